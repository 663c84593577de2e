"""`open_clip.ClipLoss`, whose logits are whole: what ours is compared with."""

from __future__ import annotations

from ..chips import Chip
from .model import Phase, Prediction, Sizes, packing_bytes

DENSE_OPERATORS = 40


def dense(p: Sizes, chip: Chip) -> Prediction:
    """`open_clip.ClipLoss` in eager PyTorch: both directions' logits, each by a product of its own, and their log-softmax."""
    copy = p.logits * p.s
    phases = [p.exchange(2, p.s)]
    for direction in ("images", "texts"):
        phases += [
            Phase(f"logits of {direction}", p.dtype, 2 * p.logits * p.d, bytes=copy),
            Phase("log-softmax", exponentials=p.logits, bytes=2 * copy),
            # a matrix of zeros with N entries; it and the log-softmax are read, the logits' gradient is written
            Phase("their gradient", exponentials=p.logits, bytes=4 * copy),
            Phase("products with it", p.dtype, 4 * p.logits * p.d, bytes=2 * copy),
        ]
    phases.append(Phase("the rest", host=DENSE_OPERATORS * chip.launch))
    other_sides = 0.0 if p.world_size == 1 else 2 * p.gathered
    # backward's peak: both log-softmaxes, the gradient of one of them and of its logits
    packing = packing_bytes(p.d) if chip.family is None else 0.0
    return Prediction("dense (open_clip.ClipLoss)", tuple(phases), 4 * copy + other_sides + packing, "4 N x M matrices")
