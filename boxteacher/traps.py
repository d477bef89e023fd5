"""Known ways in which training goes wrong, seen in the metrics of a run while it goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from .config import Config

SEEN = 10  # logged steps before a mean counts
PATIENCE = 200  # steps without a pseudo mask
STRIDE = 8  # pixels: a box that is larger in both directions has a location


class Traps:
    """Warns of each trap once. Metrics count as moving means over some ten logged steps."""

    def __init__(self, cfg: Config, start: int = 0) -> None:
        self.cfg, self.means, self.count = cfg, dict[str, float](), 0
        self.last_accepted = max(start, cfg.warmup_steps, cfg.pseudo_start)  # of a pseudo mask
        self.without = 0  # logged steps since then
        self.said: set[str] = set()

    def warnings(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The new warnings, given the metrics of a logged step."""
        self.count += 1
        for name, value in metrics.items():
            if not math.isnan(value):
                self.means[name] = 0.9 * self.means.get(name, value) + 0.1 * value
        if metrics.get("pseudo_masks_share", 1.0) > 0:
            self.last_accepted, self.without = max(step, self.last_accepted), 0
        else:
            self.without += 1
        found = [(trap, text) for trap, text in self._seen(step) if trap not in self.said]
        self.said |= {trap for trap, _ in found}
        return [text for _, text in found]

    def _seen(self, step: int) -> Iterator[tuple[str, str]]:
        cfg, means = self.cfg, self.means
        if step - self.last_accepted >= PATIENCE and self.without >= 3:
            yield (
                "pseudo",
                f"the teacher has made no pseudo mask for {PATIENCE} steps: it detects none of the"
                " boxes; is the learning rate too low, or score_threshold too high?",
            )
        if self.count < SEEN:
            return
        alike, threshold = means.get("similar_pair_share", 0.5), cfg.color_threshold
        if alike < 0.05:
            yield (
                "alike",
                f"only {alike:.1%} of the pairs of pixels look alike (color_threshold={threshold}),"
                " so the pairwise loss says little: lower --color-threshold",
            )
        if alike > 0.95:
            yield (
                "alike",
                f"{alike:.1%} of the pairs of pixels look alike (color_threshold={threshold}), so"
                " the pairwise loss pulls masks together across outlines: raise --color-threshold,"
                " or stretch dark images with --contrast stretch",
            )
        fill = means.get("mask_fill", 0.0)
        if step > cfg.steps / 2 and fill > 0.95:
            yield (
                "fill",
                f"masks fill {fill:.0%} of their boxes after half of the run: they are boxes, not"
                " objects; try half the --lr, then a longer --weak-warmup-steps",
            )
        lost = means.get("lost_boxes", 0.0)
        if lost > 0.1:
            scale = max(STRIDE / max(means.get("lost_side", STRIDE), 1.0), 1.5)
            field = "train_scales" if cfg.train_scales else "train_sizes"
            yield (
                "lost",
                f"{lost:.0%} of the boxes have no positive location: they are too small for"
                f" the network's strides; images {scale:.1f} times as large would help ({field} and"
                " the test size)",
            )
