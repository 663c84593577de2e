"""`import open_clip`, whatever torchvision is installed.

PyPI's torchvision carries C++ operators linked against CUDA, so beside a CPU-only torch they are never loaded, and the
import stops at the first Python wrapper of an operator that nobody declared. Declaring the schemas is enough: open_clip
calls none of these operators.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_UNDECLARED_OPERATOR = "operator torchvision::nms does not exist"
_OPERATOR_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# The declarations last as long as this object lives.
_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    try:
        import torchvision
    except RuntimeError as error:
        if _UNDECLARED_OPERATOR not in str(error):
            raise
        # Only now: declaring the operators beside a torchvision that loads its own aborts the process.
        library = torch.library.Library("torchvision", "DEF")
        for schema in _OPERATOR_SCHEMAS:
            library.define(schema)
        _declared.append(library)
        # The import that failed left half-made modules behind, and they would be found instead of the real ones.
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]
        import torchvision  # noqa: F401


def import_open_clip() -> ModuleType:
    """The package open_clip, on CPU-only torch too.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import_torchvision()
        import open_clip
    except ModuleNotFoundError as error:
        if error.name not in ("open_clip", "torchvision"):
            raise
        raise ImportError(
            "open_clip: expected the package open_clip_torch >= 3.0, got none: pip install open_clip_torch"
        ) from None
    return open_clip
