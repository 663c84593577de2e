"""This library beside what a user would pick instead: `python -m bench`.

Ours and every peer take turns in one process, with a matrix product between them whose rate is the ceiling of the run. Comma
lists make the product of cases; each cell is written as it is measured, so a run that is stopped keeps what it has, and
`--resume` goes on from there. `--curves` measures the scaling curves instead. Tables and figures come from the result files:
`python -m bench.report`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import cases, ceilings, measure, peers, report
from bench.cases import Case
from gcl_kernels import __version__
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.types import DIRECTIONS


def words(choices: Sequence[str]):
    def parse(text: str) -> list[str]:
        found = [word.strip() for word in text.split(",")]
        for word in found:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"expected among {', '.join(choices)}, got {word!r}")
        return found

    return parse


def numbers(kind: type):
    def parse(text: str) -> list:
        try:
            found = [kind(word.replace("_", "")) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
        if min(found) < 0:
            raise argparse.ArgumentTypeError(f"expected numbers >= 0, got {min(found)}")
        return found

    return parse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda", "mps"))
    parser.add_argument("--dtype", type=words(tuple(cases.DTYPES)), default=["fp32" if device == "cpu" else "bf16"])
    parser.add_argument("--n", type=numbers(int), default=[256, 1024, 2048], help="batch sizes")
    parser.add_argument("--m", type=numbers(int), help="columns; default N")
    parser.add_argument("--d", type=numbers(int), default=[512])
    parser.add_argument("--directions", type=words(DIRECTIONS), default=["both"])
    parser.add_argument("--pass", dest="passes", type=words(cases.PASSES), default=["both"])
    parser.add_argument("--logit-scale", type=numbers(float), default=[100.0])
    parser.add_argument("--draw", type=words(cases.DRAWS), default=["clustered"])
    parser.add_argument("--fields", type=numbers(int), default=[1], help="fields of the right-hand side")
    parser.add_argument("--ids", action="store_true", help="mask false negatives")
    parser.add_argument("--loss", default="softmax", choices=cases.LOSSES)
    parser.add_argument("--option", type=words(cases.OPTIONS), default=[""], help=", ".join(cases.OPTIONS[1:]))
    parser.add_argument(
        "--graph", choices=("no", "yes", "both"), default="no", help="steps eager, replayed in a CUDA graph, or both"
    )
    parser.add_argument(
        "--peers",
        type=chosen_peers,
        default=tuple(peers.PEERS),
        help="all, none, module:function (of lhs, rhs, logit_scale) or names: " + ", ".join(list(peers.PEERS)[1:]),
    )
    parser.add_argument("--turns", type=int, help="default: 31 for short steps, 5 for others")
    parser.add_argument("--no-error", action="store_true", help="leave out the float64 oracle")
    parser.add_argument("--curves", action="store_true", help="the scaling curves instead")
    parser.add_argument("--largest", type=int, help="of the curves: leave out what is above this N")
    parser.add_argument("--json", type=Path, help="result file; default: none, the table is printed")
    parser.add_argument("--resume", action="store_true", help="leave out what the result file has")
    parser.add_argument("--memory-of", nargs=2, metavar=("PEER", "CASE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen_peers(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(peers.PEERS) if text == "all" else ("ours",)
    names = [name.strip() for name in text.split(",")]
    words(tuple(peers.PEERS))(",".join(name for name in names if ":" not in name) or "ours")
    return ("ours", *(name for name in names if name != "ours"))


def plan(options: argparse.Namespace) -> list[tuple[Case, tuple[str, ...]]]:
    if options.curves:
        return cases.curves(options.device, options.largest)
    found = cases.product(
        devices=[options.device],
        dtypes=options.dtype,
        ns=options.n,
        ms=options.m,
        ds=options.d,
        directions=options.directions,
        passes=options.passes,
        scales=options.logit_scale,
        draws=options.draw,
        fields=options.fields,
        ids=[options.ids],
    )
    if options.graph != "no" and options.device != "cuda":
        raise SystemExit(f"--graph: expected --device cuda, got {options.device}")
    graphs = {"no": (False,), "yes": (True,), "both": (False, True)}[options.graph]
    return [
        (replace(case, loss=options.loss, option=option, graph=graph), options.peers)
        for case in found
        for option in options.option
        for graph in graphs
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))
    if options.memory_of:
        name, case = options.memory_of
        measure.print_memory_of(name, Case(**json.loads(case)))
        return
    result: dict[str, Any] = report.read(options.json) if options.resume and options.json else {"cells": []}
    machine = measure.machine()
    if result.get("machine", machine) != machine:
        raise SystemExit(f"--resume: expected the machine and versions that began {options.json}, got others")
    result.setdefault("date", datetime.date.today().isoformat())
    result |= {
        "gcl_kernels": __version__,
        "machine": machine,
        "versions": {name: peers.version(name) for name in peers.PEERS},
    }
    for case, names in tqdm(plan(options), unit="case"):
        known = [cell["peer"] for cell in result["cells"] if report.case_of(cell) == case]
        if set(names) <= set(known):
            continue
        failure = None
        try:
            rows = measure.cell_rows(case, names, options.turns, error=not options.no_error)
        except (
            Exception
        ) as error:  # the device's context is lost with a peer, and the process with it: the next goes on
            failure = error
            rows = [measure.row_of(case, name, f"the process failed: {measure.reason(error)}") for name in names]
        # Ratios are of one run: a case that lacks a peer is measured again as a whole.
        result["cells"] = [cell for cell in result["cells"] if report.case_of(cell) != case] + rows
        if options.json:
            write_json_atomically(options.json, result, indent=1)
        if failure is not None:
            raise failure
        tqdm.write(report.table(rows, title=case.title))
        tqdm.write(ceilings.line(rows))


if __name__ == "__main__":
    main()
