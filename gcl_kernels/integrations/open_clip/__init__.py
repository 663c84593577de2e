"""The losses of this package in the place of open_clip's, where its factory, its tasks and its trainer look them up.

    import gcl_kernels.integrations.open_clip as integration

    integration.apply()  # before the loss is made: open_clip.create_loss, CLIPTask, open_clip_train

From a command line, `python -m gcl_kernels.integrations.open_clip ARGS` is `python -m open_clip_train.main ARGS` with them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ...clip import ClipLoss
from ...siglip import SigLipLoss
from ..importing import check_arguments, import_open_clip
from .losses import CoCaLoss, DistillClipLoss

__all__ = ["CoCaLoss", "DistillClipLoss", "apply", "undo"]

VARIABLE = "GCL_KERNELS_OPEN_CLIP"
"""The environment variable that, set to 0, makes `apply` do nothing."""

_replaced: list[tuple[Any, str, type]] = []  # (module, name, what was there)


def apply(clip: bool = True, siglip: bool = True, coca: bool = True, distill: bool = True) -> list[str]:
    """Replace open_clip's losses by those of this package, in every module of open_clip that has them.

    The names `open_clip.ClipLoss` and `open_clip.factory.ClipLoss` are two bindings: a factory that was imported does not see the
    first replaced. Modules imported later find the replacements. Losses that have been made already stay what they are.

    Args:
        clip: replace `ClipLoss`.
        siglip: replace `SigLipLoss`.
        coca: replace `CoCaLoss`.
        distill: replace `DistillClipLoss`.

    Returns:
        What this call has replaced, such as `["open_clip.factory.ClipLoss", ...]`. A second call finds nothing left. With
        `GCL_KERNELS_OPEN_CLIP=0` in the environment nothing is replaced.

    Raises:
        ImportError: open_clip is not installed.
        RuntimeError: a loss of the open_clip that is installed takes arguments that its replacement does not know.
    """
    modules = _modules_of_open_clip()
    if os.environ.get(VARIABLE) == "0":
        return []
    wanted = {ClipLoss: clip, SigLipLoss: siglip, CoCaLoss: coca, DistillClipLoss: distill}
    found = []
    for replacement in (kind for kind, is_wanted in wanted.items() if is_wanted):
        for module in modules:
            original = vars(module).get(replacement.__name__)
            if isinstance(original, type) and original is not replacement:
                check_arguments(original, replacement, "open_clip", "versions 3 and 4", "forward")
                found.append((module, replacement.__name__, original, replacement))
    for module, name, original, replacement in found:  # all of them or none
        setattr(module, name, replacement)
        _replaced.append((module, name, original))
    return [f"{module.__name__}.{name}" for module, name, *_ in found]


def undo() -> list[str]:
    """Put open_clip's own losses back, and return where."""
    names = [f"{module.__name__}.{name}" for module, name, _ in _replaced]
    while _replaced:
        module, name, original = _replaced.pop()
        setattr(module, name, original)
    return names


def _modules_of_open_clip() -> list[Any]:
    import_open_clip()
    import open_clip.factory
    import open_clip.loss  # noqa: F401

    roots = ("open_clip", "open_clip_train")
    return [module for name, module in sorted(sys.modules.items()) if module and name.split(".")[0] in roots]
