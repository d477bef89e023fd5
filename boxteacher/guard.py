"""Ends a run early: at a loss or gradient that is not finite, and at SIGTERM or SIGINT. All ranks
end after the same step."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed
from .errors import Stopped, UserError


class DivergedError(UserError):
    """A loss, or the norm of the gradient, is not a finite number."""

    def __init__(self, step: int, where: str) -> None:
        super().__init__(
            f"step {step}: not finite: {where}; the weights before this step are in the run's"
            " diverged.pt; try a lower --lr, a longer --warmup-steps or --clip-grad 10"
        )
        self.step = step


class Watched(NamedTuple):
    """A step whose outcome is on its way to the CPU."""

    step: int
    names: list[str]
    image_ids: list[int]
    values: Tensor  # of this rank: losses, and the norm of the gradient
    is_bad: Tensor  # of any rank
    stops: Tensor  # whether a signal has reached any rank


class RunGuard:
    """Ends all ranks if a loss or gradient of any rank is not finite, before it has changed any
    weight, or if a signal has reached any rank.

    The device itself decides whether the optimizer skips the step: fused optimizers look at
    `found_inf`, which is made for loss scaling. The CPU reads the decision one step later. It does
    not wait for the optimizer's step. A bad step damages the statistics of batch norms in the
    forward pass. `undo_statistics` gives back those from before that step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, networks: Iterable[nn.Module]) -> None:
        self.optimizer, self.signals = optimizer, StopSignals()
        self.watched: Watched | None = None
        self.arrived: torch.cuda.Event | None = None
        norms = [m for n in networks for m in n.modules() if isinstance(m, nn.BatchNorm2d)]
        self.statistics = [s for norm in norms for s in (norm.running_mean, norm.running_var)]
        self.kept = [s.clone() for s in self.statistics]

    def begin_step(self) -> None:
        """Raise DivergedError if the step before was bad."""
        self.raise_if_bad()
        for kept, now in zip(self.kept, self.statistics, strict=True):
            kept.copy_(now)

    def undo_statistics(self) -> None:
        for kept, now in zip(self.kept, self.statistics, strict=True):
            now.copy_(kept)

    def watch(self, step: int, values_by_name: dict[str, Tensor], image_ids: list[int]) -> None:
        """To be called between the backward pass and the optimizer's step."""
        values = torch.stack(list(values_by_name.values()))
        signaled = values.new_full((1,), self.signals.received)
        means = distributed.reduce_mean(torch.cat([values, signaled]))
        is_bad, stops = ~means[:-1].isfinite().all(), means[-1] > 0
        self.optimizer.found_inf = is_bad.float()
        outcome = (t.to("cpu", non_blocking=True) for t in (values, is_bad, stops))
        self.watched = Watched(step, list(values_by_name), image_ids, *outcome)
        if values.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def raise_if_bad(self) -> None:
        """Raise DivergedError if the step that was watched last was bad."""
        if (last := self._last()) and last.is_bad:
            values = zip(last.names, last.values.tolist(), strict=True)
            bad = [name for name, value in values if not math.isfinite(value)]
            ids = f"{', '.join(bad)} for image ids {last.image_ids}" if bad else ""
            where = filter(None, distributed.from_main(distributed.gather_objects(ids)))
            raise DivergedError(last.step, "; ".join(where))

    def must_stop(self) -> bool:
        """Whether a signal had reached any rank by the step that was watched last. Raises
        DivergedError if that step was bad."""
        self.raise_if_bad()
        return bool((last := self._last()) and last.stops)

    def _last(self) -> Watched | None:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.watched


class StopSignals:
    """While it is entered, SIGTERM, SIGINT and SIGHUP (a closed terminal, unless nohup ignores it)
    are only noted: a run goes on until it is saved. In `at_once` all is saved, and they end it with
    Stopped. A second signal, two seconds later or more, ends the process, as without this class.
    """

    ONE_SIGNAL = 2.0  # seconds: Slurm and torchrun may send the same signal both

    def __init__(self) -> None:
        self.received, self.since, self.is_saved, self.out = False, 0.0, False, ""
        self.before: dict[int, Any] = {}

    def of(self, out: Path) -> StopSignals:
        """Remember the run's folder, which the message of `stopped` names."""
        self.out = shlex.quote(str(out))
        return self

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def stopped(self) -> Stopped:
        command = f"train.py --resume --out {self.out}"
        return Stopped(f"stopped, and everything is saved: {command} continues the run")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        self.is_saved = True
        if self.received:
            raise self.stopped()
        yield
        self.is_saved = False

    def _note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.received and now - self.since > self.ONE_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self.since = True, now
            if distributed.is_main() and not self.is_saved:
                name = signal.Signals(number).name
                text = f"\n{name}: the run saves and stops in two steps; a second signal kills it\n"
                with contextlib.suppress(OSError):  # nobody reads it
                    os.write(sys.stderr.fileno(), text.encode())
        if self.is_saved:
            raise self.stopped()
