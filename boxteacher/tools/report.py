"""One page about one run or several: curves, tables, pseudo masks over time, pictures.

    python -m boxteacher.tools.report RUN ... [--output report.html]

RUN is a folder that train.py wrote. The page is one HTML file without scripts. It needs no network.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from boxteacher import errors
from boxteacher.coco_eval import METRICS
from boxteacher.command_line import Parser
from boxteacher.config import FIELDS, as_word
from boxteacher.tools.common import write

COLORS = ("#1b6ca8", "#d1495b", "#2e933c", "#8f5db7", "#c77800", "#00868b", "#7a4b3a", "#555555")
FLYWHEEL = {
    "pseudo_mask_iou": "IoU of pseudo masks with true masks",
    "mask_aware_score": "mask-aware score of pseudo masks",
    "pseudo_masks_share": "share of boxes with a pseudo mask",
    "mask_fill": "share of the box that masks fill",
}
NOT_LOSSES = {"step", "lr", "images_per_s", "loss", "similar_pair_share", "pseudo_masks_per_image"}
NOT_LOSSES |= {"lost_boxes", "lost_side", *FLYWHEEL}
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 400, 230, 48, 26, 22  # of a chart, and its margins
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1280px;
       padding: 0 1em }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
.charts { display: flex; flex-wrap: wrap; gap: 12px }
.scroll { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: 3px 10px; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } th { text-align: left }
svg text { font: 11px system-ui, sans-serif; fill: #444 } svg .title { font-size: 13px; fill: #000 }
img { max-width: 100% } .key { display: inline-block; width: 12px; height: 12px; margin-right: 6px }
"""

Points = list[tuple[float, float]]


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


def ticks(low: float, high: float) -> list[float]:
    """Four round numbers or so from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= 5), 10)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def smooth(points: Points) -> Points:
    """Means of neighboring points, about 40 in all if there are many."""
    size = max(len(points) // 40, 1)
    parts = [points[k : k + size] for k in range(0, len(points), size)]
    return [tuple(sum(v) / len(v) for v in zip(*part, strict=True)) for part in parts]


def chart(title: str, curves: dict[str, tuple[str, Points]]) -> str:
    """Curves by name, each with its color, as SVG. Pale: all points. Firm: means of neighbors.
    Empty if there are no points."""
    points = [point for _, line in curves.values() for point in line]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    values = sorted(y for _, y in points)
    cut = len(values) // 100  # a few outliers may leave the picture
    low, high = min(0.0, values[cut]), values[len(values) - 1 - cut]
    right, high = max(right, left + 1), max(high, low + 1e-9)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - 10)
        up = min(max((y - low) / (high - low), 0), 1) * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{HEIGHT - BOTTOM - up:.1f}"

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for y in ticks(low, high):
        at = place(left, y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{at}" y2="{at}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="4" text-anchor="end">{y:.4g}</text>')
    for x in ticks(left, right):
        at = place(x, low).split(",")[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - 6}" text-anchor="middle">{x:g}</text>')
    for name, (color, line) in curves.items():
        for some, look in ((line, 'opacity="0.25"'), (smooth(line), 'stroke-width="2"')):
            path = " ".join(place(x, y) for x, y in some)
            note = f"<title>{escape(name)}</title>"
            if len(some) == 1:
                x, y = path.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}">{note}</circle>')
            else:
                line_look = f'fill="none" stroke="{color}" {look}'
                parts.append(f'<polyline points="{path}" {line_look}>{note}</polyline>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


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
    heads = ["run", "mode", "steps", *(f"{k} {m}" for k in kinds.values() for m in METRICS)]
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
                *(shown(run.last().get(k, {}).get(m)) for k in kinds for m in METRICS),
                shown(run.given.get("mean_iou"), 3),
                shown(run.given.get("over_75"), 3),
                shown(speeds[len(speeds) // 2] if speeds else None),
            ]
        )
    parts += ["<h2>Results</h2><p>AP, 0 to 100, of the last evaluation.</p>", table(heads, rows)]
    words = {f: [as_word(_tuple(run.config.get(f, ""))) for run in runs] for f in FIELDS}
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
    losses = {"loss": "loss, all together"} | {
        n: f"loss: {n}" for n in names if n not in NOT_LOSSES
    }
    parts += ["<h2>Losses</h2>", charts(runs, losses, Run.curve)]
    other = {
        "similar_pair_share": "share of pairs of similar color",
        "lost_boxes": "boxes without a",
    }
    other["lost_boxes"] += " location"
    other |= {"lr": "learning rate", "images_per_s": "images per second"}
    parts += ["<h2>Other measurements</h2>", charts(runs, other, Run.curve)]

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


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main() -> None:
    parser = Parser("python -m boxteacher.tools.report RUN ... [...]", __doc__, fields=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    default = Path("report.html")
    parser.add_argument("--output", type=Path, default=default, metavar="FILE", help=str(default))
    args, _ = parser.read(sys.argv[1:])
    runs = []
    for number, folder in enumerate(args.runs):
        is_unique = sum(other.name == folder.name for other in args.runs) == 1
        name = folder.name if is_unique and folder.name else str(folder)
        runs.append(Run(folder, name, COLORS[number % len(COLORS)]))
    write(args.output, page(runs))
    print(args.output)


if __name__ == "__main__":
    errors.run(main)
