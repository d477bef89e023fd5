"""Instances in images: what a trained model finds in files, folders and globs.

    python -m boxteacher.tools.predict IMAGES ... --checkpoint last.pt --output DIR [--draw class]

No annotations are needed. DIR/results.json has the results in COCO's format. `image_id` counts the
images, and `file_name` names them. DIR/results.jsonl grows by a line for each image. With
--skip-existing the program goes on where it was interrupted. --draw writes pictures to
DIR/overlays. --instance-maps writes PNGs of 16 bits to DIR/instances: 0 is background, and k the
image's k-th result.
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
from boxteacher.coco import DataError, decode_mask, image_loader, polygons
from boxteacher.coco_eval import to_coco_results
from boxteacher.command_line import Parser
from boxteacher.config import Config, ConfigError
from boxteacher.files import write_text
from boxteacher.model import CondInst, Instances, Size
from boxteacher.reporting import progress
from boxteacher.tools import common
from boxteacher.visualize import (
    draw_instances,
    instance_color,
    instance_map,
    paint_instance_map,
    with_legend,
)

LEAST_SIDE, MOST_SIDE = 800, 2000  # the long side of a drawn picture
NO_SETTINGS = ("images", "output", "batch", "skip_existing", "device", "workers")


class Item(NamedTuple):
    """A file, read for the network. Without images there is a problem."""

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
        view = common.test_view(pixels.shape[:2], self.cfg)
        images, kept = common.network_input(view, pixels), pixels if self.keep_pixels else None
        return Item(name, view.original, view.resized, images, kept)


def find_images(words: Sequence[str]) -> list[str]:
    """The files that are meant: files, all images below folders, and what globs match."""
    endings, names = tuple(Image.registered_extensions()), []
    for word in words:
        found = [word] if os.path.isfile(word) else glob.glob(word, recursive=True)
        if os.path.isdir(word):
            below = (path for path in Path(word).rglob("*") if path.suffix.lower() in endings)
            found = [str(path) for path in below if path.is_file()]
        if not found:
            raise ConfigError(f"{word}: no image there; give files, folders of images or globs")
        names += sorted(found)
    return list(dict.fromkeys(names))


def batches(items: Iterable[Item], largest: int) -> Iterator[list[Item]]:
    """Readable items in lists of one padded size, because padding counts in the head's GroupNorm:
    so an image's results do not depend on the others. Problems are printed."""
    group: list[Item] = []
    for item in items:
        if item.problem:
            print(f"error: {item.problem}", file=sys.stderr, flush=True)
            continue
        if group and (len(group) == largest or group[0].images.shape != item.images.shape):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def predict(model: CondInst, group: Sequence[Item], least_score: float) -> Iterator[Instances]:
    images = torch.cat([item.images for item in group]).to(model.pixel_mean.device)
    sizes = [[item.seen_size for item in group], [item.size for item in group]]
    for found in model.predict(images, *sizes):
        keep = (found.scores >= least_score).nonzero().flatten()
        masks = [found.masks[k] for k in keep.tolist()]
        yield Instances(found.boxes[keep], found.scores[keep], found.labels[keep], masks)


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


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# --- results --------------------------------------------------------------------------------------


def finished(path: Path, settings: dict[str, str], goes_on: bool) -> set[str]:
    """The names of the images in results.jsonl, which begins with the settings. A line that was cut
    off is removed. Without such a file, one is begun."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings) + "\n")
    elif not goes_on:
        raise ConfigError(f"output: {path.parent} holds results; add --skip-existing to go on")
    names = set()
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
    """The results of all lines as one list, image by image. Returns their number."""
    count, unfinished = 0, path.with_name(f".{path.name}.unfinished")
    with open(lines_path) as lines, open(unfinished, "w") as file:
        next(lines)  # the settings
        for line in lines:
            for result in json.loads(line)["results"]:
                file.write((",\n" if count else "[") + json.dumps(result))
                count += 1
        file.write("]" if count else "[]")
    unfinished.replace(path)
    return count


# --- the program ----------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = Parser("python -m boxteacher.tools.predict IMAGES ... [...]", __doc__)
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
    root = Path(os.path.commonpath([Path(name).resolve().parent for name in names]))
    model, state = common.load_network(args.checkpoint, given)
    settings = {k: str(v) for k, v in (vars(args) | given).items() if k not in NO_SETTINGS}
    lines_path, results_path = args.output / "results.jsonl", args.output / "results.json"
    done = finished(lines_path, settings, args.skip_existing)
    todo, read = [name for name in names if name not in done], 0

    files = ImageFiles(todo, model.cfg, keep_pixels=bool(args.draw))
    options = dict(collate_fn=operator.itemgetter(0), num_workers=model.cfg.workers)
    items = progress(DataLoader(files, **options), "predict", len(todo))
    with open(lines_path, "a") as lines:
        for group in batches(items, args.batch):
            for item, found in zip(group, predict(model, group, args.score), strict=True):
                read += 1
                target = Path(item.name).resolve().relative_to(root)
                png = target.with_name(target.name.removesuffix(".png") + ".png")
                if args.draw or args.instance_maps:
                    ids = instance_map(found.masks, item.size)
                if args.instance_maps:
                    save_image(Image.fromarray(ids), args.output / "instances" / png)
                if args.draw:
                    picture = overlay(item.pixels, ids, found, state["class_names"], args.draw)
                    save_image(picture, args.output / "overlays" / png)
                results = to_coco_results(len(done) + read, found, state["category_ids"])
                for result in results:
                    result["file_name"] = item.name
                    if args.polygons:
                        result["segmentation"] = polygons(decode_mask(result["segmentation"]))
                line = {"file_name": item.name, "height": item.size[0], "width": item.size[1]}
                lines.write(json.dumps(line | {"results": results}) + "\n")
                lines.flush()
    print(f"{write_results(lines_path, results_path)} instances in {len(done) + read} images")
    print(results_path)
    if read < len(todo):
        raise errors.UserError(f"{len(todo) - read} of {len(todo)} files could not be read")


if __name__ == "__main__":
    errors.run(main)
