"""Train BoxTeacher, BoxInst or CondInst: `python train.py [PRESET] [--field value ...]`, or the
same under torchrun.

`train_step` is the method, and `train` the loop around it. Above them are the schedules and the
state of a run, below them what makes it fast, checkpoints, evaluation and the program itself.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from boxteacher import distributed, errors
from boxteacher.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from boxteacher.coco_eval import NoMasksError, evaluate_dataset, require_masks
from boxteacher.command_line import parse
from boxteacher.config import LR_IMAGES, Config, ConfigError, is_due, to_json, warnings
from boxteacher.data import (
    Batch,
    Classes,
    CocoDataset,
    make_train_loader,
    make_train_set,
    make_val_set,
    match_classes,
    whole_geometry,
)
from boxteacher.ema import ema_momentum, update_teacher
from boxteacher.guard import DivergedError, FiniteGuard
from boxteacher.model import CondInst, build_model, make_teacher
from boxteacher.published import load_initial_weights, masks_for_boxes_as_published
from boxteacher.reporting import RunLog, final_summary, make_contact_sheet
from boxteacher.transforms import augment

# --- schedules: functions of the step -------------------------------------------------------------


def learning_rate(cfg: Config, step: int) -> float:
    """`cfg.lr` is for 16 images. SGD scales it linearly with the batch size."""
    scale = cfg.batch_size / LR_IMAGES if cfg.optimizer == "sgd" else 1.0
    return cfg.lr * scale * lr_factor(cfg, step)


def lr_factor(cfg: Config, step: int) -> float:
    """Linear warm-up from 0.001 to 1, times 0.1 at every drop, or times half a cosine down to 0."""
    progress = min(step / cfg.warmup_steps, 1.0) if cfg.warmup_steps else 1.0
    warmup = 0.001 * (1 - progress) + progress
    if cfg.lr_schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    return warmup * 0.1 ** sum(step >= drop for drop in cfg.lr_drops)


def weak_factor(cfg: Config, step: int) -> float:
    """The warm-up of the pairwise and the pseudo-mask losses: min((step + 1) / warm-up, 1)."""
    return min((step + 1) / max(cfg.weak_warmup_steps, 1), 1.0)


# --- the state of a run ---------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    """The networks of a run and what trains them. A checkpoint holds student, teacher, optimizer
    and step."""

    cfg: Config
    device: torch.device
    student: CondInst
    teacher: CondInst | None  # in mode boxteacher
    optimizer: torch.optim.Optimizer
    guard: FiniteGuard
    model: nn.Module  # the student as training calls it (see speed_up)
    autocast: torch.autocast
    step: int = 0  # steps done

    @property
    def evaluated_model(self) -> CondInst:
        """The teacher where there is one, else the student."""
        return self.teacher or self.student


def make_state(cfg: Config, num_classes: int, device: torch.device) -> State:
    student = build_model(cfg, num_classes)
    if not cfg.resume:
        load_initial_weights(student, cfg)
    student.to(device).train()
    teacher = make_teacher(student) if cfg.mode == "boxteacher" else None
    if teacher is not None and cfg.published_score:
        teacher.masks_for_boxes = lambda *args: masks_for_boxes_as_published(teacher, *args)
    parameters = [p for p in student.parameters() if p.requires_grad]
    options = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, **options)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=0.9, **options)
    guard = FiniteGuard(optimizer)
    autocast = torch.autocast(device.type, torch.bfloat16, cfg.dtype == "bfloat16")
    return State(cfg, device, student, teacher, optimizer, guard, student, autocast)


def seed_draws(cfg: Config, step: int, part: int) -> torch.Generator:
    """Seed the random numbers of one part of a step, so that a resumed run draws the same ones.

    The global generator is of this rank and part alone. The generator returned is for colors. All
    ranks and parts share its numbers: each skips those of the step's images before its own.
    """
    number = step * cfg.accumulate + part
    seed = cfg.seed * 1_000_003 + number
    torch.manual_seed(seed * distributed.world_size() + distributed.rank())
    return torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)


# --- the method -----------------------------------------------------------------------------------


def train_step(state: State, parts: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step: the teacher follows the student and turns boxes into pseudo masks, and the student
    learns from the boxes and from these masks.

    The step's images come in `parts` (cfg.accumulate), one after the other. Returns the weighted
    losses and the metrics, as means over the parts.
    """
    cfg, step, teacher = state.cfg, state.step, state.teacher
    state.guard.raise_if_bad()  # about the step before this one
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    if teacher is not None:
        update_teacher(teacher, state.student, ema_momentum(step, cfg.ema_momentum))

    parts_losses, parts_metrics, image_ids = [], [], []
    for part, batch in enumerate(parts):
        batch = batch.to(state.device)
        colors, num_images = seed_draws(cfg, step, part), len(batch.sizes)
        state.model.require_backward_grad_sync = part == len(parts) - 1  # DDP: add up once a step

        # 1. The teacher sees the plain images and turns their boxes into pseudo masks.
        with state.autocast:
            pseudo = teacher.make_pseudo_masks(batch) if teacher is not None else None
        # 2. The student sees the same images in other colors (if cfg.student_augmentation says so).
        skip = (distributed.rank() * len(parts) + part) * num_images
        images = augment(batch.images, batch.sizes, cfg.student_augmentation, colors, skip)
        # 3. It learns from the boxes and from the pseudo masks.
        with state.autocast:
            losses, metrics = state.model(images, batch, weak_factor(cfg, step), pseudo)
        (sum(losses.values()) / len(parts)).backward()

        parts_losses.append(losses)
        parts_metrics.append(metrics)
        image_ids += batch.image_ids

    losses, metrics = mean_of(parts_losses), mean_of(parts_metrics)
    state.guard.watch(step, losses, image_ids)
    if cfg.clip_grad:
        nn.utils.clip_grad_norm_(state.student.parameters(), cfg.clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return losses, metrics


def mean_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name].detach() for part in parts) / len(parts) for name in parts[0]}


