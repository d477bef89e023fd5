"""Studies: named lists of configurations, each trained with several seeds, and tables of them.

    python -m boxteacher.tools.study NAME [--seeds 0-4] [--jobs 2] [--only LABEL] [--table]

Every run is a process on one core (OMP_NUM_THREADS sets another number). When it ends, it becomes a
line of runs/study/NAME/results.jsonl. The same command goes on where it stopped: it runs what has
not finished, has failed, or has other words or settings than before.

Settings are tuned with seeds 10 and up, and seeds 0 to 4 are reported. A table has the given seeds.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image

from boxteacher import errors
from boxteacher.command_line import Parser, parse
from boxteacher.config import CHOICES, FIELDS, Config, ConfigError
from boxteacher.files import write_text
from boxteacher.shapes import load_shapes_image, make_shapes_coco
from boxteacher.tools.studies import STUDIES, C
from boxteacher.tools.study_tables import MEASURES, Result, is_finished, markdown, tabulate

# --- runs -----------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    identity: Result  # label, seed, words and settings, with which its result begins
    needs: list[Path]  # the folders of runs that come first
    commands: list[list[str]]  # the last but one trains


def make_run(study: Path, configurations: dict[str, C], label: str, seed: int) -> Run:
    """Train, then compare masks given true boxes. Self-training makes its masks first."""
    configuration, folder = configurations[label], study / label.replace(" ", "_") / f"seed_{seed}"
    identity, needs = {"label": label, "seed": seed, "words": configuration.words}, []
    words = [*configuration.words.split(), f"--seed={seed}", f"--out={folder}"]
    if configuration.start_from:
        first = make_run(study, configurations, configuration.start_from, seed)
        needs.append(first.folder)
        identity["words"] += f" | start from: {first.identity['words']}"
        identity["starts_from"] = first.identity["settings"]
        words.append(f"--init={first.folder / 'last.pt'}")
    cfg, masks, files = parse(words), folder / "masks.json", folder / "files"
    settings = {f: getattr(cfg, f) for f in FIELDS if getattr(cfg, f) != getattr(Config(), f)}
    settings = {f: v for f, v in settings.items() if f not in CHOICES}
    identity["settings"] = json.loads(json.dumps(settings))  # of this version's presets
    make_masks, commands = [sys.executable, "-m", "boxteacher.tools.label"], []
    if configuration.masks_from:
        first = make_run(study, configurations, configuration.masks_from, seed)
        needs.append(first.folder)
        identity["words"] += f" | masks from: {first.identity['words']}"
        identity["masks_from"] = first.identity["settings"]
        inputs = [f"--boxes={cfg.train_json}", f"--images={cfg.train_images}"]
        if cfg.dataset == "shapes":
            code = f"import boxteacher.tools.study as s; s.write_shapes({str(files)!r}, {words})"
            commands.append([sys.executable, "-c", code])
            inputs = [f"--boxes={files / 'train.json'}", f"--images={files / 'train'}"]
            words += ["--dataset=coco", f"--train-images={files / 'train'}"]
            words += [f"--val-json={files / 'val.json'}", f"--val-images={files / 'val'}"]
        inputs += [f"--checkpoint={first.folder / 'last.pt'}", f"--output={masks}"]
        commands.append(make_masks + inputs)
        words.append(f"--train-json={masks}")
    commands.append([sys.executable, str(Path(__file__).parents[2] / "train.py"), *words])
    commands.append([*make_masks, f"--checkpoint={folder / 'last.pt'}"])
    return Run(folder, identity, needs, commands)


def write_shapes(folder: str, words: list[str]) -> None:
    """Generated images as files: FOLDER/train, FOLDER/train.json, and the same for val."""
    # Imported here, because torch would occupy memory in the process that waits for the runs.
    from boxteacher.data import train_shapes_seed

    cfg = parse(words)
    sets = {"train": (train_shapes_seed(cfg), cfg.shapes_train), "val": (0, cfg.shapes_val)}
    for name, (seed, count) in sets.items():
        images, coco = Path(folder, name), make_shapes_coco(seed, count, cfg.shapes_size)
        images.mkdir(parents=True)
        load_image = load_shapes_image(seed, cfg.shapes_size)
        for entry in coco["images"]:
            pixels = load_image(entry)
            entry["file_name"] = f"{entry['id']}.png"
            Image.fromarray(pixels).save(images / entry["file_name"])
        write_text(images.with_suffix(".json"), json.dumps(coco))


def do(run: Run, lock: int, children: list[subprocess.Popen]) -> Result:
    """One command after the other. Returns what was measured, or the last line that a failed
    command wrote. The processes inherit the lock, which lasts until all who have it end."""
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    environment, ends = {"OMP_NUM_THREADS": "1"} | os.environ, [time.monotonic()]
    for command in run.commands:
        with open(run.folder / "log.txt", "a") as log:
            options = dict(env=environment, pass_fds=[lock], stdout=log, stderr=log)
            children.append(process := subprocess.Popen(command, **options))
        if code := process.wait():
            lines = (run.folder / "log.txt").read_text(errors="replace").strip().splitlines()
            return run.identity | {"error": lines[-1] if lines else f"exit code {code}"}
        ends.append(time.monotonic())
    shutil.rmtree(run.folder / "files", ignore_errors=True)
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    *_, tables = (line["evaluation"] for line in lines if "evaluation" in line)
    values = {f"mask_{k.lower()}": tables.get("segm", {}).get(k) for k in ("AP", "AP50", "AP75")}
    given = json.loads((run.folder / "given_boxes.json").read_text())["all"].get("masks", {})
    values |= {"box_ap": tables["bbox"]["AP"], "minutes": (ends[-2] - ends[-3]) / 60} | given
    return run.identity | dict.fromkeys(MEASURES) | values


def read_results(study: Path) -> list[Result]:
    path = study / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(runs: list[Run], jobs: int, study: Path) -> None:
    """Do the runs that have not finished, `jobs` at a time. Write the results when one ends."""
    lock = os.open(study / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise errors.UserError(f"{study}: runs of this study are going on already") from None
    except OSError:
        pass  # a file system without locks
    results, children, futures, failed = read_results(study), [], {}, 0
    waiting = [run for run in runs if not is_finished(run.identity, results)]
    started, pool = time.monotonic(), ThreadPoolExecutor(jobs)

    def attempt(run: Run) -> Result:
        for folder in run.needs:
            if folder in futures and "error" in futures[folder].result():
                return run.identity | {"error": f"{folder} failed, which comes first"}
        try:
            return do(run, lock, children)
        except (OSError, ValueError, LookupError) as error:  # a full disk, metrics without AP
            return run.identity | {"error": repr(error)}

    try:
        for run in waiting:
            futures[run.folder] = pool.submit(attempt, run)
        for done, future in enumerate(as_completed(futures.values()), 1):
            results.append(future.result())
            lines = [json.dumps(result) + "\n" for result in results]
            write_text(study / "results.jsonl", "".join(lines))
            failed += "error" in results[-1]
            left = (time.monotonic() - started) / done * (len(waiting) - done) / 60
            print(f"{done} of {len(waiting)}, {left:.0f} min left: {lines[-1]}", end="", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while any(future.running() for future in futures.values()):
            for process in children:
                process.kill()
            time.sleep(0.1)
        os.close(lock)
    if failed:
        raise errors.UserError(f"{failed} runs failed; start again to retry them")


# --- the program ----------------------------------------------------------------------------------


def interrupt(number: int, _: object) -> NoReturn:
    """As Ctrl-C, but once: the second signal of a group would end the clean-up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    parser = Parser("python -m boxteacher.tools.study NAME [...]", __doc__, fields=False)
    add = parser.add_argument
    add("name", choices=STUDIES, help=f"one of {', '.join(STUDIES)}", metavar="NAME")
    add("--seeds", default="0-4", help="such as 0-4 or 0,1,2")
    add("--jobs", type=int, default=2, help="runs at a time")
    add("--only", action="append", metavar="LABEL", help="one configuration (can be repeated)")
    add("--table", action="store_true", help="write the tables and run nothing")
    args, _ = parser.read(sys.argv[1:])
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be 1 or more, got {args.jobs}")
    configurations = {c.label: c for c in STUDIES[args.name]}
    chosen = args.only or list(configurations)
    if unknown := set(chosen) - configurations.keys():
        labels = ", ".join(map(repr, configurations))  # some have commas
        raise ConfigError(f"only: {unknown.pop()!r} is not one of {labels}")
    for label in chosen:  # the list grows by what they need, which may need something too
        chosen += {configurations[label].start_from, configurations[label].masks_from} - {""}
    try:
        ends = [part.partition("-") for part in args.seeds.split(",")]
        seeds = sorted({s for low, _, high in ends for s in range(int(low), int(high or low) + 1)})
        if not seeds:
            raise ValueError
    except ValueError:
        raise ConfigError(f"seeds: give 0-4 or 0,1,2 and the like, not {args.seeds}") from None

    study = Path("runs/study", args.name)
    study.mkdir(parents=True, exist_ok=True)
    runs = [make_run(study, configurations, label, s) for label in configurations for s in seeds]
    signal.signal(signal.SIGTERM, interrupt)
    try:
        if not args.table:
            run_all([run for run in runs if run.identity["label"] in chosen], args.jobs, study)
    finally:
        rows = tabulate(configurations, [run.identity for run in runs], read_results(study))
        table = study / f"table_seeds_{args.seeds}.md"
        write_text(table, markdown(rows))
        write_text(table.with_suffix(".json"), json.dumps(rows, indent=2) + "\n")
        print(table)


if __name__ == "__main__":
    errors.run(main)
