"""tools.convert on small trees in the layouts in which the data sets are distributed."""

import itertools
import json
import os

import numpy as np
import pytest
from PIL import Image

from boxteacher.coco import DataError, image_loader, read_coco
from boxteacher.config import ConfigError
from boxteacher.data import CocoDataset
from boxteacher.masks import decode_mask
from boxteacher.tools import convert
from boxteacher.tools.yolo import number_names
from boxteacher.transforms import Geometry

RNG = np.random.default_rng(0)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(height, width):
    return RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def rectangle(size, x, y, w, h):
    mask = np.zeros(size, dtype=bool)
    mask[y : y + h, x : x + w] = True
    return mask


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, argv)])
    convert.main()


def load(path, images):
    """What our own reader and data set make of it."""
    coco, _ = read_coco(path, images)
    dataset = CocoDataset(coco, image_loader(images), Geometry((64,), 128), train=False)
    for index in range(len(dataset)):
        dataset[index]
    return coco


def of_image(coco, file_name):
    (image,) = (image for image in coco["images"] if image["file_name"] == file_name)
    return [a for a in coco["annotations"] if a["image_id"] == image["id"]]


def names(coco):
    return {category["id"]: category["name"] for category in coco["categories"]}


# --- Pascal VOC -----------------------------------------------------------------------------------

OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>
<xmax>{}</xmax><ymax>{}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>
<xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def voc_image(root, name, objects, numbers=None):
    """objects: (class, difficult, xmin, ymin, xmax, ymax). The PNG has a palette."""
    save(root / "JPEGImages" / f"{name}.jpg", picture(40, 60))
    body = "".join(OBJECT.format(*found) for found in objects)
    write(root / "Annotations" / f"{name}.xml", f"<annotation>{body}</annotation>")
    if numbers is not None:
        path = root / "SegmentationObject" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(numbers.astype(np.uint8)).convert("P")
        image.putpalette(list(range(256)) * 3)
        image.putdata(numbers.ravel().tolist())
        image.save(path)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    numbers = np.zeros((40, 60), dtype=int)
    numbers[2:12, 2:22] = 255  # a border around the first object
    numbers[3:11, 3:21] = 1
    numbers[20:30, 30:50] = 2  # overlaps both dogs' boxes, more the second one's
    numbers[5:9, 40:44] = 3
    train = [("person", 0, 1, 1, 60, 40), ("tvmonitor", 1, 10, 10, 20.5, 19)]
    voc_image(root, "2007_1", train, np.where(np.arange(60) < 30, 1, 2) * np.ones((40, 1)))
    # The PNG's order is not the XML's; one dog has no mask.
    val = [("dog", 0, 25, 15, 52, 34), ("dog", 0, 31, 21, 50, 30), ("cat", 1, 41, 6, 44, 9)]
    voc_image(root, "2007_2", [*val, ("boat", 0, 4, 4, 21, 11)], numbers)
    voc_image(root, "2008_3", [("bus", 0, 5, 6, 7, 8)])  # of the augmented set: no PNG
    write(root / "ImageSets/Segmentation/train.txt", "2007_1\n")
    write(root / "ImageSets/Segmentation/val.txt", "2007_2\n")
    write(
        tmp_path / "trainaug.txt",
        "/JPEGImages/2008_3.jpg /SegmentationClassAug/2008_3.png\n2007_1\n",
    )
    return root


