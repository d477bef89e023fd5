"""Train BoxTeacher, BoxInst or CondInst: `python train.py [PRESET] [--field value ...]`, or the
same under torchrun.

`train` below is the whole method. What stands above it are schedules and state; what stands below
says how it went.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from boxteacher import distributed
from boxteacher.backbone import WeightsError
from boxteacher.checkpoint import CheckpointError, load_checkpoint, load_weights, save_checkpoint
from boxteacher.coco import DataError
from boxteacher.coco_eval import NoMasksError, evaluate_dataset, require_masks
from boxteacher.command_line import parse
from boxteacher.config import Config, ConfigError, to_json, warnings
from boxteacher.data import CocoDataset, make_train_loader, make_train_set, make_val_set
from boxteacher.ema import ema_momentum, update_teacher
from boxteacher.model import CondInst, build_model, make_teacher
from boxteacher.published import load_initial_weights
from boxteacher.reporting import RunLog, make_contact_sheet, pseudo_mask_figures
from boxteacher.transforms import augment


class DivergedError(RuntimeError):
    """A loss is not a finite number; the message names the losses and the images."""


USER_ERRORS = (
    *(ConfigError, DataError, WeightsError, CheckpointError, distributed.DeviceError),
    DivergedError,
)


# --- schedules: functions of the step -------------------------------------------------------------


def lr_factor(cfg: Config, step: int) -> float:
    """Linear warm-up from 0.001 to 1, then x0.1 at every drop, or half a cosine down to 0."""
    progress = min(step / cfg.warmup_steps, 1.0) if cfg.warmup_steps else 1.0
    warmup = 0.001 * (1 - progress) + progress
    if cfg.lr_schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    return warmup * 0.1 ** sum(step >= drop for drop in cfg.lr_drops)


def weak_factor(cfg: Config, step: int) -> float:
    """The share at which losses without true masks count: min((step + 1) / warm-up, 1)."""
    return min((step + 1) / max(cfg.weak_warmup_steps, 1), 1.0)


# --- the state of a run ---------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    """What a checkpoint holds. `teacher` is None in the modes without one."""

    student: CondInst
    teacher: CondInst | None
    optimizer: torch.optim.Optimizer
    step: int = 0

    @property
    def judged(self) -> CondInst:
        """The model that a run is about: the teacher where there is one."""
        return self.teacher or self.student


def make_state(cfg: Config, num_classes: int, device: torch.device) -> State:
    student = build_model(cfg, num_classes, not (cfg.init or cfg.resume)).to(device)
    if cfg.init:
        load_initial_weights(student, cfg)
    teacher = None
    if cfg.mode == "boxteacher" and cfg.teacher:
        teacher = make_teacher(student)
    parameters = parameter_groups(student, cfg.norm_decay)
    if cfg.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, weight_decay=cfg.weight_decay, fused=True)
    else:
        options = dict(momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=True)
        optimizer = torch.optim.SGD(parameters, **options)
    return State(student, teacher, optimizer)


def parameter_groups(model: nn.Module, norm_decay: bool) -> list[dict[str, Any]]:
    """All that trains; without `norm_decay` weight decay spares vectors (biases, norms, scales) and
    Swin's position tables, as is usual with AdamW.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if norm_decay:
        return [{"params": [p for _, p in trained]}]
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in trained:
        is_spared = parameter.ndim < 2 or name.endswith("relative_position_bias_table")
        groups[is_spared]["params"].append(parameter)
    return groups


def save(cfg: Config, path: Path, state: State, train_set: CocoDataset) -> None:
    """Rank 0 writes all that is needed to go on, to evaluate and to predict."""
    if not distributed.is_main():
        return
    content = {
        "config": dataclasses.asdict(cfg),
        "class_names": train_set.class_names,
        "category_ids": train_set.category_ids,
        "step": state.step,
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict() if state.teacher else None,
        "optimizer": state.optimizer.state_dict(),
    }
    save_checkpoint(path, content)


