"""The cells of a GPU session: what `python -m bench` is called with in each step, and what it left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.gpu.context import Context, read

SCALE = ("--logit-scale", str(100 / 7))
SIGMOID = ("--loss", "sigmoid", "--logit-scale", "10")
DENSE = ("--peers", "open_clip,open_clip_compiled")
SMALL, SHORT = "64,256,1024,2048,4096,8192,16384", "256,2048,16384"
OTHERS = "memeff,liger,linear_cross_entropy,linear_cross_entropy_chunked,cut_cross_entropy,inf_cl,sentence_transformers"


def call(n: int | str, d: int, *options: str, graph: str = "no", dtype: str = "bf16") -> list[str]:
    """Arguments of `python -m bench`; an option that comes twice counts where it comes last."""
    return ["--n", str(n), "--d", str(d), "--dtype", dtype, "--graph", graph, *SCALE, *options]


# A step: its calls, in the order in which they are worth having. A step that is cut off goes on with the case it was at.
CALLS: dict[str, list[list[str]]] = {
    "gates": [
        call(2048, 512, *DENSE, graph="both"),
        call(65_536, 768, "--peers", "open_clip"),
        call(65_536, 768, *SIGMOID, "--peers", "open_clip"),
    ],
    "curves": [
        call(SMALL, 512, *DENSE, graph="both"),
        call(SHORT, 512, *SIGMOID, *DENSE, graph="both"),
        call("2048,16384", 768, *DENSE, graph="both"),
        call(65_536, 512, "--peers", "open_clip"),
        call("1024,4096,16384", 512, *DENSE, dtype="fp32"),
    ],
    "peers": [
        call(65_536, 768, *SIGMOID, "--peers", "siglip_kernel,open_clip_compiled"),
        call(65_536, 768, "--peers", f"open_clip_compiled,{OTHERS}", "--turns", "3"),
        call(4096, 768, "--peers", f"open_clip,open_clip_compiled,{OTHERS}"),
        call(SHORT, 512, *SIGMOID, "--peers", "siglip_kernel", graph="both"),
        call(SHORT, 512, "--peers", "memeff,liger,linear_cross_entropy", graph="both"),
    ],
    "large": [
        call(262_144, 512, "--peers", "memeff,liger", "--turns", "2"),
        call(262_144, 512, *SIGMOID, "--peers", "siglip_kernel", "--turns", "2"),
        call(2**20, 512, "--peers", "none", "--turns", "1"),
        call(2**20, 512, *SIGMOID, "--peers", "none", "--turns", "1"),
    ],
}
TOY_CALLS: dict[str, list[list[str]]] = {
    "gates": [call(48, 32, "--peers", "open_clip", "--turns", "1")],
    "curves": [call("16,40", 32, "--peers", "none", "--turns", "1")],
    "peers": [
        call(40, 32, "--peers", "memeff,liger", "--turns", "1"),
        call(40, 32, *SIGMOID, "--peers", "siglip_kernel,open_clip", "--turns", "1"),
    ],
    "large": [call(96, 32, "--peers", "none", "--no-error", "--turns", "1")],
}

# `python -m bench` for each of the calls, in one process. A dry run goes without what a GPU does not do or does in no time: the
# products that give a CPU's rate take ten seconds, the fresh process in which a CPU's memory is measured takes three.
PROGRAM = """
import ast, sys
from bench import __main__, measure
calls, toy = ast.literal_eval(sys.argv[1])
if toy:
    measure.gemm = lambda case: lambda: 1e-9
    measure.cpu_extra_mib = lambda case, peer: None
for arguments in calls:
    __main__.main(arguments)
"""


def calls(step: str, context: Context) -> list[list[str]]:
    chosen = TOY_CALLS if context.dry_run else CALLS
    ends = ["--device", context.device, "--json", str(context.out / f"{step}.json"), "--resume"]
    return [[*arguments, *ends] for arguments in chosen[step]]


def cases(step: str) -> list[Case]:
    """The cases of a step of a real session, each once."""
    from bench.__main__ import parse, plan

    found = [case for arguments in CALLS[step] for case, _ in plan(parse([*arguments, "--device", "cuda"]))]
    return list(dict.fromkeys(found))


def step(name: str) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        wanted = calls(name, context)
        failed = False
        if run_calls(wanted, context):
            # A peer may take the process or the device's context with it: then each call has a process of its own.
            failed = sum(run_calls([arguments], context) != 0 for arguments in wanted) > 0
        cells = read(context.out / f"{name}.json").get("cells", [])
        measured = [cell for cell in cells if cell["seconds"]]
        context.save({"file": f"{name}.json", "cells": len(cells), "measured": len(measured)} if cells else {})
        if failed or not measured:
            sys.exit(1)

    return run


def run_calls(wanted: Sequence[Sequence[str]], context: Context) -> int:
    program = repr(([list(arguments) for arguments in wanted], context.dry_run))
    return shown([sys.executable, "-c", PROGRAM, program])[0]


def shown(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output, which is passed on line by line."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def all_cells(out: Path) -> list[dict[str, Any]]:
    """Every cell that the session has measured, or has a reason for."""
    return [cell for name in CALLS for cell in read(out / f"{name}.json").get("cells", [])]