def test_voc(voc, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "voc", voc, tmp_path / "out", "--list", tmp_path / "trainaug.txt")
    files = ["boxes_trainaug.json", "instances_train.json", "instances_val.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files

    # One-based corners that both belong to the box; difficult objects are objects.
    boxes = load(tmp_path / "out/boxes_trainaug.json", voc / "JPEGImages")
    assert [image["file_name"] for image in boxes["images"]] == ["2008_3.jpg", "2007_1.jpg"]
    assert [a["bbox"] for a in boxes["annotations"]] == [
        [4, 5, 3, 3],
        [0, 0, 60, 40],
        [9, 9, 11.5, 10],
    ]
    assert [names(boxes)[a["category_id"]] for a in boxes["annotations"]] == [
        "bus",
        "person",
        "tvmonitor",
    ]
    assert not any("segmentation" in a for a in boxes["annotations"])

    # A mask belongs to the object whose box fits best. The border belongs to no mask.
    val = load(tmp_path / "out/instances_val.json", voc / "JPEGImages")
    found = {names(val)[a["category_id"]]: a for a in val["annotations"]}
    assert len(val["annotations"]) == len(found) == 3
    assert found["dog"]["bbox"] == [30, 20, 20, 10]
    size = (40, 60)
    for name, box in {"dog": (30, 20, 20, 10), "cat": (40, 5, 4, 4), "boat": (3, 3, 18, 8)}.items():
        assert np.array_equal(decode_mask(found[name]["segmentation"]), rectangle(size, *box))
        assert found[name]["area"] == box[2] * box[3]
    out = capsys.readouterr().out
    assert "left out: 1 objects without a mask" in out
    assert "      1 boat" in out
    assert "      0 sheep" in out


def test_voc_boxes_only(voc, tmp_path, monkeypatch):
    run(monkeypatch, "voc", voc, tmp_path / "out", "--boxes-only")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "boxes_train.json",
        "boxes_val.json",
    ]
    assert "segmentation" not in (tmp_path / "out/boxes_val.json").read_text()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda root: (root / "JPEGImages").rename(root / "Images"),
            "expected JPEGImages, .*found",
        ),
        (lambda root: (root / "Annotations/2007_2.xml").unlink(), r"2007_2\.xml cannot be read"),
        (lambda root: write(root / "Annotations/2007_2.xml", "<a><b>"), r"2007_2\.xml cannot"),
        (
            lambda root: voc_image(root, "2007_1", [("cow", 0, 9, 9, 2, 9)]),
            "without width or height",
        ),
        (
            lambda root: voc_image(root, "2007_1", [("unicorn", 0, 1, 1, 9, 9)]),
            "class .unicorn. is none of VOC",
        ),
        (lambda root: (root / "JPEGImages/2007_2.jpg").unlink(), r"2007_2\.jpg cannot be read"),
        (
            lambda root: save(root / "SegmentationObject/2007_2.png", picture(40, 60)),
            r"its image has \(40, 60\) pixels",
        ),
    ],
)
def test_voc_that_is_damaged_leaves_nothing_behind(voc, tmp_path, monkeypatch, damage, words):
    damage(voc)
    with pytest.raises(DataError, match=words) as error:
        run(monkeypatch, "voc", voc, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_two_sets_of_one_name_are_refused(voc, tmp_path, monkeypatch):
    write(tmp_path / "train.txt", "2007_2\n")
    with pytest.raises(DataError, match="two sets have the name train"):
        run(monkeypatch, "voc", voc, tmp_path / "out", "--list", tmp_path / "train.txt")


# --- Cityscapes -----------------------------------------------------------------------------------


def cityscapes_image(root, split, city, name, numbers):
    top = root / "leftImg8bit" / split / city / f"{city}_{name}_leftImg8bit.png"
    save(top, picture(*numbers.shape))
    path = root / "gtFine" / split / city / f"{city}_{name}_gtFine_instanceIds.png"
    save(path, numbers.astype(np.uint16))  # 16 bits, as distributed


@pytest.fixture
def cityscapes(tmp_path):
    numbers = np.full((32, 64), 7)  # road
    numbers[:4] = 0  # void
    numbers[4:8, :10] = 29001  # a caravan, which is neither a class nor void
    numbers[8:12, :10] = 29  # a group of caravans is void
    numbers[10:20, 20:40] = 26001
    numbers[12:16, 36:50] = 26000
    numbers[20:30, 0:20] = 24  # a group of persons
    numbers[31, 63] = 33012  # a bicycle of one pixel, in the corner
    root = tmp_path / "cityscapes"
    for split, city in itertools.product(("train", "val"), ("aachen", "bonn")):
        cityscapes_image(root, split, city, "000000_000019", numbers)
    return root, numbers


def test_cityscapes(cityscapes, tmp_path, monkeypatch, capsys):
    root, numbers = cityscapes
    run(monkeypatch, "cityscapes", root, tmp_path / "out")
    coco = load(tmp_path / "out/instances_val.json", root / "leftImg8bit/val")
    load(tmp_path / "out/instances_train.json", root / "leftImg8bit/train")
    assert list(names(coco).values()) == (
        "person rider car truck bus train motorcycle bicycle".split()
    )
    annotations = of_image(coco, "bonn/bonn_000000_000019_leftImg8bit.png")
    found = {(a["category_id"], a["iscrowd"]) for a in annotations}
    assert found == {(26, 0), (24, 1), (33, 0)}
    assert len(annotations) == 4
    for annotation, number in zip(annotations, (24, 26000, 26001, 33012), strict=True):
        mask = decode_mask(annotation["segmentation"])
        assert np.array_equal(mask, numbers == number)
        assert annotation["area"] == mask.sum()
        rows, columns = mask.nonzero()
        tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation["bbox"] == tight
    void = decode_mask(coco["images"][1]["void"])
    assert np.array_equal(void, (numbers == 0) | (numbers == 29))
    assert "8 objects, 8 with a mask, 2 groups (crowds)" in capsys.readouterr().out


def test_cityscapes_boxes_only(cityscapes, tmp_path, monkeypatch):
    root, _ = cityscapes
    run(monkeypatch, "cityscapes", root, tmp_path / "out", "--boxes-only")
    coco = load(tmp_path / "out/boxes_train.json", root / "leftImg8bit/train")
    keys = {key for entry in [*coco["annotations"], *coco["images"]] for key in entry}
    assert not keys & {"segmentation", "void"}
    box = next(a["bbox"] for a in coco["annotations"] if a["category_id"] == 33)
    assert box == [63, 31, 1, 1]


def test_cityscapes_without_its_annotations(cityscapes, tmp_path, monkeypatch):
    root, _ = cityscapes
    (root / "gtFine/val/bonn/bonn_000000_000019_gtFine_instanceIds.png").unlink()
    with pytest.raises(DataError, match=r"gtFine_instanceIds\.png cannot be read"):
        run(monkeypatch, "cityscapes", root, tmp_path / "out")
    (root / "gtFine").rename(root / "gtCoarse")
    with pytest.raises(DataError, match=r"not Cityscapes: expected .*gtFine/train.*found gtCoarse"):
        run(monkeypatch, "cityscapes", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- YOLO -----------------------------------------------------------------------------------------

YAML = {
    "list": "train: ../train/images\nnc: 2\nnames: ['crack', \"dent # not\"]\n",
    "lines": "path: .\nnames:  # the classes\n- crack\n- dent\ntrain: images/train\n",
    "indented": "names:\n  - crack\n  - dent\nval: images/val\n",
    "numbers": "names:\n  0: crack\n  7: 'dent'\n\ntrain: images/train\n",
    "inline": "names: {0: crack, 1: dent}\n",
    "long": "names: [\n  crack,\n  dent,\n]\nnc: 2\n",
}


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "yolo"
    write(root / "data.yaml", YAML["lines"])
    save(root / "images/train/a.png", picture(20, 40))
    save(root / "images/train/b.JPG", picture(50, 100))
    save(root / "images/val/c.png", picture(20, 40))
    rows = "1 0.5 0.5 0.25 0.5\n\n0 0.05 0.5 0.2 0.2\n"  # the second sticks out on the left
    write(root / "labels/train/a.txt", rows)
    write(root / "labels/val/c.txt", "0 0.25 0.5 0.5 0.5 0.5 1.0\n1 .5 .5 .1 .1\n")
    return root


def test_yolo(yolo, tmp_path, monkeypatch):
    run(monkeypatch, "yolo", yolo, tmp_path / "out")
    train = load(tmp_path / "out/boxes_train.json", yolo / "images/train")
    assert names(train) == {0: "crack", 1: "dent"}
    assert [(i["file_name"], i["width"], i["height"]) for i in train["images"]] == [
        ("a.png", 40, 20),
        ("b.JPG", 100, 50),
    ]
    assert of_image(train, "b.JPG") == []
    dent, crack = of_image(train, "a.png")
    assert dent["bbox"] == pytest.approx([15, 5, 10, 10])
    assert crack["bbox"] == pytest.approx([0, 8, 6, 4])
    val = load(tmp_path / "out/instances_val.json", yolo / "images/val")
    outlined, boxed = val["annotations"]
    assert outlined["segmentation"] == [pytest.approx([10, 10, 20, 10, 20, 20])]
    assert outlined["bbox"] == pytest.approx([10, 10, 10, 10])
    assert 40 <= outlined["area"] <= 60  # a triangle of 50
    assert "segmentation" not in boxed


def test_yolo_with_a_folder_for_each_set(tmp_path, monkeypatch):
    root = tmp_path / "robo"
    write(root / "classes.txt", "nut\nbolt\n")
    for name in ("train", "valid"):
        save(root / name / "images/a.png", picture(20, 40))
        write(root / name / "labels/a.txt", "1 .5 .5 .5 .5")
    run(monkeypatch, "yolo", root, tmp_path / "out")
    for name in ("train", "valid"):
        coco = load(tmp_path / f"out/boxes_{name}.json", root / name / "images")
        assert names(coco)[coco["annotations"][0]["category_id"]] == "bolt"


def test_yolo_behind_links_without_labels_and_with_a_pipe(yolo, tmp_path, monkeypatch, capsys):
    (yolo / "images/val").rename(tmp_path / "elsewhere")
    (yolo / "images/val").symlink_to(tmp_path / "elsewhere")
    save(yolo / "images/.ipynb_checkpoints/a.png", picture(20, 40))
    run(monkeypatch, "yolo", yolo, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "boxes_train.json",
        "instances_val.json",
    }
    assert "left out: 1 missing files of labels" in capsys.readouterr().out
    os.mkfifo(yolo / "images/train/pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png cannot be read .*not a regular file"):
        run(monkeypatch, "yolo", yolo, tmp_path / "out")


def test_a_comma_or_a_hash_in_a_name_is_a_part_of_it():
    lines = "- cup\n- bottle, glass\n  - 'fire, \"hydrant\"'\n- C#\n"
    wanted = {0: "cup", 1: "bottle, glass", 2: 'fire, "hydrant', 3: "C#"}
    assert number_names(lines, "\n") == wanted
    assert number_names("0: cup, 3: 'a, b',\n 5: bird's nest", ",\n") == {
        0: "cup",
        3: "a, b",
        5: "bird's nest",
    }


@pytest.mark.parametrize("kind", YAML)
def test_names_in_yaml(yolo, tmp_path, monkeypatch, kind):
    write(yolo / "data.yaml", YAML[kind].replace(" # not", ""))
    for label in ("train/a", "val/c"):
        write(yolo / f"labels/{label}.txt", "0 .5 .5 .1 .1")
    run(monkeypatch, "yolo", yolo, tmp_path / "out")
    wanted = {0: "crack", 7 if kind == "numbers" else 1: "dent"}
    assert names(json.loads((tmp_path / "out/boxes_train.json").read_text())) == wanted


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("2 .5 .5 .1 .1", r"a\.txt, object 1: class 2 has no name; there are 2"),
        ("0 12 10 4 4", "expected a box"),
        ("0 .5 .5 .1", "expected a box"),
        ("0 .5 .5 .1 .1 .9", "expected a box"),
        ("0 .5 .5 0 .1", "without width or height"),
        ("0 .5 .5 nan .1", "expected a box"),
        ("crack .5 .5 .1 .1", "object 1 cannot be read .*'crack'"),
    ],
)
def test_yolo_rows_that_cannot_be_meant(yolo, tmp_path, monkeypatch, rows, words):
    write(yolo / "labels/train/a.txt", rows)
    with pytest.raises(DataError, match=words):
        run(monkeypatch, "yolo", yolo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_yolo(yolo, tmp_path, monkeypatch):
    (yolo / "labels/val").rename(yolo / "labels/validation")
    with pytest.raises(DataError, match=r"expected labels/val, found data\.yaml, images, labels"):
        run(monkeypatch, "yolo", yolo, tmp_path / "out")
    (yolo / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"a YAML file with names, classes\.txt or a .names file"):
        run(monkeypatch, "yolo", yolo, tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        run(monkeypatch, "yolo", tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_boxes_belong_to_the_image_as_it_is_shown(yolo, tmp_path, monkeypatch, ending):
    (yolo / "images/train/a.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(picture(40, 20)).save(yolo / f"images/train/a.{ending}", exif=exif)
    run(monkeypatch, "yolo", yolo, tmp_path / "out")
    coco = load(tmp_path / "out/boxes_train.json", yolo / "images/train")
    assert (coco["images"][0]["width"], coco["images"][0]["height"]) == (40, 20)


# --- the Data Science Bowl ------------------------------------------------------------------------


@pytest.fixture
def dsb(tmp_path):
    root = tmp_path / "dsb"
    for name in ("aa", "bb"):
        folder = root / "stage1_train" / name
        alpha = np.full((16, 24, 1), 255, dtype=np.uint8)
        save(folder / "images" / f"{name}.png", np.concatenate([picture(16, 24), alpha], axis=2))
        for k in range(2):
            mask = rectangle((16, 24), 5 * k, 3, 4, 6)
            save(folder / "masks" / f"m{k}.png", mask.astype(np.uint8) * 255)
        save(folder / "masks" / "empty.png", np.zeros((16, 24), dtype=np.uint8))
    return root


def test_dsb(dsb, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "dsb", dsb, tmp_path / "out")
    coco = load(tmp_path / "out/instances_train.json", dsb / "stage1_train")
    first, second = of_image(coco, "bb/images/bb.png")
    assert first["bbox"] == [0, 3, 4, 6]
    assert np.array_equal(decode_mask(second["segmentation"]), rectangle((16, 24), 5, 3, 4, 6))
    assert "left out: 2 empty masks" in capsys.readouterr().out

    write(tmp_path / "val.txt", "bb\n")
    run(monkeypatch, "dsb", dsb, tmp_path / "lists", "--list", tmp_path / "val.txt")
    assert [path.name for path in (tmp_path / "lists").iterdir()] == ["instances_val.json"]
    val = load(tmp_path / "lists/instances_val.json", dsb / "stage1_train")
    assert [image["file_name"] for image in val["images"]] == ["bb/images/bb.png"]
    write(tmp_path / "other/val.txt", "aa\n")
    lists = ["--list", tmp_path / "val.txt", "--list", tmp_path / "other/val.txt"]
    with pytest.raises(DataError, match="two sets have the name val"):
        run(monkeypatch, "dsb", dsb, tmp_path / "more", *lists)


def test_dsb_of_another_shape(dsb, tmp_path, monkeypatch):
    save(dsb / "stage1_train/bb/masks/m1.png", np.ones((16, 25), dtype=np.uint8))
    with pytest.raises(DataError, match=r"m1\.png: its image has \(16, 24\) pixels"):
        run(monkeypatch, "dsb", dsb, tmp_path / "out")
    with pytest.raises(DataError, match="expected stage1_train, found aa, bb"):
        run(monkeypatch, "dsb", dsb / "stage1_train", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_format_that_is_unknown_and_lists_that_have_no_meaning(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="FORMAT: invalid choice"):
        run(monkeypatch, "coco", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match="--list is for voc and dsb"):
        run(monkeypatch, "yolo", tmp_path, tmp_path, "--list", "a.txt")