def restore(cfg: Config, path: Path, state: State, train_set: CocoDataset) -> None:
    checkpoint = load_checkpoint(path)
    optimizer = checkpoint["config"]["optimizer"]
    if optimizer != cfg.optimizer or not checkpoint["optimizer"]:
        raise CheckpointError(f"{path}: was trained with {optimizer}; --init takes weights alone")
    if checkpoint["step"] >= cfg.steps:
        raise CheckpointError(f"{path}: has {checkpoint['step']} steps already; give more --steps")
    if checkpoint["category_ids"] != train_set.category_ids:
        raise CheckpointError(f"{path}: was trained on other classes: {checkpoint['class_names']}")
    if (checkpoint["teacher"] is None) != (state.teacher is None):
        raise CheckpointError(f"{path}: was trained in mode {checkpoint['config']['mode']}")
    load_weights(state.student, checkpoint["student"], f"{path} (student)")
    if state.teacher:
        load_weights(state.teacher, checkpoint["teacher"], f"{path} (teacher)")
    state.optimizer.load_state_dict(checkpoint["optimizer"])
    state.step = checkpoint["step"]


# --- the method -----------------------------------------------------------------------------------


def train(
    cfg: Config, out: Path, device: torch.device, train_set: CocoDataset, val_set: CocoDataset
) -> dict[str, Any]:
    """The training loop. Returns the last evaluation's tables (on rank 0)."""
    torch.manual_seed(cfg.seed)
    state = make_state(cfg, len(train_set.class_names), device)
    if cfg.resume:
        restore(cfg, out / "last.pt", state, train_set)
    student, teacher, optimizer = state.student, state.teacher, state.optimizer
    model = speed_up(cfg, state, device)
    full_lr = cfg.lr * (cfg.batch_size / cfg.lr_batch_size if cfg.optimizer == "sgd" else 1)
    rank, world_size = distributed.rank(), distributed.world_size()
    batch_size_per_rank = cfg.batch_size // world_size
    batches = make_train_loader(train_set, cfg, state.step, rank, world_size)
    autocast = torch.autocast(device.type, torch.bfloat16, cfg.dtype == "bfloat16")
    colors = torch.Generator()
    log = RunLog(out / "metrics.jsonl", state.step, cfg.steps, cfg.log_every, cfg.batch_size)
    tables: dict[str, Any] = {}
    verdict: Verdict | None = None  # on the step before

    for number, batch in enumerate(chain.from_iterable(batches), state.step * cfg.accumulate):
        step, part = divmod(number, cfg.accumulate)  # of the parts that a step's images come in
        is_last_part = part == cfg.accumulate - 1
        batch = batch.to(device)
        if part == 0:
            stop_if_not_finite(verdict, cfg, out, state, train_set)
            means, image_ids = {}, []  # over the whole step
        colors.manual_seed(cfg.seed * 1_000_003 + step)  # a resumed run draws what it would have
        torch.manual_seed((cfg.seed * 1_000_003 + number) * world_size + rank)
        lr = full_lr * lr_factor(cfg, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The teacher follows the student and turns boxes into pseudo masks, on the plain images.
        pseudo = None
        if teacher is not None:
            if part == 0:
                update_teacher(teacher, student, ema_momentum(step, cfg.ema_momentum))
            with autocast:
                pseudo = teacher.make_pseudo_masks(
                    batch,
                    cfg.teacher_size,
                    cfg.teacher_max_size,
                    cfg.mask_threshold,
                    cfg.iou_threshold,
                    cfg.score_threshold,
                    cfg.published_score,
                )
        # The student sees the same images in other colors, and learns from boxes and pseudo masks.
        skip = rank * batch_size_per_rank + part * len(batch.sizes)
        images = augment(batch.images, batch.sizes, cfg.student_augmentation, colors, skip)
        model.require_backward_grad_sync = is_last_part  # DDP adds the ranks' gradients up but once
        with autocast:
            losses, figures = model(images, batch, weak_factor(cfg, step), pseudo)
        (sum(losses.values()) / cfg.accumulate).backward()
        if pseudo is not None and log.wants(step):
            figures = figures | pseudo_mask_figures(pseudo, batch)
        for name, value in (losses | figures).items():
            means[name] = means.get(name, 0.0) + value.detach() / cfg.accumulate
        image_ids += batch.image_ids
        if not is_last_part:
            continue
        losses, figures = ({name: means[name] for name in some} for some in (losses, figures))
        verdict = judge(losses, optimizer, image_ids, step)
        if cfg.clip_grad:
            nn.utils.clip_grad_norm_(student.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

        state.step = step + 1
        if log.wants(step):
            log.step(step, lr, losses, figures)
        is_last = state.step == cfg.steps
        wants_checkpoint = is_last or state.step % cfg.checkpoint_every == 0
        wants_tables = is_last or (cfg.eval_every and state.step % cfg.eval_every == 0)
        if wants_checkpoint or wants_tables:
            stop_if_not_finite(verdict, cfg, out, state, train_set)
        if wants_checkpoint:
            save(cfg, out / "last.pt", state, train_set)
        if wants_tables:
            tables = evaluate(cfg, out, state, val_set, device, log)
    log.close()
    if distributed.is_main():
        make_contact_sheet(state.judged, val_set, device).save(out / "contact_sheet.png")
    return tables


def settle(cfg: Config, device: torch.device) -> Config:
    """What "auto" means on this device."""
    dtype, compiled = ("bfloat16", "on") if device.type == "cuda" else ("float32", "off")
    return dataclasses.replace(
        cfg,
        dtype=dtype if cfg.dtype == "auto" else cfg.dtype,
        compile=compiled if cfg.compile == "auto" else cfg.compile,
    )


def speed_up(cfg: Config, state: State, device: torch.device) -> nn.Module:
    """What makes a GPU fast stands here, outside the model. Returns the student to call, wrapped
    for its ranks.
    """
    state.student.train()
    if state.teacher:
        state.teacher.train()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for network in filter(None, (state.student, state.teacher)):
        network.to(memory_format=torch.channels_last)
        if cfg.compile == "on":
            varies = not cfg.crop and (cfg.dataset == "coco" or len(set(cfg.train_sizes)) > 1)
            compile_parts(network, dynamic=varies or None)
    if distributed.world_size() == 1:
        return state.student
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(state.student, device_ids=ids, broadcast_buffers=False)


def compile_parts(network: CondInst, **options: Any) -> None:
    """In place, so that names in checkpoints stay. Where images vary, `dynamic=True` makes their
    sizes symbols from the start: left to find that out level by level, torch compiles the head more
    often than it allows itself, student's and teacher's together, and then no longer compiles it.
    `forward`, not the module: all modules share one code object, and the limit is for each of them.
    """
    for part in (network.backbone, network.head, network.mask_branch):
        part.forward = torch.compile(part.forward, **options)
    network.loss_sums = torch.compile(network.loss_sums, **options)


class Verdict(NamedTuple):
    """A step's losses, on their way to the CPU."""

    step: int
    image_ids: list[int]
    names: list[str]
    mine: Tensor  # this rank's losses
    is_bad: Tensor  # whether any rank's is not finite
    arrived: torch.cuda.Event | None


def judge(
    losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, image_ids: list[int], step: int
) -> Verdict:
    """If a loss of any rank is not finite, the optimizer is to change no weight. That is settled on
    the device; the CPU reads the verdict a step later, and so need not wait.
    """
    values = torch.stack(list(losses.values())).detach()
    is_bad = ~distributed.reduce_mean(values).isfinite().all()
    optimizer.found_inf = is_bad.float()  # fused optimizers look at it, as for loss scaling
    mine, is_bad = (t.to("cpu", non_blocking=True) for t in (values, is_bad))
    arrived = None
    if values.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    return Verdict(step, image_ids, list(losses), mine, is_bad, arrived)


def stop_if_not_finite(
    verdict: Verdict | None, cfg: Config, out: Path, state: State, data: CocoDataset
) -> None:
    """All ranks stop together, before the bad step has changed any weight, and rank 0 saves what
    there is.
    """
    if verdict and verdict.arrived:
        verdict.arrived.synchronize()
    if not verdict or not verdict.is_bad:
        return
    state.step = verdict.step
    save(cfg, out / "diverged.pt", state, data)
    distributed.barrier()  # torchrun ends all processes when the first fails
    mine = zip(verdict.names, verdict.mine.tolist(), strict=True)
    bad = [name for name, value in mine if not math.isfinite(value)]
    where = f"{', '.join(bad)} for image ids {verdict.image_ids}" if bad else "on another rank"
    raise DivergedError(
        f"step {state.step}: loss not finite: {where}; the weights before this step are in "
        f"{out / 'diverged.pt'}; try a lower --lr, a longer --warmup-steps or --clip-grad 10"
    )


# --- how it went ----------------------------------------------------------------------------------


def evaluate(
    cfg: Config, out: Path, state: State, val_set: CocoDataset, device: torch.device, log: RunLog
) -> dict[str, Any]:
    """AP of the judged model on the validation set; results.json and metrics.jsonl on rank 0."""
    started = time.perf_counter()
    distributed.broadcast_buffers(state.judged)  # every rank has batch norm statistics of its own
    tables, text = evaluate_dataset(
        state.judged, val_set, device, cfg.workers, cfg.max_detections, out / "results.json"
    )
    if distributed.is_main():
        log.say(f"step {state.step}\n{text}")
        log.evaluation(state.step, tables, time.perf_counter() - started)
    distributed.barrier()
    return tables


def make_run_folder(cfg: Config) -> Path:
    """The folder to write to. A finished or interrupted run in it is never overwritten: without
    --out the next free name is taken; with --out, the user is asked to say --resume.
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


def last_words(cfg: Config, out: Path, tables: dict[str, Any], minutes: float) -> str:
    """Where everything is and what the numbers mean."""
    kind, table = ("mask", tables["segm"]) if "segm" in tables else ("box", tables["bbox"])
    ap, ap50 = (f"{table[k]:.1f}" if table[k] is not None else "-" for k in ("AP", "AP50"))
    source = "boxes and masks" if cfg.mode == "condinst" else "boxes alone"
    who = "teacher" if cfg.mode == "boxteacher" and cfg.teacher else "model"
    return f"""
{cfg.mode} learned from {source} in {minutes:.1f} min: {kind} AP {ap}, AP50 {ap50} on images it has
not seen. AP, 0 to 100, is the mean precision over recalls, classes and {kind} IoU thresholds from
0.50 to 0.95; AP50 asks for an IoU of 0.50 only.
  {out / "contact_sheet.png"}: boxes, pseudo masks, predictions, truth
  {out / "last.pt"}: weights; tables again: python evaluate.py --checkpoint {out / "last.pt"}
  {out / "results.json"}: the {who}'s predictions in COCO's format
  {out / "metrics.jsonl"}: losses and figures over time
  {out / "config.json"}: the whole configuration"""


def main() -> None:
    started = time.perf_counter()
    cfg = parse(sys.argv[1:])
    device = distributed.init_distributed(cfg.device)
    cfg = settle(cfg, device)
    processes = distributed.world_size()
    if cfg.batch_size % (processes * cfg.accumulate):
        raise ConfigError(
            f"batch_size {cfg.batch_size} cannot be shared evenly by {processes} processes with"
            f" accumulate={cfg.accumulate}"
        )
    out = make_run_folder(cfg)
    train_set, val_set = make_train_set(cfg), make_val_set(cfg)  # nothing is written if they fail
    if train_set.categories != val_set.categories:
        raise DataError(f"{val_set.name}: its categories are not those of {train_set.name}")
    distributed.barrier()  # all ranks have chosen a folder before rank 0 creates it
    if distributed.is_main():
        notes = warnings(cfg) + train_set.notes
        try:
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
    tables = train(cfg, out, device, train_set, val_set)
    if distributed.is_main():
        print(last_words(cfg, out, tables, (time.perf_counter() - started) / 60))
    distributed.shutdown()


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
