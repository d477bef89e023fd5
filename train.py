"""Train BoxTeacher, BoxInst or CondInst: `python train.py [PRESET] [--field value ...]`, or the
same under torchrun.

`train_step` is the method, and `train` the loop around it. Above them are the schedules and the
state of a run, below them what makes it fast, checkpoints, evaluation and the program itself.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from boxteacher import distributed, errors, run_folder
from boxteacher.checkpoint import Checkpoint, load_optimizer, load_weights, save_checkpoint
from boxteacher.coco import DataError
from boxteacher.coco_eval import evaluate_dataset, lacks_masks, require_void
from boxteacher.command_line import parse
from boxteacher.config import Config, ConfigError, is_due, scaled_lr, to_json, warnings
from boxteacher.data import (
    Batch,
    CocoDataset,
    check_batch_norm,
    make_train_loader,
    make_train_set,
    make_val_set,
)
from boxteacher.ema import ema_momentum, update_teacher
from boxteacher.files import write_text
from boxteacher.guard import DivergedError, RunGuard
from boxteacher.model import CondInst, build_model, make_teacher
from boxteacher.published import load_initial_weights, masks_for_boxes_as_published
from boxteacher.reporting import RunLog, final_summary, headline_ap, say_notes, write_contact_sheet
from boxteacher.transforms import augment

# --- schedules: functions of the step -------------------------------------------------------------


def learning_rate(cfg: Config, step: int) -> float:
    return scaled_lr(cfg) * lr_factor(cfg, step)


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
    guard: RunGuard
    model: nn.Module  # the student as training calls it (see speed_up)
    autocast: torch.autocast
    step: int = 0  # steps done

    @property
    def evaluated_model(self) -> CondInst:
        """The teacher where there is one, else the student."""
        return self.teacher or self.student


def make_state(
    cfg: Config, num_classes: int, device: torch.device, class_names: Sequence[str] = ()
) -> State:
    """A run at its beginning. `class_names`: `--init` carries classes over by name."""
    torch.manual_seed(cfg.seed)
    student = build_model(cfg, num_classes)
    if not cfg.resume:
        say_notes(load_initial_weights(student, cfg, class_names))
    student.to(device).train()
    teacher = make_teacher(student) if cfg.mode == "boxteacher" else None
    if teacher is not None and cfg.pseudo_score == "published":
        teacher.masks_for_boxes = lambda *args: masks_for_boxes_as_published(teacher, *args)
    parameters = [p for p in student.parameters() if p.requires_grad]
    options = dict(lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    if cfg.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, **options)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=0.9, **options)
    autocast = torch.autocast(device.type, torch.bfloat16, cfg.dtype == "bfloat16")
    guard = RunGuard(optimizer, filter(None, (student, teacher)))
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
    cfg, step, student, teacher = state.cfg, state.step, state.student, state.teacher
    state.guard.begin_step()  # raises if the step before this one was bad
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    has_begun = step >= cfg.pseudo_start
    if teacher is not None and has_begun:
        update_teacher(teacher, student, ema_momentum(step - cfg.pseudo_start, cfg.ema_momentum))
    elif teacher is not None:  # until then it is a copy
        teacher.load_state_dict(student.state_dict())

    parts_losses, parts_metrics, image_ids = [], [], []
    for part, batch in enumerate(parts):
        batch = batch.to(state.device)
        colors, num_images = seed_draws(cfg, step, part), len(batch.sizes)
        state.model.require_backward_grad_sync = part == len(parts) - 1  # DDP: add up once a step

        # 1. The teacher sees the plain images and turns their boxes into pseudo masks.
        with state.autocast:
            pseudo = teacher.make_pseudo_masks(batch) if teacher and has_begun else None
        # 2. The student sees the same images in other colors (if cfg.student_augmentation says so).
        skip = (distributed.rank() * len(parts) + part) * num_images
        images = augment(batch.images, batch.sizes, cfg.student_augmentation, colors, skip)
        # 3. It learns from the boxes and from the pseudo masks.
        with state.autocast:
            losses, metrics = state.model(images, batch, weak_factor(cfg, step), pseudo, has_begun)
        (sum(losses.values()) / len(parts)).backward()

        parts_losses.append(losses)
        parts_metrics.append(metrics)
        image_ids += batch.image_ids

    losses, metrics = mean_of(parts_losses), mean_of(parts_metrics)
    norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_grad or math.inf)
    state.guard.watch(step, losses | {"gradient": norm}, image_ids)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    return losses, metrics


def mean_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(part[name].detach() for part in parts) / len(parts) for name in parts[0]}


def train(
    state: State, out: Path, train_set: CocoDataset, val_set: CocoDataset | None
) -> dict[str, Any]:
    """The training loop. Returns the last evaluation's tables (on rank 0, given a val_set)."""
    cfg = state.cfg
    speed_up(state)
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = make_train_loader(train_set, cfg, state.step, rank, world_size)
    log = RunLog(out / "metrics.jsonl", cfg, state.step)

    def is_due_now(every: int) -> bool:
        return is_due(cfg, state.step, every)

    def evaluate_if_due() -> None:
        if val_set is not None and is_due_now(cfg.eval_every) and log.evaluated != state.step:
            with state.guard.signals.at_once():  # all is saved
                evaluate(state, out, train_set, val_set, log)

    if state.step > 0:  # what an interrupted run left to do
        evaluate_if_due()
    try:
        try:
            for parts in batches:
                if state.guard.must_stop():  # a signal
                    save(out / "last.pt", state, train_set)
                    distributed.barrier()  # torchrun ends all processes when the first ends
                    raise state.guard.signals.stopped()
                losses, metrics = train_step(state, parts)
                if is_due_now(cfg.log_every):
                    log.step(state.step, learning_rate(cfg, state.step - 1), losses, metrics)
                if is_due_now(cfg.checkpoint_every) or is_due_now(cfg.eval_every):
                    state.guard.raise_if_bad()
                    save(out / "last.pt", state, train_set)
                    evaluate_if_due()
        except DataError:  # an image that cannot be read
            state.guard.raise_if_bad()
            save(out / "last.pt", state, train_set)
            raise
    except DivergedError as error:
        state.step = error.step  # the optimizer skipped that step
        state.guard.undo_statistics()
        save(out / "diverged.pt", state, train_set)
        distributed.barrier()
        raise
    log.close()
    return log.tables


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
    """Memory format (also of the optimizer's averages), TF32, compilation, and
    DistributedDataParallel where there are ranks."""
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
    # Fused optimizers expect equal layouts of a weight and its averages. On a GPU they check that,
    # on a CPU they mix the numbers up. A checkpoint of another device has other layouts.
    for weight, averages in state.optimizer.state.items():
        for name, average in averages.items():
            if average.shape == weight.shape:
                averages[name] = torch.empty_like(weight).copy_(average)
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
    # torch 2.11 writes hundreds of lines about sizes as symbols. They say nothing of use.
    logging.getLogger("torch.utils._sympy.interp").setLevel(logging.ERROR)
    torch._dynamo.config.optimize_ddp = False  # DDP would split the parts once more
    for part in (network.backbone, network.head, network.mask_branch):
        part.forward = torch.compile(part.forward, **options)
    network.loss_sums = torch.compile(network.loss_sums, **options)


