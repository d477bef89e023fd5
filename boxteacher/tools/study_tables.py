"""The tables of `boxteacher.tools.study`: means over seeds, and paired differences."""

from __future__ import annotations

import statistics
from typing import Any

from boxteacher.tools.studies import C

MEASURES = {  # name in results.jsonl: heading, decimals
    "mask_ap": ("mask AP", 1),
    "mask_ap50": ("AP50", 1),
    "mask_ap75": ("AP75", 1),
    "box_ap": ("box AP", 1),
    "mean_iou": ("given true boxes: mean IoU", 3),
    "over_50": ("over 0.5", 3),
    "over_75": ("over 0.75", 3),
    "minutes": ("minutes of training", 1),
}
# Student's t: quantile 0.975 for 1, 2, ... degrees of freedom. The last is used for more.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)

Result = dict[str, Any]  # a line of results.jsonl


def is_finished(identity: Result, results: list[Result]) -> bool:
    return any("error" not in result and identity.items() <= result.items() for result in results)


def spread(values: list[float]) -> dict[str, Any]:
    """Number of values, mean, standard deviation, and half the width of the 95 % interval of the
    mean, by Student's t: t_0.975(n - 1) * std / sqrt(n)."""
    mean = statistics.fmean(values) if values else None
    std = half = None
    if len(values) > 1:
        std = statistics.stdev(values)
        half = T_975[min(len(values) - 1, len(T_975)) - 1] * std / len(values) ** 0.5
    return {"seeds": len(values), "mean": mean, "std": std, "half_interval": half}


def tabulate(
    configurations: dict[str, C], identities: list[Result], results: list[Result]
) -> list[dict[str, Any]]:
    """A row for each configuration, of the runs with these identities. By measure: the values of
    the seeds, their spread, and the spread of the differences to the reference, over the seeds that
    both have."""
    found = [r for r in results if any(is_finished(identity, [r]) for identity in identities)]
    rows = []
    for label, configuration in configurations.items():
        reference = configuration.reference or next(iter(configurations))
        row = {"label": label, "words": configuration.words, "reference": reference}
        for measure in MEASURES:
            own, other = (
                {
                    r["seed"]: r[measure]
                    for r in found
                    if r["label"] == x and r.get(measure) is not None
                }
                for x in (label, reference)
            )
            differences = spread([own[seed] - other[seed] for seed in own if seed in other])
            row[measure] = {"values": own, **spread(list(own.values())), "difference": differences}
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Two tables: means ± standard deviations, and differences ± half of the 95 % interval."""
    headings = " | ".join(heading for heading, _ in MEASURES.values())
    lines = []
    for title, reach in ("mean ± std", "std"), ("difference ± 95 %", "half_interval"):
        lines += [f"| {title} | seeds | {headings} |", "| --- " * (len(MEASURES) + 2) + "|"]
        for row in rows:
            spreads, name = [row[measure] for measure in MEASURES], row["label"]
            if reach == "half_interval":
                spreads = [values["difference"] for values in spreads]
                name = f"{name} - {row['reference']}"
            cells = [name, str(max(values["seeds"] for values in spreads))]
            for values, (_, digits) in zip(spreads, MEASURES.values(), strict=True):
                shown = [x for x in (values["mean"], values[reach]) if x is not None]
                cells.append(" ± ".join(f"{x:.{digits}f}" for x in shown))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)
