"""Checks shared by the public functions. A message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .backends.settings import debug

try:
    import numpy
except ImportError:  # the library does without
    NUMPY = ()
else:
    NUMPY = (numpy.ndarray, numpy.generic)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def may_read(x: Tensor) -> bool:
    """Whether values may be looked at: not under torch.compile, and on a device other than the CPU only in debug mode."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or debug())


def check_tensor(name: str, x: object, ndim: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(x.dtype).removeprefix('torch.')}")
    if x.ndim not in ndim:
        expected = " or ".join(f"{d}-d" for d in ndim)
        raise ValueError(f"{name}: expected a {expected} tensor, got shape {tuple(x.shape)}")


def check_device(name: str, x: Tensor, device: torch.device, owner: str = "lhs") -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected the device of {owner}, {device}, got {x.device}")


def check_pair(lhs: Tensor, rhs: Tensor) -> None:
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        check_tensor(name, x, (2,))
        if 0 in x.shape:
            raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(x.shape)}")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"rhs: expected (M, {lhs.shape[1]}) to match lhs {tuple(lhs.shape)}, got {tuple(rhs.shape)}")
    check_device("rhs", rhs, lhs.device)


def check_scale(value: Any, lhs: Tensor, name: str = "logit_scale") -> Tensor:
    """A number, or the one element of a tensor or numpy array, 0-d on lhs's device: float64 beside float64, else float32."""
    kind = torch.float64 if lhs.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a float or a floating-point tensor, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(value.shape)}")
        check_device(name, value, lhs.device)
        return value.reshape(()).to(kind)
    if isinstance(value, NUMPY):
        if torch.compiler.is_compiling():  # a number that is not known yet, and a tensor in the graph
            number = torch.as_tensor(value)
            return check_scale(number if number.dtype == torch.bool else number.to(lhs.device, kind), lhs, name)
        if value.size != 1:
            raise ValueError(f"{name}: expected one element, got shape {value.shape}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float or a tensor of one element, got {type(value).__name__}")
    if not abs(value) <= torch.finfo(kind).max:
        among = f" in {str(kind).removeprefix('torch.')}" if value == value and abs(value) != math.inf else ""
        raise ValueError(f"{name}: expected a finite number{among}, got {value}")
    return torch.full((), float(value), dtype=kind, device=lhs.device)


def as_labels(name: str, labels: Tensor, n: int, lhs: Tensor) -> Tensor:
    """(N, P) int64; the values are `check_label_range`'s."""
    check_lines(name, labels, n, lhs, INTEGERS, "P")
    return labels.reshape(n, -1).to(torch.int64)


def as_ids(name: str, ids: Tensor, n: int, lhs: Tensor) -> Tensor:
    """(N, K)"""
    check_lines(name, ids, n, lhs, (torch.int64,), "K")
    return ids.reshape(n, -1)


def as_numbers(name: str, x: Tensor, n: int, lhs: Tensor) -> Tensor:
    """(n,) without a gradient, float64 beside float64 embeddings and float32 otherwise. Infinities are taken, NaN is not."""
    check_lines(name, x, n, lhs, DTYPES, None)
    if may_read(x) and bool(x.isnan().any()):
        raise ValueError(f"{name}: expected numbers, got NaN at {x.isnan().nonzero()[0].item()}")
    return x.detach().to(torch.float64 if lhs.dtype == torch.float64 else torch.float32)


def check_lines(
    name: str, x: Tensor, n: int, lhs: Tensor, dtypes: tuple[torch.dtype, ...], columns: str | None
) -> None:
    """One number a line, or `columns` of them, on the device of lhs."""
    check_tensor(name, x, (1, 2) if columns else (1,), dtypes)
    if x.shape[0] != n or 0 in x.shape:
        expected = f"({n},) or ({n}, {columns})" if columns else f"({n},)"
        raise ValueError(f"{name}: expected {expected}, got {tuple(x.shape)}")
    check_device(name, x, lhs.device)


def check_label_range(labels: Tensor | None, lhs: Tensor, rhs: Tensor, distributed: bool = False) -> None:
    """`distributed`: labels may name other ranks' columns, which only the ranks together can check."""
    n, m = lhs.shape[0], rhs.shape[0]
    if labels is None:
        if m < n:
            raise ValueError(f"labels: expected labels for M < N (row i's default positive is column i), got None with "
                             f"N = {n}, M = {m}")  # fmt: skip
    elif may_read(labels) and not distributed:
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= m:
            raise ValueError(f"labels: expected columns 0..{m - 1}, or -1 for none, got values from {low} to {high}")


def check_channels(lhs_ids: Tensor | None, rhs_ids: Tensor | None) -> None:
    """Ids (N, K) and (M, K): both or neither."""
    if lhs_ids is None and rhs_ids is None:
        return
    if lhs_ids is None or rhs_ids is None:
        absent, given = ("lhs_ids", "rhs_ids") if lhs_ids is None else ("rhs_ids", "lhs_ids")
        raise ValueError(f"{absent}: expected ids together with {given}, got None")
    if lhs_ids.shape[1] != rhs_ids.shape[1]:
        raise ValueError(f"rhs_ids: expected {lhs_ids.shape[1]} channels as in lhs_ids, got {rhs_ids.shape[1]}")


def check_weights(weights: Tensor | None, labels: Tensor | None, n: int, device: torch.device) -> None:
    if weights is None:
        return
    expected = (n,) if labels is None else tuple(labels.shape)
    check_tensor("weights", weights, (1, 2), (*DTYPES, *INTEGERS))
    if tuple(weights.shape) != expected:
        raise ValueError(f"weights: expected shape {expected}, that of labels, got {tuple(weights.shape)}")
    check_device("weights", weights, device)
    if may_read(weights):
        used = weights.detach() if labels is None else weights.detach()[labels >= 0]
        bad = ~(torch.isfinite(used) & (used >= 0))
        if bool(bad.any()):
            raise ValueError(
                f"weights: expected finite numbers >= 0, got {used[bad][0].item()} ({int(bad.sum())} such)"
            )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_fraction(name: str, value: float, upper: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value <= upper:
        limit = f"in [0, {upper:g}]" if math.isfinite(upper) else ">= 0"
        raise ValueError(f"{name}: expected a number {limit}, got {value}")