def train(
    cfg: Config,
    out: Path,
    device: torch.device,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
) -> dict[str, Any]:
    """The training loop. Returns the last evaluation's tables (on rank 0, given a val_set)."""
    torch.manual_seed(cfg.seed)
    state = make_state(cfg, len(train_set.class_names), device)
    if cfg.resume:
        restore(out / "last.pt", state, train_set)
    speed_up(state)
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = make_train_loader(train_set, cfg, state.step, rank, world_size)
    log = RunLog(out / "metrics.jsonl", cfg, state.step)
    tables: dict[str, Any] = {}

    try:
        for parts in batches:
            losses, metrics = train_step(state, parts)
            if is_due(cfg, state.step, cfg.log_every):
                log.step(state.step, learning_rate(cfg, state.step - 1), losses, metrics)
            if is_due(cfg, state.step, cfg.checkpoint_every):
                state.guard.raise_if_bad()
                save(out / "last.pt", state, train_set)
            if val_set is not None and is_due(cfg, state.step, cfg.eval_every):
                state.guard.raise_if_bad()
                tables = evaluate(state, out, val_set, log)
    except DivergedError as error:
        state.step = error.step  # the optimizer skipped that step
        save(out / "diverged.pt", state, train_set)
        distributed.barrier()  # torchrun ends all processes when the first fails
        raise DivergedError(
            error.step,
            f"{error}; the weights before this step are in {out / 'diverged.pt'}; try a lower --lr,"
            " a longer --warmup-steps or --clip-grad 10",
        ) from None
    log.close()
    if distributed.is_main():
        shown = train_set.whole(whole_geometry(cfg)) if val_set is None else val_set
        make_contact_sheet(state.evaluated_model, shown, device).save(out / "contact_sheet.png")
    return tables


# --- speed: what makes a GPU fast is here, outside the model --------------------------------------


def resolve_auto(cfg: Config, device: torch.device) -> Config:
    """What "auto" means on this device."""
    dtype, compiled = ("bfloat16", "on") if device.type == "cuda" else ("float32", "off")
    return dataclasses.replace(
        cfg,
        dtype=dtype if cfg.dtype == "auto" else cfg.dtype,
        compile=compiled if cfg.compile == "auto" else cfg.compile,
    )


def speed_up(state: State) -> None:
    """Memory format, TF32, compilation, and DistributedDataParallel where there are ranks."""
    cfg, device = state.cfg, state.device
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for network in filter(None, (state.student, state.teacher)):
        if device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        else:
            # On CPUs, GroupNorm and BatchNorm of channels_last maps lose digits. So only the
            # backbone has that format, and head and mask branch get contiguous maps.
            network.backbone.to(memory_format=torch.channels_last)
            network.backbone.register_forward_hook(contiguous)
        if cfg.compile == "on":
            varies = not cfg.crop and (cfg.dataset == "coco" or len(set(cfg.train_sizes)) > 1)
            compile_parts(network, dynamic=varies or None)  # None: torch decides
    if distributed.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        state.model = DistributedDataParallel(state.student, device_ids=ids)


def contiguous(_: nn.Module, __: Any, maps: list[Tensor]) -> list[Tensor]:
    return [m.contiguous() for m in maps]


def compile_parts(network: CondInst, **options: Any) -> None:
    """Compile in place, so that names in checkpoints stay.

    Without `dynamic=True`, torch recompiles the head for every level and image size. It reaches its
    limit of 8 (student and teacher count together) and falls back to plain Python. `part.forward`
    is compiled, not `part`, because compiled modules would share one limit.
    """
    for part in (network.backbone, network.head, network.mask_branch):
        part.forward = torch.compile(part.forward, **options)
    network.loss_sums = torch.compile(network.loss_sums, **options)


