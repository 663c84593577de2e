"""Matrix products whose results are added up in a wider dtype, by the best way that torch has on the device."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b in out's dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if way(a.device.type, a.dtype) == "widen":
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return out.copy_(torch.mm(a, b, out_dtype=out.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, accumulated in total's dtype; the first product replaces whatever total held."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
        return
    best = way(a.device.type, a.dtype)
    if best == "addmm":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif best == "mm":
        result = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(result) if first else total.add_(result)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


@cache  # one warning a device and dtype
def way(device: str, dtype: torch.dtype) -> str:
    """How a half-precision product is added to a float32 matrix. Versions of torch do not say, so it is tried.

    "addmm" in one call; "mm" by way of a float32 product; "widen" by products of float32, which are right but slow.
    """
    if device == "meta":
        return "addmm"  # tensors without memory stand for those of a GPU
    total, x = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    for name in ("addmm", "mm"):
        try:
            if name == "addmm":
                torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
            else:
                torch.mm(x, x, out_dtype=torch.float32)
            return name
        except (RuntimeError, TypeError):  # no such overload, or not on this device, or not with a float32 total
            continue
    if device == "cpu":  # where operands are widened anyway, but for Triton's interpreter and tests
        return "widen"
    warnings.warn(
        f"gcl_kernels: this torch ({torch.__version__}) has no product of {dtype} with float32 results on {device} devices; "
        "operands are widened to float32, which is exact but slow",
        stacklevel=2,
    )
    return "widen"


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> in float64, summed in float32 within a row."""
    return (a * b).sum(dim=1).sum(dtype=torch.float64)
