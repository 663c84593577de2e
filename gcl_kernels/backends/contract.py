"""What passes between the operator and a backend. A backend is a module with three functions, the whole contract.

`forward(pairs, want) -> Lines`
    Row and column logsumexp in natural-log units, of negatives alone unless `want.joined`, and the positives' logits, all of
    `statistics_dtype`. A direction that is not wanted is None and costs nothing. A row or column with nothing visible is -inf.
    The positive of label -1 is 0.

`backward(pairs, statistics, upstream, need, *, joined=True, dtype=None) -> Gradients`
    `statistics` as the forward returned them, `joined` as it was wanted. `upstream` are the gradients with respect to them,
    None where zero. Gradients of lhs and rhs come in `dtype`, None for the inputs'. Pass float32 to accumulate several partial
    gradients and round their sum only once (a CPU that multiplies bfloat16 as such rounds each tile's product as well). The
    gradient of the scale is 0-d in the scale's dtype. A gradient that is not needed is None.

`forward_with_gradient(pairs, upstream, need, *, joined=True) -> (Lines, Gradients)`
    Does both passes in 6 N M D floating-point operations instead of 8, where the upstream gradients are known beforehand and
    the backend says that it saves work (`Backend.one_pass`). A direction whose upstream gradient is None is not wanted.

Statistics are float64 although tiles are float32. At logit_scale 100 a float32 `row` near 100 is known to 4e-6 only, which is
the whole loss of a well-trained row. O(N + M) numbers cost nothing.

Field aggregation (`fields.aggregate_fields`) is plain PyTorch everywhere but in Triton, whose module has two functions more:

`aggregate_fields(fields, mask, mean) -> (out, inverse_norms)`
    fields: F tensors (N, D) of one dtype; mask None or (N, F) bool; mean says how (`Mean`). Returns (N, D) in the fields'
    dtype and (N, F + 1) float32 for the backward: 1 / |x_f| of each row and field, then 1 / |mean|. It holds 0 for 1 / 0,
    and 1 where nothing is normalised.

`aggregate_fields_backward(fields, mask, mean, inverse_norms, g, need) -> gradients`
    g (N, D); a list of F tensors (N, D), empty where `need[f]` is False.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Want(NamedTuple):
    """Which directions are computed, and whether a line's positives are part of it."""

    row: bool
    col: bool
    joined: bool = True

    @property
    def both(self) -> bool:
        return self.row and self.col


class Lines(NamedTuple):
    """Numbers of rows (N,), of columns (M,) and of labels (N, P): statistics, or gradients with respect to them."""

    row: Tensor | None
    col: Tensor | None
    positive: Tensor | None


class Need(NamedTuple):
    """Which gradients are computed."""

    lhs: bool
    rhs: bool
    scale: bool


class Gradients(NamedTuple):
    lhs: Tensor | None
    rhs: Tensor | None
    scale: Tensor | None


class Mean(NamedTuple):
    """How fields become one vector: `normalize(sum_f u_f normalize_fields(x_f))`."""

    weights: Sequence[float]  # u, F of them, which sum to 1
    normalize_fields: bool
    normalize: bool


def statistics_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
