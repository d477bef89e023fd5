"""coco.py, transforms.py, data.py: what is refused, image modes, geometry and batches."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import struct
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from pycocotools import mask as rle_codec

from boxteacher import data, transforms
from boxteacher.coco import DataError, check_coco, image_loader, read_coco, stretch_contrast
from boxteacher.config import Config
from boxteacher.masks import decode_mask, run_lengths
from boxteacher.presets import from_preset
from boxteacher.transforms import Geometry, View, augment, draw_view

NUCLEI = Path(__file__).parents[2] / "shared" / "data" / "nuclei"
NAN, INF = float("nan"), float("inf")


def tiny_coco() -> dict:
    """Two images; categories out of order; one annotation without, one with an empty mask."""
    images = [
        {"id": 3, "file_name": "wide.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "tall.png", "width": 24, "height": 50},
    ]
    annotations = [
        {"id": 1, "image_id": 3, "category_id": 7, "bbox": [4, 6, 20, 10]},
        {"id": 2, "image_id": 3, "category_id": 2, "bbox": [30, 20, 90, 90], "segmentation": []},
        {"id": 5, "image_id": 9, "category_id": 2, "bbox": [2.5, 3, 8, 9.25]},
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, coco: object) -> tuple[Path, Path]:
    for image in tiny_coco()["images"]:
        pixels = np.random.default_rng(image["id"]).integers(
            0, 256, (image["height"], image["width"], 3)
        )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / image["file_name"])
    (folder / "boxes.json").write_text(json.dumps(coco))
    return folder / "boxes.json", folder


def random_image(entry: dict) -> np.ndarray:
    rng = np.random.default_rng(entry["id"])
    return rng.integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)


SAME_SIZE = Geometry(scales=(1.0,))


def dataset(coco: dict, geometry: Geometry = SAME_SIZE, **options) -> data.CocoDataset:
    defaults = {"load_image": random_image, "train": True}
    return data.CocoDataset(coco, geometry=geometry, **(defaults | options))


def many(count: int) -> dict:
    """`count` small images of alternating shape, with 1, 2, 3, 1, ... boxes."""
    images, annotations = [], []
    for i in range(count):
        width, height = (48, 32) if i % 3 else (32, 40)
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        for k in range(1 + i % 3):
            bbox = [3 + 5 * k, 2 + i % 7, 10 + k, 12]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 1, "bbox": bbox}
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}


# --- reading and checking ---


def test_a_box_only_json_is_read(tmp_path):
    coco, notes = read_coco(*write(tmp_path, tiny_coco()))
    assert coco == tiny_coco()
    assert ["1 of 3 boxes reach out of their images" in note for note in notes] == [True]
    loaded = dataset(coco, load_image=image_loader(tmp_path))
    assert loaded.class_names == ["cat", "dog"]
    assert loaded.category_ids == [2, 7]
    assert loaded[0].labels.tolist() == [1, 0]
    np.testing.assert_array_equal(
        loaded[1].image.permute(1, 2, 0), Image.open(tmp_path / "tall.png")
    )


def change(path: str, value: object):
    """A function that sets coco[a][0][b]... to value, or deletes it (value is Ellipsis)."""

    def apply(coco: dict) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in parents:
            coco = coco[key]
        if value is ...:
            del coco[last]
        else:
            coco[last] = value

    return apply


BAD = [
    ("images", ..., "field 'images': is missing"),
    ("images", [], "field 'images': is empty"),
    ("annotations", {}, "field 'annotations': is not a list, but {}"),
    ("categories", ..., "field 'categories': is missing"),
    ("images.1.id", 3, r"images\[1\]: field 'id': 3 is a duplicate"),
    ("annotations.2.id", 1, r"annotations\[2\]: field 'id': 1 is a duplicate"),
    ("categories.1.id", 7, r"categories\[1\]: field 'id': 7 is a duplicate"),
    ("categories.1.name", "dog", "category id 2: field 'name' 'dog' is a duplicate"),
    ("categories.0.name", ..., "category id 7: field 'name' is missing"),
    ("annotations.0.id", ..., r"annotations\[0\]: field 'id' is missing"),
    ("annotations.0.id", "1", r"annotations\[0\]: field 'id' is missing or not a whole number"),
    ("annotations.0", None, r"annotations\[0\]: field 'id'"),
    ("images.0.file_name", ..., "image id 3: field 'file_name' is missing"),
    ("images.0.width", 0, "image id 3: field 'width' must be a positive whole number, found 0"),
    (
        "images.0.height",
        ...,
        "image id 3: field 'height' must be a positive whole number, found None",
    ),
    ("annotations.0.category_id", 99, "annotation id 1: field 'category_id' has no such id.*99"),
    ("annotations.0.category_id", ..., "annotation id 1: field 'category_id'.*None"),
    (
        "annotations.0.image_id",
        99,
        "annotation id 1: field 'image_id' has no such id in 'images': 99",
    ),
    ("annotations.0.image_id", [3], r"annotation id 1: field 'image_id'.*\[3\]"),
    ("annotations.0.bbox", ..., r"annotation id 1: field 'bbox' \(image id 3\) is missing"),
    ("annotations.0.bbox", [1, 2, 3], "annotation id 1: field 'bbox'.*four finite numbers"),
    ("annotations.0.bbox", [1, 2, 3, 4, 5], "annotation id 1: field 'bbox'.*four finite numbers"),
    ("annotations.0.bbox", [1, NAN, 3, 4], "annotation id 1: field 'bbox'.*four finite.*nan"),
    ("annotations.0.bbox", [1, 2, INF, 4], "annotation id 1: field 'bbox'.*four finite.*inf"),
    ("annotations.0.bbox", [1, 2, 10**400, 4], "annotation id 1: field 'bbox'.*four finite"),
    ("annotations.0.bbox", [1, 2, "3", 4], "annotation id 1: field 'bbox'.*four finite"),
    ("annotations.0.bbox", [1, 2, None, 4], "annotation id 1: field 'bbox'.*four finite"),
    ("annotations.0.bbox", "1 2 3 4", "annotation id 1: field 'bbox'.*four finite"),
    ("annotations.0.bbox", [1, 2, 0, 4], "annotation id 1: field 'bbox'.*zero or negative"),
    ("annotations.0.bbox", [1, 2, 3, -4], "annotation id 1: field 'bbox'.*zero or negative"),
    (
        "annotations.0.bbox",
        [40, 2, 3, 4],
        "annotation id 1: field 'bbox'.*outside its image of 40x30",
    ),
    ("annotations.0.bbox", [5, -9, 3, 9], "annotation id 1: field 'bbox'.*outside"),
    (
        "annotations.0.segmentation",
        [[1, 2, 3, 4]],
        "annotation id 1: field 'segmentation'.*polygon",
    ),
    ("annotations.0.segmentation", [[]], "annotation id 1: field 'segmentation'.*polygon"),
    ("annotations.0.segmentation", [[1, 2, 3, 4, 5, NAN]], "id 1: field 'segmentation'.*polygon"),
    (
        "annotations.0.segmentation",
        {"size": [40, 30], "counts": "1"},
        r"'segmentation'.*\[30, 40\]",
    ),
    ("annotations.0.segmentation", {"size": [30, 40], "counts": [7]}, "'segmentation'.*counts"),
    ("annotations.0.segmentation", {"size": [30, 40], "counts": ["7"]}, "'segmentation'.*counts"),
    ("annotations.0.segmentation", {"size": [30, 40]}, "'segmentation'.*neither"),
    ("annotations.0.segmentation", "mask.png", "'segmentation'.*neither"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), BAD, ids=[f"{p}={v!r}"[:50] for p, v, _ in BAD]
)
def test_bad_json_gets_one_line_with_file_entry_and_field(tmp_path, path, value, message):
    coco = tiny_coco()
    change(path, value)(coco)
    json_path, images_dir = write(tmp_path, coco)
    with pytest.raises(DataError, match=message) as caught:
        read_coco(json_path, images_dir)
    assert str(caught.value).startswith(f"{json_path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "", "\xff\x00", "[" * 100_000, '{"images": [,]}'])
def test_malformed_json(tmp_path, text):
    json_path, images_dir = write(tmp_path, {})
    json_path.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"boxes.json cannot be read \(.*\); give a JSON file"
    ) as caught:
        read_coco(json_path, images_dir)
    assert "\n" not in str(caught.value)


def test_missing_json_or_images(tmp_path):
    json_path, images_dir = write(tmp_path, tiny_coco())
    with pytest.raises(DataError, match=r"none\.json cannot be read .*No such file.*; give"):
        read_coco(tmp_path / "none.json", images_dir)
    with pytest.raises(DataError, match="none: no such image directory; give"):
        read_coco(json_path, tmp_path / "none")
    (tmp_path / "tall.png").unlink()
    with pytest.raises(
        DataError, match=r"tall\.png: no such file.*id 9.*'file_name'.*1 of 2 images"
    ):
        read_coco(json_path, images_dir)


@pytest.mark.parametrize("top", [[], [1], None, 3, "images"])
def test_top_level_must_be_an_object(top):
    with pytest.raises(DataError, match=r"x\.json: the top level is a \w+; expected an object"):
        check_coco(top, "x.json")


def test_known_empty_boxes_of_coco_are_left_out():
    coco = tiny_coco()
    coco["images"].append({"id": 200365, "file_name": "0.jpg", "width": 640, "height": 480})
    empty = {"id": 918, "image_id": 200365, "category_id": 2, "bbox": [296.65, 388.33, 1.03, 0.0]}
    coco["annotations"] += [empty, empty | {"id": 919, "bbox": [5, 6, 7, 8]}]
    check_coco(coco, "coco")
    assert dataset(coco)[2].boxes.tolist() == [[5, 6, 12, 14]]


@pytest.mark.parametrize("size", [(39, 30), (41, 30), (30, 40)])
def test_image_of_another_size_is_refused_before_training(tmp_path, size):
    json_path, images_dir = write(tmp_path, tiny_coco())
    Image.new("RGB", size).save(tmp_path / "wide.png")
    with pytest.raises(
        DataError, match=r"boxes\.json: image id 3 \(wide\.png\).*40x30.*has {}x{}".format(*size)
    ):
        read_coco(json_path, images_dir)
    with pytest.raises(DataError, match="image id 3"):  # and when loaded
        dataset(tiny_coco(), load_image=image_loader(images_dir))[0]


# --- run-length codes ---


def encode(mask: np.ndarray, compressed: bool) -> dict:
    if compressed:
        code = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": code["size"], "counts": code["counts"].decode()}
    counts, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


@settings(max_examples=200)
@given(
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2
def test_decoded_masks_are_pycocotools(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    code, listed = encode(mask, True), encode(mask, False)
    np.testing.assert_array_equal(decode_mask(code), rle_codec.decode(code))
    np.testing.assert_array_equal(decode_mask(code), mask)
    np.testing.assert_array_equal(decode_mask(listed), mask)
    assert run_lengths(code).tolist() == listed["counts"]
    assert decode_mask(code).dtype == bool


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2**23), min_size=1, max_size=12))
def test_long_runs_of_a_large_image(runs):
    """pycocotools has memory for six characters a run, less one in all: it breaks at 2**24."""
    code = rle_codec.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))
    assert run_lengths(code).tolist() == runs


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(-999, 999), min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(1, 50),
)
def test_polygons_fill_their_image_wherever_they_are(polygons, side):
    codes = rle_codec.frPyObjects([[x / 8 for x in polygon] for polygon in polygons], side, side)
    assert decode_mask(rle_codec.merge(codes)).shape == (side, side)


FULL = encode(np.ones((30, 40), bool), True)["counts"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([3, 10], "do not add up to its 1200 pixels"),
        ([3, 1000, 300], "do not add up to its 1200 pixels"),
        ([3, -1, 1198], "not the lengths of runs"),
        ([3, 10**30], "not the lengths of runs"),
        ([3.0, 1197.0], "not the lengths of runs"),
        ("", "do not add up to its 1200 pixels"),
        (FULL[:-1], "not a run-length code"),  # cut within a number
        (FULL + "1", "do not add up to its 1200 pixels"),
        (FULL + "OO", "do not add up to its 1200 pixels"),  # negative runs
        ("P" * 9 + "0", "not a run-length code"),
        ("/0", "not a run-length code"),
        ("\u0661", "not a run-length code"),
        ("aaaa", "not a run-length code"),
    ],
)
def test_a_broken_run_length_code_is_refused(counts, message):
    code = {"size": [30, 40], "counts": counts}
    with pytest.raises(ValueError, match=f"^counts that .*{message}"):
        decode_mask(code)
    coco = tiny_coco()
    coco["annotations"][0]["segmentation"] = code
    with pytest.raises(DataError, match=rf"id 1: field 'segmentation' has counts that .*{message}"):
        check_coco(coco, "broken")


# --- image files ---


def save_rotated(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A file of `size` that EXIF turns by a quarter; returns what one should see."""
    raw = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(raw).save(path, exif=exif)
    return np.rot90(raw, -1)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpg"])
