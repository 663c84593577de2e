"""The primitive and field aggregation in Triton, on NVIDIA and AMD GPUs, or on CPU in Triton's interpreter.

What runs on the device, JIT functions: `tiles` (where a tile is, its logits and labels), `modify` (masks and additive terms),
`softmax` and `sigmoid` (the losses), `kernels` (two tile kernels beside library GEMMs), `strip_kernels` (the forward of a large
plane), `line_kernels` (what is O((N + M) D)), `loss_kernels` (a loss of lines), `field_kernels`. What the host does: `operands`
(the inputs as kernels read them), `launch`, `strips`, `one_pass` and `pointwise` (the problem cut into launches), `step` (a loss,
whole), `tape` (which repeats what was launched), `partials`, `lines`, `fields`, `config` (shapes of tiles and blocks), and `run`,
which alone imports Triton, when a kernel is launched.
"""

from .fields import aggregate_fields, aggregate_fields_backward
from .launch import backward, forward
from .lines import spread_gradient, sum_losses
from .one_pass import forward_with_gradient
from .pointwise import softplus
from .run import interpreted
from .step import loss_of_pairs, loss_of_pairs_backward

__all__ = [
    "aggregate_fields",
    "aggregate_fields_backward",
    "backward",
    "forward",
    "forward_with_gradient",
    "interpreted",
    "loss_of_pairs",
    "loss_of_pairs_backward",
    "softplus",
    "spread_gradient",
    "sum_losses",
]
