"""Data that is broken on purpose: each fault gives one clear line, or a data set that can be used.

What is broken goes through C code (pycocotools, Pillow), so a child process does the work. If it
dies or hangs, the cases that it has not answered fail. Every case is one row of a table below.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from boxteacher.coco import image_loader, read_coco
from boxteacher.coco_eval import EvaluationError, evaluate_coco, format_table
from boxteacher.data import Classes, CocoDataset, Ragged, collate, match_classes, pack
from boxteacher.errors import UserError
from boxteacher.masks import encode_mask, mask_extents, run_lengths
from boxteacher.plausible import AS_IS, CENTERS, CORNERS, doubts, fits, forms, likely_form
from boxteacher.transforms import Geometry

NAN, INF = float("nan"), float("inf")
USABLE = "usable"


def rectangle(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((48, 64), bool)
    mask[y : y + h, x : x + w] = True
    return mask


def listed(mask: np.ndarray) -> dict:
    return {"size": list(mask.shape), "counts": run_lengths(encode_mask(mask)).tolist()}


def good_coco() -> dict:
    """Polygons, both kinds of run-length codes, a crowd, a box without a mask in its own image."""
    common = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    annotations = [
        {"bbox": [4, 4, 20, 10], "area": 200, "segmentation": [[4, 4, 24, 4, 24, 14, 4, 14]]},
        {"bbox": [30, 20, 16, 16], "segmentation": encode_mask(rectangle(30, 20, 16, 16))},
        {
            "bbox": [0, 30, 20, 10],
            "category_id": 5,
            "segmentation": listed(rectangle(0, 30, 20, 10)),
        },
        {"bbox": [40, 0, 24, 48], "iscrowd": 1, "segmentation": listed(rectangle(40, 0, 24, 48))},
    ]
    images = [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (1, 2)]
    categories = [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}]
    annotations = [common | {"id": k} | a for k, a in enumerate(annotations, start=11)]
    return {"images": images, "annotations": annotations, "categories": categories}


def good_results() -> list[dict]:
    return [
        {
            "image_id": 1,
            "category_id": category_id,
            "bbox": list(box),
            "score": score,
            "segmentation": encode_mask(rectangle(*box)),
        }
        for category_id, score, box in ((1, 0.9, (4, 4, 20, 10)), (5, 0.5, (0, 30, 20, 10)))
    ]


def write_images(folder: Path) -> None:
    for n in (1, 2):
        pixels = np.random.default_rng(n).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")


def load(coco: object, folder: Path) -> str:
    """Read, check and load as training does. The JSON may be given as text."""
    path = folder / "data.json"
    text = coco if isinstance(coco, (str, bytes)) else json.dumps(coco)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    try:
        read, _ = read_coco(path, folder, compact=True)
        geometry = Geometry(scales=(1.3,), flip=True)
        data = CocoDataset(read, image_loader(folder), geometry, True, str(path))
        batch = collate([data[index] for index in range(len(data))])
    except UserError as error:
        return str(error)
    assert batch.valid.any()
    assert batch.boxes.isfinite().all()
    return USABLE


def evaluate(coco: object, results: object, metric: str = "coco") -> str:
    try:
        tables = evaluate_coco(coco, results, 100, name="val.json", metric=metric)
    except UserError as error:
        return str(error)
    for table in tables.values():
        assert table["AP"] is None or 0 <= table["AP"] <= 100
    assert len(format_table(tables)) < 2000
    return USABLE


def set_at(path: str, value: object, content: object) -> object:
    """content with content[a][0][b] ... as `value`, or without it, if that is Ellipsis. A function
    makes the new value of the old one."""
    content = copy.deepcopy(content)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = content
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return content


# --- the tables: place, value, what the line says -------------------------------------------------

A, MASK = "annotations.0", "annotations.0.segmentation"
ENTRY = "annotation id 11"
POLYGON = "polygon that is not .* 3 points or more"
NUMBER64 = "'id' is missing or not a whole number of at most 64 bits"
FAR = "points 4 times the image's size away"


def code(counts: object, **fields: object) -> dict:
    return {"size": [48, 64], "counts": counts} | fields


TRUTH = [  # refused by training and evaluation alike
    *(("images", value, "field 'images'") for value in (..., [], {}, None, 3, "x")),
    *(("categories", value, "field 'categories'") for value in (..., [], {}, None)),
    *(("annotations", value, "field 'annotations'") for value in (..., {}, None, True)),
    *((f"{key}.0", None, rf"{key}\[0\].*{NUMBER64}") for key in ("images", "annotations")),
    *(
        (f"{A}.id", value, rf"annotations\[0\].*{NUMBER64}")
        for value in (..., "1", 1.5, 2**63, True)
    ),
    ("images.0.id", 10**30, rf"images\[0\].*{NUMBER64}"),
    ("images.0.id", [1], rf"images\[0\].*{NUMBER64}"),
    ("images.1.id", 1, r"images\[1\].*1 is a duplicate"),
    ("annotations.1.id", 11, r"annotations\[1\].*11 is a duplicate"),
    ("categories.1.id", 1, r"categories\[1\].*1 is a duplicate"),
    ("categories.1.name", "cat", "category id 5.*'cat' is a duplicate"),
    *(
        ("categories.0.name", value, "category id 1.*not text")
        for value in (..., None, 3, "", ["a"])
    ),
    *(("images.0.width", v, "image id 1.*'width' must be") for v in (..., 0, -64, 64.0, "64", NAN)),
    ("images.0.height", True, "image id 1.*'height' must be"),
    ("images.0.height", 10**12, "image id 1.*over 178956970 pixels"),
    *(
        (f"{A}.image_id", v, f"{ENTRY}.*no such id in 'images'")
        for v in (..., 99, "1", [1], 1.0, None)
    ),
    *((f"{A}.category_id", v, f"{ENTRY}.*no such id in 'categories'") for v in (..., 0, {}, True)),
    *((f"{A}.iscrowd", v, f"{ENTRY}.*must be 0 or 1") for v in ("0", 2, -1, [], {}, NAN)),
    *((f"{A}.area", v, f"{ENTRY}.*0 or more") for v in ("200", -1, NAN, INF, 10**400, [2], True)),
    *(
        (f"{A}.bbox", v, f"{ENTRY}.*bbox")
        for v in (..., None, [], [1, 2, 3], [1] * 5, "4 4 9 9", {})
    ),
    *(
        (f"{A}.bbox.1", v, f"{ENTRY}.*four finite")
        for v in ("4", None, NAN, -INF, 10**400, [4], True)
    ),
    *((MASK, v, f"{ENTRY}.*neither polygons") for v in ("mask.png", 7, True, {"size": [48, 64]})),
    *(
        (MASK, [v], f"{ENTRY}.*{POLYGON}")
        for v in ([], [1, 2, 3, 4], [1] * 7, "abcdef", 5, None, {})
    ),
    *(
        (f"{MASK}.0.2", v, f"{ENTRY}.*({POLYGON}|{FAR})")
        for v in (NAN, INF, "24", None, [1], 1e300)
    ),
    *((f"{MASK}.0.2", v, f"{ENTRY}.*{FAR}") for v in (1e7, -1e7, 1e11, 300)),
    (MASK, [[0, 0, 64, 48] * 5000], f"{ENTRY}.*outline without end"),
    *(
        (MASK, code(v), f"{ENTRY}.*do not add up to its 3072")
        for v in ([5], [3072, 1], [], "", "0", b"".decode())
    ),
    *(
        (MASK, code(v), f"{ENTRY}.*lengths of runs")
        for v in ([-1, 3073], [1.0, 3071.0], ["3072"], [10**30], [None])
    ),
    *(
        (MASK, code(v), f"{ENTRY}.*not a run-length code")
        for v in ("aaaa", "P" * 9, "/0", "é", "\ud800", " ")
    ),
    *((MASK, code(v), f"{ENTRY}.*neither polygons") for v in (None, 3072, {})),
    *(
        (MASK, code([3072], size=v), f"{ENTRY}.*has size")
        for v in ([64, 48], [48.0, 64.0], None, "48", [48], 3072)
    ),
    ("annotations.3.segmentation.counts", [9], "annotation id 14.*do not add up"),  # the crowd
    ("annotations.1.segmentation.counts", lambda text: text[:-1], "annotation id 12.*counts"),
    ("annotations.1.segmentation.counts", lambda text: text + "1", "annotation id 12.*counts"),
    ("annotations.1.segmentation.counts", lambda text: text + "OO", "annotation id 12.*counts"),
]

TRAIN = [  # what training and reading refuse, but evaluation need not know
    *(("images.0.file_name", v, "image id 1.*'file_name'") for v in (..., None, "", 5, ["1.png"])),
    *(("images.0.file_name", v, "no such file") for v in ("no.png", "../data", "a\0b", "x" * 5000)),
    *(("images.0.file_name", v, "cannot be read.*replace") for v in ("text.png", "cut.jpg")),
    *(
        ("images.0.file_name", v, "no such file|cannot be read")
        for v in (".", "/dev/zero", "pipe.png")
    ),
    ("images.0.file_name", "turned.jpg", "image id 1.*64x48.*has 48x64 pixels"),
    ("images.0.width", 63, r"annotation id 12.*has size \[48, 64\], its image \[48, 63\]"),
    (f"{A}.bbox", [4, 4, 0, 10], f"{ENTRY}.*zero or negative"),
    (f"{A}.bbox", [4, 4, 10, -1], f"{ENTRY}.*zero or negative"),
    (f"{A}.bbox", [64, 4, 5, 5], f"{ENTRY}.*outside its image of 64x48"),
    (f"{A}.bbox", [4, 4, 1e11, 5], f"{ENTRY}.*far beyond its image"),
    (f"{A}.bbox", [-1e7, 4, 1e7 + 9, 5], f"{ENTRY}.*far beyond its image"),
    ("annotations", [], "no box to train on"),
    ("annotations", lambda old: old[3:], "no box to train on: of 1, 1 are crowds"),
    (
        "annotations",
        lambda old: [a | {"bbox": [0, 0, 1, 1]} for a in old],
        "all boxes lie in the first",
    ),
    ("annotations", lambda old: [a | {"bbox": [44, 24, 24, 14]} for a in old] * 1, USABLE),
]

FINE = [  # odd, but it means something
    *((f"{A}.iscrowd", v, USABLE) for v in (..., None, False)),
    *((f"{A}.area", v, USABLE) for v in (..., None, 0, 10**9)),
    *((f"{A}.id", v, USABLE) for v in (0, -5, 2**63 - 1)),
    ("categories.0.name", "\x1b[2J\nAP 100\n\ud800" + "x" * 10**6, USABLE),
    (MASK, code([3072]), USABLE),
    (MASK, [[4, 4, 4, 4, 4, 4]], USABLE),
    (MASK, [[-9, -9, 90, -9, 90, 90]], USABLE),
    ("info", [1], USABLE),
    ("images.0.void", "no matter", USABLE),
]

RESULTS = [
    *(("0", v, r"results\[0\]: is not an object") for v in (None, [], 3, "x")),
    *(
        ("0.image_id", v, r"results\[0\].*no such id in 'images'")
        for v in (..., 7, "1", [1], {}, 1.0, 10**30)
    ),
    *(("1.category_id", v, r"results\[1\].*in 'categories'") for v in (..., 7, None, [5], True)),
    *(
        ("0.score", v, r"results\[0\].*'score' must be a finite number")
        for v in (..., None, "1", NAN, INF, [1], 10**400, True)
    ),
    *(
        ("0.bbox", v, r"results\[0\].*'bbox' must be four")
        for v in (..., None, [], [1, 2, 3], [0, 0, -1, 5], [0, 0, NAN, 1], "abcd", [0, 0, "1", 1])
    ),
    *(("1.segmentation", v, r"results\[1\].*is missing or empty") for v in (..., None, [], {})),
    *(
        ("0.segmentation", v, r"results\[0\].*neither polygons")
        for v in ("x", 5, True, {"counts": 4})
    ),
    *(
        ("0.segmentation.counts", v, r"results\[0\].*neither polygons")
        for v in (..., None, 3072, {})
    ),
    *(
        ("0.segmentation.counts", v, r"results\[0\].*has counts that")
        for v in ("", "0", "aaaa", [1], [-1, 3073], [10**30], "\ud800")
    ),
    *(
        ("0.segmentation.size", v, r"results\[0\].*has size")
        for v in (..., [64, 48], [48.0, 64.0], None, [48], "48")
    ),
    ("0.segmentation", [[0, 0, 1e11, 0, 5, 5]], rf"results\[0\].*{FAR}"),
    ("0.segmentation", [[1, 2, 3]], rf"results\[0\].*{POLYGON}"),
    ("0.segmentation", [[4, 4, 24, 4, 24, 14]], USABLE),
    ("0.segmentation", code([3072]), USABLE),
    ("0.bbox", [4, 4, 0, 0], USABLE),
    ("0.score", 1, USABLE),
    ("0.extra", {"a": [1]}, USABLE),
]

VOID = [  # of Cityscapes; boxes are placeholders
    ("images.1.void", ..., "image id 2: field 'void' is missing"),
    *(
        ("images.1.void", v, "image id 2: field 'void'")
        for v in (None, 3, "x", code([5]), code("aaaa"))
    ),
    ("images.1.void", code([3072], size=[64, 48]), "image id 2: field 'void' has size"),
    ("images.1.void", code([3072]), USABLE),
]

TEXTS = [  # whole files
    *(
        (text, "cannot be read")
        for text in ("", "{", "[" * 10**5, '{"images": [,]}', "\x00", "NaN,")
    ),
    (b"\xff\xfe", "cannot be read"),
    (b'{"images": "\xe9"}', "cannot be read"),
    *((text, "the top level is a") for text in ("[]", "null", "3", '"images"', "NaN")),
    ('{"images": [{"id": 1' + "0" * 5000 + "}]}", "cannot be read"),
]


def cases() -> dict[str, tuple[Callable[[Path], str], str]]:
    """Name -> (what to run in a folder with images, what its line must say)."""
    found: dict[str, tuple[Callable[[Path], str], str]] = {}

    def add(group: str, what: str, run: Callable[[Path], str], words: str) -> None:
        what = re.sub(r"<function .*", "changed", what)
        name = f"{group} {re.sub(r'[^ -~]', '?', what)[:60]}"
        found[name + f" #{len(found)}"] = run, words

    def evaluation(*arguments: object) -> Callable[[Path], str]:
        return lambda folder: evaluate(*arguments)

    for path, value, words in [*TRUTH, *TRAIN, *FINE]:
        content = set_at(path, value, good_coco())
        add("load", f"{path}={value!r}", lambda folder, c=content: load(c, folder), words)
    for path, value, words in [*TRUTH, *FINE]:
        content = set_at(path, value, good_coco())
        add("evaluate", f"{path}={value!r}", evaluation(content, good_results()), words)
    for path, value, words in RESULTS:
        results = set_at(path, value, good_results())
        add("results", f"{path}={value!r}", evaluation(good_coco(), results), words)
    for value in (None, {}, "results.json", 5):
        run = evaluation(good_coco(), value)
        add("results", repr(value), run, "results for val.json are a")
    for path, value, words in VOID:
        content = good_coco()
        for image in content["images"]:
            image["void"] = encode_mask(rectangle(0, 0, 9, 9))
        for annotation in content["annotations"]:
            annotation["bbox"] = [0, 0, 1, 1]
        content = set_at(path, value, content)
        bare = [{k: v for k, v in result.items() if k != "bbox"} for result in good_results()]
        add("void", f"{path}={value!r}", evaluation(content, bare, "cityscapes"), words)
    for text, words in TEXTS:
        add("text", repr(text), lambda folder, t=text: load(t, folder), words)
    return found


CASES = cases()


def main() -> None:
    """The child: answers every case with a line of JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        os.mkfifo(folder / "pipe.png")
        (folder / "text.png").write_text("no image")
        picture = Image.open(folder / "1.png")
        picture.save(content := io.BytesIO(), "JPEG")
        (folder / "cut.jpg").write_bytes(content.getvalue()[:300])
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(folder / "turned.jpg", exif=exif)
        for case, (run, _) in CASES.items():
            try:
                answer = run(folder).replace(name, "FOLDER")
            except BaseException as error:
                answer = f"TRACEBACK {error!r}"[:500]
            print(json.dumps([case, answer]), flush=True)


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", __file__]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
        out, why = ended.stdout, f"the child ended with {ended.returncode}: {ended.stderr[-500:]}"
    except subprocess.TimeoutExpired as error:
        out, why = (error.stdout or b"").decode(), "the child hangs"
    return dict(map(json.loads, out.splitlines())) | {"": why}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_said_in_one_line_or_means_something(answers, case):
    answer, words = answers.get(case, f"NO ANSWER: {answers['']}"), CASES[case][1]
    if words == USABLE:
        assert answer == USABLE
        return
    assert re.search(words, answer), answer
    assert answer.isprintable()
    assert len(answer) <= 2000
    assert re.match("FOLDER/|/dev/zero|val.json: |results for val.json", answer), (
        answer
    )  # which file


