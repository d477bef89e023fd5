"""One page about one run or several: curves, tables, pseudo masks over time, pictures.

    python -m boxteacher.tools.report RUN ... [--output report.html]

RUN is a folder that train.py wrote. The page is one HTML file without scripts. It needs no network.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from boxteacher import errors
from boxteacher.coco_eval import COLUMNS
from boxteacher.command_line import Parser
from boxteacher.config import FIELDS
from boxteacher.files import write_text
from boxteacher.reporting import WHAT_AP_DEPENDS_ON, read_lines
from boxteacher.visualize import Points, chart

COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#8f5db7", "#c77800", "#00868b", "#7a4b3a", "#555555")
KINDS = {"segm": "mask", "bbox": "box"}
TEACHING = {
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
NOT_LOSSES = {"step", "loss", "pseudo_masks_per_image", "lost_side", *TEACHING, *OTHER}
NOT_LOSSES |= {"evaluation", "evaluation_s", *WHAT_AP_DEPENDS_ON}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1280px; padding: 0 1em }
.charts { display: flex; flex-wrap: wrap; gap: 12px } .scroll { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: 3px 10px; border-bottom: 1px solid #ddd }
td { text-align: right; white-space: nowrap } th { text-align: left }
svg text { font: 11px system-ui, sans-serif; fill: #444 } svg .title { font-size: 13px; fill: #000 }
img { max-width: 100% } .key { display: inline-block; width: 12px; height: 12px; margin-right: 6px }
"""


class Run:
    """What a run's folder says."""

    def __init__(self, folder: Path, color: str) -> None:
        self.name, self.color, self.sheet = str(folder), color, folder / "contact_sheet.png"
        self.key = f'<span class="key" style="background:{color}"></span>{escape(self.name)}'
        given = folder / "given_boxes.json"  # written by boxteacher.tools.label
        try:
            self.config = json.loads((folder / "config.json").read_text())
            self.mode, self.steps = self.config["mode"], self.config["steps"]
            given = json.loads(given.read_text()) if given.exists() else {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise errors.UserError(f"{folder}: not the folder of a run ({error})") from None
        self.given = given.get("all", {}).get("masks", {})
        self.lines = read_lines(folder / "metrics.jsonl")
        tables = (line["evaluation"] for line in reversed(self.lines) if line.get("evaluation"))
        self.tables = next(tables, {})  # of the last evaluation

    def curve(self, *path: str) -> Points:
        """Steps and values of a figure: "loss", or "evaluation", "segm", "AP"."""
        points = []
        for line in self.lines:
            value: Any = line
            for key in path:
                value = (value or {}).get(key)
            points += [(line["step"], value)] if value is not None else []
        return points

    def last(self, *path: str, digits: int = 1) -> str:
        points = self.curve(*path)
        return f"{points[-1][1]:.{digits}f}" if points else "-"


# --- pieces of the page ---------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML. The first of a row is its name."""
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for name, *cells in rows:
        lines.append(f"<tr><th>{name}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def charts(runs: Sequence[Run], titles: dict[str, str], *path: str) -> str:
    """A chart for each figure by its title. `path` leads to the figures."""
    curves = {
        title: {run.name: (run.color, run.curve(*path, figure)) for run in runs}
        for figure, title in titles.items()
    }
    return '<div class="charts">' + "\n".join(map(chart, curves, curves.values())) + "</div>"


def page(runs: Sequence[Run]) -> str:
    # Results side by side, and what the runs do not share.
    metrics = dict.fromkeys(itertools.chain(*COLUMNS.values()))
    columns = [(kind, metric) for kind in KINDS for metric in metrics]
    columns = [(k, m) for k, m in columns if any(m in run.tables.get(k, {}) for run in runs)]
    heads = ["run", "mode", "steps", *(f"{KINDS[kind]} {metric}" for kind, metric in columns)]
    heads += ["given boxes: mean IoU", "over 0.75", "images/s"]
    rows = []
    for run in runs:
        row = [run.key, escape(run.mode)]
        row.append(f"{run.last('step', digits=0)} of {run.steps}")
        aps = [run.tables.get(kind, {}).get(metric) for kind, metric in columns]
        row += ["-" if ap is None else f"{ap:.1f}" for ap in aps]
        row += [f"{run.given[k]:.3f}" if k in run.given else "-" for k in ("mean_iou", "over_75")]
        rows.append([*row, run.last("images_per_s")])
    parts = ["<h1>Training runs</h1><h2>Results</h2>", table(heads, rows)]
    parts.append("<p>AP, 0 to 100, of the last evaluation.</p>")
    words = {f: [str(run.config.get(f, "")).strip("[]") for run in runs] for f in FIELDS}
    rows = [map(escape, (f, *words[f])) for f in FIELDS if len({*words[f]}) > 1 and f != "out"]
    if rows:
        parts += ["<h2>Settings that differ</h2>", table(["field", *(r.key for r in runs)], rows)]

    # Curves.
    parts.append("<h2>Evaluations</h2>")
    for kind, what in KINDS.items():
        aps = {metric: f"{what} {metric}" for metric in ("AP", "AP50", "AP75")}
        parts.append(charts(runs, aps, "evaluation", kind))
    parts += ["<h2>Pseudo masks over time</h2>", charts(runs, TEACHING)]
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    losses = {name: f"loss: {name}" for name in names if name not in NOT_LOSSES}
    parts += ["<h2>Losses</h2>", charts(runs, {"loss": "loss, all together"} | losses)]
    parts += ["<h2>Other measurements</h2>", charts(runs, OTHER)]

    # Classes and pictures.
    tables = [t for run in runs for line in run.lines for t in line.get("evaluation", {}).values()]
    classes = dict.fromkeys(name for found in tables for name in found["per_class"])
    if len(classes) > 1:
        heads = ["class", *(f"{run.key}, {what}" for run in runs for what in KINDS.values())]
        pairs = [(run, "evaluation", kind, "per_class") for run in runs for kind in KINDS]
        rows = [[escape(c), *(run.last(*path, c) for run, *path in pairs)] for c in classes]
        parts += ["<h2>AP of each class</h2>", table(heads, rows)]
    for run in runs:
        if run.sheet.exists():
            data = base64.b64encode(run.sheet.read_bytes()).decode()
            image = f'<img alt="contact sheet" src="data:image/png;base64,{data}">'
            parts.append(f"<h2>{run.key}: contact sheet</h2>{image}")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Training runs</title><style>{STYLE}</style>"
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def main() -> None:
    parser = Parser("python -m boxteacher.tools.report RUN ... [...]", __doc__, fields=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="report.html")
    args, _ = parser.read(sys.argv[1:])
    runs = [Run(folder, COLORS[k % len(COLORS)]) for k, folder in enumerate(args.runs)]
    write_text(args.output, page(runs))
    print(args.output)


if __name__ == "__main__":
    errors.run(main)
