"""The oracle: the whole of the loss, dense and readable, in plain PyTorch (any dtype; use float64).

Every N x M matrix is written out, so someone who knows the formulas can check this file by reading it. It imports
nothing but torch, takes part in no dispatch and shares no code with `gcl_kernels`; tests hold every backend against it.
"""

from .dense import (
    PairwiseLSE,
    PairwiseSoftplus,
    aggregate_fields,
    gcl_loss,
    hidden_pairs,
    pairwise_logsumexp,
    pairwise_softplus,
    score_to_weight,
    sigmoid_loss,
)
from .parts import multi_part_loss

__all__ = [
    "gcl_loss",
    "multi_part_loss",
    "pairwise_logsumexp",
    "PairwiseLSE",
    "sigmoid_loss",
    "pairwise_softplus",
    "PairwiseSoftplus",
    "aggregate_fields",
    "hidden_pairs",
    "score_to_weight",
]