def test_all_entries_with_a_fault_are_counted_and_the_first_are_named():
    results = [result | {"score": NAN} for result in good_results() * 4]
    with pytest.raises(EvaluationError) as caught:
        evaluate_coco(good_coco(), results, 100)
    named = ", ".join(f"results[{i}]" for i in range(1, 5))
    assert str(caught.value).endswith(
        f"results[0]: field 'score' must be a finite number, found nan;"
        f" correct it (and 7 more: {named}, ...)"
    )


def test_faults_of_different_fields_are_said_together():
    coco = set_at(f"{A}.bbox", [1], set_at("annotations.1.area", -1, good_coco()))
    with pytest.raises(
        EvaluationError, match=r"id 12: field 'area'.*\. Also: .*id 11: field 'bbox'"
    ):
        evaluate_coco(coco, [], 100)


def test_nothing_is_changed_by_a_check():
    coco, results = good_coco(), good_results()
    evaluate(coco, results)
    assert (coco, results) == (good_coco(), good_results())


def test_class_names_forge_no_rows_of_a_table():
    names = ["\x1b[2J", "a\n b   100.0", "\ud800", "x" * 10**6]
    per_class = dict.fromkeys(names, 1.0)
    table = format_table({"segm": {"AP": 1.0, "per_class": per_class}})
    lines = table.splitlines()
    assert len(lines) == 4 + len(names)
    assert max(map(len, lines)) < 100
    assert all(line.isprintable() for line in lines)
    table.encode()


