"""Seconds and memory of `evaluate_coco`, on images of 480x640 with 7 objects and 100 detections:

OMP_NUM_THREADS=1 python tests/time_evaluation.py [images, default 5000]
"""

import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from boxteacher.coco_eval import evaluate_coco
from boxteacher.masks import encode_mask

RNG = np.random.default_rng(0)


def ellipse(x: int, y: int, w: int, h: int) -> dict:
    down, across = ((np.arange(n) - (n - 1) / 2) / (n / 2) for n in (h, w))
    code = encode_mask(np.hypot(down[:, None], across) <= 1, (y, x), (480, 640))
    return {"bbox": [x, y, w, h], "segmentation": code}


def random_ellipse() -> dict:
    w, h = RNG.integers(8, 200, 2).tolist()
    return ellipse(int(RNG.integers(640 - w)), int(RNG.integers(480 - h)), w, h)


def near(x: int, y: int, w: int, h: int) -> dict:
    return ellipse(max(x - 2, 0), max(y - 1, 0), w, h)


def main() -> None:
    images = [
        {"id": n, "height": 480, "width": 640}
        for n in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
    ]
    annotations, results = [], []
    false_alarms = [random_ellipse() for _ in range(2000)]
    for image in images:
        classes = RNG.integers(80, size=7).tolist()
        for category_id in classes:
            common = {"image_id": image["id"], "category_id": category_id}
            found = random_ellipse()
            annotations.append({"id": len(annotations)} | common | found)
            results.append(common | near(*found["bbox"]) | {"score": float(RNG.random())})
        for k in RNG.integers(2000, size=93).tolist():
            common = {"image_id": image["id"], "category_id": classes[k % 7]}
            results.append(common | false_alarms[k] | {"score": float(RNG.random() / 2)})
    categories = [{"id": k, "name": f"class {k}"} for k in range(80)]
    coco = {"images": images, "annotations": annotations, "categories": categories}

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    tables = evaluate_coco(coco, results, 100)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{len(results)} detections: {seconds:.1f} CPU seconds, mask AP {tables['segm']['AP']:.1f}"
    )
    print(f"memory before {before >> 10} MiB, peak {peak >> 10} MiB")


if __name__ == "__main__":
    main()
