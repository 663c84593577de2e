"""Runs the Triton backend's own launch code without a GPU or kernels: on tensors without memory, and takes notes."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcl_kernels.backends.triton import launch
from gcl_kernels.backends.triton.config import Config


@dataclass
class Trace:
    kernels: Counter[str] = field(default_factory=Counter)
    operators: int = 0  # that do work: neither views nor allocations
    tile_logits: int = 0  # made by tile kernels
    product_flops: int = 0  # of library products
    largest_gradient: tuple[int, int] = (0, 0)
    peak: int = 0  # bytes


class Watch(TorchDispatchMode):
    """Bytes of storages that are alive, and operators."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace, self.alive, self.now = trace, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.trace.operators += not (func.is_view or func.__name__.startswith(("empty", "new_empty", "detach")))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.trace.peak = max(self.trace.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key, 0)


def trace_step(n: int, m: int, d: int, dtype: torch.dtype, config: Config) -> tuple[Trace, Trace]:
    """Forward and backward of both directions, as launched on a GPU whose torch adds half-precision products in place.

    Peaks are over the inputs; the backward's counts what the forward left and its own results.
    """
    traces = Trace(), Trace()
    trace = traces[0]

    def run(kernel, programs, **arguments):
        name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
        trace.kernels[name] += 1
        if name != "merge_partials":
            trace.tile_logits += arguments["n"] * arguments["m"]
        if name == "backward_tile":
            trace.largest_gradient = max(trace.largest_gradient, tuple(arguments["gradient"].shape))

    add_product, problem_of = launch.add_product, launch.Problem.of

    def counted_product(total, a, b):
        trace.product_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        add_product(total, a, b)

    def of(*arguments):
        with mock.patch.object(launch, "INTERPRETED", True):  # tensors off the GPU are let through
            return problem_of(*arguments)

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (launch, "run", run),
            (launch, "add_product", counted_product),
            (launch, "half_precision_product", lambda *_: "addmm"),
            (launch.Problem, "of", of),
            (launch.Problem, "block", lambda self, x, *_: x),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        lhs, rhs = (torch.empty(k, d, dtype=dtype, device="meta") for k in (n, m))
        scale = torch.empty((), device="meta")
        watch = Watch(trace)
        watch.alive = {x.untyped_storage()._cdata: 0 for x in (lhs, rhs, scale)}  # views of them are nothing new
        with watch:
            statistics = launch.forward(lhs, rhs, scale, None, None, None, True, True, config)
            upstream = [torch.empty_like(v) for v in statistics]
            trace = watch.trace = traces[1]
            launch.backward(lhs, rhs, scale, None, None, None, *statistics, *upstream, True, True, True, config)
    return traces
