"""What a computation costs, counted: floating-point operations of matrix products, and the largest tensor."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gcl_kernels.backends import torch as torch_backend


class Products(TorchDispatchMode):
    """FLOPs of matrix products, those into a given tensor too; a product over two columns is no logits."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "_linear_pointwise"):
            inner = args[1 if name == "addmm" else 0].shape[1]
            self.flops += 2 * result.numel() * inner if inner > 2 else 0
        return result


class LargestTensor(TorchDispatchMode):
    numel = nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numel, self.nbytes = max(self.numel, x.numel()), max(self.nbytes, x.nbytes)
        return result


class Operators(TorchDispatchMode):
    """Operators that do work: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.__name__.startswith(("empty", "new_empty", "detach")))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_products():
    """A list of the FLOPs of matrix products in each pass of the torch backend, under operators that hide them from counters."""
    flops = []

    def counted(function):
        def call(*arguments, **options):
            with Products() as products:
                result = function(*arguments, **options)
            flops.append(products.flops)
            return result

        return call

    names = ("forward", "forward_with_gradient", "backward")
    with mock.patch.multiple(torch_backend, **{name: counted(getattr(torch_backend, name)) for name in names}):
        yield flops
