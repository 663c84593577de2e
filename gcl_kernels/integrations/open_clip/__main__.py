"""`python -m gcl_kernels.integrations.open_clip ARGS`: `python -m open_clip_train.main ARGS`, with the losses of this package."""

import sys

from . import VARIABLE, apply, undo


def main(arguments: list[str] | None = None) -> None:
    """Replace the losses and train, with open_clip_train's own command line."""
    replaced = apply()
    try:
        _train(replaced, arguments)
    finally:
        undo()


def _train(replaced: list[str], arguments: list[str] | None) -> None:
    from open_clip_train.main import main as train  # pyright: ignore[reportMissingImports]

    # open_clip_train sets up its logging later
    said = f"replaced {', '.join(replaced)}" if replaced else f"nothing is replaced, by {VARIABLE}=0"
    print(f"gcl_kernels: {said}", file=sys.stderr)
    train(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
