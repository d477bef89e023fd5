"""The student's step never waits for a GPU, which is checked even where there is none.

A host that asks the device for a number (`.item()`, `if tensor:`, a boolean index, whose size is
data) stops until all that was queued is done; so does one that copies a list of numbers there. On
fake CUDA tensors, which have shapes but no values, the first cannot be answered and raises; the
second is seen as a blocking copy between devices.
"""

import os
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from boxteacher.command_line import parse
from boxteacher.data import Batch
from boxteacher.ema import update_teacher
from boxteacher.model import CondInst, PseudoMasks, build_model
from boxteacher.transforms import STRENGTHS, _augment_image, augment

torch.set_num_threads(1)


def can_fake_cuda() -> bool:
    """Old versions of torch (2.6) want a driver even for some operations on fake tensors."""
    try:
        with FakeTensorMode():
            return torch.zeros(2, device="cuda").uniform_().device.type == "cuda"
    except RuntimeError as error:
        if "driver" not in str(error):
            raise
        return False


fake_cuda = pytest.mark.skipif(not can_fake_cuda(), reason="this torch needs a CUDA driver")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
slow = pytest.mark.skipif(
    "COMPILE_TESTS" not in os.environ, reason="compiles for minutes: set COMPILE_TESTS=1"
)
TINY = "shapes --fpn-channels 64 --tower-convs 1 --mask-branch-channels 16 --mask-branch-convs 1"
MODES = ["boxinst", "boxteacher"]  # condinst draws a number of instances that depends on the data


def make_model(mode: str) -> CondInst:
    return build_model(parse([*TINY.split(), "--mode", mode]), num_classes=3).train()