def test_exif_rotated_images_count_as_rotated(tmp_path, suffix):
    seen = save_rotated(tmp_path / f"a.{suffix}", (30, 40))
    coco = tiny_coco()
    coco["images"][0]["file_name"] = f"a.{suffix}"
    json_path, images_dir = write(tmp_path, coco)
    read_coco(json_path, images_dir)  # 40x30 after rotation: as the JSON says
    image = image_loader(images_dir)(coco["images"][0])
    assert image.shape == (30, 40, 3)
    if suffix in ("png", "tiff"):
        np.testing.assert_array_equal(image, seen)
    save_rotated(tmp_path / f"a.{suffix}", (40, 30))  # 30x40 when seen upright
    with pytest.raises(DataError, match=r"image id 3.*40x30.*30x40"):
        read_coco(json_path, images_dir)


def test_malformed_exif_data_refuse_no_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    load = image_loader(tmp_path)
    turn = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # a quarter
    for odd in (
        struct.pack("<HHI4s", 0x0128, 2, 3, b"in"),  # the unit of the resolution, as text
        struct.pack("<HHI4s", 0x011A, 2, 3, b"72"),  # the resolution, as text
    ):
        entries = sorted([turn, odd], key=lambda entry: struct.unpack("<H", entry[:2]))
        tiff = b"II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4)
        Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + tiff)
        assert load({"file_name": "a.jpg"}).shape == (40, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\0\0no TIFF header")
    assert np.array_equal(load({"file_name": "a.png"}), pixels)


@pytest.mark.parametrize("number", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(tmp_path, number):
    exif = Image.Exif()
    exif[0x0112] = number
    image = Image.fromarray(COLOR)
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as stored:
        wanted = np.array(ImageOps.exif_transpose(stored))
    assert np.array_equal(image_loader(tmp_path)({"file_name": "a.png"}), wanted)


def test_a_png_turned_by_xmp_is_seen_before_the_first_step(tmp_path):
    xmp = '<x xmlns:tiff="t"><y tiff:Orientation="6"/></x>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    coco = tiny_coco()
    json_path, images_dir = write(tmp_path, coco)
    entry = coco["images"][0]
    pixels = np.zeros((entry["height"], entry["width"], 3), np.uint8)
    Image.fromarray(pixels).save(Path(images_dir) / entry["file_name"], pnginfo=info)
    assert image_loader(images_dir)(entry).shape == pixels.transpose(1, 0, 2).shape
    with pytest.raises(DataError, match="upright, if EXIF rotates it"):
        read_coco(json_path, images_dir)


GRAY = np.arange(0, 252, dtype=np.uint8).reshape(12, 21)
COLOR = np.stack([GRAY, GRAY[::-1], GRAY // 2], axis=2)
ALPHA = np.full_like(GRAY, 7)


def image_of_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """A picture and the RGB it must load as."""
    gray, color = Image.fromarray(GRAY), Image.fromarray(COLOR)
    three = np.repeat(GRAY[:, :, None], 3, axis=2)
    if mode == "1":
        return gray.point(lambda v: 255 * (v > 99), mode="1"), np.where(three > 99, 255, 0)
    if mode == "L":
        return gray, three
    if mode == "LA":
        return Image.merge("LA", [gray, Image.fromarray(ALPHA)]), three
    if mode in ("P", "P-transparent"):
        return color.quantize(256), np.asarray(color.quantize(256).convert("RGB"))
    if mode == "PA":
        return color.quantize(256).convert("PA"), np.asarray(color.quantize(256).convert("RGB"))
    if mode == "RGBA":
        return Image.merge("RGBA", [*color.split(), Image.fromarray(ALPHA)]), COLOR
    if mode == "CMYK":
        return color.convert("CMYK"), COLOR
    if mode == "I;16":
        deep = GRAY.astype(np.uint16) * 257 + np.uint16(60)
        return Image.fromarray(deep), np.round(deep / 257).astype(int)[:, :, None].repeat(3, axis=2)
    if mode == "I":  # 16 bits
        return Image.fromarray(GRAY.astype(np.int32) * 257), three
    if mode == "I-small":  # 8 bits
        return Image.fromarray(GRAY.astype(np.int32)), three
    return color, COLOR


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "P-transparent", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "I-small"],
)
def test_every_mode_loads_as_rgb(tmp_path, mode):
    image, expected = image_of_mode(mode)
    suffix = "tiff" if mode in ("LA", "PA", "CMYK", "I", "I-small") else "png"
    options = {"transparency": 3} if mode == "P-transparent" else {}
    image.save(tmp_path / f"a.{suffix}", **options)
    with Image.open(tmp_path / f"a.{suffix}") as saved:
        # before version 11, Pillow opened 16-bit PNG files as I
        assert saved.mode == mode.split("-")[0] or (mode, saved.mode) == ("I;16", "I")
    loaded = image_loader(tmp_path)({"file_name": f"a.{suffix}"})
    assert loaded.dtype == np.uint8
    assert loaded.flags.writeable
    np.testing.assert_array_equal(loaded, expected)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("float.tiff", lambda p: Image.new("F", (9, 9)).save(p), "floating-point"),
        ("deep.tiff", lambda p: Image.new("I", (9, 9), 70_000).save(p), "0..65535"),
        ("negative.tiff", lambda p: Image.new("I", (9, 9), -1).save(p), "0..65535"),
        ("text.png", lambda p: p.write_text("no image"), "cannot identify"),
        ("empty.png", lambda p: p.write_bytes(b""), "cannot identify"),
        ("none.png", lambda p: None, "No such file"),
    ],
)
def test_unusable_images_are_refused_by_name(tmp_path, name, make, reason):
    make(tmp_path / name)
    with pytest.raises(
        DataError, match=f"{name} cannot be read .*{reason}.*; replace it"
    ) as caught:
        image_loader(tmp_path)({"file_name": name})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.bmp", "a.gif", "a.webp"])
