"""Settings of the backends: read from the environment, or given for a while by `settings(...)`.

They hold for the whole process, not for one thread: autograd runs the backward of CUDA tensors on a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

DEFAULT_WORKSPACE_MIB = 256
WORKSPACE_VARIABLE = "GCL_KERNELS_WORKSPACE_MIB"


@dataclass(frozen=True)
class Settings:
    """None: the environment's value, or the backend's own choice."""

    tile: tuple[int, int] | None = None
    config: Any = None
    workspace_mib: float | None = None
    debug: bool | None = None
    host_reads: bool | None = None
    few_chunks: bool | None = None
    tapes: bool | None = None
    cpu_products: str | None = None
    cpu_bfloat16: str | None = None


_current = Settings()


@contextlib.contextmanager
def settings(
    *,
    tile: tuple[int, int] | None = None,
    config: Any = None,
    workspace_mib: float | None = None,
    debug: bool | None = None,
    host_reads: bool | None = None,
    few_chunks: bool | None = None,
    tapes: bool | None = None,
    cpu_products: str | None = None,
    cpu_bfloat16: str | None = None,
) -> Iterator[None]:
    """Sets what is not None for the `with` block, for tests, benchmarks and tuning. Blocks may be nested.

    Args:
        tile: (rows, columns) of a tile of the torch backend.
        config: `backends.triton.config.Config` of the Triton backend, instead of its table's.
        workspace_mib: budget for tiles in memory, in MiB; otherwise `GCL_KERNELS_WORKSPACE_MIB`, 256 by default.
        debug: whether values on a device are checked, which synchronises it; otherwise `GCL_KERNELS_DEBUG`.
        host_reads: whether the torch backend may read numbers on the host; otherwise on CPU tensors only. False makes CPU
            tensors take the path of other devices.
        few_chunks: whether loops over chunks make their first two steps and their last one only. The results are then wrong,
            but the peak of memory is not: `plan` asks for it.
        tapes: whether the Triton backend repeats what it launched for a layout (`triton.tape`) or decides it anew every time;
            otherwise `GCL_KERNELS_TAPES`, 1 by default.
        cpu_products: "mm" or "onednn", how a CPU multiplies float32 (`cpu`); otherwise `GCL_KERNELS_CPU_PRODUCTS`.
        cpu_bfloat16: "widen" or "native", how a CPU multiplies bfloat16; otherwise `GCL_KERNELS_CPU_BFLOAT16`.
    """
    global _current
    before = _current
    given = {
        "tile": tile,
        "config": config,
        "workspace_mib": workspace_mib,
        "debug": debug,
        "host_reads": host_reads,
        "few_chunks": few_chunks,
        "tapes": tapes,
        "cpu_products": cpu_products,
        "cpu_bfloat16": cpu_bfloat16,
    }
    _current = replace(before, **{name: value for name, value in given.items() if value is not None})
    try:
        yield
    finally:
        _current = before


def current() -> Settings:
    return _current


def workspace_bytes() -> int:
    """The budget for tiles in memory. What is O((N + M) D) does not count."""
    mib = _current.workspace_mib
    if mib is None:
        mib = float(os.environ.get(WORKSPACE_VARIABLE, DEFAULT_WORKSPACE_MIB))
    return int(mib * 2**20)


def debug() -> bool:
    if _current.debug is not None:
        return _current.debug
    return os.environ.get("GCL_KERNELS_DEBUG", "0") not in ("", "0")


def may_read_on_host(device: torch.device) -> bool:
    """Whether reading a number costs no synchronisation."""
    return device.type == "cpu" if _current.host_reads is None else _current.host_reads


def may_record() -> bool:
    if _current.tapes is not None:
        return _current.tapes
    return os.environ.get("GCL_KERNELS_TAPES", "1") not in ("", "0")
