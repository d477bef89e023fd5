"""`boxteacher.tools.benchmark --report OUT`: all that is to be known about a GPU, in one call.

Each job is a process. OUT/results.json and OUT/report.md are written after each of them, a job's
output is in OUT/JOB.log. A call ends after 9 minutes at most. The same command goes on: with jobs
that have not run, then with those that have failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from boxteacher.config import ConfigError
from boxteacher.files import write_text
from boxteacher.tools.study import interrupt

R50 = "--batch 16 --size 800x1333 --steps 5"
SWIN = "coco_boxteacher_swin_b_3x --batch 8 --size 800x1333 --steps 5 --only train"
# What takes seconds comes first. To compile R-50 took over four minutes on an H200 (torch 2.11).
JOBS = {
    "r50_eager": f"{R50} --only train --compile off --profile OUT/trace_eager.json.gz",
    "r50_80_boxes": f"{R50} --only train --compile off --boxes 80",
    "r50_float32": f"{R50} --only train --compile off --dtype float32",
    "r50_inference": f"{R50} --only inference --compile off",
    "r50_compiled": f"{R50} --only train --profile OUT/trace.json.gz",
    "data": "--only data --batch 16 --workers 16 --steps 20",
    "mask_rcnn": "--against torchvision --batch 8 --size 800x1333 --teacher-size 0 --steps 8"
    " --compile off",
    "swin_b_eager": f"{SWIN} --compile off",
    "run": "--only run --batch 16 --workers 14 --steps 200",
    "coco": "--only data --synthetic-coco --batch 16 --workers 4",
    "swin_b": SWIN,
}
CALL_SECONDS, JOB_SECONDS = 540, 480  # at most
INTERRUPTED = "interrupted"


def write_report(out: Path, argv: Sequence[str]) -> dict[str, Any]:
    """Run the jobs, each with the words of `argv` behind its own. Returns what results.json holds:
    for each job its command, its measurements, and why it failed ("" if it did not)."""
    if argv[0] != "--report":
        raise ConfigError("report: --report OUT comes first; all other options go to every job")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    file, end = out / "results.json", time.monotonic() + CALL_SECONDS
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in sorted(JOBS, key=lambda name: name in done):
        words = [word.replace("OUT", str(out)) for word in JOBS[name].split()] + list(argv[2:])
        old, left = done.get(name, {}), end - time.monotonic()
        if left < 10 or (old.get("words") == words and not old["failure"]):
            continue
        print(f"{name}: {' '.join(words)}", flush=True)
        results, failure = run_job(words, out / f"{name}.log", min(left, JOB_SECONDS))
        print(f"    {failure or 'done'}", flush=True)
        done[name] = {"words": words, "failure": failure, "results": results}
        write_text(file, json.dumps(done, indent=1))
        write_text(out / "report.md", to_markdown(done, out))
        if failure == INTERRUPTED:
            raise KeyboardInterrupt
    return done


def run_job(words: list[str], log: Path, seconds: float) -> tuple[list[dict], str]:
    """What a job measured, and why it failed. Its process and those that it started end with it."""
    command, failure = [sys.executable, "-m", "boxteacher.tools.benchmark", *words], ""
    with log.open("w") as output:  # not a pipe: that would wait for all who can write to it
        streams = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        process = subprocess.Popen(command, **streams)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code, failure = 0, f"stopped after {seconds:.0f} seconds"
        except KeyboardInterrupt:
            code, failure = 0, INTERRUPTED
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code:
        failure = f"exit status {code}: {lines[-1] if lines else 'no output'}"
    return [json.loads(line) for line in lines if line.startswith('{"benchmark"')], failure


def to_markdown(done: dict[str, Any], out: Path) -> str:
    """A table of all measurements, then each job's own table, or the end of its output."""
    results = [(name, result) for name, job in done.items() for result in job["results"]]
    device = "{device}, torch {torch}".format(**results[0][1]) if results else "nothing measured"
    lines = ["# Benchmark", "", f"{device}, {time.strftime('%Y-%m-%d')}", ""]
    lines += ["| job | | images/s | seconds | peak MiB | of peak |", "| --- | --- |" + " --- |" * 4]
    for name, result in results:
        values = "{images_per_s:.2f} | {seconds:.4f} | {peak_mib:.0f}".format(**result)
        of_peak = f"{result['of_peak']:.1%}" if "of_peak" in result else ""
        lines.append(f"| {name} | {result['benchmark']} | {values} | {of_peak} |")
    lines += [f"| {name} | not run |" + " |" * 4 for name in JOBS if name not in done]
    for name, job in done.items():
        text = (out / f"{name}.log").read_text(errors="replace").splitlines()
        shown = [line for line in text if not line.startswith('{"benchmark"')][-25:]
        failed = ["", f"Failed: {job['failure']}"] if job["failure"] else []
        lines += ["", f"## {name}", "", f"`{' '.join(job['words'])}`", *failed, ""]
        lines += ["```", *shown, "```"]
    return "\n".join(lines) + "\n"