# --- classes --------------------------------------------------------------------------------------

KNOWN = Classes(["cat", "dog"], [1, 5], "train.json")


@pytest.mark.parametrize(
    ("names", "ids", "words"),
    [
        (["dog", "cat"], [1, 5], "category id 1 is 'dog', but in train.json it is 'cat'"),
        (["cat"], [1], "lacks 'dog'"),
        (["cat", "dog", "cow"], [1, 5, 6], "has 'cow'"),
        (["Cat", "dog"], [1, 5], "has 'Cat' and lacks 'cat'"),
        (["cat", "x\n" * 10**5], [1, 5], "lacks 'dog'"),
    ],
)
def test_other_classes_are_refused(names, ids, words):
    with pytest.raises(UserError, match=words) as caught:
        match_classes(Classes(names, ids, "val.json"), KNOWN)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ids", [[0, 1], [2, 3], [7, -7], [2**62, 0]])
def test_other_ids_of_equal_names_are_the_same_classes(ids):
    found = match_classes(Classes(["dog", "cat"], ids, "val.json"), KNOWN)
    assert found.names == KNOWN.names
    assert found.ids == ids[::-1]


def test_classes_without_names_are_in_the_order_of_their_ids():
    """A published file says only how many there are."""
    published = Classes(["class 1", "class 2"], [1, 2], "published.pth")
    assert match_classes(Classes(["rider", "car"], [25, 26], "a.json"), published).ids == [25, 26]
    with pytest.raises(UserError, match="'class 1', 'class 2'"):
        match_classes(Classes(["rider"], [25], "a.json"), published)


