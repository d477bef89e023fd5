"""Instances in images: what a trained model finds in files, folders and globs.

    python -m boxteacher.tools.predict --checkpoint last.pt --output DIR IMAGES ... [--draw class]

No annotations are needed. DIR/results.json has the results in COCO's format. `image_id` counts the
images, and `file_name` names them. DIR/results.jsonl grows while the program runs, by a line for
each image. With --skip-existing the program goes on where it was interrupted. --draw writes
pictures to DIR/overlays. --instance-maps writes PNGs of 16 bits to DIR/instances: 0 is background,
and k the image's k-th result.
"""

from __future__ import annotations

import argparse
import glob
import json
import operator
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from boxteacher import errors
from boxteacher.coco import DataError, image_loader
from boxteacher.command_line import Parser
from boxteacher.config import Config, ConfigError
from boxteacher.model import CondInst, Instances, Size
from boxteacher.tools.common import (
    load_network,
    network_input,
    progress,
    segmentation,
    test_view,
    write,
)
from boxteacher.visualize import draw_instances, instance_color, paint_instance_map, with_legend

LEAST_SIDE, MOST_SIDE = 800, 2000  # the long side of a drawn picture


class Item(NamedTuple):
    """A file, read for the network or not."""

    name: str  # as the user gave it, or found below what the user gave
    size: Size = (0, 0)
    seen_size: Size = (0, 0)  # as the network sees it
    images: Tensor | None = None  # uint8 [1, 3, H, W]
    pixels: np.ndarray | None = None  # uint8 [h, w, 3], kept for drawing
    problem: str = ""


class ImageFiles(Dataset):
    def __init__(self, names: Sequence[str], cfg: Config, keep_pixels: bool) -> None:
        self.names, self.cfg, self.keep_pixels = names, cfg, keep_pixels
        self.load = image_loader(".", cfg.contrast)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        name = self.names[index]
        try:
            pixels = self.load({"file_name": name})
        except DataError as error:
            return Item(name, problem=str(error))
        view = test_view(pixels.shape[:2], self.cfg)
        images, kept = network_input(view, pixels), pixels if self.keep_pixels else None
        return Item(name, view.original, view.resized, images, kept)


def find_images(words: Sequence[str]) -> list[str]:
    """The files that are meant: files, all images below folders, and what globs match."""
    endings, names = tuple(Image.registered_extensions()), []
    for word in words:
        if os.path.isdir(word):
            below = (path for path in Path(word).rglob("*") if path.suffix.lower() in endings)
            found = [str(path) for path in below if path.is_file()]
        else:
            found = [word] if os.path.isfile(word) else glob.glob(word, recursive=True)
        if not found:
            raise ConfigError(f"{word}: no image there; give files, folders of images or globs")
        names += sorted(found)
    return list(dict.fromkeys(names))


def batches(items: Iterable[Item], largest: int) -> Iterator[list[Item]]:
    """Readable items in lists of one padded size. So an image's result does not depend on others:
    padding counts in the head's GroupNorm."""
    group: list[Item] = []
    for item in items:
        if item.problem:
            yield [item]
            continue
        if group and (len(group) == largest or group[0].images.shape != item.images.shape):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def predict_images(
    model: CondInst, group: Sequence[Item], least_score: float
) -> list[tuple[Instances, list[tuple[np.ndarray, int, int]]]]:
    """What is found in each image, with masks cut to what they cover: bool [h, w], top, left."""
    images = torch.cat([item.images for item in group]).to(model.pixel_mean.device)
    sizes = [[item.seen_size for item in group], [item.size for item in group]]
    results = []
    for found in model.predict(images, *sizes):
        found = Instances(*(part[found.scores >= least_score].cpu() for part in found))
        cuts = []
        for mask in found.masks.numpy():
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            top, left = (int(span[0]) if len(span) else 0 for span in (rows, columns))
            cuts.append(
                (
                    mask[top : rows.max(initial=-1) + 1, left : columns.max(initial=-1) + 1],
                    top,
                    left,
                )
            )
        results.append((found, cuts))
    return results


def instance_map(size: Size, cuts: Sequence[tuple[np.ndarray, int, int]]) -> np.ndarray:
    """uint16 [h, w]: 0, or the number of the instance, from 1. The smaller one lies on top."""
    ids = np.zeros(size, dtype=np.uint16)
    for k in sorted(range(len(cuts)), key=lambda k: -int(cuts[k][0].sum())):
        mask, top, left = cuts[k]
        ids[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = k + 1
    return ids


def overlay(
    pixels: np.ndarray, ids: np.ndarray, found: Instances, class_names: Sequence[str], by: str
) -> Image.Image:
    """The image with its instances, and below it the classes with their numbers."""
    labels = found.labels.tolist()
    colors = [instance_color(k) for k in (labels if by == "class" else range(len(labels)))]
    side = min(max(*ids.shape, LEAST_SIDE), MOST_SIDE)
    picture = np.asarray(paint_instance_map(pixels, ids, colors, side))
    boxes = found.boxes * (side / max(ids.shape))
    look = dict(class_names=class_names, scores=found.scores, colors=colors)
    entries = []
    for label, count in Counter(labels).most_common():
        color = instance_color(label) if by == "class" else None
        entries.append((f"{class_names[label]}: {count}", color))
    return with_legend(draw_instances(picture, boxes, None, labels, **look), entries)


# --- files ----------------------------------------------------------------------------------------


def finished(path: Path, settings: dict[str, Any], goes_on: bool) -> set[str]:
    """The names of the images that results.jsonl holds. It begins with the settings, and a line
    that was cut off is removed. Without such a file, one is begun."""
    names, length = set(), 0
    if path.exists() and not goes_on:
        raise ConfigError(f"output: {path.parent} holds results; add --skip-existing to go on")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(settings) + "\n")
    with open(path, "rb") as file:
        if json.loads(file.readline()) != settings:
            raise ConfigError(f"output: {path.parent} holds results of other settings")
        length = file.tell()
        for line in file:
            if line.endswith(b"\n"):
                names.add(json.loads(line)["file_name"])
                length += len(line)
    os.truncate(path, length)
    return names


