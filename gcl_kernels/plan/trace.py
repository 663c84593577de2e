"""Peak memory of the Triton backend: its own launch code, run on tensors without memory, with kernels that do nothing."""

from __future__ import annotations

import weakref
from functools import lru_cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..backends import Lines, Need, Want, settings, workspace_bytes
from ..backends.triton import launch, one_pass, run
from ..backends.triton.config import Config
from ..pairs import Pairs
from .model import Sizes


class WithoutMemory(TorchDispatchMode):
    """Lets the launch code run on tensors without memory, for which torch 2.9 lacks one product."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["out"] if func is torch.ops.aten.addmm.dtype_out else func(*args, **kwargs)


class Storages(WithoutMemory):
    """Bytes of the storages that are alive, those of `inputs` excepted, and their peak."""

    def __init__(self, *inputs: torch.Tensor):
        super().__init__()
        self.alive = {x.untyped_storage()._cdata: 0 for x in inputs}  # views of them are nothing new
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def peak_memory(p: Sizes, config: Config, in_one_pass: bool) -> tuple[float, float]:
    """Bytes over the inputs at the peak of the forward, and of the backward with what the forward left and its results."""
    # ranks add up their parts of a gradient in float32
    dtype = None if p.world_size == 1 else torch.float32
    both = p.directions == 2
    return _peaks((p.n, p.m, p.d), (p.torch_dtype, dtype), config, both, in_one_pass, workspace_bytes())


@lru_cache(maxsize=4096)
def _peaks(shape, dtypes, config, both, in_one_pass, workspace) -> tuple[float, float]:
    (n, m, d), (dtype, dtype_of_gradients) = shape, dtypes
    lhs, rhs = (torch.empty(k, d, dtype=dtype, device="meta") for k in (n, m))
    scale = torch.empty((), device="meta")
    labels = None if m >= n else torch.empty(n, 1, dtype=torch.int64, device="meta")  # the default ones need M >= N
    pairs, want, need = Pairs(lhs, rhs, scale, labels), Want(True, both), Need(True, True, True)
    nothing = run.replaced_by(lambda kernel, programs, **arguments: None)
    with settings(config=config, few_chunks=True), nothing, Storages(lhs, rhs, scale) as storages:
        if in_one_pass:
            upstream = Lines(*(torch.empty(k, dtype=torch.float64, device="meta") for k in (n, m, (n, 1))))
            one_pass.forward_with_gradient(pairs, upstream._replace(col=upstream.col if both else None), need)
            return 0.0, storages.peak
        statistics = launch.forward(pairs, want)
        forward, storages.peak = storages.peak, storages.now
        upstream = Lines(*(None if v is None else torch.empty_like(v) for v in statistics))
        launch.backward(pairs, statistics, upstream, need, dtype=dtype_of_gradients)
        return forward, storages.peak
