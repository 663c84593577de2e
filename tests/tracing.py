"""What one step of the Triton backend launches, noted by running its launch code on tensors without memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcl_kernels import backends
from gcl_kernels.backends import Lines, Need, Want
from gcl_kernels.backends.triton import launch, run
from gcl_kernels.backends.triton.config import Config
from gcl_kernels.pairs import Pairs
from gcl_kernels.plan.trace import Storages
from tests.counting import Products


@dataclass
class Trace:
    kernels: Counter[str] = field(default_factory=Counter)
    tile_logits: int = 0  # made by tile kernels
    largest_gradient: tuple[int, int] = (0, 0)
    operators: int = 0  # that do work: neither views nor allocations
    product_flops: int = 0  # of library products
    peak: int = 0  # bytes


class Operators(TorchDispatchMode):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.trace.operators += not (func.is_view or func.__name__.startswith(("empty", "new_empty", "detach")))
        return func(*args, **(kwargs or {}))


def trace_step(n: int, m: int, d: int, dtype: torch.dtype, config: Config) -> tuple[Trace, Trace]:
    """Forward and backward of both directions, as launched on a GPU whose torch adds half-precision products in place.

    Peaks are over the inputs; the backward's counts what the forward left and its own results.
    """
    traces = Trace(), Trace()
    trace = traces[0]

    def noted(kernel, programs, **arguments):
        trace.kernels[kernel] += 1
        if kernel in ("forward_tile", "backward_tile"):
            trace.tile_logits += arguments["n"] * arguments["m"]
        if kernel == "backward_tile":
            gradient = arguments["gradient"]
            gradient = gradient.tensor if isinstance(gradient, run.Block) else gradient
            trace.largest_gradient = max(trace.largest_gradient, tuple(gradient.shape))

    lhs, rhs = (torch.empty(k, d, dtype=dtype, device="meta") for k in (n, m))
    pairs = Pairs(lhs, rhs, torch.empty((), device="meta"))
    with backends.settings(config=config), run.replaced_by(noted), Storages(*pairs.differentiable) as storages:
        with Products() as products, Operators(trace):
            statistics = launch.forward(pairs, Want(True, True))
        trace.peak, trace.product_flops = storages.peak, products.flops
        storages.peak = storages.now
        trace = traces[1]
        upstream = Lines(*(torch.empty_like(v) for v in statistics))
        with Products() as products, Operators(trace):
            launch.backward(pairs, statistics, upstream, Need(True, True, True))
        trace.peak, trace.product_flops = storages.peak, products.flops
    return traces