def write_results(lines_path: Path, path: Path) -> int:
    """results.jsonl as one list of COCO results, image by image. Returns their number."""
    count, unfinished = 0, path.with_name(f".{path.name}.unfinished")
    with open(lines_path) as lines, open(unfinished, "w") as file:
        next(lines)  # the settings
        for image_id, line in enumerate(lines, 1):
            image = json.loads(line)
            for result in image["results"]:
                named = {"image_id": image_id, "file_name": image["file_name"]} | result
                file.write(("[" if count == 0 else ",\n") + json.dumps(named))
                count += 1
        file.write("]" if count else "[]")
    unfinished.replace(path)
    return count


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# --- the program ----------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = Parser("python -m boxteacher.tools.predict --checkpoint FILE [...]", __doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders, globs")
    add("--checkpoint", metavar="FILE", required=True, help="written by train.py")
    add("--output", type=Path, metavar="DIR", required=True, help="the folder to write to")
    add("--score", type=float, default=0.5, metavar="S", help="least score of a result (0.5)")
    add("--batch", type=int, default=1, metavar="N", help="images of one size at a time (1)")
    add("--polygons", action="store_true", help="write polygons, not run-length codes")
    add("--draw", choices=("class", "instance"), help="pictures, with one color for each")
    add("--instance-maps", action="store_true", help="PNGs of 16 bits")
    add("--skip-existing", action="store_true", help="go on where it was interrupted")
    args, given = parser.read(argv)
    if args.batch < 1 or not 0 <= args.score <= 1:
        raise ConfigError("give a --batch of 1 or more and a --score between 0 and 1")
    return args, given


def main() -> None:
    args, given = read_arguments(sys.argv[1:])
    names = find_images(args.images)
    model, state = load_network(args.checkpoint, given)
    settings = {key: str(value) for key, value in (vars(args) | given).items()}
    for key in ("images", "output", "batch", "skip_existing", "device", "workers"):
        settings.pop(key, None)
    lines_path = args.output / "results.jsonl"
    done = finished(lines_path, settings, args.skip_existing)
    root = Path(os.path.commonpath([Path(name).resolve().parent for name in names]))
    names, unreadable = [name for name in names if name not in done], 0

    files = ImageFiles(names, model.cfg, keep_pixels=bool(args.draw))
    options = dict(collate_fn=operator.itemgetter(0), num_workers=model.cfg.workers)
    items = progress(DataLoader(files, **options), "predict", len(names))
    with open(lines_path, "a") as lines:
        for group in batches(items, args.batch):
            if group[0].problem:
                print(f"error: {group[0].problem}", file=sys.stderr, flush=True)
                unreadable += 1
                continue
            predictions = predict_images(model, group, args.score)
            for item, (found, cuts) in zip(group, predictions, strict=True):
                target = Path(item.name).resolve().relative_to(root)
                png = target.with_name(target.name.removesuffix(".png") + ".png")
                if args.draw or args.instance_maps:
                    ids = instance_map(item.size, cuts)
                if args.instance_maps:
                    save_image(Image.fromarray(ids), args.output / "instances" / png)
                if args.draw:
                    picture = overlay(item.pixels, ids, found, state["class_names"], args.draw)
                    save_image(picture, args.output / "overlays" / png)
                results = []
                for box, score, label, cut in zip(
                    *(part.tolist() for part in found[:3]), cuts, strict=True
                ):
                    x1, y1, x2, y2 = box
                    code = segmentation(*cut, item.size, args.polygons)
                    results.append(
                        {
                            "category_id": state["category_ids"][label],
                            "bbox": [x1, y1, x2 - x1, y2 - y1],
                            "score": score,
                            "segmentation": code,
                        }
                    )
                line = {"file_name": item.name, "height": item.size[0], "width": item.size[1]}
                lines.write(json.dumps(line | {"results": results}) + "\n")
                lines.flush()
    count = write_results(lines_path, args.output / "results.json")
    print(f"{count} instances in {len(done) + len(names) - unreadable} images")
    print(args.output / "results.json")
    if unreadable:
        raise errors.UserError(f"{unreadable} of {len(names)} images could not be read (see above)")


if __name__ == "__main__":
    errors.run(main)
