"""A contrastive loss held against a dense one, property by property: `python -m gcl_kernels.testing module:function`.

The status is 1 where a property fails, and 2 where a function cannot be had.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .battery import Loss
from .conformance import DRAWS, MEMORY_SIZES, check_loss
from .dense import AGAINST
from .report import Report, side_by_side

BEGIN, END = "<!-- figures: gcl_kernels.testing -->", "<!-- end figures -->"
FAULTS = (ImportError, AttributeError, ValueError, TypeError, OSError)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gcl_kernels.testing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "functions", nargs="*", metavar="module:function", help="of (lhs, rhs, logit_scale[, logit_bias]), or a class"
    )
    parser.add_argument("--public", action="store_true", help="the public losses that are installed, ours too")
    parser.add_argument("--against", choices=tuple(AGAINST), help="the dense loss; default: clip")
    parser.add_argument("--constant", nargs="+", metavar="NAME", help="what gets no gradient by design, as logit_scale")
    parser.add_argument("--draws", type=int, default=DRAWS, help="problems drawn beside the smallest")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--compiler", default="aot_eager", help="backend of torch.compile, as inductor")
    parser.add_argument(
        "--memory-n", nargs=2, type=int, default=MEMORY_SIZES, metavar="N", help="sizes whose memory is compared"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file that everything is written to")
    parser.add_argument(
        "--markdown", type=Path, help="file that the tables are written to; between the marks where it has them"
    )
    options = parser.parse_args(arguments)
    if not options.functions and not options.public:
        parser.error("expected module:function, or --public")
    return options


def load(name: str) -> Loss:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError("expected module:function")
    function = getattr(importlib.import_module(module), attribute)
    return function() if isinstance(function, type) else function


def version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def refusal(function: Loss, device: str) -> str | None:
    """Why a public loss does not run here at all."""
    sides = [torch.nn.functional.normalize(torch.randn(4, 8, device=device), dim=1) for _ in range(2)]
    scalars = [torch.tensor(v, device=device) for v in (10.0, -10.0)]
    try:
        function(*sides, *scalars[: 1 + (getattr(function, "against", "clip") == "siglip")])
    except Exception as fault:  # whatever a library raises is its result
        return f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:160]
    return None


def progress() -> tuple[Callable[[str], None], Callable[[str], None]]:
    """(what tells of a row, what tells of a loss), on a terminal that has tqdm."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return (lambda name: None), (lambda name: None)
    bar = tqdm(unit="row", disable=None)

    def row(name: str) -> None:
        bar.set_postfix_str(name)
        bar.update()

    return row, bar.set_description


def markdown(result: dict[str, Any], reports: Sequence[Report]) -> str:
    titles = [loss["title"] for loss in result["losses"]]
    lines = [f"Made by `{result['command']}`.", "", *(f"- {k} {v}" for k, v in result["versions"].items()), ""]
    lines += [f"{title} does not run here: {reason}." for title, reason in result["refused"].items()]
    return "\n".join([*lines, "", side_by_side(titles, reports)])


def write_markdown(path: Path, text: str) -> None:
    """Between the marks of a page that has them; or the file."""
    page = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path}: expected a page with the marks {BEGIN} and {END}, or no file")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    row, loss_begins = progress()
    chosen = {"against": options.against, "constant": options.constant}
    common = {
        "draws": options.draws,
        "seed": options.seed,
        "compiler": options.compiler,
        "memory_sizes": tuple(options.memory_n),
        "device": options.device,
        "tell": row,
    }
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "gcl_kernels.testing", *(arguments or sys.argv[1:])]),
        "versions": {"Python": platform.python_version(), "torch": torch.__version__},
        "losses": [],
        "refused": {},
    }
    found, reports = [], []
    name = ""
    try:
        for name in options.functions:
            function = load(name)
            found.append((getattr(function, "title", name), function, chosen))
        if options.public:
            from .public import PUBLIC

            for function in PUBLIC:
                title, package = function.title, function.package
                result["versions"][package] = version(package)
                reason = refusal(function, options.device)
                if reason:
                    result["refused"][title] = reason
                else:
                    found.append((title, function, {}))
        for name, function, own in found:
            loss_begins(name)
            report = check_loss(function, **own, **common)
            reports.append(report)
            rows = [dataclasses.asdict(r) for r in report.rows]
            result["losses"].append({"title": name, "rows": rows})
            print(f"{name}\n\n{report}\n" if len(found) > 1 else report, flush=True)
        for title, reason in result["refused"].items():
            print(f"{title} does not run here: {reason}")
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if options.markdown:
            write_markdown(options.markdown, markdown(result, reports))
    except FAULTS as fault:
        print(f"{name}: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
