"""Published rates of the chips that the models of time and memory know: `python -m gcl_kernels.plan`, `bench.roofline`.

These are ceilings from data sheets, and `Chip.reach` says which part of them is expected; nothing in this file was measured on
such a chip. The CPU is the exception: `this_cpu` measures the machine it runs on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Host time of one eager PyTorch operator with its kernel launch: 4 to 10 us are usual, Python included.
EAGER_OPERATOR = 5e-6
# A Triton kernel takes its twenty arguments through Python: about four operators.
TRITON_LAUNCH = 20e-6


@dataclass(frozen=True)
class Reach:
    """The part of a published ceiling that a good kernel gets."""

    # 8192^3 bfloat16 products of random numbers run at 770 to 800 of an H200's 989 TFLOP/s: power limits the clock.
    gemm: float = 0.8
    bandwidth: float = 0.9  # copies on an H200: 4.3 of 4.8 TB/s
    link: float = 0.8  # usual bus bandwidth of large all-gathers


@dataclass(frozen=True)
class Chip:
    """Rates in FLOP/s (dense, a multiply-add counts two) and bytes/s, memory in bytes."""

    name: str
    family: str | None  # of launch configurations; None: the PyTorch backend
    half: float  # bfloat16 and float16, on the matrix units
    tf32: float  # float32 under torch.set_float32_matmul_precision("medium")
    fp32: float  # IEEE, on the ordinary units
    bandwidth: float
    memory: float
    units: int  # multiprocessors (NVIDIA), compute units (AMD)
    clock: float  # Hz, at which the rates above hold
    exponentials: int  # a clock and unit
    link: float | None  # to the other GPUs of a node, one way; None: not modelled
    launch: float = EAGER_OPERATOR
    reach: Reach = Reach()

    def rate(self, dtype: str) -> float:
        """Of matrix products, by the names in `DTYPES`."""
        return {"bf16": self.half, "fp16": self.half, "tf32": self.tf32, "fp32": self.fp32}[dtype]


ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
DTYPES = tuple(ITEMSIZE)

# Exponentials: NVIDIA's special-function units give 16 results a clock and multiprocessor on compute capability 8.0, 9.0 and 10.0
# (CUDA C++ Programming Guide, arithmetic throughput). AMD: transcendentals run at a quarter of 64 lanes.
CHIPS = {
    # NVIDIA A100 80GB SXM data sheet; 108 x 2048 FLOP a clock x 1.41 GHz = 312e12; NVLink 600 GB/s, both ways
    "a100": Chip("A100-80GB SXM", "sm_80", 312e12, 156e12, 19.5e12, 2.039e12, 80e9, 108, 1.41e9, 16, 300e9),
    # NVIDIA H100 SXM5 data sheet, without sparsity; 132 x 4096 x 1.83 GHz = 989e12; NVLink 900 GB/s, both ways
    "h100": Chip("H100 SXM", "sm_90", 989.4e12, 494.7e12, 66.9e12, 3.35e12, 80e9, 132, 1.83e9, 16, 450e9),
    # NVIDIA H200 SXM data sheet: the H100's chip with HBM3e
    "h200": Chip("H200 SXM", "sm_90", 989.4e12, 494.7e12, 66.9e12, 4.8e12, 141e9, 132, 1.83e9, 16, 450e9),
    # NVIDIA HGX B200 data sheet, an eighth, without sparsity; 148 x 8192 x 1.85 GHz = 2.24e15; NVLink 5: 1.8 TB/s, both ways
    "b200": Chip("B200", "sm_100", 2250e12, 1100e12, 75e12, 7.7e12, 180e9, 148, 1.85e9, 16, 900e9),
    # AMD MI300X data sheet; float32 vector rate; Triton has no tf32 there: three bfloat16 products, 1307 / 3;
    # 7 Infinity Fabric links of 64 GB/s one way
    "mi300x": Chip("MI300X", "gfx942", 1307.4e12, 435.8e12, 163.4e12, 5.3e12, 192e9, 304, 2.1e9, 16, 448e9),
}


def this_cpu() -> Chip:
    """The machine this runs on, measured in about a second: float32 products, a copy, exponentials."""
    a, b = torch.rand(2048, 512), torch.rand(512, 2048)
    x, y = torch.rand(2**24), torch.empty(2**24)
    tile = torch.rand(2**20)
    gemm = 2 * 2048 * 2048 * 512 / best_time(lambda: torch.mm(a, b))
    return Chip(
        f"this CPU, {torch.get_num_threads()} threads",
        None,
        half=gemm,  # widened to float32
        tf32=gemm,
        fp32=gemm,
        bandwidth=2 * 4 * x.numel() / best_time(lambda: y.copy_(x)),
        memory=physical_memory(),
        units=1,
        clock=tile.numel() / best_time(lambda: torch.exp2(tile)),  # one exponential a tick
        exponentials=1,
        link=None,
        reach=Reach(1.0, 1.0, 1.0),
    )


def physical_memory() -> float:
    """Bytes of this machine; infinity where the system does not tell, as Windows, which has no `os.sysconf`."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def best_time(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
