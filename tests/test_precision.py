"""Training steps as train.py sets them up: their digits, and numbers that are not finite."""

from __future__ import annotations

import copy
import math
import statistics

import pytest
import torch
from torch import Tensor, nn

import train
from boxteacher.command_line import parse
from boxteacher.data import Batch
from boxteacher.guard import DivergedError, RunGuard
from boxteacher.mask_head import dynamic_mask_logits

torch.set_num_threads(1)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
TINY = """shapes --mode boxinst --optimizer sgd --lr 0.016 --warmup-steps 0 --weak-warmup-steps 1
    --batch-size 2 --clip-grad 0 --lr-schedule step --dtype float32 --compile off""".split()


def make_batch(cfg, device: str) -> Batch:
    train_set = train.make_train_set(cfg)
    return next(iter(train.make_train_loader(train_set, cfg)))[0].to(device)


def make_states(cfg, device: str) -> tuple[train.State, train.State]:
    """The same network in float32 and float64. The convolutions before its norms have outputs far
    from 0, as in trained networks: that is where norms that sum up squares lose digits."""
    torch.manual_seed(0)
    single = train.make_state(cfg, 6, torch.device(device))
    with torch.no_grad():
        for module in single.student.head.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == cfg.fpn_channels:
                module.bias.fill_(5.0)
        single.student.head.distances.bias.fill_(1.5)
    double = copy.deepcopy(single)
    double.student.double()
    parameters = double.student.parameters()
    options = dict(lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    double.optimizer = torch.optim.SGD(parameters, **options)
    double.guard = RunGuard(double.optimizer, [double.student])
    double.model = double.student
    train.speed_up(single)
    return single, double


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
def test_a_float32_step_has_the_digits_of_float32(device):
    """Single pixels change sides (ReLU, maximum), so the gradients of some batches differ more. Of
    five batches, the median error was 1.0e-3 (torch 2.14) and 2.3e-3 (2.6). With channels_last maps
    everywhere it was 8.5e-3 (both)."""
    tf32 = 100 if device == "cuda" else 1  # which keeps 10 bits of the mantissa, not 23
    loss_error = 5e-4 if device == "cuda" else 5e-7  # TF32 rounds by 5e-4; 6e-5 on an H200
    errors = []
    for seed in range(5):
        cfg = parse([*TINY, "--shapes-train", "8", "--device", device, "--seed", str(seed)])
        batch = make_batch(cfg, device)
        single, double = make_states(cfg, device)

        outputs = []
        for state in (single, double):
            with torch.no_grad():
                images = state.student.normalize(batch.images, batch.sizes)
                dtype = next(state.student.parameters()).dtype
                encoded = state.student.encode(images.to(dtype))
            logits, distances, centerness, maps = encoded.predictions
            outputs.append((logits, distances, centerness, maps[0], encoded.mask_features))
        for found, expected in zip(*outputs, strict=True):
            assert relative_error(found, expected) < 3e-5 * tf32

        before = copy.deepcopy(double.student.state_dict())
        (found, _), (expected, _) = (train.train_step(s, [batch]) for s in (single, double))
        for name, loss in expected.items():
            assert found[name].item() == pytest.approx(loss.item(), rel=loss_error), name
        moved = [
            torch.cat([(p.double() - before[n]).flatten() for n, p in s.student.named_parameters()])
            for s in (single, double)
        ]
        errors.append(relative_error(*moved))
    assert statistics.median(errors) < 4e-3 * tf32


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_goes_on_in_another_memory_format(device, optimizer):
    """As from a checkpoint of a GPU, where all is channels_last, on a CPU. torch's fused optimizers
    would raise (GPU), or mix up weights and averages (CPU: an error of 0.5 for sgd)."""
    words = ["--optimizer", optimizer, "--lr", "0.001", "--shapes-train", "8", "--device", device]
    cfg = parse([*TINY, *words])
    batch = make_batch(cfg, device)
    plain = train.make_state(cfg, 6, torch.device(device))
    train.train_step(plain, [batch])
    other = copy.deepcopy(plain)
    other.student.to(memory_format=torch.channels_last)
    train.speed_up(other)
    before = copy.deepcopy(plain.student.state_dict())
    for state in (plain, other):
        train.train_step(state, [batch])
    moved = [
        torch.cat([(p - before[n]).flatten() for n, p in s.student.named_parameters()])
        for s in (other, plain)
    ]
    assert relative_error(*moved) < (0.1 if device == "cuda" else 0.02)


@pytest.mark.parametrize("clip_grad", ["0", "1"])
def test_a_gradient_that_is_not_finite_changes_no_weight(clip_grad):
    """All losses are finite. One step later the run stops, and the message says why."""
    cfg = parse([*TINY, "--shapes-train", "8", "--device", "cpu", "--clip-grad", clip_grad])
    batch = make_batch(cfg, "cpu")
    state = train.make_state(cfg, 6, torch.device("cpu"))
    train.train_step(state, [batch])
    before = copy.deepcopy(state.student.state_dict())
    bias = state.student.head.centerness.bias
    hook = bias.register_hook(lambda gradient: gradient * math.inf)
    losses, _ = train.train_step(state, [batch])
    hook.remove()
    assert all(loss.isfinite() for loss in losses.values())
    for name, weight in state.student.named_parameters():
        assert torch.equal(weight, before[name]), name
    with pytest.raises(DivergedError, match=r"step 1: not finite: gradient for image ids \["):
        train.train_step(state, [batch])


@pytest.mark.parametrize("device", DEVICES)
def test_relative_coordinates_keep_their_digits(device):
    """An instance far from the origin of a photograph, with TF32 as train.py sets it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        generator = torch.Generator().manual_seed(0)
        params = torch.zeros(1, 1, 233, dtype=torch.float64)
        params[..., :144].unflatten(-1, (8, 18))[..., :2] = torch.randn(8, 2, generator=generator)
        params[..., 144:216] = torch.randn(72, generator=generator).double()
        features = torch.zeros(1, 16, 100, 168, dtype=torch.float64)
        where = torch.tensor([[[1332.0, 796.0]]], dtype=torch.float64)
        inputs = features, params, where, torch.full((1, 1), 64.0, dtype=torch.float64)
        expected = dynamic_mask_logits(*(x.to(device) for x in inputs))
        found = dynamic_mask_logits(*(x.float().to(device) for x in inputs))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    # around the instance, where the coordinates are small, so must be the error
    near = (..., slice(95, 100), slice(160, 168))
    layers_2_and_3 = 1e-2 if device == "cuda" else 1e-5
    assert relative_error(found[near], expected[near]) < layers_2_and_3