def test_truncated_images_are_refused_by_name(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.3, 0.9):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            image_loader(tmp_path)({"file_name": name})


def test_unreadable_header_is_refused_before_training(tmp_path):
    json_path, images_dir = write(tmp_path, tiny_coco())
    (tmp_path / "tall.png").write_text("no image")
    with pytest.raises(DataError, match=r"tall\.png cannot be read"):
        read_coco(json_path, images_dir)


# --- geometry ---


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((480, 640, 800, 1333), (800, 1067)),
        ((640, 480, 800, 1333), (1067, 800)),
        ((427, 640, 800, 1333), (800, 1199)),
        ((300, 640, 800, 1333), (625, 1333)),
        ((640, 300, 800, 1333), (1333, 625)),
        ((300, 640, 800), (800, 1707)),
        ((256, 256, 256, 256), (256, 256)),
        ((100, 151, 0, 0, 2.0), (200, 302)),
        ((100, 151, 0, 151, 2.0), (100, 151)),
        ((1, 4000, 800, 1333), (1, 1333)),
    ],
)
def test_resized_size(args, expected):
    assert transforms.resized_size(*args) == expected


@st.composite
def views(draw) -> View:
    original = draw(st.tuples(st.integers(1, 30), st.integers(1, 30)))
    resized = draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    h, w = draw(st.integers(1, resized[0])), draw(st.integers(1, resized[1]))
    top, left = draw(st.integers(0, resized[0] - h)), draw(st.integers(0, resized[1] - w))
    return View(original, resized, (top, left, h, w), draw(st.booleans()))


