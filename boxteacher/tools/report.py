"""One page about one run or several: curves, tables, pseudo masks over time, pictures.

    python -m boxteacher.tools.report RUN ... [--output report.html]

RUN is a folder that train.py wrote. The page is one HTML file without scripts. It needs no network.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from boxteacher import errors
from boxteacher.coco_eval import COLUMNS
from boxteacher.command_line import Parser
from boxteacher.config import FIELDS
from boxteacher.files import write_text
from boxteacher.visualize import Points, chart

COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#8f5db7", "#c77800", "#00868b", "#7a4b3a", "#555555")
FLYWHEEL = {
    "pseudo_mask_iou": "IoU of pseudo masks with true masks",
    "mask_aware_score": "mask-aware score of pseudo masks",
    "pseudo_masks_share": "share of boxes with a pseudo mask",
    "mask_fill": "share of the box that masks fill",
}
OTHER = {
    "similar_pair_share": "share of pairs of similar color",
    "lost_boxes": "share of boxes without a location",
    "lr": "learning rate",
    "images_per_s": "images per second",
}
NOT_LOSSES = {"step", "loss", "pseudo_masks_per_image", "lost_side", *FLYWHEEL, *OTHER}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1280px;
       padding: 0 1em }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
.charts { display: flex; flex-wrap: wrap; gap: 12px }
.scroll { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: 3px 10px; border-bottom: 1px solid #ddd }
td { text-align: right; white-space: nowrap } th { text-align: left }
svg text { font: 11px system-ui, sans-serif; fill: #444 } svg .title { font-size: 13px; fill: #000 }
img { max-width: 100% } .key { display: inline-block; width: 12px; height: 12px; margin-right: 6px }
"""


class Run:
    """What a run's folder says."""

    def __init__(self, folder: Path, name: str, color: str) -> None:
        self.folder, self.name, self.color = folder, name, color
        self.key = f'<span class="key" style="background:{color}"></span>{escape(name)}'
        try:
            self.config = json.loads((folder / "config.json").read_text())
            texts = (folder / "metrics.jsonl").read_text().splitlines()
        except (OSError, ValueError) as error:
            raise errors.UserError(f"{folder}: not the folder of a run ({error})") from None
        self.lines = []
        for text in texts:
            try:
                self.lines.append(json.loads(text))
            except ValueError:
                continue  # cut off by a crash
        self.tables = [line for line in self.lines if "evaluation" in line]
        self.steps = [line for line in self.lines if "evaluation" not in line]
        given = folder / "given_boxes.json"  # written by boxteacher.tools.label
        self.given = json.loads(given.read_text())["all"].get("masks", {}) if given.exists() else {}

    def curve(self, name: str) -> Points:
        found = ((line["step"], line.get(name)) for line in self.steps)
        return [(step, value) for step, value in found if value is not None]

    def ap(self, kind: str, metric: str) -> Points:
        found = ((t["step"], t["evaluation"].get(kind, {}).get(metric)) for t in self.tables)
        return [(step, value) for step, value in found if value is not None]

    def last(self) -> dict[str, Any]:
        return self.tables[-1]["evaluation"] if self.tables else {}


# --- pieces of the page ---------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML. The first of a row is its name."""
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name, *cells in rows:
        lines.append(f"<tr><th>{name}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def charts(runs: Sequence[Run], titles: dict[str, str], read: Callable[[Run, str], Points]) -> str:
    all_charts = (
        chart(title, {run.name: (run.color, read(run, name)) for run in runs})
        for name, title in titles.items()
    )
    return '<div class="charts">' + "\n".join(all_charts) + "</div>"


# --- the page -------------------------------------------------------------------------------------


def page(runs: Sequence[Run]) -> str:
    parts = ["<h1>Training runs</h1>"]

    # Results side by side, and what the runs do not share.
    kinds = {"segm": "mask", "bbox": "box"}
    heads = ["run", "mode", "steps", *(f"{k} {m}" for k in kinds.values() for m in COLUMNS["coco"])]
    heads += ["given boxes: mean IoU", "over 0.75", "images/s"]
    rows = []
    for run in runs:
        speeds = sorted(value for _, value in run.curve("images_per_s"))
        done = run.lines[-1]["step"] if run.lines else 0
        rows.append(
            [
                run.key,
                escape(run.config["mode"]),
                f"{done} of {run.config['steps']}",
                *(shown(run.last().get(k, {}).get(m)) for k in kinds for m in COLUMNS["coco"]),
                shown(run.given.get("mean_iou"), 3),
                shown(run.given.get("over_75"), 3),
                shown(speeds[len(speeds) // 2] if speeds else None),
            ]
        )
    parts += ["<h2>Results</h2><p>AP, 0 to 100, of the last evaluation.</p>", table(heads, rows)]
    words = {f: [str(run.config.get(f, "")).strip("[]") for run in runs] for f in FIELDS}
    differing = [f for f in FIELDS if len(set(words[f])) > 1 and f != "out"]
    if differing:
        rows = [[escape(f), *(escape(word) for word in words[f])] for f in differing]
        parts += ["<h2>Settings that differ</h2>", table(["field", *(r.key for r in runs)], rows)]

    # Curves.
    aps = {"AP": "mask AP", "AP50": "mask AP50", "AP75": "mask AP75"}
    parts += ["<h2>Evaluations</h2>", charts(runs, aps, lambda run, m: run.ap("segm", m))]
    parts.append(charts(runs, {"AP": "box AP"}, lambda run, m: run.ap("bbox", m)))
    parts += ["<h2>Pseudo masks over time</h2>", charts(runs, FLYWHEEL, Run.curve)]
    names = {name: name for run in runs for line in run.steps for name in line}
    losses = {name: f"loss: {name}" for name in names if name not in NOT_LOSSES}
    losses = {"loss": "loss, all together"} | losses
    parts += ["<h2>Losses</h2>", charts(runs, losses, Run.curve)]
    parts += ["<h2>Other measurements</h2>", charts(runs, OTHER, Run.curve)]

    # Classes and pictures.
    classes = {c: c for run in runs for table in run.last().values() for c in table["per_class"]}
    if len(classes) > 1:
        heads = ["class", *(f"{run.key}, {kind}" for run in runs for kind in kinds.values())]
        rows = []
        for name in classes:
            cells = (run.last().get(k, {}).get("per_class", {}) for run in runs for k in kinds)
            rows.append([escape(name), *(shown(of_class.get(name)) for of_class in cells)])
        parts += ["<h2>AP of each class</h2>", table(heads, rows)]
    for run in runs:
        sheet = run.folder / "contact_sheet.png"
        if sheet.exists():
            data = base64.b64encode(sheet.read_bytes()).decode()
            image = f'<img alt="contact sheet" src="data:image/png;base64,{data}">'
            parts.append(f"<h2>{run.key}: contact sheet</h2>{image}")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Training runs</title><style>{STYLE}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def main() -> None:
    parser = Parser("python -m boxteacher.tools.report RUN ... [...]", __doc__, fields=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    default = Path("report.html")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help=str(default))
    args, _ = parser.read(sys.argv[1:])
    runs = []
    for number, folder in enumerate(args.runs):
        is_unique = sum(other.name == folder.name for other in args.runs) == 1
        name = folder.name if is_unique else str(folder)
        runs.append(Run(folder, name, COLORS[number % len(COLORS)]))
    write_text(args.output, page(runs))
    print(args.output)


if __name__ == "__main__":
    errors.run(main)
