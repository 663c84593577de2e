"""`python -m gcl_kernels.testing module:function [--against clip]`: the table of `check_loss`; status 1 where a row fails."""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path

from .conformance import check_loss


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gcl_kernels.testing", description="Check a contrastive loss.")
    parser.add_argument("function", help="module:function of (lhs, rhs, logit_scale[, logit_bias])")
    parser.add_argument("--against", choices=("clip", "siglip"), default="clip")
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    args = parser.parse_args()
    module, _, name = args.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        function = function() if isinstance(function, type) else function
        report = check_loss(function, args.against)
        if args.json:
            args.json.write_text(json.dumps([dataclasses.asdict(row) for row in report.rows], indent=1) + "\n")
    except (ImportError, AttributeError, ValueError, TypeError, OSError) as fault:
        print(f"{args.function}: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