@settings(max_examples=60)
@given(views(), st.integers(0, 2**32 - 1), st.booleans())
def test_mask_of_a_view_against_loops(view, seed, compressed):
    mask = np.random.default_rng(seed).random(view.original) < 0.5
    (height, width), (tall, wide) = view.original, view.resized
    top, left, h, w = view.window
    expected = np.zeros((h, w), bool)
    for i in range(h):
        for j in range(w):
            column = left + (w - 1 - j if view.flip else j)
            y, x = (
                (2 * (top + i) + 1) * height // (2 * tall),
                (2 * column + 1) * width // (2 * wide),
            )
            expected[i, j] = mask[y, x]
    found = view.mask(encode(mask, compressed))
    assert found.shape == (h, w)
    assert found.dtype == bool
    # A pixel center exactly on the border of two pixels may round to either.
    assert (found != expected).mean() <= (0 if is_generic(view) else 0.5)


def is_generic(view: View) -> bool:
    """No center of a resized pixel lies on the border of two original ones."""
    return all(
        (2 * k + 1) * old % (2 * new)
        for old, new in zip(view.original, view.resized, strict=True)
        for k in range(new)
    )


@settings(max_examples=40)
@given(views(), st.integers(0, 2**32 - 1))
def test_image_of_a_view_is_resize_then_crop_then_flip(view, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*view.original, 3), dtype=np.uint8)
    (tall, wide), (top, left, h, w) = view.resized, view.window
    whole = np.asarray(Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BILINEAR))
    expected = whole[top : top + h, left : left + w].astype(int)
    expected = expected[:, ::-1] if view.flip else expected
    assert abs(view.image(pixels) - expected).max() <= 2  # two passes, each rounded
    uncut = View(view.original, view.resized, (0, 0, tall, wide), False)
    np.testing.assert_array_equal(uncut.image(pixels), whole)


@settings(max_examples=60)
@given(views(), st.integers(0, 2**32 - 1))
def test_boxes_of_a_view_against_loops(view, seed):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (5, 2, 2)), axis=1) * view.original[::-1]
    boxes = corners.reshape(5, 4)
    found, kept = view.boxes(boxes)
    top, left, h, w = view.window
    y_scale, x_scale = np.divide(view.resized, view.original)
    for box, new, is_kept in zip(boxes, found, kept, strict=True):
        x1, x2 = box[0] * x_scale - left, box[2] * x_scale - left
        y1, y2 = box[1] * y_scale - top, box[3] * y_scale - top
        if view.flip:
            x1, x2 = w - x2, w - x1
        seen = (min(max(x1, 0), w), min(max(y1, 0), h), min(max(x2, 0), w), min(max(y2, 0), h))
        np.testing.assert_allclose(new, seen, atol=1e-9)
        assert new[2] >= new[0]
        assert new[3] >= new[1]
        has_center = 0 <= (x1 + x2) / 2 <= w and 0 <= (y1 + y2) / 2 <= h
        seen_w, seen_h = seen[2] - seen[0], seen[3] - seen[1]
        is_large = seen_w >= min(4, x2 - x1) and seen_h >= min(4, y2 - y1)
        assert is_kept == (
            has_center or (is_large and seen_w * seen_h >= 0.3 * (x2 - x1) * (y2 - y1))
        )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["compressed", "uncompressed", "polygon"])
def test_a_mask_moves_with_its_box_and_its_pixels(kind, flip):
    """A white rectangle: after a view with a scale of 3, its box, mask and pixels agree."""
    x1, y1, x2, y2 = 5, 8, 17, 14
    mask = np.zeros((20, 30), bool)
    mask[y1:y2, x1:x2] = True
    segmentation = encode(mask, kind == "compressed")
    if kind == "polygon":
        segmentation = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    view = View((20, 30), (60, 90), (6, 9, 40, 50), flip)
    (box,), kept = view.boxes(np.array([[x1, y1, x2, y2]], float))
    assert kept.all()
    left, top, right, bottom = box.round().astype(int)
    expected = np.zeros((40, 50), bool)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal(view.mask(segmentation), expected)
    pixels = view.image(np.repeat(mask[:, :, None], 3, axis=2).astype(np.uint8) * 255)
    assert ((pixels[:, :, 0] > 127) != expected).sum() <= 4  # bilinear: corners are round


