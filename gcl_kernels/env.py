"""What a bug report needs: `python -m gcl_kernels.env` prints versions, devices, and the backend chosen for each and why."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from importlib import metadata

import torch

from . import backends
from ._version import __version__
from .backends import cpu

PACKAGES = ("torch", "triton", "numpy", "torchvision", "open_clip_torch")
VARIABLES = ("GCL_KERNELS_", "TRITON_", "OMP_", "MKL_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # names the build, +cpu or +cu130, which the package's metadata may leave out
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        name, capability = platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
        try:
            ways = f"float32 products by {cpu.float32_products()}, bfloat16 {cpu.bfloat16_products()}"
        except ValueError as error:  # what the environment asks for is refused
            ways = str(error)
        return f"{name}, {torch.get_num_threads()} threads, {capability}, {ways}"
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{about.name}, {backends.architecture(device)}, {about.total_memory / 2**30:.0f} GiB, {toolkit}"
    return platform.processor()


def choice(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `backend=None` takes, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is printed
        name, reason = backends.choose_with_reason(None, device, dtype)
    if name == "triton":
        from .backends.triton.config import family_of

        reason += f"; launch configuration of {family_of(backends.architecture(device))}"
    return f"{name}: {reason}"


def report() -> Iterator[str]:
    yield f"gcl_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}"
    yield from (f"{package} {version(package)}" for package in PACKAGES)
    for device in devices():
        yield f"{device}: {describe(device)}"
        yield from (f"    {str(dtype)[6:]}: backend {choice(device, dtype)}" for dtype in DTYPES)
    yield f"Triton: {backends.why_not_triton() or 'works'}"
    yield f"workspace {backends.workspace_bytes() // 2**20} MiB"
    yield f"float32 matrix products: {torch.get_float32_matmul_precision()}"
    yield from (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES))


def main() -> None:
    print("\n".join(report()))


if __name__ == "__main__":
    main()
