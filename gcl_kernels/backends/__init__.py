"""Backends of the primitive. Each is a module with two functions, the whole contract:

``forward(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, want_row, want_col) -> (row, col, positive)``
    lhs (N, D), rhs (M, D) of one dtype; logit_scale 0-d float32 (float64 for float64 inputs) on the same device; labels
    None (row i's positive is column i) or (N, P) int64 with -1 for none; ids None or (N, K), (M, K) int64. Returns row (N,),
    col (M,) in natural-log units and positive (N, P), all of ``statistics_dtype``; a direction not wanted is an empty
    tensor. Row or column with nothing visible: -inf. Positive of label -1: 0.

``backward(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, row, col, positive, g_row, g_col, g_positive, need_lhs,
need_rhs, need_scale, *, dtype=None) -> (dlhs, drhs, dscale)``
    row, col and positive as the forward returned them; g_row (N,), g_col (M,), g_positive (N, P) or None where zero.
    dlhs, drhs in ``dtype``, None for the inputs': float32 for one who has parts of a gradient to add up and round once.
    dscale 0-d in logit_scale's dtype; a gradient not needed is an empty tensor.

A third function makes 6 N M D of 8 where it can:

``forward_with_gradient(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, g_row, g_col, g_positive, need_lhs, need_rhs,
need_scale) -> (row, col, positive, dlhs, drhs, dscale)``
    both passes at once where the upstream gradients are known beforehand (``gradient_in_one_pass``); None for g_row or g_col:
    direction not wanted.

Field aggregation (``fields.aggregate_fields``) is plain PyTorch everywhere but in Triton, which has two functions for it:

``aggregate_fields(fields, weights, mask, normalize_fields, normalize) -> (out, inverse_norms)``
    fields: F tensors (N, D) of one dtype; weights: F floats that sum to 1; mask None or (N, F) bool. Returns (N, D) in the
    fields' dtype and (N, F + 1) float32 for the backward: 1 / |x_f| of each row and field, then 1 / |mean|; 0 for 0,
    1 where nothing is normalised.

``aggregate_fields_backward(fields, weights, mask, normalize_fields, normalize, inverse_norms, g, need) -> gradients``
    g (N, D); a list of F tensors (N, D), empty where ``need[f]`` is False.

Statistics travel in float64 although tiles are float32: at logit_scale 100 a float32 ``row`` near 100 is known to 4e-6
only, which is the whole loss of a well-trained row. O(N + M) numbers cost nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

NAMES = ("torch", "triton")
DEFAULT_WORKSPACE_MIB = 256
# Up to so many fields up to so wide: rows of all fields that a kernel holds in registers. No embedding in use is wider.
FIELDS_AND_WIDTH = ((4, 8192), (8, 4096))


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None  # finds it without importing it
    except (ImportError, ValueError):
        return False


HAS_TRITON = _has_triton()


def statistics_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend's name: the one asked for, else Triton on CUDA/HIP devices where it can be imported, else torch.

    float64 goes to torch: the kernels' tiles are float32.
    """
    if name is None:
        return "triton" if device.type == "cuda" and dtype != torch.float64 and HAS_TRITON else "torch"
    if name not in NAMES:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend: expected an installed one, got 'triton', which cannot be imported here")
    return name


def choose_for_fields(name: str | None, device: torch.device, dtype: torch.dtype, n_fields: int, d: int) -> str:
    """As ``choose``; what no kernel takes goes to torch unless a backend was named."""
    return choose(name if name or fields_fit(n_fields, d) else "torch", device, dtype)


def fields_fit(n_fields: int, d: int) -> bool:
    return any(n_fields <= most and d <= widest for most, widest in FIELDS_AND_WIDTH)


def architecture(device: torch.device) -> str | tuple[int, int]:
    """Of a GPU: compute capability (NVIDIA) or gfx name (AMD)."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return torch.cuda.get_device_capability(device)


def workspace_bytes() -> int:
    """The budget for tiles in memory, ``GCL_KERNELS_WORKSPACE_MIB``; it is not for what is O((N + M) D)."""
    return int(os.environ.get("GCL_KERNELS_WORKSPACE_MIB", DEFAULT_WORKSPACE_MIB)) * 2**20


def gradient_in_one_pass(name: str, n: int, m: int, both: bool, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether gradients promised beforehand are formed beside the forward, where that saves a pass.

    torch: one direction always, both on a CPU where the budget holds enough of the N x M plane, an eighth, to save more than a
    few percent. Triton: one direction, in dtypes with float32's range, where the budget holds at least 1,024 whole lines: every
    chunk reads and writes the other side's (M, D) accumulator in float32, and with fewer lines that takes as long as making
    the tiles again, 8 D / 1,024 bytes at 3 TB/s against 2 D FLOP at 700 TFLOP/s a logit.
    """
    if name == "torch":
        return not both or (device.type == "cpu" and 4 * n * m <= 8 * workspace_bytes())
    return not both and dtype != torch.float16 and max(n, m) * min(n, m, 1024) * dtype.itemsize <= workspace_bytes()


def load(name: str) -> ModuleType:
    return importlib.import_module({"torch": ".torch_chunked", "triton": ".triton"}[name], __name__)