# --- checkpoints and evaluation -------------------------------------------------------------------


def save(path: Path, state: State, train_set: CocoDataset) -> None:
    """Rank 0 writes all that is needed to go on, to evaluate and to predict."""
    if not distributed.is_main():
        return
    content = {
        "config": dataclasses.asdict(dataclasses.replace(state.cfg, resume=False)),
        "class_names": train_set.class_names,
        "category_ids": train_set.category_ids,
        "num_images": len(train_set),
        "step": state.step,
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict() if state.teacher else None,
        "optimizer": state.optimizer.state_dict(),
    }
    save_checkpoint(path, content)


def restore(state: State, checkpoint: Checkpoint) -> None:
    """Go on from what `save` wrote."""
    where = str(checkpoint.path)
    load_weights(state.student, checkpoint["student"], f"{where} (student)")
    if state.teacher:
        load_weights(state.teacher, checkpoint["teacher"], f"{where} (teacher)")
    load_optimizer(state.optimizer, checkpoint["optimizer"], where)
    state.step = checkpoint["step"]


def evaluate(
    state: State, out: Path, train_set: CocoDataset, val_set: CocoDataset, log: RunLog
) -> None:
    """AP on the validation set. Rank 0 writes results.json, best.pt if there are evaluations to
    choose from, and a line of metrics.jsonl."""
    started, cfg, model = time.perf_counter(), state.cfg, state.evaluated_model
    distributed.broadcast_buffers(model)  # the teacher has batch norm statistics of each rank
    tables, text = evaluate_dataset(model, val_set, state.device, cfg, out / "results.json")
    if distributed.is_main():
        log.say(f"step {state.step}\n{text}")
        if cfg.eval_every and headline_ap(tables) > log.best_ap:
            save(out / "best.pt", state, train_set)
        log.evaluation(state.step, tables, time.perf_counter() - started)
    distributed.barrier()


