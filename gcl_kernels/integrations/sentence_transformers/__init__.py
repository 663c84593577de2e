"""The losses of this package in the place of sentence-transformers' MultipleNegativesRankingLoss, plain and cached.

    from gcl_kernels.integrations.sentence_transformers import CachedGCLLoss, GCLLoss

    loss = GCLLoss(model)  # was: losses.MultipleNegativesRankingLoss(model)

sentence-transformers is imported with the first name that is taken from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import CachedGCLLoss, GCLLoss

__all__ = ["CachedGCLLoss", "GCLLoss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import losses

    return getattr(losses, name)
