"""Matrix products whose results are added up in a wider dtype, by the best way that torch has on the device."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from . import cpu

# So many terms of a product are added up in one float32 accumulator. oneDNN would add up 512 or more, and the errors of logits
# near 100 would then be up to 3.6 times those of MKL.
TERMS = 256


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b in out's dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if way(a.device.type, a.dtype) == "widen":
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return out.copy_(torch.mm(a, b, out_dtype=out.dtype))


def by_onednn(a: Tensor) -> bool:
    """Whether products of such operands go through oneDNN (`cpu`), which allocates its results."""
    return a.device.type == "cpu" and a.dtype == torch.float32 and cpu.float32_products() == "onednn"


def onednn_product(a: Tensor, b: Tensor, terms: int | None = None) -> Tensor:
    """a @ b in new memory, IEEE float32 where `torch.mm` is.

    Reads a row by row; a's transpose is multiplied from the right, so that b is copied if need be and not a. `terms`: how many
    at most are added up in one accumulator.
    """
    if a.numel() == 0 or b.numel() == 0:
        return torch.mm(a, b)
    if not a.is_contiguous() and a.t().is_contiguous():
        return in_parts(b.t(), a.t(), terms).t()
    return in_parts(a, b, terms)


def in_parts(a: Tensor, b: Tensor, terms: int | None) -> Tensor:
    linear = cpu.linear()
    assert linear is not None
    result, weight = None, b.t()
    for part in range(0, a.shape[1], terms or a.shape[1]):
        x, w = a, weight
        if terms is not None and terms < a.shape[1]:
            x, w = a[:, part : part + terms], weight[:, part : part + terms]
        # With rows of the weight apart in memory oneDNN has only its reference, some 1,000 times slower.
        w = w if w.is_contiguous() or w.t().is_contiguous() else w.contiguous()
        if result is None:
            result = linear.default(x, w, None, "none", [], "")
        else:
            result = linear.binary(x, result, w, None, "add")
    assert result is not None
    return result


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, accumulated in total's dtype; the first product replaces whatever total held."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        if by_onednn(a):
            result = onednn_product(a, b)
            put(
                total, result if first else result.contiguous(), first
            )  # adding a transposed matrix is slow, copying it is not
        else:
            torch.addmm(total, a, b, beta=beta, out=total)
        return
    best = way(a.device.type, a.dtype)
    if best == "addmm":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif best == "mm":
        put(total, torch.mm(a, b, out_dtype=total.dtype), first)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def add_rounded_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """As `add_product`, by a product whose result is in a's dtype: what a CPU has for bfloat16. The sum is in total's dtype."""
    put(total, torch.mm(a, b), first)


def put(total: Tensor, result: Tensor, first: bool) -> None:
    total.copy_(result) if first else total.add_(result)


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
