"""What the ranks' common ancestor imports."""

from gcl_kernels.training.openclip import import_open_clip
from tests.distributed import cases

__all__ = ["cases"]
import_open_clip()