# --- whatever is annotated ------------------------------------------------------------------------

ODD = st.sampled_from(
    [None, True, -1, 0, 1, 2**70, 1.5, NAN, 1e11, "", "0", [], [[]], {}, "x" * 99]
)
COORDINATES = st.one_of(st.integers(-80, 80), st.floats(-300, 300), st.sampled_from([1e7, 64.0]))
MASKS = st.one_of(
    st.lists(st.lists(COORDINATES, max_size=12), max_size=3),
    st.builds(code, st.one_of(st.text("0123O`aPQk", max_size=12), st.lists(st.integers(0, 4000)))),
    st.builds(lambda x, y, w, h: listed(rectangle(x, y, w, h)), *[st.integers(0, 40)] * 4),
    ODD,
)
FIELDS = {
    "id": st.integers(0, 9),
    "image_id": st.sampled_from([1, 2]),
    "category_id": st.sampled_from([1, 5]),
    "iscrowd": st.sampled_from([0, 1, None]),
    "area": st.floats(0, 4000),
    "bbox": st.lists(COORDINATES, min_size=4, max_size=4),
    "segmentation": MASKS,
}


@st.composite
def annotation_lists(draw: st.DrawFn) -> list[dict]:
    """Good ones, of which a few have one other field."""
    annotations = copy.deepcopy(good_coco()["annotations"])
    for annotation in annotations:
        if draw(st.booleans()):
            field = draw(st.sampled_from(list(FIELDS)))
            annotation[field] = draw(st.one_of(FIELDS[field], FIELDS[field], ODD))
    return annotations


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(annotation_lists())
def test_whatever_is_annotated_is_refused_in_one_line_or_loads_and_evaluates(tmp_path, annotations):
    if not (tmp_path / "1.png").exists():
        write_images(tmp_path)
    coco = good_coco() | {"annotations": annotations}
    answer = load(coco, tmp_path)
    evaluated = evaluate(coco, good_results())
    for found in {answer, evaluated} - {USABLE}:
        assert found.isprintable()
        assert len(found) <= 2000
    if answer == USABLE:
        assert evaluated == USABLE or "needs true masks" in evaluated


