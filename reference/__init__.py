"""The oracle: the whole of the loss, dense and readable, in plain PyTorch (any dtype; use float64).

Every N x M matrix is written out, so someone who knows the formulas can check this file by reading it. It imports
nothing but torch, takes part in no dispatch and shares no code with `gcl_kernels`; tests hold every backend against it.
"""

from .dense import (
    PairwiseLSE,
    aggregate_fields,
    gcl_loss,
    hidden_pairs,
    pairwise_logsumexp,
    score_to_weight,
)

__all__ = ["gcl_loss", "pairwise_logsumexp", "PairwiseLSE", "aggregate_fields", "hidden_pairs", "score_to_weight"]
