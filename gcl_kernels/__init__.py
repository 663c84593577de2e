"""Fast exact contrastive losses for very large batches, and Generalized Contrastive Learning (arXiv 2404.08535)."""

from ._version import __version__
from .clip import ClipLoss
from .fields import aggregate_fields
from .losses import GCLLoss, gcl_loss
from .lse import PairwiseLSE, pairwise_logsumexp
from .memory_bank import MemoryBank
from .parts import Part, multi_part_loss
from .positives import positives_of
from .score_to_weight import score_to_weight
from .siglip import SigLipLoss
from .sigmoid import sigmoid_loss
from .softplus import PairwiseSoftplus, pairwise_softplus
from .views import nt_xent_loss, supcon_loss

__all__ = [
    "gcl_loss",
    "GCLLoss",
    "multi_part_loss",
    "Part",
    "ClipLoss",
    "nt_xent_loss",
    "supcon_loss",
    "pairwise_logsumexp",
    "PairwiseLSE",
    "positives_of",
    "MemoryBank",
    "sigmoid_loss",
    "SigLipLoss",
    "pairwise_softplus",
    "PairwiseSoftplus",
    "aggregate_fields",
    "score_to_weight",
    "__version__",
]