# --- the check of masks, many at once -------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 3)), max_size=9))
def test_extents_of_many_masks_are_those_of_their_pixels(draws):
    masks, sizes, wanted = [], [], []
    for seed, kind in draws:
        rng = np.random.default_rng(seed)
        height, width = rng.integers(1, 12, 2).tolist()
        mask = rng.random((height, width)) < rng.choice([0.0, 0.03, 0.5, 1.0])
        text = encode_mask(mask)
        runs = run_lengths(text).tolist()
        masks.append(
            [text, text | {"counts": runs}, text | {"counts": text["counts"].encode()}, None][kind]
        )
        sizes.append((width, height))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if mask.any() else [0] * 4
        wanted.append(edges if kind < 3 else [NAN] * 4)
    extents, bad = mask_extents(masks, np.array(sizes, dtype=int).reshape(-1, 2))
    assert bad == {}
    np.testing.assert_array_equal(extents, np.reshape(wanted, (-1, 4)))


def test_one_bad_mask_among_many_is_named_and_the_others_are_measured():
    good = good_coco()["annotations"]
    masks = [a["segmentation"] for a in good] + [code("aaaa"), [[1, 2]], [[0, 0, 1e9, 0, 1, 1]]]
    extents, bad = mask_extents(masks, np.tile([64, 48], (len(masks), 1)))
    assert sorted(bad) == [4, 5, 6]
    assert extents[:4].tolist() == [
        [4, 4, 24, 14],
        [30, 20, 46, 36],
        [0, 30, 20, 40],
        [40, 0, 64, 48],
    ]