def test_flipping_twice_is_the_identity():
    view = View((20, 30), (20, 30), (0, 0, 20, 30), True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(view.image(np.ascontiguousarray(view.image(pixels))), pixels)
    boxes = np.array([[0, 1, 7.5, 9], [3, 0, 30, 20]])
    np.testing.assert_allclose(view.boxes(view.boxes(boxes)[0])[0], boxes)
    mask = pixels[:, :, 0] > 99
    np.testing.assert_array_equal(view.mask(encode(view.mask(encode(mask, True)), True)), mask)


@settings(max_examples=60)
@given(st.integers(5, 80), st.integers(5, 80), st.integers(1, 100), st.integers(0, 10**6))
def test_a_crop_shows_the_center_of_a_box(height, width, crop, seed):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (3, 2, 2)), axis=1) * (width, height)
    geometry = Geometry(scales=(0.5, 1.0, 2.3), crop=crop, flip=True)
    view = draw_view(geometry, (height, width), corners.reshape(3, 4), rng)
    (tall, wide), (top, left, h, w) = view.resized, view.window
    assert (h, w) == (min(crop, tall), min(crop, wide))
    assert 0 <= top <= tall - h
    assert 0 <= left <= wide - w
    centers = corners.mean(1) * (wide / width, tall / height) - (left, top)
    assert ((centers >= -1e-9) & (centers <= np.array([w, h]) + 1e-9)).all(1).any()
    assert view.boxes(corners.reshape(3, 4))[1].any()


def test_draws_cover_sizes_flips_and_places():
    geometry, boxes = (
        Geometry(sizes=(30, 40), max_size=60, crop=20, flip=True),
        np.array([[0, 0, 60, 90]]),
    )
    drawn = [draw_view(geometry, (90, 60), boxes, np.random.default_rng(k)) for k in range(200)]
    assert {view.resized for view in drawn} == {(45, 30), (60, 40)}
    assert 70 < sum(view.flip for view in drawn) < 130
    assert len({view.window for view in drawn}) > 50


# --- samples and batches ---


def test_training_leaves_out_crowds_and_images_without_boxes_and_says_so():
    coco = tiny_coco()
    coco["images"].append({"id": 11, "file_name": "c.png", "width": 9, "height": 9})
    coco["annotations"][2]["iscrowd"] = 1
    train = dataset(coco)
    assert train.notes == [
        "data: training leaves out 2 images without a box",
        "data: training leaves out 1 crowd annotations",
    ]
    assert train.image_ids.tolist() == [3]
    test = dataset(coco, train=False)
    assert len(test) == 3
    assert [len(test[i].boxes) for i in range(3)] == [2, 0, 0]
    coco["annotations"] = []
    with pytest.raises(DataError, match="no box to train on: the list is empty"):
        dataset(coco)


def test_boxes_are_clipped_to_the_image():
    assert dataset(tiny_coco(), Geometry(scales=(2.0,)))[0].boxes.tolist() == [
        [8, 12, 48, 32],
        [60, 40, 80, 60],
    ]


def masked_coco() -> dict:
    """tiny_coco with triangles as masks: polygon, compressed and uncompressed."""
    coco = tiny_coco()
    triangle = np.tril(np.ones((30, 40), bool)) & (np.arange(40) < 25)
    coco["annotations"][0]["segmentation"] = [[4, 6, 24, 16, 4, 16]]
    coco["annotations"][1]["segmentation"] = encode(triangle, True)
    coco["annotations"][2]["segmentation"] = encode(np.zeros((50, 24), bool), False)
    check_coco(coco, "masks")
    return coco


def test_masks_and_centroids():
    geometry = Geometry(scales=(2.0,), flip=True)
    masked = dataset(masked_coco(), geometry, mask_centers=True)
    for key in range(4):
        sample = masked[0, key]
        view = draw_view(geometry, (30, 40), masked.boxes[0], np.random.default_rng((0, 0, key)))
        for g in range(2):
            mask = view.mask(masked_coco()["annotations"][g]["segmentation"])
            np.testing.assert_array_equal(sample.masks[g], mask[2::4, 2::4])
            points = [(x, y) for y in range(60) for x in range(80) if mask[y, x]]
            np.testing.assert_allclose(sample.centers[g], np.mean(points, axis=0), rtol=1e-5)
    empty = masked[1]  # an empty mask: its box's center
    assert not empty.masks.any()
    assert empty.has_mask.tolist() == [True]
    assert torch.equal(empty.centers, (empty.boxes[:, :2] + empty.boxes[:, 2:]) / 2)
    plain = dataset(masked_coco(), geometry)[0]
    assert torch.equal(plain.centers, (plain.boxes[:, :2] + plain.boxes[:, 2:]) / 2)


def test_masks_where_there_are_some():
    coco = masked_coco()
    del coco["annotations"][0]["segmentation"]
    sample = dataset(coco)[0]
    assert sample.has_mask.tolist() == [False, True]
    assert not sample.masks[0].any()
    assert sample.masks[1].any()
    with pytest.raises(DataError, match=r"f\.json: annotation id 1: field 'segmentation'.*boxinst"):
        dataset(coco, name="f.json", mask_centers=True)
    coco["annotations"][0]["iscrowd"] = 1  # crowds need none
    assert "crowd" in str(dataset(coco, mask_centers=True).notes)


def test_broken_run_length_code_is_refused_by_annotation():
    coco = masked_coco()
    coco["annotations"][1]["segmentation"] = {"size": [30, 40], "counts": "aaaa"}
    with pytest.raises(DataError, match="annotation id 2: field 'segmentation' has counts that"):
        check_coco(coco, "masks")


def test_cut_rows_follow_the_view():
    rows = dict(bottom_rows=10)
    assert dataset(tiny_coco(), Geometry(sizes=(40,)), **rows)[0].cut_rows == int(10 * 40 / 30)
    cropped = dataset(tiny_coco(), Geometry(scales=(2.0,), crop=32), **rows)
    for key in range(20):
        box = cropped.boxes[0]
        view = draw_view(cropped.geometry, (30, 40), box, np.random.default_rng((0, 0, key)))
        seen = range(view.window[0], view.window[0] + view.window[2])
        assert cropped[0, key].cut_rows == sum(row >= 60 - 20 for row in seen)