def make_batch(
    device: str, height: int = 64, width: int = 96, slots: int = 8
) -> tuple[Batch, PseudoMasks]:
    """Two images with 3 boxes each, and pseudo masks for all slots."""
    corners = torch.arange(2 * slots * 2, device=device).view(2, slots, 2) % 23
    boxes = torch.cat((corners, corners + 25), dim=-1).float()
    valid = torch.arange(slots, device=device) < torch.full((2, 1), 3, device=device)
    masks = torch.ones(2, slots, height // 4, width // 4, dtype=torch.bool, device=device)
    images = torch.arange(2 * 3 * height * width, device=device).remainder(251).to(torch.uint8)
    batch = Batch(
        images=images.view(2, 3, height, width),
        sizes=[(height, width - 6), (height - 4, width)],
        boxes=boxes,
        labels=corners[..., 0] % 3,
        valid=valid,
        centers=(boxes[..., :2] + boxes[..., 2:]) / 2,
        masks=None,
        has_mask=None,
        cut_rows=[0, 3],
        image_ids=[1, 2],
    )
    return batch, PseudoMasks(masks, torch.full((2, slots), 0.7, device=device))


def student_losses(model: CondInst, batch: Batch, pseudo: PseudoMasks) -> Tensor:
    losses, _ = model(batch.images, batch, 0.5, pseudo if model.cfg.mode == "boxteacher" else None)
    return sum(losses.values())


# --- without a GPU --------------------------------------------------------------------------------


class HasToWaitError(Exception):
    pass


WAITS = (HasToWaitError, DataDependentOutputException, DynamicOutputShapeException)


class RefuseWaiting(TorchDispatchMode):
    """Raises where a host would wait: copies between CPU and GPU, values, sizes that are data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        is_boolean = any(index is not None and index.dtype == torch.bool for index in indices)
        if name.startswith(self.FORBIDDEN) or is_boolean:
            raise HasToWaitError(name)
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and not kwargs.get("non_blocking"):
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            if len({t.device.type for t in tensors}) > 1:
                raise HasToWaitError(f"{name} between devices")
        return result


@fake_cuda
@pytest.mark.parametrize("mode", MODES)
def test_the_students_forward_pass_never_waits(mode):
    with FakeTensorMode() as fake, torch.device("cuda"):
        model = make_model(mode)
        batch, pseudo = make_batch("cuda")
    with fake, RefuseWaiting():
        assert student_losses(model, batch, pseudo).device.type == "cuda"


@pytest.mark.parametrize("mode", MODES)
def test_the_students_backward_pass_asks_for_no_values(mode):
    """On the CPU, since fake tensors have no backward pass without a driver. It sees no copies."""
    model = make_model(mode)
    batch, pseudo = make_batch("cpu")
    loss = student_losses(model, batch, pseudo)
    with RefuseWaiting():
        loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())


@fake_cuda
@pytest.mark.parametrize("strength", ["weak", "strong", "strong_blur"])
def test_coloring_never_waits(strength):
    with FakeTensorMode(), RefuseWaiting():
        image = torch.zeros(3, 20, 30, dtype=torch.uint8, device="cuda")
        for draws in ([0.0] * 12, [0.999] * 12):
            assert _augment_image(image, STRENGTHS[strength], draws).shape == image.shape


@fake_cuda
def test_the_teachers_update_never_waits():
    with FakeTensorMode(), RefuseWaiting():
        teacher, student = (torch.nn.Linear(3, 3, device="cuda") for _ in range(2))
        update_teacher(teacher, student, 0.9)


@fake_cuda
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.tensor([1.0, 2.0]).to(x.device),
        lambda x: x.repeat_interleave((x > 0).long()),
    ],
)
def test_waiting_would_be_noticed(wait: Callable[[Tensor], object]):
    with FakeTensorMode(), RefuseWaiting():
        x = torch.ones(4, device="cuda")
        with pytest.raises(WAITS):
            wait(x)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0]])
def test_waiting_would_be_noticed_on_the_cpu(wait: Callable[[Tensor], object]):
    x = torch.ones(4)
    with RefuseWaiting(), pytest.raises(WAITS):
        wait(x)


# --- compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=slow)])
def test_compiled_losses_and_gradients_are_the_same(backend):
    """In whole graphs: no part falls back to Python in its middle. Backend eager only traces."""
    torch._dynamo.reset()
    counters.clear()
    model = make_model("boxteacher")
    batch, pseudo = make_batch("cpu")

    def losses_and_gradients() -> list[Tensor]:
        losses, _ = model(batch.images, batch, 0.5, pseudo)
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), model.parameters())]

    expected = losses_and_gradients()
    train.compile_parts(model, backend=backend)
    found = losses_and_gradients()
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    scale = max(float(tensor.detach().abs().max()) for tensor in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * scale)


Steps = list[tuple[int, int, int]]  # height, width and number of boxes, as collate pads them


def random_steps(count: int) -> Steps:
    draw = random.Random(0)
    sides = range(256, 400, 32)
    boxes = (8, 16, 32, 64, 128)
    return [(draw.choice(sides), draw.choice(sides), draw.choice(boxes)) for _ in range(count)]


def count_graphs(device: str, steps: Steps, **options: object) -> int:
    """How often student and teacher are compiled in a run."""
    torch._dynamo.reset()
    counters.clear()
    student, teacher = make_model("boxteacher").to(device), make_model("boxteacher").to(device)
    teacher.requires_grad_(False)
    for network in (student, teacher):
        train.compile_parts(network, **options)
    settings, option = torch._dynamo.config, "fail_on_recompile_limit_hit"
    option = option if hasattr(settings, option) else "fail_on_cache_limit_hit"  # torch 2.6
    refuse = settings.patch({option: True})  # else: plain Python
    for step in steps:
        batch, pseudo = make_batch(device, *step)
        with refuse:
            with torch.no_grad():
                teacher.encode(teacher.normalize(batch.images, batch.sizes))
            student_losses(student, batch, pseudo).backward()
    return counters["stats"]["unique_graphs"]


def test_sizes_that_vary_are_compiled_but_a_few_times():
    """Seven parts: once, and again where numbers that happened to be equal no longer are."""
    steps = [(256, 320, 8), (288, 352, 16), (384, 288, 32), (320, 320, 64), (352, 256, 128)]
    assert 7 <= count_graphs("cpu", steps, backend="eager", dynamic=True) <= 2 * 7


@slow
def test_sizes_that_are_found_to_vary_are_compiled_too_often():
    """The reason for dynamic=True. If this fails, torch has learned, and can be left to itself."""
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        count_graphs("cpu", random_steps(12), backend="eager")


# --- on a GPU -------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_the_students_step_never_waits_for_the_gpu(mode, dtype):
    model = make_model(mode).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch, pseudo = make_batch("cuda")
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step() -> None:
        augment(batch.images, batch.sizes, "strong", torch.Generator().manual_seed(0))
        with autocast:
            loss = student_losses(model, batch, pseudo)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # libraries may wait when they are first used
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@slow
def test_a_run_of_200_sizes_is_compiled_but_a_few_times():
    assert count_graphs("cuda", random_steps(200), dynamic=True) <= 4 * 7
