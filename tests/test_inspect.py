"""inspect.py and report.py: what the method sees, and what a run says, as people look at it."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from boxteacher import losses
from boxteacher.checkpoint import save_checkpoint
from boxteacher.coco import DataError
from boxteacher.command_line import parse
from boxteacher.config import ConfigError, to_json
from boxteacher.data import collate, make_train_set
from boxteacher.errors import UserError
from boxteacher.model import build_model
from boxteacher.reporting import RunLog
from boxteacher.shapes import CLASS_NAMES
from boxteacher.tools import inspect, report, statistics
from boxteacher.tools.statistics import pair_shares
from boxteacher.visualize import chart, smooth, ticks

torch.set_num_threads(1)

WORDS = """shapes --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1
    --device cpu --norm gn --mask-norm gn --shapes-size 64 --shapes-train 6 --train-sizes 64
    --train-max-size 64 --test-size 64 --test-max-size 96 --size-unit 16 --teacher-size 96
    --iou-threshold 0.2""".split()


@pytest.fixture(scope="module")
def model():
    """It detects something everywhere."""
    torch.manual_seed(1)
    model = build_model(parse(WORDS), len(CLASS_NAMES))
    with torch.no_grad():
        model.head.class_logits.bias.fill_(0.5)
        model.head.distances.bias.fill_(1.5)
        model.head.controller.weight.normal_(std=0.03)
        model.head.controller.bias.normal_(std=0.4)[-1] = 4.0
    return model.eval()


@pytest.fixture(scope="module")
def batch(model):
    return collate([make_train_set(model.cfg)[0, 0]])


def run(monkeypatch, module, *argv):
    monkeypatch.setattr("sys.argv", [str(word) for word in (module.__name__, *argv)])
    module.main()


# --- inspect --------------------------------------------------------------------------------------


def test_pictures_are_made_of_every_image(model, tmp_path, monkeypatch):
    state = {"config": dataclasses.asdict(model.cfg), "class_names": list(CLASS_NAMES), "step": 1}
    state |= {"category_ids": [1, 2, 3, 4, 5, 6], "student": model.state_dict()}
    save_checkpoint(tmp_path / "last.pt", state | {"teacher": None, "optimizer": None})
    words = ("--checkpoint", tmp_path / "last.pt", "--output", tmp_path / "out", "--images", 3)
    run(monkeypatch, inspect, *words)
    pictures = [Image.open(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len(pictures) == 3
    assert all(picture.width > 4 * inspect.SIDE for picture in pictures)
    assert all(picture.height > inspect.SIDE for picture in pictures)


def test_the_classes_of_the_data_must_be_those_of_the_checkpoint(model, tmp_path, monkeypatch):
    state = {"config": dataclasses.asdict(model.cfg), "class_names": list(CLASS_NAMES[:5])}
    student = build_model(model.cfg, 5).state_dict()
    state |= {"category_ids": [1, 2, 3, 4, 5], "step": 1, "student": student}
    save_checkpoint(tmp_path / "last.pt", state | {"teacher": None, "optimizer": None})
    words = ("--checkpoint", tmp_path / "last.pt", "--output", tmp_path / "out")
    with pytest.raises(DataError, match=CLASS_NAMES[5]):
        run(monkeypatch, inspect, *words)


def test_the_pseudo_masks_are_those_of_the_teachers_step(model, batch):
    """What is assigned in the picture is what has a weight in the step."""
    step = inspect.teacher_step(model, batch)
    pseudo = model.make_pseudo_masks(batch)
    weights = pseudo.weights[0, batch.valid[0]]
    assert torch.equal(step.pseudo.masks, pseudo.masks)
    assert len(step.assigned) == len(weights)
    assert any(d >= 0 for d in step.assigned)
    assert {d for d in step.assigned if d >= 0} <= set(step.shown)
    for g, (weight, detection) in enumerate(zip(weights.tolist(), step.assigned, strict=True)):
        wanted = step.found.scores[detection].item() if detection >= 0 else 0.0
        assert weight == pytest.approx(wanted, abs=1e-5)
        if detection >= 0:  # its mask, cut to the box, is the pseudo mask
            mask = step.probs[step.shown.index(detection), 2::4, 2::4] > 0.5
            box = losses.box_masks(batch.boxes[0, g], *pseudo.masks.shape[-2:])
            assert torch.equal(mask & box, pseudo.masks[0, g])


def test_pairs_inside_a_box_are_blue_and_those_across_its_edge_red():
    """In an image of one color all pairs look alike."""
    image = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    boxes = torch.zeros(1, 8, 4)
    boxes[0, 0] = torch.tensor([16.0, 16, 47, 47])
    valid = (torch.arange(8) == 0)[None]
    batch = collate_like(image, boxes, valid)
    picture = np.array(inspect.color_pairs(image[0], batch, 0.3)).astype(int)
    red, _, blue = picture[:: inspect.SIDE // 16, :: inspect.SIDE // 16].transpose(2, 0, 1)[
        :, :16, :16
    ]
    assert (blue > red)[7:9, 7:9].all()  # far from the edge
    assert red[5, 5] > red[8, 8]
    assert red[0, 0] == blue[0, 0]  # gray: outside


def collate_like(image, boxes, valid):
    from boxteacher.data import Batch

    empty = torch.zeros(1, 8, dtype=torch.int64)
    sizes = [tuple(image.shape[-2:])]
    return Batch(image, sizes, boxes, empty, valid, boxes[..., :2], None, None, [0], [1])


def test_options_of_inspect_that_do_not_go_together_are_refused(monkeypatch):
    for words in ([], ["--statistics", "--checkpoint", "a.pt", "--output", "b"], ["--output", "b"]):
        with pytest.raises(ConfigError, match="give either --statistics, or --checkpoint"):
            run(monkeypatch, inspect, *words)
    with pytest.raises(ConfigError, match="nuclei: --checkpoint has its own configuration"):
        run(monkeypatch, inspect, "nuclei", "--checkpoint", "last.pt", "--output", "pictures")


def test_figures_of_photographs_bring_no_advice_and_others_do():
    cfg = parse(["coco_boxinst_r50_1x"])
    found = dict(alike_in_box=30.0, leaks=9.0, wrong_pulls=1.8, leaky_objects=3.4)
    found |= dict(longer_sides_of_boxes=[20.0, 90.0, 500.0], objects_per_image=[1.0, 5.0, 20.0])
    assert statistics.advice(found, cfg) == []
    odd = dict(
        alike_in_box=[2.0, 80.0],
        leaks=[40.0],
        wrong_pulls=[15.0],
        leaky_objects=[30.0],
        longer_sides_of_boxes=[[4.0, 90.0, 500.0], [20.0, 400.0, 600.0]],
        objects_per_image=[[1.0, 5.0, 300.0]],
    )
    for name, values in odd.items():
        for value in values:
            (line,) = statistics.advice(found | {name: value}, cfg)
            assert re.search(r"--[a-z-]+|masks will be too large|times as large", line)


def test_shares_without_any_pair_are_0():
    assert not any(pair_shares(torch.zeros(2, 3, 2).long(), torch.ones(2).bool()).values())


def test_statistics_print_rows_advice_and_json(monkeypatch, capsys):
    words = ("--statistics", "--images", "3", "--color-threshold", "0.99")
    run(monkeypatch, inspect, *WORDS, *words)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["images"] == 3
    assert any(line.endswith("lower --color-threshold") for line in lines)


# --- report ---------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Two runs: a BoxTeacher with two evaluations and a sheet, and one that has just begun."""
    folders = tmp_path / "first", tmp_path / "se<co>nd"
    for folder, mode in zip(folders, ("boxteacher", "boxinst"), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(to_json(parse(["shapes", f"--mode={mode}"])))
    lines = []
    for step in range(20, 1001, 20):
        line = {"step": step, "lr": 1e-3, "images_per_s": 10.0, "loss": 3 - step / 1000}
        line |= {"class": 1.0, "pseudo_mask": None if step == 20 else 0.5}
        lines.append(line | {"pseudo_mask_iou": step / 2000, "pseudo_masks_share": 0.9})
        if step % 500 == 0:
            table = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), step / 50)
            table["per_class"] = {"star & ring": 12.34, "blob": None}
            lines.append({"step": step, "evaluation": {"segm": table, "bbox": table}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folders[0] / "metrics.jsonl").write_text(text + '{"step": 1020, "lo')  # cut off by a crash
    (folders[1] / "metrics.jsonl").write_text(json.dumps({"step": 20, "loss": 2.5}) + "\n")
    Image.new("RGB", (60, 40), (9, 200, 30)).save(folders[0] / "contact_sheet.png")
    return folders


class Page(HTMLParser):
    """Checks that tags close in order, and collects what the test looks at."""

    VOID = ("meta", "img", "path")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_has_tables_curves_and_pictures_and_needs_nothing_else(runs, tmp_path, monkeypatch):
    run(monkeypatch, report, *runs, "--output", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    assert "se<co>nd" in words  # escaped in the page
    assert "20.0" in words  # AP of the last evaluation, not of the first
    assert "star & ring" in words
    assert "12.3" in words
    assert "1000 of 1800" in words
    assert "max_mask_locations" not in words  # equal in both runs
    charts = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert {"mask AP", "box AP", "loss: class", "IoU of pseudo masks with true masks"} <= {*charts}
    assert "loss: step" not in charts
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    for _, attributes in page.tags:
        assert all(attributes[k].startswith("data:") for k in ("src", "href") if k in attributes)
    assert "http" not in text


def test_the_columns_are_those_of_the_runs_metrics(runs, tmp_path, monkeypatch):
    lines = [{"APs": 22.2}, {"AP25": 71.5}]  # --resume --metric voc
    lines = [{"step": 9, "evaluation": {"segm": table | {"per_class": {}}}} for table in lines]
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(monkeypatch, report, runs[1], "--output", tmp_path / "report.html")
    words = " ".join(Page((tmp_path / "report.html").read_text()).words)
    assert "mask AP25" in words
    assert "71.5" in words
    assert "APs" not in words
    assert "22.2" not in words


def test_a_run_that_diverged_has_a_page(runs, tmp_path, monkeypatch):
    """JSON has no infinity, and a run writes none. Names may be no Unicode."""
    log = RunLog(tmp_path / "metrics.jsonl", parse(["shapes", "--device", "cpu"]), 0)
    log.step(20, 1e-3, {"class": torch.tensor(math.inf)}, {})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    shutil.copy(tmp_path / "metrics.jsonl", runs[1])
    odd = runs[1].rename(tmp_path / os.fsdecode(b"\xff"))
    run(monkeypatch, report, runs[0], odd, "--output", tmp_path / "report.html")
    Page((tmp_path / "report.html").read_text())


def test_the_page_opens_in_a_browser(runs, tmp_path, monkeypatch):
    """Its screenshot has the curve's color and the picture."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no browser is installed")
    run(monkeypatch, report, *runs, "--output", tmp_path / "report.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,4000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'shot.png'}"]
    command = [browser, *options, (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pixels = np.array(Image.open(tmp_path / "shot.png").convert("RGB"))
    curve = tuple(int(report.COLORS[0][k : k + 2], 16) for k in (1, 3, 5))
    assert (pixels == curve).all(-1).sum() > 500
    assert (np.abs(pixels.astype(int) - (9, 200, 30)) < 3).all(-1).sum() == 60 * 40


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not the folder of a run"):
        run(monkeypatch, report, tmp_path)
    for content in ("{}", "[]", "1"):  # of another program
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="not the folder of a run"):
            run(monkeypatch, report, tmp_path)


def test_curves_stay_in_their_frame_and_outliers_leave_it():
    points = [(k, 1.0) for k in range(1, 200)] + [(200, 1e6)]
    svg = chart("title", {"a": ("#123456", points)})
    for line in re.findall(r'polyline points="([^"]+)"', svg):
        places = np.array([place.split(",") for place in line.split()], dtype=float)
        assert (places >= 0).all()
        assert (places <= (400, 230)).all()
        assert np.ptp(places[:-1, 1]) < 1  # the scale is that of the ordinary values
    assert chart("title", {"a": ("#123456", [])}) == ""
    svg = chart("title", {"a": ("#123456", [(1, 0.0), (2, 0.0)])})  # as AP at the start
    assert ">0.8</text>" in svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3e-4), (0, 1800), (-2.5, 7), (0, 90000)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert low - 1e-9 <= found[0]
    assert found[-1] <= high + 1e-9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:e}"[0] in "125"


def test_smoothing_keeps_means():
    points = [(float(k), float(k % 7)) for k in range(400)]
    smoothed = smooth(points)
    assert len(smoothed) == 40
    assert np.mean([y for _, y in smoothed]) == pytest.approx(np.mean([y for _, y in points]))
    assert smooth(points[:5]) == points[:5]


@pytest.mark.parametrize("cut", [0, 16])
def test_losses_and_statistics_count_the_same_pairs(batch, cut):
    """What `--statistics` calls alike is what the pairwise loss weighs, with bottom rows or not."""
    batch = batch._replace(cut_rows=[cut])
    counts = statistics.pair_counts(batch, 0.3)
    rows, columns = (side // 4 for side in batch.images.shape[-2:])
    reliable = [(height - cut, width) for height, width in batch.sizes]
    on_image = losses.inside_masks(reliable, rows, columns)
    alike = losses.color_similarity(batch.images, on_image) >= 0.3
    in_box = losses.box_masks(batch.boxes, rows, columns)[:, batch.valid[0]]
    _, weights = losses.color_pairwise_sums(torch.zeros(in_box.shape), alike, in_box)
    assert counts[..., 1].sum(1).tolist() == weights[0].tolist()
