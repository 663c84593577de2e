"""`SigLipLoss`: open_clip's sigmoid loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from . import distributed, whole
from .clip import check_default_group, check_features
from .derivatives import refuse_forward_mode
from .groups import local_tensor
from .sigmoid import sigmoid_loss
from .types import Transport, signature_of
from .validation import check_choice

# What open_clip passes around, and what does the same here.
TRANSPORT_OF: dict[str, Transport] = {
    "bidir": "ring",
    "shift": "ring",
    "reduce": "all_gather",
    "gather": "all_gather",
}


class SigLipLoss(nn.Module):
    """Drop-in for `open_clip.SigLipLoss`: same constructor and forward arguments, same loss and gradients, without N x N memory.

    With `world_size > 1`, over the default process group, a rank's loss is that of its own images and all ranks' texts, as in
    open_clip. Gradients of the texts come from all ranks' losses, those of logit_scale and logit_bias from the rank's own.

    Ranks may have unequal numbers of rows, which open_clip's loss does not allow. A rank's loss is then world / (all ranks' N)
    times the sum over its rows, so that the mean over ranks is the loss of the joined batch.

    Args:
        cache_labels: accepted, and changes nothing: no labels are made.
        rank: of this process in the default group.
        world_size: of the default group.
        dist_impl: how texts travel. `"bidir"` (None, the default) and `"shift"` are one ring here, in which no rank holds all of
            them; `"reduce"` and `"gather"` are one all-gather. The result is the same.
        chunk_size: open_clip 4's, accepted, and changes nothing: memory does not grow with N^2 anyway.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; with `world_size > 1` on every rank.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        dist_impl = dist_impl or "bidir"
        check_choice("dist_impl", dist_impl, tuple(TRANSPORT_OF))
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        defaults = {"cache_labels": False, "rank": 0, "world_size": 1, "dist_impl": "bidir", "chunk_size": 0}
        return ", ".join(f"{k}={getattr(self, k)!r}" for k, default in defaults.items() if getattr(self, k) != default)

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """SigLIP's loss of (N, D) features, float32 (float64 for float64 features).

        Args:
            image_features: (N, D), used as given.
            text_features: (N, D), used as given.
            logit_scale: a float or a one-element tensor, which may need a gradient.
            logit_bias: likewise; None is 0.
            output_dict: True returns `{"contrastive_loss": loss}`.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        small = whole.of_features(image_features, text_features, logit_scale, bias) if self.world_size == 1 else None
        if small is not None:
            return {"contrastive_loss": small} if output_dict else small
        refuse_forward_mode("SigLipLoss", image_features, text_features, logit_scale, logit_bias)
        group = None if self.world_size == 1 else torch.distributed.group.WORLD
        with distributed.shared_failure(group):
            image_features = local_tensor("image_features", image_features, group)
            text_features = local_tensor("text_features", text_features, group)
            check_features(image_features, text_features)
            if self.world_size > 1:
                check_default_group(self.rank, self.world_size)
        loss = sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            bias,
            process_group=group,
            transport=TRANSPORT_OF[self.dist_impl],
        )
        return {"contrastive_loss": loss} if output_dict else loss

    if TYPE_CHECKING:  # nn.Module's own is typed as returning anything

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