# --- the program ----------------------------------------------------------------------------------


def read_config(images: int = 0) -> Config:
    """What the command line says, for so many training images (0: not known)."""
    cfg = parse(sys.argv[1:], images, run_folder.read_run)
    return run_folder.resume_after_restart(cfg)


def main() -> None:
    started = time.perf_counter()
    cfg = read_config()
    device = distributed.init_distributed(cfg.device)
    cfg = resolve_auto(cfg, device)
    processes = distributed.world_size()
    if cfg.batch_size % (processes * cfg.accumulate):
        raise ConfigError(
            f"batch_size {cfg.batch_size} cannot be shared evenly by {processes} processes with"
            f" accumulate={cfg.accumulate}"
        )
    run_folder.refuse_taken(cfg)
    if cfg.resume:  # the run may have begun on another device
        auto = resolve_auto(Config(), device)
        for name in ("dtype", "compile"):
            if (value := getattr(cfg, name)) != (usual := getattr(auto, name)):
                say_notes([f"{name} is {value} (--{name} auto: {usual})"], "note")

    # Data and networks: nothing is written if one of them fails.
    checkpoint, classes = run_folder.load_last(cfg) if cfg.resume else (None, None)
    train_set = make_train_set(cfg, classes)
    if cfg.epochs:  # now that the number of images is known
        cfg = resolve_auto(read_config(len(train_set)), device)
    val_set = make_val_set(cfg, train_set.classes) if cfg.val_json else None
    if val_set is not None and cfg.metric == "cityscapes":
        require_void(val_set.coco, val_set.name)
    check_batch_norm(train_set, cfg, processes)
    say_notes([*warnings(cfg), *train_set.notes])
    say_notes([*val_set.notes, *lacks_masks(val_set)] if val_set is not None else [])
    if checkpoint:
        run_folder.check_resume(cfg, checkpoint, train_set)
    state = make_state(cfg, len(train_set.class_names), device, train_set.class_names)
    if checkpoint:
        restore(state, checkpoint)

    claimed = run_folder.claim(cfg, checkpoint) if distributed.is_main() else None
    out = distributed.from_main(claimed)
    if distributed.is_main():
        write_text(out / "config.json", to_json(dataclasses.replace(cfg, resume=False)))
        masks = f" ({train_set.num_masks()} boxes have masks)" if cfg.use_masks else ""
        run = f"{len(train_set)} images{masks}, {cfg.steps} steps, learning rate {scaled_lr(cfg):g}"
        print(f"{cfg.mode}: {run}, to {out}", flush=True)
        if cfg.compile == "on":
            print("torch.compile: the first step can take minutes (or --compile off)", flush=True)
    with state.guard.signals.of(out) as signals:
        tables = train(state, out, train_set, val_set)
        if distributed.is_main():
            with signals.at_once():
                sheet = out / "contact_sheet.png"
                write_contact_sheet(sheet, state.evaluated_model, train_set, val_set)
            print(final_summary(cfg, out, tables, (time.perf_counter() - started) / 60))
    distributed.shutdown()


if __name__ == "__main__":
    errors.run(main)
