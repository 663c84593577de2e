"""Predicts what a batch will need, before it is run: `python -m gcl_kernels.plan`.

`model` says what a prediction is made of, `gpu`, `cpu` and `dense` make one, `trace` runs the Triton backend's launch code on
tensors without memory, `report` is the command.
"""

from .cpu import on_cpu, stored_tiles, tile_count
from .dense import dense
from .gpu import launch_config, on_gpu
from .model import LABEL, Phase, Prediction, Sizes
from .report import amount, duration, largest_batch, main, ours

__all__ = [
    "LABEL",
    "Phase",
    "Prediction",
    "Sizes",
    "amount",
    "dense",
    "duration",
    "largest_batch",
    "launch_config",
    "main",
    "on_cpu",
    "on_gpu",
    "ours",
    "stored_tiles",
    "tile_count",
]
