"""Drop-ins for the losses of open_clip that are made of `ClipLoss` and something more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import distributed
from ...backends.chunks import round_up
from ...clip import ClipLoss, check_default_group, check_features
from ...lse import pairwise_logsumexp
from ...pairs import Pairs

Sides = tuple[Tensor, Tensor]  # images, texts

FUSED_WIDTH = 8  # PyTorch's fused attention takes widths that this divides


class CoCaLoss(ClipLoss):
    """Drop-in for `open_clip.CoCaLoss`: the contrastive loss of the features, and the cross-entropy of the caption's tokens.

    Args:
        caption_loss_weight: factor of the caption's loss.
        clip_loss_weight: factor of the contrastive loss; 0 leaves it out.
        pad_id: the token that has no loss.
        local_loss: as in `ClipLoss`, like everything below.
        gather_with_grad: as in `ClipLoss`.
        cache_labels: as in `ClipLoss`.
        rank: as in `ClipLoss`.
        world_size: as in `ClipLoss`.
        use_horovod: as in `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as in open_clip
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """(contrastive loss, caption loss), each with its weight.

        Args:
            image_features: (N, D), used as given.
            text_features: (N, D), used as given.
            logits: (N, T, V), of the tokens of the caption.
            labels: (N, T) int64.
            logit_scale: 1 / temperature: a float or a one-element tensor.
            output_dict: True returns `{"contrastive_loss": ..., "caption_loss": ...}`.
        """
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        else:
            contrastive = logits.new_zeros(())
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        return {"contrastive_loss": contrastive, "caption_loss": caption} if output_dict else (contrastive, caption)


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.DistillClipLoss`: ClipLoss, and the student's softmax against a teacher's.

    With t the student's scale and q_ij the softmax over j of the teacher's logits, a direction's loss of distillation is

        mean_i (row_i - t <x_i, sum_j q_ij y_j>)        row_i = logsumexp_j t <x_i, y_j>

    The inner sum is attention, of the teacher's queries and keys over the student's values. PyTorch's fused attention computes
    it without the N x N softmax where it has a kernel for the width and dtype (on CUDA up to 256 of either model's width), and
    with it elsewhere.
    The teacher's features and scale are constants: they get no gradient.

    Args:
        local_loss: as in `ClipLoss`, like everything below.
        gather_with_grad: as in `ClipLoss`.
        cache_labels: as in `ClipLoss`.
        rank: as in `ClipLoss`.
        world_size: as in `ClipLoss`.
        use_horovod: as in `ClipLoss`.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # as in open_clip
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """(contrastive loss, loss of distillation).

        Args:
            image_features: (N, D), the student's, used as given.
            text_features: (N, D), the student's, used as given.
            logit_scale: the student's 1 / temperature: a float or a one-element tensor.
            dist_image_features: (N, D'), the teacher's.
            dist_text_features: (N, D'), the teacher's.
            dist_logit_scale: the teacher's.
            output_dict: True returns `{"contrastive_loss": ..., "distill_loss": ...}`.
        """
        teacher: Sides = dist_image_features.detach(), dist_text_features.detach()
        teacher_scale = dist_logit_scale.detach() if isinstance(dist_logit_scale, Tensor) else dist_logit_scale
        check_features(image_features, text_features)
        check_features(*teacher)
        mine: Sides = image_features, text_features
        everyones, labels, share = mine, None, 1.0
        if self.world_size > 1:
            mine, teacher, everyones, everyones_teacher, labels, share = self._over_ranks(mine, teacher, logit_scale)
        else:
            everyones_teacher = teacher
        if labels is None:
            lines = pairwise_logsumexp(*mine, logit_scale)
            sums, positive = lines.row + lines.col, lines.positive
        else:
            by_image, by_text = (
                pairwise_logsumexp(x, y, logit_scale, labels=labels, directions="lhs_to_rhs")
                for x, y in zip(mine, reversed(everyones), strict=True)
            )
            # others' features may be constants in the one and not in the other
            sums, positive = by_image.row + by_text.row, (by_image.positive + by_text.positive) / 2
        expected = [
            _expected_similarity(x, y, tx, ty, teacher_scale)
            for x, y, tx, ty in zip(mine, reversed(everyones), teacher, reversed(everyones_teacher), strict=True)
        ]
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        contrastive = share * (sums / 2 - positive.reshape(len(sums))).mean().to(dtype)
        distill = share * (sums / 2 - logit_scale * (expected[0] + expected[1]) / 2).mean().to(dtype)
        return {"contrastive_loss": contrastive, "distill_loss": distill} if output_dict else (contrastive, distill)

    def _over_ranks(
        self, mine: Sides, teacher: Sides, logit_scale: Tensor | float
    ) -> tuple[Sides, Sides, Sides, Sides, Tensor | None, float]:
        """(rows whose loss this rank computes, their teacher, all rows, their teacher, labels, factor of the mean)."""
        group = torch.distributed.group.WORLD
        with distributed.shared_failure(group):
            check_default_group(self.rank, self.world_size)
            pairs = Pairs.of(*mine, logit_scale, group)
            theirs = Pairs.of(*teacher, 1.0, group)
        alike = {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad, "teacher's width": theirs.d}
        ranks = distributed.agree(group, "all_gather", pairs, logit_scale, alike)
        # others' features have a gradient only under `gather_with_grad`, as in open_clip
        given = mine if self.gather_with_grad else (mine[0].detach(), mine[1].detach())
        everyones = ranks.all_columns(given[0], "features"), ranks.all_columns(given[1], "features")
        everyones_teacher = ranks.all_columns(teacher[0], "features"), ranks.all_columns(teacher[1], "features")
        first, end = ranks.first_column, ranks.first_column + pairs.n
        if self.local_loss:
            labels = torch.arange(first, end, device=mine[0].device)
            return mine, teacher, everyones, everyones_teacher, labels, ranks.world * pairs.n / ranks.n
        if not self.gather_with_grad:
            images, texts = everyones
            everyones = (
                torch.cat([images[:first], mine[0], images[end:]]),
                torch.cat([texts[:first], mine[1], texts[end:]]),
            )
        return everyones, everyones_teacher, everyones, everyones_teacher, None, 1.0


def _expected_similarity(x: Tensor, y: Tensor, tx: Tensor, ty: Tensor, scale: Tensor | float) -> Tensor:
    """(N,) `<x_i, sum_j softmax_j(scale <tx_i, ty_j>) y_j>`, in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = round_up(max(x.shape[1], tx.shape[1]), FUSED_WIDTH)
    # the scale goes into the queries: as an argument it would have to be read from the device
    given = tx.to(dtype) * scale, ty.to(dtype), y.to(dtype)
    query, key, value = (F.pad(a, (0, width - a.shape[1]))[None, None] for a in given)
    with torch.autocast(x.device.type, enabled=False):
        mean = F.scaled_dot_product_attention(query, key, value, scale=1.0)[0, 0, :, : x.shape[1]]
    return (x.to(dtype) * mean).sum(dim=1)
