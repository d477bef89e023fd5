"""The teacher's update and its momentum schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from boxteacher.ema import ema_momentum, update_teacher


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4))


def test_momentum_schedule():
    for step in (0, 1, 2, 10, 998, 999, 1000, 90_000):
        assert ema_momentum(step) == min(0.999, 1 - 1 / (step + 1))
    assert ema_momentum(0) == 0
    assert ema_momentum(10**6) == 0.999
    assert ema_momentum(10**6, 0.99) == 0.99


def test_update_at_step_0_is_a_copy_of_the_parameters_and_only_of_them():
    teacher, student = network(0), network(1)
    student(torch.randn(2, 2, 6, 6))  # batch norm statistics that differ
    buffers = copy.deepcopy(dict(teacher.named_buffers()))
    before = copy.deepcopy(student.state_dict())
    update_teacher(teacher, student, ema_momentum(0))
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[name])
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("momentum", [0.999, 0.5, 0.25, 1.0])
def test_update_is_a_weighted_mean(momentum):
    teacher, student = network(0), network(1)
    expected = [
        momentum * mine.detach().double() + (1 - momentum) * theirs.detach().double()
        for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    update_teacher(teacher, student, momentum)
    for mine, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.detach().double(), value, rtol=1e-6, atol=1e-7)
        assert mine.grad_fn is None


def test_teacher_is_the_running_mean_at_first_and_converges_to_a_resting_student():
    teacher, student = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    seen = []
    for step in range(6):
        nn.init.normal_(student.weight)
        seen.append(student.weight.detach().clone())
        update_teacher(teacher, student, ema_momentum(step))
        torch.testing.assert_close(teacher.weight.detach(), torch.stack(seen).mean(0))
    for step in range(6, 300):
        update_teacher(teacher, student, ema_momentum(step, 0.9))
    torch.testing.assert_close(teacher.weight, student.weight, rtol=0, atol=1e-9)
