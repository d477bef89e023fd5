"""Instances in images: what a trained model finds in files, folders and globs.

    python -m boxteacher.tools.predict IMAGES ... --checkpoint last.pt --output DIR [--draw class]

No annotations are needed. DIR/results.json has the results in COCO's format. `image_id` counts the
images, and `file_name` names them. DIR/results.jsonl grows by a line for each image. An interrupted
command goes on when it is given again. --draw writes pictures to DIR/overlays. --instance-maps
writes PNGs of 16 bits to DIR/instances: 0 is background, and k the image's k-th result. Names of
pictures begin with the image_id. Every field of the configuration is an option, too (`python
train.py --help` shows them).
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from boxteacher import errors
from boxteacher.coco import DataError, image_loader
from boxteacher.coco_eval import to_coco_results
from boxteacher.command_line import Parser
from boxteacher.config import ConfigError
from boxteacher.data import make_loader
from boxteacher.files import append_line, files_below, whole_file
from boxteacher.masks import decode_mask, polygons
from boxteacher.model import CondInst, Instances, whole_view
from boxteacher.reporting import progress
from boxteacher.tools.common import claimed_lines, lines_so_far, load_network, settings_of
from boxteacher.transforms import View
from boxteacher.visualize import (
    draw_instances,
    instance_color,
    instance_map,
    paint_instance_map,
    save_picture,
    with_legend,
)

File = tuple[str, np.ndarray]  # its name and its pixels, uint8 RGB [h, w, 3]
LEAST_SIDE, MOST_SIDE = 800, 2000  # the long side of a drawn picture


def find_images(words: Sequence[str]) -> list[str]:
    """The files that are meant: files, all images below folders, and what globs match."""
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = []
    for word in words:
        found = [word] if os.path.isfile(word) else glob.glob(word, recursive=True)
        if os.path.isdir(word):
            found = [str(p) for p in files_below(Path(word)) if p.suffix.lower() in readable]
        found = [name for name in found if os.path.isfile(name)]
        if not found:
            raise ConfigError(f"{word}: no image there; give files, folders of images or globs")
        names += sorted(found)
    return list(dict.fromkeys(names))


def read_file(load: Callable[[dict], np.ndarray], names: list[str]) -> File | None:
    """The file of `names`, a list of one. None, and a line of text, if it cannot be read."""
    try:
        return names[0], load({"file_name": names[0]})
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return None


def predict_all(
    model: CondInst, files: Iterable[File], batch: int
) -> Iterator[tuple[str, np.ndarray, Instances]]:
    """Neighbors of one padded size are looked at together, at most `batch` of them. Padding counts
    in the head's GroupNorm, so an image's results do not depend on the others."""

    def seen(file: File) -> tuple[File, View, Tensor]:
        view = whole_view(file[1].shape[:2], model.cfg)
        return file, view, view.padded(file[1])

    for _, neighbors in itertools.groupby(map(seen, files), lambda item: item[2].shape):
        while group := list(itertools.islice(neighbors, batch)):
            some, views, images = zip(*group, strict=True)
            sizes = [[view.resized for view in views], [view.original for view in views]]
            images = torch.cat(images).to(model.pixel_mean.device)
            for (name, pixels), found in zip(some, model.predict(images, *sizes), strict=True):
                yield name, pixels, found


# --- pictures -------------------------------------------------------------------------------------


def overlay(
    pixels: np.ndarray, ids: np.ndarray, found: Instances, class_names: Sequence[str], by: str
) -> Image.Image:
    """The image with its instances, and below it the classes with their numbers."""
    labels, has_class_colors = found.labels.tolist(), by == "class"
    colors = [instance_color(k) for k in (labels if has_class_colors else range(len(labels)))]
    side = min(max(*ids.shape, LEAST_SIDE), MOST_SIDE)
    picture = np.asarray(paint_instance_map(pixels, ids, colors, side))
    boxes = found.boxes * (side / max(ids.shape))
    look = dict(class_names=class_names, scores=found.scores, colors=colors)
    entries = [
        (f"{class_names[label]}: {count}", instance_color(label) if has_class_colors else None)
        for label, count in Counter(labels).most_common()
    ]
    return with_legend(draw_instances(picture, boxes, None, labels, **look), entries)


# --- the program ----------------------------------------------------------------------------------


def write_results(lines_path: Path, path: Path) -> int:
    """The results of all lines as one list, image by image. Returns their number."""
    count = 0
    with open(lines_path) as lines, whole_file(path) as file:
        next(lines)  # the settings
        for line in lines:
            for result in json.loads(line)["results"]:
                file.write(((",\n" if count else "[") + json.dumps(result)).encode())
                count += 1
        file.write(b"]" if count else b"[]")
    return count


def main() -> None:
    parser = Parser("python -m boxteacher.tools.predict IMAGES ... [...]", __doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders, globs")
    add("--checkpoint", metavar="FILE", required=True, help="written by train.py")
    add("--output", type=Path, metavar="DIR", required=True, help="the folder to write to")
    add("--score", type=float, default=0.5, metavar="S", help="least score of a result (0.5)")
    add("--batch", type=int, default=1, metavar="N", help="images of one size at a time (1)")
    add("--polygons", action="store_true", help="write polygons, not run-length codes")
    add("--draw", choices=("class", "instance"), help="pictures, one color per class or instance")
    add("--instance-maps", action="store_true", help="PNGs of 16 bits")
    args, given = parser.read(sys.argv[1:])
    if args.batch < 1 or not 0 <= args.score <= 1:
        raise ConfigError("give a --batch of 1 or more and a --score between 0 and 1")
    overlays, instances = args.output / "overlays", args.output / "instances"
    own = {overlays.resolve(), instances.resolve()}  # pictures of an earlier call
    names = [n for n in find_images(args.images) if own.isdisjoint(Path(n).resolve().parents)]
    settings = settings_of(args, "images", "batch")
    model, state = load_network(args.checkpoint, {"teacher_size": 0} | given)
    lines, results_path = args.output / "results.jsonl", args.output / "results.json"
    with claimed_lines(lines, settings):
        done = {line["file_name"] for line in lines_so_far(lines, settings)}
        todo, count = [name for name in names if name not in done], len(done)
        if done:
            print(f"goes on after {count} images", file=sys.stderr)

        read = functools.partial(read_file, image_loader(".", model.cfg.contrast))
        order = ([index] for index in range(len(todo)))
        files = make_loader(todo, order, model.cfg.workers, read)
        readable = filter(None, progress(files, "predict", len(todo)))
        for name, pixels, found in predict_all(model, readable, args.batch):
            count, size = count + 1, pixels.shape[:2]
            keep = (found.scores >= args.score).nonzero().flatten()
            masks = [found.masks[k] for k in keep.tolist()]
            found = Instances(found.boxes[keep], found.scores[keep], found.labels[keep], masks)
            png = f"{count:06}_{Path(name).name}.png"  # names alone may be equal
            ids = instance_map(masks, size) if args.draw or args.instance_maps else None
            if args.instance_maps:
                save_picture(Image.fromarray(ids), instances / png)
            if args.draw:
                picture = overlay(pixels, ids, found, state["class_names"], args.draw)
                save_picture(picture, overlays / png)
            results = to_coco_results(count, found, state["category_ids"])
            for result in results:
                result["file_name"] = name
                if args.polygons:
                    code = result["segmentation"]  # an empty mask has no polygon
                    result["segmentation"] = polygons(decode_mask(code)) or code
            line = {"file_name": name, "height": size[0], "width": size[1], "results": results}
            append_line(lines, line)
        print(f"{write_results(lines, results_path)} instances in {count} images")
    print(results_path)
    if failed := len(todo) + len(done) - count:
        advice = "replace them and give the same command again"
        raise errors.UserError(f"{failed} of {len(todo)} files could not be read; {advice}")


if __name__ == "__main__":
    errors.run(main)
