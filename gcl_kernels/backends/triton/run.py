"""Where the host side meets Triton: kernels are launched here by name, and only here is Triton imported, when one is.

So everything beside the JIT functions imports without Triton, and with another runner in place it runs without it: on tensors
without memory it then says what would be launched on which shapes (`replaced_by`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Arguments of kernels that are JIT functions, given by their names in `softmax` and `sigmoid`.
FUNCTIONS = ("EPILOGUE", "FITS", "GRADIENT")

# What every kernel is compiled with, at a launch and ahead of time. Multiplications and additions are fused: unfused, a tile's
# epilogue takes up to twice the instructions, and Triton's default is about to be that.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Block:
    """A matrix that a kernel takes as a descriptor of (rows, cols) blocks."""

    tensor: Tensor
    rows: int
    cols: int


def run(kernel: str, programs: int, **arguments: Any) -> None:
    """Launches a kernel of this package's `kernels` and `*_kernels` modules on the device of its tensors."""
    arguments |= OPTIONS
    watcher = getattr(_of_this_thread, "watcher", None)
    if watcher is None:
        _runner(kernel, programs, **arguments)
    else:
        watcher(_runner, kernel, programs, arguments)


@contextlib.contextmanager
def watched_by(watcher: Callable[[Callable[..., Any], str, int, dict[str, Any]], None]) -> Iterator[None]:
    """Within the `with` block this thread's launches are `watcher(launch, kernel, programs, arguments)`, which calls `launch`.

    What `launch(kernel, programs, **arguments)` returns launches the kernel again as `compiled[(programs, 1, 1)](*given)`, given
    being the arguments `in_order`; it is None where there is no such thing.
    """
    _of_this_thread.watcher = watcher
    try:
        yield
    finally:
        _of_this_thread.watcher = None


def in_order(kernel: str, arguments: dict[str, Any]) -> list[Any]:
    """A kernel's arguments as it takes them when it is compiled: those of the launch are left out."""
    if _runner is not _launch:
        return list(arguments.values())
    arguments = _with_functions(arguments)
    return [arguments[name] for name in _jit_functions()[kernel].arg_names]


def as_argument(block: Block) -> Any:
    """What a compiled kernel takes."""
    return _descriptor(block) if _runner is _launch else block


@contextlib.contextmanager
def replaced_by(runner: Callable[..., Any]) -> Iterator[None]:
    """Within the `with` block, `run` calls `runner(kernel, programs, **arguments)` and launches nothing."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    from .tiles import INTERPRETED

    return bool(INTERPRETED.value)


def storable(x: Tensor) -> torch.dtype:
    """What kernels store in place of x's dtype: itself, but float32 in the interpreter, whose bfloat16 rounding is faulty."""
    return torch.float32 if x.device.type != "meta" and interpreted() else x.dtype


def _launch(kernel: str, programs: int, **arguments: Any) -> Any:
    functions, arguments = _jit_functions(), _with_functions(arguments)
    device = next(x.device for x in map(_first, arguments.values()) if isinstance(x, Tensor))
    arguments = {name: _descriptor(x) if isinstance(x, Block) else x for name, x in arguments.items()}
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return functions[kernel][(programs,)](**arguments)


def _with_functions(arguments: dict[str, Any]) -> dict[str, Any]:
    functions = _jit_functions()
    return arguments | {name: functions[arguments[name]] for name in FUNCTIONS if arguments.get(name) is not None}


_runner: Callable[..., Any] = _launch
_of_this_thread = threading.local()


@cache
def _jit_functions() -> dict[str, Any]:
    from . import field_kernels, kernels, line_kernels, loss_kernels, sigmoid, softmax, strip_kernels

    return {
        name: f
        for module in (softmax, sigmoid, field_kernels, line_kernels, loss_kernels, strip_kernels, kernels)
        for name, f in defined_in(module)
    }


def defined_in(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """JIT functions by name, without those that the module imports."""
    return (
        (name, f)
        for name, f in vars(module).items()
        if getattr(getattr(f, "fn", None), "__module__", None) == module.__name__
    )


def _first(x: Any) -> Any:
    if isinstance(x, Block):
        return x.tensor
    return _first(x[0]) if isinstance(x, tuple) and x else x


def _descriptor(block: Block) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(block.tensor, [block.rows, block.cols])