# --- plausible.py ---------------------------------------------------------------------------------


def random_boxes(count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y, width, height; their corners; image sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(200, 900, (count, 2))
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * sizes[:, None]
    corners = np.add(corners, [[[0, 0], [9, 7]]]).reshape(count, 4).clip(0, np.tile(sizes, 2))
    return np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]), corners, sizes


def test_each_form_undoes_what_an_export_did():
    boxes, corners, sizes = random_boxes()
    (x, y, w, h), (x1, y1, x2, y2) = boxes.T, corners.T
    written = {
        AS_IS: (x, y, w, h),
        CORNERS: (x1, y1, x2, y2),
        CENTERS: (x + w / 2, y + h / 2, w, h),
        "[y, x, height, width]": (y, x, h, w),
        "[y1, x1, y2, x2]": (y1, x1, y2, x2),
        "[x, y, height, width]": (x, y, h, w),
        f"{AS_IS}, y upwards": (x, sizes[:, 1] - y - h, w, h),
        f"{CENTERS} as fractions of the image": np.divide(
            (x + w / 2, y + h / 2, w, h), np.tile(sizes.T, (2, 1))
        ),
        f"{AS_IS} in percent of the image": np.divide((x, y, w, h), np.tile(sizes.T, (2, 1))) * 100,
    }
    for form, numbers in written.items():
        found = np.stack(numbers, axis=1)
        np.testing.assert_allclose(forms(found, sizes)[form], corners, atol=1e-9)
        if form != AS_IS:
            assert form in likely_form(found, corners, sizes)
        else:
            assert likely_form(found, corners, sizes) == ""
    # One box of a hundred is wrong: the form is not.
    small = np.tile([[10.0, 20, 30, 40]], (100, 1))
    small[0, 0] = 300
    assert likely_form(small, None, np.tile([[96, 400]], (100, 1))) == ""


