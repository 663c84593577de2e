"""Curves of a run for TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from gcl_kernels.training.errors import InputError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What each name imports."""


def expect_packages(names: str) -> None:
    """Raise InputError for one of `names`, a comma between them, whose package is not installed."""
    for name in filter(None, names.split(",")):
        package = PACKAGES[name]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise InputError(f"--report-to: expected the package {package}, got none: pip install {package}")


class Tracker:
    """Sends numbers to each of `names`, a comma between them: tensorboard, wandb; "" is none.

    A run that goes on from `step` goes on with its curves: TensorBoard's replace what was logged after that step, those of
    Weights & Biases keep it, the numbers being the same. The latter's name for the run stands in `folder/wandb_id`.
    """

    def __init__(self, names: str, folder: Path, options: dict[str, Any], step: int = 0) -> None:
        self._writer = self._wandb = None
        chosen = set(filter(None, names.split(",")))
        try:
            if "tensorboard" in chosen:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
            if "wandb" in chosen:
                import wandb  # pyright: ignore[reportMissingImports]

                known = folder / "wandb_id"
                identity = known.read_text(encoding="utf-8").strip() if step and known.exists() else None
                folder.mkdir(parents=True, exist_ok=True)
                self._wandb = wandb.init(
                    project="gcl_kernels", name=folder.name, config=options, dir=folder, id=identity, resume="allow"
                )
                known.write_text(self._wandb.id, encoding="utf-8")
        except ImportError as error:
            raise InputError(
                f"--report-to: expected the package {error.name}, got none: pip install {error.name}"
            ) from None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()