# --- checkpoints and evaluation -------------------------------------------------------------------


def save(path: Path, state: State, train_set: CocoDataset) -> None:
    """Rank 0 writes all that is needed to go on, to evaluate and to predict."""
    if not distributed.is_main():
        return
    content = {
        "config": dataclasses.asdict(state.cfg),
        "class_names": train_set.class_names,
        "category_ids": train_set.category_ids,
        "step": state.step,
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict() if state.teacher else None,
        "optimizer": state.optimizer.state_dict(),
    }
    save_checkpoint(path, content)


def restore(path: Path, state: State, train_set: CocoDataset) -> None:
    """Go on from what `save` wrote."""
    cfg, checkpoint = state.cfg, load_checkpoint(path)
    optimizer = checkpoint["config"]["optimizer"]
    if optimizer != cfg.optimizer or not checkpoint["optimizer"]:
        raise CheckpointError(f"{path}: was trained with {optimizer}; --init takes weights alone")
    if checkpoint["step"] >= cfg.steps:
        raise CheckpointError(f"{path}: has {checkpoint['step']} steps already; give more --steps")
    known = Classes(checkpoint["class_names"], checkpoint["category_ids"], str(path))
    if match_classes(train_set.classes, known) != train_set.classes:
        raise CheckpointError(f"{path}: was trained on other classes: the order of ids differs")
    if (checkpoint["teacher"] is None) != (state.teacher is None):
        raise CheckpointError(f"{path}: was trained in mode {checkpoint['config']['mode']}")
    load_weights(state.student, checkpoint["student"], f"{path} (student)")
    if state.teacher:
        load_weights(state.teacher, checkpoint["teacher"], f"{path} (teacher)")
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.step = checkpoint["step"]


def evaluate(state: State, out: Path, val_set: CocoDataset, log: RunLog) -> dict[str, Any]:
    """AP on the validation set. Rank 0 writes results.json and a line of metrics.jsonl."""
    started, cfg, model = time.perf_counter(), state.cfg, state.evaluated_model
    distributed.broadcast_buffers(model)  # the teacher has batch norm statistics of each rank
    tables, text = evaluate_dataset(
        model, val_set, state.device, cfg.workers, cfg.max_detections, out / "results.json"
    )
    if distributed.is_main():
        log.say(f"step {state.step}\n{text}")
        log.evaluation(state.step, tables, time.perf_counter() - started)
    distributed.barrier()
    return tables


# --- the program ----------------------------------------------------------------------------------


def make_run_folder(cfg: Config) -> Path:
    """The folder to write to. It never overwrites a run. Without --out the next free name is taken.
    With --out the user has to say --resume.
    """
    out = Path(cfg.out or f"runs/{cfg.preset}")
    if cfg.resume:
        if not (out / "last.pt").is_file():
            raise ConfigError(f"resume: {out} holds no last.pt to go on from; say --out FOLDER")
        return out
    if cfg.out and (out / "last.pt").exists():
        raise ConfigError(
            f"out: {out} already holds a run; go on with --resume or choose another --out"
        )
    if not cfg.out and (out / "config.json").exists():
        number = next(n for n in range(2, 10_000) if not Path(f"{out}_{n}").exists())
        out = Path(f"{out}_{number}")
    return out


def main() -> None:
    started = time.perf_counter()
    cfg = parse(sys.argv[1:])
    device = distributed.init_distributed(cfg.device)
    cfg = resolve_auto(cfg, device)
    processes = distributed.world_size()
    if cfg.batch_size % (processes * cfg.accumulate):
        raise ConfigError(
            f"batch_size {cfg.batch_size} cannot be shared evenly by {processes} processes with"
            f" accumulate={cfg.accumulate}"
        )
    out = make_run_folder(cfg)
    train_set, val_set = make_train_set(cfg), None  # nothing is written if they fail
    if cfg.val_json:
        val_set = make_val_set(cfg, train_set.classes)

    distributed.barrier()  # all ranks have chosen a folder before rank 0 creates it
    if distributed.is_main():
        notes = warnings(cfg) + train_set.notes + (val_set.notes if val_set is not None else [])
        try:
            if val_set is not None:
                require_masks(val_set.coco, val_set.name)
        except NoMasksError as error:
            notes.append(str(error))
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not cfg.resume:
                (out / "config.json").write_text(to_json(cfg))
        except OSError as error:
            raise ConfigError(f"out: cannot write to {out} ({error.strerror})") from None

        print(f"{cfg.mode}: {len(train_set)} images, {cfg.steps} steps, to {out}", flush=True)
    tables = train(cfg, out, device, train_set, val_set)
    if distributed.is_main():
        print(final_summary(cfg, out, tables, (time.perf_counter() - started) / 60))
    distributed.shutdown()


if __name__ == "__main__":
    errors.run(main)
