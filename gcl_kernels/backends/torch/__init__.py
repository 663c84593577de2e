"""The primitive in plain PyTorch, tile by tile, on any device.

A tile is the logits of (rows of a chunk) x (columns of a block), in base 2. The scale and log2(e) are folded into lhs. One tile
is alive at a time, and a second one of its size for factors. Only `forward_with_gradient` stores more, within the workspace
budget.

`tiles` makes tiles and knows no loss, `modify` hides pairs, `softmax` is the loss of a tile, `passes` goes over all tiles.
`sigmoid` is the loss of each pair alone, with its one pass.
`whole` makes the plain losses of a small batch, whose plane is one tile, in one go.
"""

from .passes import backward, forward, forward_with_gradient
from .sigmoid import softplus
from .whole import fits, sigmoid_step, softmax_step

__all__ = ["backward", "fits", "forward", "forward_with_gradient", "sigmoid_step", "softmax_step", "softplus"]
