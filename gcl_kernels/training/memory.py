"""The memory that this process holds, and the most that it has held."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak for `peak_memory`, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Where it cannot be reset, the peak is that of the whole process.
        with contextlib.suppress(OSError):
            reset_peak_resident_memory()


def peak_memory(device: torch.device) -> int | None:
    """Bytes at the peak: allocated on a CUDA device, resident in memory otherwise; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        return peak_resident_memory()
    try:
        import resource
    except ImportError:  # Windows
        return None
    # macOS counts bytes where others count KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown_peak(size: int | None) -> str:
    """`"peak memory 12 MiB"`, for the end of a run."""
    return "peak memory unknown" if size is None else f"peak memory {size / 2**20:.0f} MiB"


# Linux only: elsewhere these raise OSError.


def resident_memory() -> int:
    """Bytes of this process that are resident now."""
    return status_bytes("VmRSS")


def peak_resident_memory() -> int:
    """Bytes at the peak since the process began, or since `reset_peak_resident_memory`."""
    return status_bytes("VmHWM")


def reset_peak_resident_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def status_bytes(name: str) -> int:
    """A size that the kernel counts for this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"expected {name} in /proc/self/status, got none")
