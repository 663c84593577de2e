"""Which matrix products of a CPU the torch backend uses. The machine alone decides, so that its results repeat bit for bit.

`torch.mm` of float32 on x86 is MKL's, which uses no AVX-512 on AMD processors. oneDNN, which torch has as well, does. On one core
of an AMD EPYC of family 26 (Zen 5) MKL runs at 110 GFLOP/s, oneDNN at 250, and products of bfloat16 at 480. Where nothing has
been measured float32 takes `torch.mm`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from .settings import current

FLOAT32_WAYS = ("mm", "onednn")
BFLOAT16_WAYS = ("widen", "native")
VARIABLES = {"cpu_products": "GCL_KERNELS_CPU_PRODUCTS", "cpu_bfloat16": "GCL_KERNELS_CPU_BFLOAT16"}

# AMD's family of Zen 5, the first whose AVX-512 units are twice as wide as its AVX2 units.
ZEN5 = 26


def float32_products() -> str:
    """ "onednn" or "mm": `GCL_KERNELS_CPU_PRODUCTS`, otherwise oneDNN on AMD processors from Zen 5 on where torch.mm is MKL's."""
    given = chosen("cpu_products", FLOAT32_WAYS)
    if given is None:
        return best_float32()
    if given == "onednn" and not has_onednn():
        raise ValueError(
            f"{VARIABLES['cpu_products']}: expected 'mm', since torch {torch.__version__} has no oneDNN product here, "
            f"got {given!r}"
        )
    return given


def bfloat16_products() -> str:
    """ "native" or "widen": `GCL_KERNELS_CPU_BFLOAT16`, otherwise native where the processor has units for bfloat16.

    Not float16: a sum over the 1,024 rows of a tile may exceed its largest number.
    """
    return chosen("cpu_bfloat16", BFLOAT16_WAYS) or best_bfloat16()


def chosen(setting: str, ways: tuple[str, ...]) -> str | None:
    """What `settings(...)` or the environment says; None for nothing."""
    value = getattr(current(), setting)
    if value is None:
        value = os.environ.get(VARIABLES[setting], "") or None
    if value is not None and value not in ways:
        raise ValueError(f"{VARIABLES[setting]}: expected {' or '.join(map(repr, ways))}, got {value!r}")
    return value


@cache
def best_float32() -> str:
    known = processor()
    zen5 = known.get("vendor_id") == "AuthenticAMD" and int(known.get("cpu family", "0")) >= ZEN5
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "onednn" if zen5 and wide and torch.backends.mkl.is_available() and has_onednn() else "mm"


@cache
def best_bfloat16() -> str:
    flags = processor().get("flags", "").split()
    return "native" if torch.backends.mkldnn.is_available() and {"avx512_bf16", "amx_bf16"} & set(flags) else "widen"


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and linear() is not None


@cache
def linear() -> Callable | None:
    """torch's operator for oneDNN's x @ weight^T; None where torch has none. It is not public, so it is looked up and tried."""
    try:
        packet = torch.ops.mkldnn._linear_pointwise
        one = torch.ones(1, 1)
        packet.binary(packet.default(one, one, None, "none", [], ""), one, one, None, "add")
        return packet
    except (AttributeError, RuntimeError, TypeError):  # not built in, or another signature
        return None


@cache
def processor() -> dict[str, str]:
    """What Linux says about the first processor: vendor_id, cpu family, flags, …; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace") if sys.platform == "linux" else ""
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