def test_batch_contract():
    coco = masked_coco()
    samples = [dataset(coco, Geometry(scales=(1.7,)), bottom_rows=3)[i] for i in (0, 1)]
    batch = data.collate(samples)
    assert batch.images.shape == (2, 3, 96, 96)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes == [(51, 68), (85, 41)]
    assert batch.image_ids == [3, 9]
    assert batch.boxes.shape == (2, 8, 4)
    assert batch.boxes.dtype == torch.float32
    assert batch.labels.shape == (2, 8)
    assert batch.labels.dtype == torch.int64
    assert batch.centers.shape == (2, 8, 2)
    assert batch.centers.dtype == torch.float32
    assert batch.valid.sum(1).tolist() == [2, 1]
    assert batch.valid[:, 0].all()
    assert batch.masks.shape == (2, 8, 24, 24)
    assert batch.masks.dtype == torch.bool
    assert batch.has_mask.sum(1).tolist() == [2, 1]
    assert batch.cut_rows == [5, 5]
    for n, (sample, (h, w)) in enumerate(zip(samples, batch.sizes, strict=True)):
        assert torch.equal(batch.images[n, :, :h, :w], sample.image)
        assert not batch.images[n, :, h:].any()
        assert not batch.images[n, :, :, w:].any()
        g = len(sample.boxes)
        assert torch.equal(batch.boxes[n, :g], sample.boxes)
        assert not batch.boxes[n, g:].any()
        padded = np.zeros((96, 96), bool)
        mask = View(sample.original_size, (h, w), (0, 0, h, w), False).mask(
            coco["annotations"][2 * n]["segmentation"]
        )
        padded[:h, :w] = mask
        np.testing.assert_array_equal(batch.masks[n, 0], padded[2::4, 2::4])
    moved = batch.to("meta")
    assert moved.masks.device.type == moved.images.device.type == "meta"
    assert moved.sizes == batch.sizes
    sample = dataset(tiny_coco())[0]._replace(masks=None, has_mask=None)
    assert data.collate([sample]).to("cpu").masks is None


@pytest.mark.parametrize(
    ("count", "slots"), [(0, 8), (1, 8), (8, 8), (9, 16), (33, 64), (375, 512)]
)
def test_box_slots(count, slots):
    coco = tiny_coco()
    annotation = coco["annotations"][0]
    coco["annotations"] = [annotation | {"id": k} for k in range(count)]
    test = dataset(coco, train=False)
    batch = data.collate([test[1], test[0]])
    assert batch.boxes.shape == (2, slots, 4)
    assert batch.masks.shape[:2] == (2, slots)
    assert batch.valid.sum(1).tolist() == [0, count]


# --- loaders ---


def content(batch: data.Batch) -> list:
    """Everything of a batch that padding does not change, per image."""
    return [
        (
            i,
            size,
            batch.images[n, :, : size[0], : size[1]].tolist(),
            batch.boxes[n][batch.valid[n]].tolist(),
        )
        for n, (i, size) in enumerate(zip(batch.image_ids, batch.sizes, strict=True))
    ]


RANDOM = Geometry(sizes=(24, 28, 32), crop=26, flip=True)


def train_run(rank=0, world=1, start=0, grouping=True, **fields) -> list:
    """The content of each step's batch, the parts together. Without a crop, images are grouped."""
    fields = dict(steps=6, batch_size=4, seed=5, workers=0, crop=0 if grouping else 26) | fields
    cfg = Config(**fields)
    loader = data.make_train_loader(dataset(many(7), RANDOM), cfg, start, rank, world)
    assert len(loader) == cfg.steps - start
    steps = list(loader)
    assert {len(parts) for parts in steps} <= {cfg.accumulate}
    return [list(itertools.chain(*map(content, parts))) for parts in steps]


def test_batches_do_not_depend_on_workers():
    assert train_run() == train_run(workers=2)
    assert train_run(seed=6) != train_run()
    assert len(train_run()) == 6


def test_parts_of_a_step_are_loaded_ahead_and_come_together():
    assert train_run(accumulate=2) == train_run(accumulate=2, workers=2) == train_run()
    assert train_run(accumulate=4, start=4) == train_run()[4:]


@pytest.mark.parametrize("grouping", [False, True])
def test_ranks_share_the_global_batches(grouping):
    whole = train_run(grouping=grouping)
    halves = zip(*(train_run(rank=r, world=2, grouping=grouping) for r in (0, 1)), strict=True)
    assert [left + right for left, right in halves] == whole


def test_a_resumed_run_is_the_tail_of_the_whole(monkeypatch):
    whole = train_run()
    loaded = []
    monkeypatch.setattr(data, "check_size", lambda image, entry, name: loaded.append(entry["id"]))
    assert train_run(start=4) == whole[4:]
    assert len(loaded) == 2 * 4
    assert train_run(start=6) == []


def test_order_shuffles_groups_and_visits_all_equally():
    is_wide = [index % 3 > 0 for index in range(30)]
    batches = list(data.train_order(is_wide, [1] * 30, Config(batch_size=4, steps=300), 0, 0, 1))
    assert len(batches) == 300
    assert all(len({is_wide[item.index] for item in batch}) == 1 for batch in batches)
    counts = np.bincount([item.index for batch in batches for item in batch])
    assert counts.min() >= 38
    assert counts.max() <= 42
    assert [item.key for batch in batches for item in batch] == list(range(1200))
    cfg = Config(batch_size=5, steps=12)
    ungrouped = list(data.train_order([True] * 30, [1] * 30, cfg, 0, 0, 1))
    epochs = [item.index for batch in ungrouped for item in batch]
    assert sorted(epochs[:30]) == sorted(epochs[30:]) == list(range(30))
    assert epochs[:30] != epochs[30:] != list(range(30))


def test_with_crops_all_boxes_are_chosen_equally_often():
    coco = many(7)
    boxes = np.bincount([a["image_id"] for a in coco["annotations"]])[1:]
    assert len(set(boxes)) > 1

    def images(crop: int) -> np.ndarray:
        cfg = Config(steps=int(boxes.sum()), batch_size=2, crop=crop, workers=0)
        loader = data.make_train_loader(dataset(coco, Geometry(scales=(1.0,), crop=crop)), cfg)
        seen = [i - 1 for (batch,) in loader for i in batch.image_ids]
        return np.bincount(seen, minlength=7)

    assert (images(26) == 2 * boxes).all()  # two passes
    assert abs(images(0) - 2 * boxes.mean()).max() <= 1.5


