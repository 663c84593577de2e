"""The loss of a training step, by the options of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import gcl_kernels
from gcl_kernels import distributed
from gcl_kernels.training.train_options import TrainOptions, by_similarity, weighting, weights_of

SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
"""Where SigLIP starts (arXiv 2303.15343): nearly all pairs of a batch are negatives, and it says so."""


def start_logits(model: Any, args: TrainOptions) -> None:
    """Set the scale and, for the sigmoid loss, the bias that training starts from.

    A pretrained model keeps its own scale. A bias of 0 is none: open_clip gives it to weights that have no bias.
    """
    scale = args.logit_scale
    if args.loss == "sigmoid":
        scale = scale or (None if args.pretrained else SIGMOID_SCALE)
        with torch.no_grad():
            if args.logit_bias is not None:
                model.logit_bias.fill_(args.logit_bias)
            elif not model.logit_bias.any():
                model.logit_bias.fill_(SIGMOID_BIAS)
    if scale is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(scale))


class Objective:
    """`objective(lhs, rhs, scores, scale, bias, **visible)`: the loss of a batch, 0-d.

    Softmax is `GCLLoss`. Sigmoid is `sigmoid_loss` with the same weights, which there weigh positives alone; bias is None
    for softmax.
    """

    def __init__(self, args: TrainOptions, group: Any) -> None:
        self._group = group
        self._fields: dict[str, Any] = {
            "lhs_field_weights": dict(zip(args.left_keys, args.left_weights, strict=True)),
            "rhs_field_weights": dict(zip(args.right_keys, args.right_weights, strict=True)),
        }
        self._cross_fields = args.cross_field_loss
        if args.loss == "sigmoid":
            self._weights_of = weights_of(args)
            return
        self._weights_of = None
        options: dict[str, Any] = {
            "score_to_weight": args.score_to_weight,
            **weighting(args),
            "process_group": group,
            **by_similarity(args.false_negatives),
        }
        self._softmax = gcl_kernels.GCLLoss(**options, **self._fields)
        # Equal field weights, the default, make it the mean over all (left, right) pairs of fields.
        self._softmax_of_field_pairs = gcl_kernels.GCLLoss(**options, field_mode="pairwise")

    def __call__(
        self,
        lhs: Mapping[str, Tensor],
        rhs: Mapping[str, Tensor],
        scores: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        **visible: Tensor | None,
    ) -> Tensor:
        if self._weights_of is None:
            loss = self._softmax(lhs, rhs, scores, scale, **visible)
            return (
                loss + self._softmax_of_field_pairs(lhs, rhs, scores, scale, **visible) if self._cross_fields else loss
            )
        assert bias is not None
        options: dict[str, Any] = {"weights": self._weights(scores), "process_group": self._group, **visible}
        loss = gcl_kernels.sigmoid_loss(lhs, rhs, scale, bias, **options, **self._fields)
        if self._cross_fields:
            loss = loss + gcl_kernels.sigmoid_loss(lhs, rhs, scale, bias, **options, field_mode="pairwise")
        return loss

    def _weights(self, scores: Tensor) -> Tensor:
        """Of the mean weight 1 over all processes' rows, if they are to be normalised."""
        assert self._weights_of is not None
        if self._group is None or self._weights_of.normalize is None:
            return self._weights_of(scores)
        weights = self._weights_of.not_normalized(scores)
        mine = torch.stack([weights.sum(), weights.new_tensor(float(len(weights)))])
        total, count = distributed.total(mine, self._group)
        return weights * torch.where(total > 0, count / total, 1.0)
