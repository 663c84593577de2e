"""Runs the steps that have no result yet, each in a process of its own with a time limit."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.gpu import cells, report
from bench.gpu.context import Result, read
from bench.gpu.steps import NOT_INTERPRETED, STEPS
from bench.gpu.targets import targets
from gcl_kernels.training.files import write_json_atomically


def run_step(name: str, limit: float, out: Path, dry_run: bool) -> Result:
    """Runs a step in a process group of its own and returns its entry of the summary."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONUNBUFFERED"] = "1"
    if dry_run:
        environment["OMP_NUM_THREADS"] = "1"
        if name not in NOT_INTERPRETED:
            environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        result_path, output_path = Path(scratch) / "result.json", Path(scratch) / "output.txt"
        command = [
            sys.executable,
            "-m",
            "bench.gpu",
            "--step",
            name,
            "--out",
            str(out),
            "--result",
            str(result_path),
        ]
        start = time.monotonic()
        with output_path.open("wb") as output:
            process = subprocess.Popen(
                [*command, *["--dry-run"] * dry_run],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                process.wait(limit)
                status = "ok" if process.returncode == 0 else f"failed: exit {process.returncode}"
            except subprocess.TimeoutExpired:
                status = f"stopped after {limit:.0f} s"
            finally:
                stop(process)
        seconds = time.monotonic() - start
        text = output_path.read_bytes()[-(2**20) :].decode(errors="replace")
        with (out / "log.txt").open("a") as log:
            log.write(f"\n=== {name}: {status}, {seconds:.1f} s\n{text}\n")
        result = read(result_path)
    if status != "ok":
        print(text[-2000:])
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"status": status, "seconds": round(seconds, 1), "date": date, "result": result}


def stop(process: subprocess.Popen) -> None:
    """The process and what it started: its group is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session(out: Path, dry_run: bool, limit: float) -> Result:
    """Runs what has no result yet, in the time there is; the summary is on disk after each step."""
    out.mkdir(parents=True, exist_ok=True)
    summary = read(out / "summary.json") or {"dry_run": dry_run, "steps": {}}
    if summary["dry_run"] != dry_run:
        raise ValueError(f"--out: expected a folder of {'dry' if dry_run else 'real'} runs, got the other kind, {out}")
    end = time.monotonic() + limit
    print(plan(summary, limit), flush=True)
    for name, (_, step_limit) in STEPS.items():
        if has_result(name, summary):
            print(f"{name}: has a result")
            continue
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left")
            continue
        summary["steps"][name] = run_step(name, min(step_limit, left), out, dry_run)
        print(f"{name}: {summary['steps'][name]['status']}, {summary['steps'][name]['seconds']} s", flush=True)
        summary["targets"] = targets(summary["steps"], out)
        write_json_atomically(out / "summary.json", summary, indent=1)
        (out / "report.md").write_text(report.text(summary, out))
    return summary


def has_result(name: str, summary: Result) -> bool:
    """A step that was cut off counts if it saved something; one of cells goes on where it stopped."""
    known = summary["steps"].get(name)
    if not known or not known["result"] or known["status"].startswith("failed"):
        return False
    return known["status"] == "ok" or name not in cells.CALLS


def plan(summary: Result, limit: float) -> str:
    """What is left, and how much time it may take at the most."""
    left = {name: step_limit for name, (_, step_limit) in STEPS.items() if not has_result(name, summary)}
    words = ", ".join(f"{name} {seconds} s" for name, seconds in left.items()) or "nothing"
    return f"To do, each at the most: {words}; together {sum(left.values())} s, of which this call has {limit:.0f} s"