@pytest.mark.parametrize(
    ("fields", "steps_with_masks"),
    [
        (dict(mode="boxteacher"), [3, 6, 7]),  # the logged ones
        (dict(mode="boxteacher", use_masks=True), [1, 2, 3, 4, 5, 6, 7]),
        (dict(mode="condinst"), [1, 2, 3, 4, 5, 6, 7]),
        (dict(mode="boxinst"), []),
    ],
)
def test_true_masks_come_where_they_are_learned_or_logged(fields, steps_with_masks):
    cfg = Config(steps=7, log_every=3, batch_size=2, crop=26, workers=0, **fields)
    batches = list(data.make_train_loader(dataset(masked_coco()), cfg))
    found = [step for step, (batch,) in enumerate(batches, 1) if batch.masks is not None]
    assert found == steps_with_masks
    assert all((batch.masks is None) == (batch.has_mask is None) for (batch,) in batches)
    resumed = data.make_train_loader(dataset(masked_coco()), cfg, start_step=2)
    assert [b.masks is None for (b,) in resumed] == [b.masks is None for (b,) in batches[2:]]


def test_one_image_gets_new_draws_each_time():
    train = dataset(many(7), RANDOM)
    assert content(data.collate([train[2, 0]])) == content(data.collate([train[2, 0]]))
    assert len({str(content(data.collate([train[2, key]]))) for key in range(6)}) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_test_loader_yields_every_image_once(workers):
    test = dataset(many(7), Geometry(sizes=(64,), max_size=80), train=False)
    seen = {}
    for rank in (0, 1):
        loader = data.make_test_loader(test, rank, 2, workers)
        assert len(loader) == 4 - rank
        for _ in range(2):  # once more: the same
            for batch, original in loader:
                assert batch.images.shape[0] == 1
                seen.setdefault(batch.image_ids[0], []).append((batch.sizes[0], original))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]
    assert all(len(v) == 2 for v in seen.values())
    assert seen[1][0] == ((80, 64), (40, 32))
    assert seen[2][0] == ((53, 80), (32, 48))


def test_loading_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    train_run(steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def refuse(entry: dict) -> np.ndarray:
    raise DataError(f"dir/{entry['file_name']} cannot be read (DataError: or so); replace it")


@pytest.mark.parametrize("kind", ["rgb", "gray16", "float"])
def test_stretched_contrast_against_sorted_values(kind):
    """From all values, channels alike; what lies outside the percentiles is cut off."""
    rng = np.random.default_rng(0)
    pixels = {
        "rgb": rng.integers(40, 90, (30, 20, 3)).astype(np.uint8),
        "gray16": rng.integers(300, 4096, (30, 20)).astype(np.uint16),
        "float": rng.normal(-3, 2, (30, 20)).astype(np.float32),
    }[kind]
    pixels[0, 0] = pixels.max() + 100  # one hot pixel
    found = stretch_contrast(pixels)
    assert found.dtype == np.uint8
    values = np.sort(pixels.ravel().astype(float))
    low = values[math.floor(0.005 * (len(values) - 1))]
    high = values[math.ceil(0.995 * (len(values) - 1))]
    expected = np.floor(((pixels - low) / (high - low) * 255).clip(0, 255) + 0.5)
    assert np.abs(found - expected).max() <= 1
    assert (found.min(), found.max()) == (0, 255)
    assert np.array_equal(stretch_contrast(found), found)
    assert not stretch_contrast(np.full((4, 4), 7)).any()
    # Nearly all is background: the object keeps its values.
    sparse = np.zeros((40, 40), np.uint8)
    sparse[3, 4:8] = 30, 60, 90, 120
    found = stretch_contrast(sparse)
    assert found[3, 4:8].tolist() == [64, 128, 191, 255]
    assert np.array_equal(stretch_contrast(found), found)
    with pytest.raises(ValueError, match="finite"):
        stretch_contrast(np.array([1.0, np.nan]))


def test_contrast_is_stretched_before_values_become_8_bits(tmp_path):
    """A 12-bit image in a 16-bit file has 16 gray values without the stretch, 256 with it."""
    gray = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(gray).save(tmp_path / "a.png")
    entry = {"file_name": "a.png"}
    assert len(np.unique(image_loader(tmp_path)(entry))) <= 17
    assert len(np.unique(image_loader(tmp_path, "stretch")(entry))) == 256
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "f.tiff")
    with pytest.raises(DataError, match="--contrast stretch"):
        image_loader(tmp_path)({"file_name": "f.tiff"})
    assert image_loader(tmp_path, "stretch")({"file_name": "f.tiff"}).max() == 255


@pytest.mark.parametrize("field", ["train", "val"])
def test_both_data_sets_stretch_contrast_if_the_configuration_says_so(field, tmp_path):
    json_path, images_dir = write(tmp_path, tiny_coco())
    paths = {f"{field}_json": str(json_path), f"{field}_images": str(images_dir)}
    sets = []
    for contrast in ("none", "stretch"):
        cfg = from_preset("nuclei", contrast=contrast, **paths)
        make = data.make_train_set if field == "train" else data.make_val_set
        sets.append(make(cfg))
    plain, stretched = (s.load_image(s.entry(0)) for s in sets)
    assert np.array_equal(stretch_contrast(plain), stretched)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_workers_error_arrives_as_its_one_line(workers):
    test = dataset(many(1), load_image=refuse, train=False)
    with pytest.raises(
        DataError, match=r"^dir/0\.png cannot be read \(.*\); replace it$"
    ) as caught:
        list(data.make_test_loader(test, 0, 1, workers))
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_dataset_can_be_sent_to_a_worker(tmp_path):
    write(tmp_path, tiny_coco())
    sent = pickle.loads(pickle.dumps(dataset(tiny_coco(), load_image=image_loader(tmp_path))))
    assert sent[0].image_id == 3


# --- color augmentation ---


SIZES = [(40, 64), (64, 50), (17, 33)]


def colorful() -> torch.Tensor:
    images = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for n, (h, w) in enumerate(SIZES):
        images[n, :, :h, :w] = torch.randint(40, 216, (3, h, w), generator=generator)
    return images


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("strength", list(transforms.STRENGTHS))
def test_augment_keeps_padding_input_and_device(strength):
    images, before = colorful(), colorful()
    changed = 0
    for seed in range(8):
        augmented = augment(images, SIZES, strength, seeded(seed))
        assert torch.equal(images, before)
        assert augmented.dtype == torch.uint8
        for n, (h, w) in enumerate(SIZES):
            assert not augmented[n, :, h:].any()
            assert not augmented[n, :, :, w:].any()
            changed += not torch.equal(augmented[n], images[n])
    low, high = {"none": (0, 0), "weak": (1, 12), "strong": (15, 24), "strong_blur": (18, 24)}[
        strength
    ]
    assert low <= changed <= high
    assert torch.equal(
        augment(images, SIZES, strength, seeded(3)),
        augment(images, SIZES, strength, seeded(3)),
    )