def test_a_box_fits_its_mask_or_without_one_its_image():
    sizes, nothing = np.array([[100, 100]]), np.full((1, 4), NAN)

    def fit(corners: list, extents: object = nothing) -> bool:
        return bool(fits(np.array([corners]), np.array(extents), sizes))

    assert fit([0, 0, 103, 50])
    assert not fit([0, 0, 104, 50])
    assert not fit([9, 9, 9, 20])
    assert fit([0, 0, 50, 50], [[0, 0, 50, 30]])
    assert not fit([0, 0, 50, 50], [[0, 0, 50, 20]])
    assert fit([10, 10, 13, 13], [[12, 12, 15, 15]])  # small: two pixels


def test_doubts_name_what_hardly_can_be_meant():
    boxes, corners, sizes = random_boxes()
    ids, areas = list(range(len(boxes))), boxes[:, 2:].prod(1)
    assert doubts(ids, boxes, corners, sizes, areas) == []
    assert doubts(ids, boxes, np.full_like(corners, NAN), sizes, areas * NAN) == []
    (note,) = doubts(ids, corners, corners, sizes, areas * NAN)
    assert f"if 'bbox' was {CORNERS}" in note
    (note,) = doubts(ids, boxes, corners + 1, sizes, areas)
    assert "(-1.0, -1.0) pixels from their masks" in note
    (note,) = doubts(ids, boxes, corners, sizes, areas * 2)
    assert note.startswith("60 of 60 areas do not go with their boxes")
    (note,) = doubts(ids, boxes / 2, corners / 2, sizes, areas / 4)
    assert "no box reaches beyond" in note
    (note,) = doubts(ids, boxes, corners * 2, sizes * 2, areas)[:1]
    assert "2 times as large" in note


# --- buffers --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=4), max_size=6))
def test_ragged_is_a_list_of_lists(lists):
    parts = [part for item in lists for part in item]
    flat = np.array([number for part in parts for number in part], dtype=int)
    inner = Ragged(flat, [*map(len, parts)])
    outer = Ragged(inner, [*map(len, lists)])
    assert [part.tolist() for part in inner] == parts
    assert [[part.tolist() for part in item] for item in outer] == lists
    assert len(outer) == len(lists)
    if lists:
        assert [part.tolist() for part in outer[-1]] == lists[-1]
    with pytest.raises(IndexError):
        outer[len(lists)]


@pytest.mark.parametrize(
    ("numbers", "unit"),
    [
        ([0, 1.25, 639.99, 655.35], 100),
        ([-0.01, 700.5], 100),
        ([], 100),
        ([1 / 3], 1),
        ([0.001], 1),
        ([3e7], 1),
        ([NAN], 1),
        ([INF], 1),
    ],
)
def test_packed_numbers_are_the_same(numbers, unit):
    numbers = np.array(numbers, dtype=float)
    with np.errstate(invalid="ignore"):
        packed, found = pack(numbers)
    assert found == unit
    np.testing.assert_array_equal(packed / found, numbers)


# --- image files ----------------------------------------------------------------------------------


def bmp_of(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


IMAGES = {
    "empty.png": b"",
    "text.jpg": b"no image",
    "half.png": "half",
    "large.bmp": bmp_of(10**6, 10**6),
    "lies.bmp": bmp_of(64, 48),  # a header without pixels
    "html.jpg": b"<!DOCTYPE html><html>404</html>",
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_file_that_is_no_whole_image_is_named(tmp_path, name):
    write_images(tmp_path)
    whole = (tmp_path / "1.png").read_bytes()
    content = whole[: len(whole) // 2] if IMAGES[name] == "half" else IMAGES[name]
    (tmp_path / name).write_bytes(content)
    answer = load(set_at("images.0.file_name", name, good_coco()), tmp_path)
    assert re.search(rf"{re.escape(name)} cannot be read \(.*\); replace it", answer), answer
    assert answer.isprintable()


def test_12_of_16_bits_are_said(tmp_path):
    from boxteacher.data import dark_images

    pixels = np.random.default_rng(0).integers(0, 4096, (48, 64)).astype(np.uint16)
    for n in (1, 2):
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    for contrast, notes in (("none", 1), ("stretch", 0)):
        geometry, loader = Geometry(scales=(1.0,)), image_loader(tmp_path, contrast)
        found = dark_images(CocoDataset(good_coco(), loader, geometry, True))
        assert len(found) == notes
        assert all("12 of 16 bits? --contrast stretch" in note for note in found)


if __name__ == "__main__":
    main()
