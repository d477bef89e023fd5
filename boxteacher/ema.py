"""The teacher: an exponential moving average of the student (BoxTeacher, arXiv 2210.05174)."""

from __future__ import annotations

import torch
from torch import nn


def ema_momentum(step: int, maximum: float = 0.999) -> float:
    """mu(t) = min(maximum, 1 - 1/(t+1)): a copy at step 0, a running mean, a moving average."""
    return min(maximum, 1 - 1 / (step + 1))


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, over parameters, before the
    student's step.

    Keep the teacher in float32: bfloat16 rounds steps of 0.1 % away. Buffers are not averaged. The
    teacher runs in train mode, so its batch norms have running statistics of its own weights.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