@pytest.mark.parametrize("strength", ["strong", "strong_blur"])
def test_augment_does_not_see_padding(strength):
    """An image gets the same colors whatever stands in its padding, and whatever its size."""
    images = colorful()
    wider = torch.zeros(3, 3, 96, 128, dtype=torch.uint8)
    wider[:, :, :64, :64] = images
    for seed in range(6):
        narrow = augment(images, SIZES, strength, seeded(seed))
        assert torch.equal(augment(wider, SIZES, strength, seeded(seed))[:, :, :64, :64], narrow)


def test_augment_in_parts_draws_what_the_whole_draws():
    images = colorful()
    whole = augment(images, SIZES, "strong_blur", seeded(1))
    for n in range(3):
        part = augment(images[n : n + 1], SIZES[n : n + 1], "strong_blur", seeded(1), skip=n)
        assert torch.equal(part[0], whole[n])
    generator = seeded(1)
    parts = [augment(images[:2], SIZES[:2], "strong_blur", generator)]
    parts.append(augment(images[2:], SIZES[2:], "strong_blur", generator))
    assert torch.equal(torch.cat(parts), whole)


def test_augment_strengths():
    """Rates of jitter and grayscale, and the range of brightness."""
    color = torch.tensor([90, 120, 60], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    images = color.repeat(200, 1, 1, 1)
    expected = {  # rate of change, rate of grayscale, brightness changes at least, at most
        "weak": (0.2, 0.0, 0.15, 0.35),
        "strong": (0.84, 0.2, 0.35, 0.75),
        "strong_blur": (0.84, 0.2, 0.35, 0.75),
    }
    for strength, (change_rate, gray_rate, at_least, at_most) in expected.items():
        augmented = augment(images, [(4, 4)] * 200, strength, seeded(0))[:, :, 0, 0].int()
        changed = (augmented != color[:, 0, 0]).any(1).float().mean().item()
        gray = (augmented.amax(1) == augmented.amin(1)).float().mean().item()
        assert abs(changed - change_rate) < 0.06
        assert abs(gray - gray_rate) < 0.06
        ratio = augmented.sum(1) / color[:, 0, 0].sum()
        for furthest in (1 - ratio.min(), ratio.max() - 1):
            assert at_least < furthest < at_most


def test_blur_is_torchvisions():
    image = colorful()[1, :, :64, :50]
    strength = transforms.Strength((0, 0, 0, 0), 0, 0, 1)
    found = transforms._augment_image(image, strength, [0.5] * 12)
    assert torch.equal(found, tvf.gaussian_blur(image, [3, 3], [1.05, 1.05]))
    one_pixel = torch.full((3, 1, 9), 7, dtype=torch.uint8)
    assert torch.equal(transforms._augment_image(one_pixel, strength, [0.5] * 12), one_pixel)


def test_jitter_order_and_amounts():
    image = colorful()[0, :, :40, :64]
    draws = [0.75, 0.25, 0.9, 0.4, 0.3, 0.1, 0.4, 0.2, 0.0, 0.5, 0.9, 0.0]  # order: 1, 3, 0, 2
    expected = tvf.adjust_hue(tvf.adjust_contrast(image, 0.8), -0.02)
    expected = tvf.adjust_saturation(tvf.adjust_brightness(expected, 1.2), 1.32)
    found = transforms._augment_image(image, transforms.STRENGTHS["strong"], draws)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_augment_reads_nothing_back_from_the_device():
    """Meta tensors have no values: any .item(), any data-dependent shape would raise."""
    images = colorful().to("meta")
    for seed in range(6):
        assert augment(images, SIZES, "strong_blur", seeded(seed)).device.type == "meta"


def test_a_configuration_names_every_strength():
    named = get_args(get_type_hints(Config)["student_augmentation"])
    assert named == tuple(transforms.STRENGTHS)


# --- real data ---


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="needs ../shared/data/nuclei")
def test_nuclei():
    annotations = NUCLEI / "annotations"
    coco, notes = read_coco(annotations / "boxes_train.json", NUCLEI / "images" / "train")
    assert notes == []
    train = dataset(
        coco,
        Geometry(scales=(1.5, 2.0), crop=256, flip=True),
        load_image=image_loader(NUCLEI / "images" / "train"),
    )
    assert train.notes == []
    assert len(train) == 562
    assert train.class_names == ["nucleus"]
    for (batch,) in data.make_train_loader(train, Config(steps=3, batch_size=4, workers=0)):
        assert batch.images.shape == (4, 3, 256, 256)
        assert batch.valid[:, 0].all()
    assert not data.collate([train[0]]).has_mask.any()
    assert train.num_masks().startswith("0 of ")

    coco, notes = read_coco(annotations / "instances_val.json", NUCLEI / "images" / "val")
    assert notes == []
    geometry = Geometry(sizes=(384,), max_size=800)
    load = image_loader(NUCLEI / "images" / "val")
    val = dataset(coco, geometry, load_image=load, train=False, mask_centers=True)
    assert len(val) == 51
    batch, original = data.collate([val[0]]), val[0].original_size
    entry = coco["images"][0]
    assert original == (entry["height"], entry["width"])
    assert min(batch.sizes[0]) == 384
    x, y = np.divide(batch.sizes[0], original)[::-1]
    for g, annotation in enumerate(a for a in coco["annotations"] if a["image_id"] == entry["id"]):
        area = batch.masks[0, g].sum().item() * 16 / (x * y)
        assert abs(area - annotation["area"]) <= 0.35 * annotation["area"] + 30
        left, top, right, bottom = batch.boxes[0, g].tolist()
        assert left <= batch.centers[0, g, 0] <= right
        assert top <= batch.centers[0, g, 1] <= bottom


def test_inputs_stay_as_they_are():
    coco = masked_coco()
    before = copy.deepcopy(coco)
    dataset(coco, RANDOM, mask_centers=True)[0]
    assert coco == before
