"""Which backend a tensor gets, and why: what each can take, and whether Triton works here.

Backends are known by name and imported when they are used.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from .contract import Want
from .settings import may_read_on_host, workspace_bytes

LOWEST_TRITON = (3, 5)  # 3.2 and 3.3 lack what the launch code imports, 3.4 cannot compile the kernels

# Up to so many fields up to so wide: rows of all fields that a kernel holds in registers. No embedding in use is wider.
FIELDS_AND_WIDTH = ((4, 8192), (8, 4096))


@dataclass(frozen=True)
class Backend:
    name: str
    module: str
    refusal: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot take tensors of this device and dtype; None if it can."""
    one_pass: Callable[[int, int, Want, torch.device, torch.dtype], bool]
    """Whether `forward_with_gradient` saves work for N rows and M columns."""


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend's name: the one asked for, else Triton for CUDA and HIP tensors that it can take, else torch.

    Raises:
        ValueError: a backend was named that is unknown or cannot take such tensors. It says why.
    """
    return choose_with_reason(name, device, dtype)[0]


def choose_with_reason(name: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """`choose`, and why. Warns once where Triton would have been the choice but does not work here."""
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        reason = BACKENDS[name].refusal(device, dtype)
        if reason is not None:
            raise ValueError(f"backend: expected one that can take these tensors, got {name!r}: {reason}")
        return name, "it was asked for"
    if device.type != "cuda":
        return "torch", "the device is not CUDA or HIP"
    reason = BACKENDS["triton"].refusal(device, dtype)
    if reason is None:
        return "triton", "the device is CUDA or HIP"
    if reason == why_not_triton():  # and not what these tensors are
        _warn_of_fallback(reason)
    return "torch", reason


@cache  # one warning a process
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(f"gcl_kernels takes the slower backend 'torch' for CUDA and HIP tensors: {reason}", stacklevel=2)


@cache
def why_not_triton() -> str | None:
    """None where Triton imports and is new enough; otherwise what is wrong with it."""
    lowest = ".".join(map(str, LOWEST_TRITON))
    try:
        import triton

        version = str(triton.__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < LOWEST_TRITON:
            return f"Triton {version} is too old, {lowest} is the lowest that works"
        importlib.import_module(".triton.kernels", __package__)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        return f"Triton cannot be imported ({error})"
    except BaseException as error:  # a broken installation may raise anything, SystemExit too
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its tiles are float32, and it takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    reason = why_not_triton()
    if reason is not None or device.type == "cuda":
        return reason
    if device.type == "cpu" and load("triton").interpreted():
        return None
    return (
        f"it takes CUDA and HIP tensors, not one on {device}; with TRITON_INTERPRET=1, set before triton is imported, its "
        "interpreter takes CPU tensors"
    )


def _torch_one_pass(n: int, m: int, want: Want, device: torch.device, dtype: torch.dtype) -> bool:
    """In dtypes with float32's range: one direction always; both on a CPU where the budget holds an eighth of the N x M plane or
    more, since a smaller part would save only a few percent.

    float16 would round a gradient to its subnormals before the factor of a GradScaler, which comes with the backward, lifts it.
    """
    if dtype == torch.float16:
        return False
    return not want.both or (may_read_on_host(device) and 4 * n * m <= 8 * workspace_bytes())


def _triton_one_pass(n: int, m: int, want: Want, device: torch.device, dtype: torch.dtype) -> bool:
    """One direction, in dtypes with float32's range, where the budget holds at least 1,024 whole lines.

    Every chunk reads and writes the other side's (M, D) accumulator in float32. With fewer lines that takes as long as making
    the tiles again: 8 D / 1,024 bytes at 3 TB/s against 2 D FLOP at 700 TFLOP/s a logit.
    """
    if want.both or dtype == torch.float16:
        return False
    return max(n, m) * min(n, m, 1024) * dtype.itemsize <= workspace_bytes()


BACKENDS = {
    "torch": Backend("torch", ".torch", lambda device, dtype: None, _torch_one_pass),
    "triton": Backend("triton", ".triton", _triton_refusal, _triton_one_pass),
}


@cache
def load(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS[name].module, __package__)


def choose_for_fields(name: str | None, device: torch.device, dtype: torch.dtype, n_fields: int, d: int) -> str:
    """As `choose`; what no kernel takes goes to torch unless a backend was named."""
    return choose(name if name or fields_fit(n_fields, d) else "torch", device, dtype)


# What torch.compile traces calls it once and takes the answer: it cannot trace the import of Triton. (This is what
# torch.compiler.assume_constant_result does, which would load the compiler here.)
choose_for_fields._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def fields_fit(n_fields: int, d: int) -> bool:
    return any(n_fields <= most and d <= widest for most, widest in FIELDS_AND_WIDTH)


def architecture(device: torch.device) -> str | tuple[int, int]:
    """Of a GPU: compute capability (NVIDIA) or gfx name (AMD)."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return torch.cuda.get_device_capability(device)
