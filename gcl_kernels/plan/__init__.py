"""A model of what a batch will need, before it is run: memory and time of our loss and of dense logits.

    python -m gcl_kernels.plan --batch 262144 --dim 768 --dtype bf16 --device h200 --world-size 8

Two-direction loss, forward and backward, default labels, no ids. Memory follows what each step keeps alive; on a CPU it is tested
against measurements. Time is the sum over phases of the slowest of matrix products, exponentials, memory traffic and host work
(all of them overlapped), and beside it the sum of all four (nothing overlapped). Rates are the `chips` table's.
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
