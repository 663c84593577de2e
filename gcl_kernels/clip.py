"""`ClipLoss`: open_clip's loss, with the four meanings that it has over a process group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from . import distributed, whole
from .derivatives import refuse_forward_mode
from .groups import local_tensor
from .losses import gcl_loss
from .pairs import Pairs
from .types import signature_of
from .validation import check_scale, check_tensor


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss`: same constructor and forward arguments, same loss and gradients.

    With `world_size > 1`, over the default process group, each pair of flags has open_clip's value and gradients on every rank,
    without its N x N logits (N: all ranks' rows). What they mean, and what a rank does of the N^2 D work, here and in open_clip:

    | local_loss | gather_with_grad | value on rank r | gradient of the features | work | open_clip's |
    |---|---|---|---|---|---|
    | False | False (default) | the loss L of all rows | dL, of its own rows | 8 / world | 6, N^2 memory |
    | False | True | L | world * dL | 8 / world | 6, N^2 memory |
    | True | False | L_r of its own rows and columns | dL_r, own rows only; others' are constants | 8 / world | 8 |
    | True | True | L_r | of the sum of all L_r | 12 / world | 12 |

    DistributedDataParallel averages gradients. With `gather_with_grad=True` it therefore trains as one process on the joined
    batch would. The default divides the features' gradient, but not logit_scale's, by world. `gcl_loss(..., process_group=)`
    trains as True, True does at 8 / world, and takes a ring.

    Ranks may have unequal numbers of rows, which open_clip's loss does not allow. L_r is then world / (all ranks' N) times the
    sum over the rank's rows, so that the mean over ranks is L still.

    Args:
        local_loss: see the table.
        gather_with_grad: see the table.
        cache_labels: accepted, and changes nothing: no labels are made.
        rank: of this process in the default group.
        world_size: of the default group.
        use_horovod: refused where True.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; with `world_size > 1` on every rank.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod: expected False (torch.distributed is the only transport), got True")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        names = ("local_loss", "gather_with_grad", "cache_labels", "rank")
        shown = [name for name in names if getattr(self, name)] + ["world_size"] * (self.world_size != 1)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...

    @overload
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]: ...

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """CLIP's symmetric cross-entropy of (N, D) features, float32 (float64 for float64 features).

        Args:
            image_features: (N, D), used as given.
            text_features: (N, D), used as given.
            logit_scale: 1 / temperature: a float or a one-element tensor, which may need a gradient.
            logit_bias: a float or a one-element tensor; it cancels in a softmax, and gets the gradient 0.
            output_dict: True returns `{"contrastive_loss": loss}`.
        """
        if self.world_size == 1 and logit_bias is None:
            small = whole.of_features(image_features, text_features, logit_scale)
            if small is not None:
                return {"contrastive_loss": small} if output_dict else small
        refuse_forward_mode("ClipLoss", image_features, text_features, logit_scale, logit_bias)
        group = None if self.world_size == 1 else torch.distributed.group.WORLD
        with distributed.shared_failure(group):
            image_features = local_tensor("image_features", image_features, group)
            text_features = local_tensor("text_features", text_features, group)
            logit_scale = local_tensor("logit_scale", logit_scale, group)
            logit_bias = local_tensor("logit_bias", logit_bias, group)
            check_features(image_features, text_features)
            bias = None if logit_bias is None else check_scale(logit_bias, image_features, "logit_bias")
            if self.world_size > 1:
                check_default_group(self.rank, self.world_size)
        if self.world_size == 1:
            loss = gcl_loss(image_features, text_features, logit_scale)
        else:
            loss = self._distributed(image_features, text_features, logit_scale)
        if bias is not None:
            loss = loss + 0.0 * bias
        return {"contrastive_loss": loss} if output_dict else loss

    if TYPE_CHECKING:  # nn.Module's own is typed as returning anything

        @signature_of(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _distributed(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        if not self.local_loss:
            return self._loss_of_all(image_features, text_features, logit_scale)
        group = torch.distributed.group.WORLD
        with distributed.shared_failure(group):
            pairs = Pairs.of(image_features, text_features, logit_scale, group)
        alike = {"local_loss": True, "gather_with_grad": self.gather_with_grad}
        ranks = distributed.agree(group, "all_gather", pairs, logit_scale, alike)
        # others' features have a gradient only under `gather_with_grad`, as in open_clip
        mine = (x if self.gather_with_grad else x.detach() for x in (image_features, text_features))
        all_images, all_texts = (ranks.all_columns(x, "features") for x in mine)
        labels = torch.arange(pairs.n, device=image_features.device) + ranks.first_column
        images = gcl_loss(image_features, all_texts, logit_scale, labels=labels, directions="lhs_to_rhs")
        texts = gcl_loss(text_features, all_images, logit_scale, labels=labels, directions="lhs_to_rhs")
        return pairs.n * ranks.world / ranks.n * (images + texts) / 2

    def _loss_of_all(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
        """Each rank's rows once, then the sum: what every rank of open_clip works out for itself."""
        group = torch.distributed.group.WORLD
        # open_clip's gathering adds the gradients of all ranks' copies of the loss, to features but not to logit_scale
        copies = self.world_size if self.gather_with_grad else 1
        if isinstance(logit_scale, Tensor):
            logit_scale = distributed.sum_gradients(logit_scale, 1 / copies, group)
        share = gcl_loss(image_features, text_features, logit_scale, process_group=group) / self.world_size
        return distributed.sum_values(share, copies, group)


def check_features(image_features: Tensor, text_features: Tensor) -> None:
    """Two matrices of as many rows, by open_clip's names."""
    check_tensor("image_features", image_features, (2,))
    check_tensor("text_features", text_features, (2,))
    if len(image_features) != len(text_features):
        raise ValueError(
            f"text_features: expected {len(image_features)} rows, as image_features has, got {len(text_features)}"
        )


def check_default_group(rank: int, world_size: int) -> None:
    """That the numbers a drop-in was made with are those of the default process group."""
    given = {"world_size": world_size, "rank": rank}
    actual = {"world_size": torch.distributed.get_world_size(), "rank": torch.distributed.get_rank()}
    for name, expected in actual.items():
        if given[name] != expected:
            raise ValueError(f"{name}: expected {expected}, as in the default process group, got {given[name]}")
