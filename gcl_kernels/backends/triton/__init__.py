"""The primitive in Triton: two tile kernels and library GEMMs, on NVIDIA and AMD GPUs, or on CPU in Triton's interpreter.

``kernels`` is what runs on the device, ``launch`` cuts the problem into launches, ``config`` holds the tile shapes.
"""

from .launch import backward, forward

__all__ = ["forward", "backward"]
