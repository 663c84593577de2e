"""The rates of a CPU's matrix products, beside which a step's rate must be read: MKL's (or whose torch.mm is) and oneDNN's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.backends import cpu
from gcl_kernels.backends.products import onednn_product
from gcl_kernels.backends.torch.tiles import CPU_TILE

TURNS, SECONDS = 7, 0.02


def cpu_ceilings(d: int) -> dict[str, float]:
    """FLOP/s of the product of a tile of logits, the best of TURNS alternated turns."""
    x, y = torch.randn(CPU_TILE, d), torch.randn(CPU_TILE, d)
    x16, y16 = x.to(torch.bfloat16), y.to(torch.bfloat16)
    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = {
        "torch.mm fp32": (torch.mm, x, y.t()),
        "torch.mm bf16": (torch.mm, x16, y16.t()),
    }
    if cpu.has_onednn():
        ways["oneDNN fp32"] = onednn_product, x, y.t()
    best = dict.fromkeys(ways, 0.0)
    for _ in range(TURNS):
        for name, (multiply, a, b) in ways.items():
            multiply(a, b)
            done, start = 0, time.perf_counter()
            while (seconds := time.perf_counter() - start) < SECONDS or not done:
                multiply(a, b)
                done += 1
            best[name] = max(best[name], done * 2 * CPU_TILE**2 * d / seconds)
    return best


def line(rows: Sequence[dict[str, Any]]) -> str:
    """What ours reaches and what bounds it: the case's rows as `measure.cell_rows` returns them."""
    ours = next((row for row in rows if row["peer"] == "ours" and row["seconds"]), None)
    if ours is None or ours["device"] != "cpu":
        return ""
    ceilings = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in cpu_ceilings(ours["d"]).items())
    ways = f"float32 by {cpu.float32_products()}, bfloat16 {cpu.bfloat16_products()}"
    return f"GFLOP/s of products: {ceilings}. Ours, counted as 8 N M D or less: {1e3 * ours['tflops']:.0f} ({ways}).\n"
