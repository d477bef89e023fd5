"""Stops a run whose losses are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import distributed
from .errors import UserError


class DivergedError(UserError):
    """A loss is not a finite number."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class FiniteGuard:
    """Stops all ranks if a loss of any rank is not finite, before it has changed any weight.

    The device itself decides whether the optimizer skips the step: fused optimizers look at
    `found_inf`, which is made for loss scaling. The CPU reads the decision one step later, so it
    never waits.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.watched: tuple[int, list[str], list[int], Tensor, Tensor] | None = None
        self.arrived: torch.cuda.Event | None = None

    def watch(self, step: int, losses: dict[str, Tensor], image_ids: list[int]) -> None:
        """To be called between the backward pass and the optimizer's step."""
        values = torch.stack(list(losses.values()))
        is_bad = ~distributed.reduce_mean(values).isfinite().all()
        self.optimizer.found_inf = is_bad.float()
        mine, is_bad = (t.to("cpu", non_blocking=True) for t in (values, is_bad))
        self.watched = step, list(losses), image_ids, mine, is_bad
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def raise_if_bad(self) -> None:
        """Raise DivergedError if the step that was watched last was bad."""
        if self.watched is None:
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        step, names, image_ids, mine, is_bad = self.watched
        if is_bad:
            bad = [n for n, v in zip(names, mine.tolist(), strict=True) if not math.isfinite(v)]
            where = f"{', '.join(bad)} for image ids {image_ids}" if bad else "on another rank"
            raise DivergedError(step, f"step {step}: loss not finite: {where}")
