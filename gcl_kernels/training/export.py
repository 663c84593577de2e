"""`python -m gcl_kernels.training.export`: a checkpoint in the forms that other libraries load.

    python -m gcl_kernels.training.export --pretrained logs/first/checkpoints/best.pt --out exported

Each form is loaded back by its own library and compared with the model, and a line says how far apart they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gcl_kernels.training import command
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.exporting import FORMS, Reference
from gcl_kernels.training.files import make_folder
from gcl_kernels.training.options import Parser, parse_list
from gcl_kernels.training.search import add_model_options, load_model


def parse_forms(text: str) -> list[str]:
    forms = [str(form).replace("-", "_") for form in parse_list(text)]
    if not forms or set(forms) - set(FORMS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FORMS)}, got {text}")
    return forms


def parser() -> Parser:
    made = Parser("gcl_kernels.training.export", description="A checkpoint in the forms that other libraries load")
    made.add_argument("--to", type=parse_forms, default=["safetensors", "open_clip"], metavar="FORMS",
                      help=f"some of {', '.join(FORMS)}, commas between them (default safetensors,open_clip)")  # fmt: skip
    made.add_argument("--out", type=Path, default=Path("exported"), metavar="DIR", help="default: exported")
    add_model_options(made)
    return made


def export(args: argparse.Namespace) -> None:
    """Load the model, write every form, and say what was written."""
    make_folder(args.out)
    model = load_model(args)
    for line in model.notes:
        print(line)
    reference = Reference(model)
    for form in args.to:
        try:
            for line in FORMS[form](model, reference, args.out):
                print(line, flush=True)
        except InputError as error:
            raise InputError(f"--to {form}: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the command line says; input that cannot be used gives its message and status 2."""
    args = parser().parse_args(argv)
    return command.run(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
