"""Upstream gradients as the backends use them: wide, and for half precision of a size that half precision can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from .base2 import SAFE_SPREAD
from .contract import Lines, statistics_dtype
from .settings import may_read_on_host

# G is stored for gradients of size 1. In float16 a softmax of 65,536 columns would then lie among the subnormals; 2^8 lifts it
# out and leaves room for 2^8 before the largest finite number.
FLOAT16_LIFT = 2.0**8


def normalized(upstream: Lines, stored: torch.dtype) -> tuple[Lines, Tensor | None]:
    """Upstream gradients in the statistics' dtype, for a G that is stored in `stored`.

    For half precision they are divided by their largest magnitude, which is returned. The 1 / N that a mean leaves in G would
    be lost there, so it is applied after the products. So would weights near the smallest number of wider dtypes, where the
    host may look for them.
    """
    g = [None if v is None else v.to(statistics_dtype(v.device)) for v in upstream]
    known = [v for v in g if v is not None]
    half = stored in (torch.bfloat16, torch.float16)
    if not known or not (half or may_read_on_host(known[0].device)):
        return Lines(*g), None
    norm = torch.stack([v.abs().max() for v in known]).max()
    # a factor of G may be smaller than these by 2^SAFE_SPREAD
    if not half and not 0 < float(norm) < 2.0**SAFE_SPREAD * torch.finfo(stored).tiny:
        return Lines(*g), None
    norm = torch.where(norm > 0, norm, 1.0)
    if stored == torch.float16:
        norm = norm / FLOAT16_LIFT
    return Lines(*(None if v is None else v / norm for v in g)), norm
