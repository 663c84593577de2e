"""The primitive and field aggregation in Triton, on NVIDIA and AMD GPUs, or on CPU in Triton's interpreter.

``kernels`` is what runs on the device for the primitive, two tile kernels beside library GEMMs; ``launch`` cuts the problem into
launches; ``fields`` aggregates fields; ``config`` holds the shapes of tiles and blocks.
"""

from .fields import aggregate_fields, aggregate_fields_backward
from .launch import backward, forward, forward_with_gradient

__all__ = ["forward", "backward", "forward_with_gradient", "aggregate_fields", "aggregate_fields_backward"]
