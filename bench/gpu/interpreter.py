"""Lets Triton 3.6's interpreter run under numpy 2.4 and later, for dry runs: `pytest -p bench.gpu.interpreter`, or imported.

It turns an array of one number into an index by `int(array)`, which numpy now refuses for arrays of one dimension.
"""

from __future__ import annotations

import contextlib
from typing import Any


def install() -> None:
    from triton.runtime import interpreter

    module: Any = interpreter
    patch = module._patch_lang_tensor

    def patched(tensor: Any, *rest: Any) -> Any:
        result = patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    module._patch_lang_tensor = patched


with contextlib.suppress(ImportError, AttributeError):
    install()
