"""What a small step costs the host: `python -m bench.launches`.

Counts the operations of one step on the Triton backend that launch something on a device: Triton kernels, matrix products, fills,
copies and every other operator that is neither a view nor an allocation. Then times the host, beside `open_clip.ClipLoss`, with
Triton's launches left out and the products made on a few small CPU tensors. No GPU is needed: the launch code takes CPU tensors
for those of a GPU, and its numbers are meaningless.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from gcl_kernels import ClipLoss, backends, gcl_loss, pairwise_logsumexp, validation
from gcl_kernels.backends import choice, products
from gcl_kernels.backends.triton import run
from gcl_kernels.backends.triton.config import FAMILIES
from gcl_kernels.plan.trace import WithoutMemory
from gcl_kernels.training.openclip import import_open_clip

N, D = 64, 64
FREE = ("empty", "new_empty", "detach", "lift_fresh", "_unsafe_view", "_reshape_alias", "promote_types")


class Launches(WithoutMemory):
    """Counts, by name, the operators that launch something; `kernel` counts Triton's."""

    def __init__(self):
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.by_name.total()

    def kernel(self, name: str, programs: int, **arguments) -> None:
        self.by_name[f"{name} (Triton)"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gcl_kernels":  # its parts count; and a mode is off within its own call
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not (func.__name__.startswith(FREE) or (func.is_view and is_alias(result, args[0]))):
            self.by_name[func.overloadpacket.__name__] += 1
        return result


def is_alias(result: Tensor | list[Tensor], x: Tensor) -> bool:
    """Of `to`, `contiguous` and `reshape`, which may copy; other views always are."""
    return not isinstance(result, Tensor) or result.untyped_storage()._cdata == x.untyped_storage()._cdata


class Stub:
    """Stands for a compiled kernel."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *_: None


@contextlib.contextmanager
def as_on_a_gpu(runner: Callable[..., Any], dtype: torch.dtype) -> Iterator[None]:
    """CPU tensors take the Triton backend's path, without reads of values, and its kernels go to `runner`."""
    config = FAMILIES["sm_90"].config(dtype, D, "ieee")
    with (
        backends.settings(config=config, host_reads=False),
        run.replaced_by(runner),
        # functions, since a mock takes its time
        mock.patch.object(choice, "choose", lambda *_: "triton"),  # noqa: PT008
        mock.patch.object(backends, "choose", lambda *_: "triton"),  # noqa: PT008
        mock.patch.object(validation, "may_read", lambda _: False),  # noqa: PT008
        mock.patch.object(products, "way", lambda *_: "addmm"),  # noqa: PT008
        mock.patch.object(products, "by_onednn", lambda _: False),  # noqa: PT008
    ):
        yield


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    lhs, rhs = (torch.randn(N, D, dtype=dtype).div_(D**0.5).requires_grad_() for _ in range(2))
    return lhs, rhs, torch.tensor(10.0, requires_grad=True)


def forwards() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The loss of (lhs, rhs, logit_scale) in every case of the table."""
    weights, ids, labels = torch.rand(N), torch.arange(N), torch.arange(N)
    limits = torch.full((N,), 2.0)

    def limited(lhs, rhs, scale):
        row, col, positive = pairwise_logsumexp(lhs, rhs, scale, lhs_limit=limits, rhs_limit=limits)
        return (row + col - 2 * positive).mean()

    return {
        "ClipLoss": ClipLoss(),
        "weights": lambda *x: gcl_loss(*x, weights=weights),
        "ids": lambda *x: gcl_loss(*x, weights=weights, lhs_ids=ids, rhs_ids=ids),
        "labels (N,)": lambda *x: gcl_loss(*x, weights=weights, labels=labels),
        "limits": limited,
        "one direction": lambda *x: gcl_loss(*x, directions="lhs_to_rhs"),
        "false_negative_margin": lambda *x: gcl_loss(*x, false_negative_margin=0.1),
    }


def counted(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], gradient: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Counter[str]:
    """Operations of a step, or of a forward without gradients. Parameters' `grad` is not added to: that is the caller's."""
    inputs, launches = batch(dtype), Launches()
    with as_on_a_gpu(launches.kernel, dtype), launches, torch.set_grad_enabled(gradient):
        value = loss(*inputs)
        if gradient:
            torch.autograd.grad(value, inputs)
    return launches.by_name


def host_microseconds(losses: dict[str, Callable], turns: int = 30, steps: int = 20) -> dict[str, float]:
    """Least time of a step of each loss over alternated turns, in float32."""
    inputs, best = batch(torch.float32), dict.fromkeys(losses, float("inf"))
    with as_on_a_gpu(lambda *_, **__: Stub(), torch.float32):
        for _ in range(turns):
            for name, loss in losses.items():
                start = time.perf_counter()
                for _ in range(steps):
                    torch.autograd.grad(loss(*inputs), inputs)
                best[name] = min(best[name], (time.perf_counter() - start) / steps * 1e6)
    return best


def main() -> None:
    torch.set_num_threads(1)
    print("Operations that launch something, bfloat16, one chunk\n")
    for name, loss in forwards().items():
        step, forward = counted(loss), counted(loss, gradient=False)
        print(f"{name}: {step.total()} a step, {forward.total()} a forward without gradients")
        print("    " + ", ".join(f"{op} {k}" for op, k in sorted(step.items(), key=lambda item: -item[1])))
    losses = {name: loss for name, loss in forwards().items() if name in ("ClipLoss", "weights")}
    if importlib.util.find_spec("open_clip") is None:
        print("\nopen_clip is not installed: no host time beside it")
        return
    theirs = import_open_clip().ClipLoss()

    def dense(lhs: Tensor, rhs: Tensor, scale: Tensor) -> Tensor:
        return theirs(lhs, rhs, scale)

    times = host_microseconds({**losses, "open_clip.ClipLoss": dense})
    print(f"\nHost time of a step, float32, N = {N}, D = {D}, Triton's launches left out\n")
    for name, microseconds in times.items():
        print(f"{name}: {microseconds:.0f} us, {microseconds / times['open_clip.ClipLoss']:.2f} of open_clip's")


if __name__ == "__main__":
    main()
