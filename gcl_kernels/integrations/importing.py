"""Other libraries: imported whatever torchvision is installed, and refused where they are not as they are known here.

PyPI's torchvision carries C++ operators linked against CUDA, so beside a CPU-only torch they are never loaded, and the
import stops at the first Python wrapper of an operator that nobody declared. Declaring the schemas is enough: none of these
libraries calls the operators.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import ModuleType
from typing import Any

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


def import_transformers() -> Any:
    """The package transformers, on CPU-only torch too.

    Raises:
        ImportError: it is not installed.
    """
    with contextlib.suppress(ModuleNotFoundError):  # transformers imports torchvision where there is one
        import_torchvision()
    try:
        import transformers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "transformers: expected the package transformers, got none: pip install transformers"
        ) from None
    return transformers


def check_arguments(
    original: type, replacement: type, library: str, known: str, *methods: str, exactly: bool = False
) -> None:
    """Refuse a class of another library that `replacement` was not written for.

    Args:
        original: the class that is installed.
        replacement: the class of this package that stands in its place.
        library: the module that has `__version__`.
        known: the versions that have the class as it is known here, for the message.
        methods: what `original` must have besides `__init__`. No method may take an argument that `replacement`'s does not.
        exactly: `original.__init__` must take all that `replacement.__init__` takes by position, too.

    Raises:
        RuntimeError: it is another class.
    """
    here = f"{library} {sys.modules[library].__version__}"
    for method in ("__init__", *methods):
        if not hasattr(original, method):
            raise RuntimeError(f"{here}: expected {original.__name__}.{method} as in {known}, got none")
        theirs, ours = (inspect.signature(getattr(kind, method)).parameters for kind in (original, replacement))
        unknown = [name for name in theirs if name not in ours]
        by_position = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        missing = [name for name in by_position if name not in theirs] if exactly and method == "__init__" else []
        if unknown or missing:
            raise RuntimeError(
                f"{here}: expected {original.__name__}.{method} with the arguments that it has in {known}, got one with "
                f"{unknown or 'no argument'} more and without {missing or 'none'}"
            )
