"""Dense reference of the loss (all N x M logits in memory). Symbols as in `gcl_kernels.gcl_loss`: s, t, w, row, col, l."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class PairwiseLSE(NamedTuple):
    row: Tensor  # (N,)  logsumexp over the columns that row i sees
    col: Tensor  # (M,)  logsumexp over the rows that column j sees
    positive: Tensor  # shaped as labels: s[i, t_i], 0 where t_i = -1


def diagonal_labels(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device)


def labelled_pairs(labels: Tensor, m: int) -> Tensor:
    """(N, M) bool: positives."""
    columns = torch.arange(m, device=labels.device)
    return (labels.reshape(labels.shape[0], -1, 1) == columns).any(dim=1)


def hidden_pairs(
    labels: Tensor,
    m: int,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    similarity: Tensor | None = None,
    lhs_limit: Tensor | None = None,
    rhs_limit: Tensor | None = None,
) -> Tensor:
    """(N, M) bool: pairs that are false negatives. Equal non-negative ids in any channel hide a pair, a similarity above its
    row's or its column's limit does; a label shows it.

    Args:
        labels: (N, P), -1 for none.
        m: M.
        lhs_ids: (N, K) or None.
        rhs_ids: (M, K) or None.
        similarity: (N, M), where there are limits.
        lhs_limit: (N,) or None.
        rhs_limit: (M,) or None.
    """
    n = labels.shape[0]
    hidden = torch.zeros(n, m, dtype=torch.bool, device=labels.device)
    if lhs_ids is not None and rhs_ids is not None:
        left = lhs_ids.reshape(n, 1, -1)
        right = rhs_ids.reshape(1, m, -1)
        hidden |= ((left == right) & (left >= 0)).any(dim=2)
    if similarity is not None and lhs_limit is not None:
        hidden |= similarity > lhs_limit[:, None]
    if similarity is not None and rhs_limit is not None:
        hidden |= similarity > rhs_limit
    return hidden & ~labelled_pairs(labels, m)


def safe_logsumexp(s: Tensor, hidden: Tensor, dim: int) -> Tensor:
    """logsumexp over what is visible; -inf with gradient 0 where nothing is."""
    empty = hidden.all(dim=dim, keepdim=True)
    lse = s.masked_fill(hidden & ~empty, -torch.inf).logsumexp(dim)  # an empty line is left unmasked: no NaN gradient
    return torch.where(empty.squeeze(dim), -torch.inf, lse)


def pairwise_logsumexp(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    lhs_limit: Tensor | None = None,
    rhs_limit: Tensor | None = None,
    rhs_bias: Tensor | None = None,
    directions: str = "both",
    positives: str = "joined",
) -> PairwiseLSE:
    """s = logit_scale * lhs @ rhs.T + rhs_bias; its row and column logsumexp over visible pairs, and the positives' logits.

    `positives="apart"` hides positives too. A direction that is not asked for is empty.
    """
    n, m = lhs.shape[0], rhs.shape[0]
    labels = diagonal_labels(n, lhs.device) if labels is None else labels
    similarity = lhs @ rhs.T
    s = logit_scale * similarity
    s = s if rhs_bias is None else s + rhs_bias.to(s)
    hidden = hidden_pairs(labels, m, lhs_ids, rhs_ids, similarity.detach(), lhs_limit, rhs_limit)
    if positives == "apart":
        hidden |= labelled_pairs(labels, m)
    row = safe_logsumexp(s, hidden, dim=1) if directions != "rhs_to_lhs" else s.new_empty(0)
    col = safe_logsumexp(s, hidden, dim=0) if directions != "lhs_to_rhs" else s.new_empty(0)
    positive = s.gather(1, labels.clamp(min=0).reshape(n, -1)).reshape(labels.shape)
    return PairwiseLSE(row, col, torch.where(labels >= 0, positive, 0.0))


class PairwiseSoftplus(NamedTuple):
    row: Tensor  # (N,)  sum of softplus(z) over the negatives that row i sees
    positive: Tensor  # shaped as labels: z[i, t_i], 0 where t_i = -1


def pairwise_softplus(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    lhs_limit: Tensor | None = None,
    rhs_limit: Tensor | None = None,
    rhs_bias: Tensor | None = None,
) -> PairwiseSoftplus:
    """z = logit_scale * lhs @ rhs.T + logit_bias + rhs_bias; its row sums of softplus over the visible pairs without a label, and
    the positives' z."""
    n, m = lhs.shape[0], rhs.shape[0]
    labels = diagonal_labels(n, lhs.device) if labels is None else labels
    similarity = lhs @ rhs.T
    z = logit_scale * similarity + logit_bias
    z = z if rhs_bias is None else z + rhs_bias.to(z)
    hidden = hidden_pairs(labels, m, lhs_ids, rhs_ids, similarity.detach(), lhs_limit, rhs_limit)
    row = torch.where(hidden | labelled_pairs(labels, m), 0.0, softplus(z)).sum(dim=1)
    positive = z.gather(1, labels.clamp(min=0).reshape(n, -1)).reshape(labels.shape)
    return PairwiseSoftplus(row, torch.where(labels >= 0, positive, 0.0))


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)); torch's own softplus is z itself above a threshold, which costs float64 its last digits."""
    return -torch.nn.functional.logsigmoid(-z)


def sigmoid_loss(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    reduction: str = "mean",
    **hiding: Tensor | None,
) -> Tensor:
    """l_i = sum_p w_ip softplus(-z_{i,t_ip}) + row_i. `hiding`: the ids, limits and biases of `pairwise_softplus`."""
    n = lhs.shape[0]
    row, positive = pairwise_softplus(lhs, rhs, logit_scale, logit_bias, labels=labels, **hiding)
    labels = diagonal_labels(n, lhs.device) if labels is None else labels
    weights = lhs.new_ones(labels.shape) if weights is None else weights
    weights = torch.where(labels >= 0, weights, 0.0)
    loss = (weights * softplus(-positive)).reshape(n, -1).sum(dim=1) + row
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weights.sum().to(loss)
    return loss.sum() / (n if reduction == "mean" else torch.where(total > 0, total, 1.0))


def aggregate_fields(
    fields: Mapping[str, Tensor],
    weights: Mapping[str, float] | None = None,
    *,
    mask: Tensor | None = None,
    normalize_fields: bool = True,
    normalize: bool = True,
) -> Tensor:
    """Weighted mean of the (normalised) fields a row has, normalised again. A row without a field, or with a zero mean, is 0."""
    stack = torch.stack(list(fields.values()), dim=1)  # (N, F, D)
    n, f, _ = stack.shape
    w = stack.new_ones(f) if weights is None else stack.new_tensor([weights[name] for name in fields])
    present = torch.ones(n, f, dtype=torch.bool, device=stack.device) if mask is None else mask
    if normalize_fields:
        stack = unit(stack)
    w = torch.where(present, w, 0.0)  # (N, F)
    total = w.sum(dim=1, keepdim=True)
    w = torch.where(total > 0, w / torch.where(total > 0, total, 1.0), 0.0)
    mean = torch.where(present[..., None], w[..., None] * stack, 0.0).sum(dim=1)
    return unit(mean) if normalize else mean


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; a zero vector stays zero with gradient 0."""
    square = (x * x).sum(dim=-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, square).sqrt())


def score_to_weight(name: str, scores: Tensor, s_max: float = 100.0) -> Tensor:
    """w(s) for the functions that need no further parameters.

    Args:
        name: `"constant"`, `"linear"`, `"inverse"`, `"inverse_sqrt"` or `"log"`.
        scores: in 1 .. s_max.
        s_max: the highest score.
    """
    return {
        "constant": torch.ones_like(scores),
        "linear": scores,
        "inverse": s_max / (s_max - scores + 1),
        "inverse_sqrt": s_max / (s_max - scores + 1) ** 0.5,
        "log": (1 + scores).log(),
    }[name]


def gcl_loss(
    lhs: Tensor | Mapping[str, Tensor],
    rhs: Tensor | Mapping[str, Tensor],
    logit_scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    lhs_field_weights: Mapping[str, float] | None = None,
    rhs_field_weights: Mapping[str, float] | None = None,
    lhs_field_mask: Tensor | None = None,
    rhs_field_mask: Tensor | None = None,
    field_mode: str = "aggregate",
    directions: str = "both",
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    rhs_bias: Tensor | None = None,
    false_negative_margin: float | None = None,
    false_negative_ratio: float | None = None,
) -> Tensor:
    """l_i = sum_p w_ip * ( a * D(row_i) + (1 - a) * D(col_{t_ip}) ), with a = 1/2, 1 or 0 by `directions` and

    D(lse) = (1 - e) * (lse - s_it) + e * (lse - mean s) + c * lse^2, e = label_smoothing, c = z_loss, the mean over all
    columns (rows), hidden or not. `field_mode="pairwise"`: l_i is the sum over field pairs (f, g) of beta_fg l_i(L_f, R_g),
    beta_fg = u_f v_g with u and v the field weights of each side divided by their sum.

    `false_negative_margin` m and `false_negative_ratio` r hide an unlabelled pair whose similarity is above p + m or r p, p being
    the largest similarity of a positive of its row, or of its column.
    """
    some = next(iter(lhs.values())) if isinstance(lhs, Mapping) else lhs
    n = some.shape[0]
    labels = diagonal_labels(n, some.device) if labels is None else labels
    weights = some.new_ones(labels.shape) if weights is None else weights

    if field_mode == "aggregate":
        lhs = aggregate_fields(lhs, lhs_field_weights, mask=lhs_field_mask) if isinstance(lhs, Mapping) else lhs
        rhs = aggregate_fields(rhs, rhs_field_weights, mask=rhs_field_mask) if isinstance(rhs, Mapping) else rhs
        pairs = [(1.0, lhs, rhs, all_rows(lhs), all_rows(rhs))]
    else:
        pairs = [
            (u * v, x, y, has_x, has_y)
            for u, x, has_x in weighted_fields(lhs, lhs_field_weights, lhs_field_mask)
            for v, y, has_y in weighted_fields(rhs, rhs_field_weights, rhs_field_mask)
            if has_x.any() and has_y.any()
        ]

    a = {"both": 0.5, "lhs_to_rhs": 1.0, "rhs_to_lhs": 0.0}[directions]
    loss = some.new_zeros(n)
    for beta, x, y, has_x, has_y in pairs:
        # a row whose field is absent is neither a query nor a negative: it leaves the batch
        keep = torch.where(has_y, torch.cumsum(has_y, 0) - 1, -1)  # old column -> new column
        t = torch.where(labels >= 0, keep[labels.clamp(min=0)], -1)[has_x]
        ids = (None, None) if lhs_ids is None or rhs_ids is None else (lhs_ids[has_x], rhs_ids[has_y])
        l_pair = one_pair_loss(
            x[has_x],
            y[has_y],
            logit_scale,
            weights[has_x].to(x),
            t,
            ids,
            a=a,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            bias=None if rhs_bias is None else rhs_bias[has_y].to(x),
            margin=false_negative_margin,
            ratio=false_negative_ratio,
        )
        loss = loss.to(l_pair) + beta * torch.zeros_like(loss).to(l_pair).index_put((has_x.nonzero()[:, 0],), l_pair)

    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / n
    total = torch.where(labels >= 0, weights, 0.0).sum().to(loss)  # a row without a positive carries no weight
    return loss.sum() / torch.where(total > 0, total, 1.0)


def false_negative_limits(x, y, labels, margin, ratio) -> dict[str, Tensor]:
    """{lhs_limit (N,), rhs_limit (M,)}, +inf where there is no positive; empty without either option."""
    if margin is None and ratio is None:
        return {}
    similarity = (x @ y.T).detach()
    positives = similarity.masked_fill(~labelled_pairs(labels, y.shape[0]), -torch.inf)
    limits = {}
    for name, p in (("lhs_limit", positives.amax(dim=1)), ("rhs_limit", positives.amax(dim=0))):
        limit = torch.full_like(p, torch.inf)
        if margin is not None:
            limit = torch.minimum(limit, p + margin)
        if ratio is not None:
            limit = torch.minimum(limit, ratio * p)
        limits[name] = torch.where(p.isinf(), torch.inf, limit)
    return limits


def one_pair_loss(
    x, y, logit_scale, weights, labels, ids, *, a, label_smoothing, z_loss, bias=None, margin=None, ratio=None
) -> Tensor:
    """(N,) losses of one (N, D) side against one (M, D) side."""
    limits = false_negative_limits(x, y, labels, margin, ratio)
    options = {"labels": labels, "lhs_ids": ids[0], "rhs_ids": ids[1], "rhs_bias": bias, **limits}
    row, col, positive = pairwise_logsumexp(x, y, logit_scale, **options)
    s = logit_scale * (x @ y.T)
    s = s if bias is None else s + bias
    labels, weights, positive = (v.reshape(x.shape[0], -1) for v in (labels, weights, positive))  # (N, P)
    column = labels.clamp(min=0)

    def direction(lse: Tensor, mean: Tensor) -> Tensor:
        cross_entropy = (1 - label_smoothing) * (lse - positive) + label_smoothing * (lse - mean)
        return cross_entropy + z_loss * lse**2

    loss = torch.zeros_like(positive)
    if a > 0:
        loss = loss + a * direction(row[:, None], s.mean(dim=1)[:, None])
    if a < 1:
        loss = loss + (1 - a) * direction(col[column], s.mean(dim=0)[column])
    return torch.where(labels >= 0, weights * loss, 0.0).sum(dim=1)


def all_rows(x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)


def weighted_fields(side, weights, mask):
    """(weight / sum of weights, embedding, rows that have the field) for each field; a bare tensor is one field, as given."""
    if not isinstance(side, Mapping):
        return [(1.0, side, all_rows(side))]
    w = [1.0 if weights is None else float(weights[name]) for name in side]
    return [(w[f] / sum(w), unit(x), all_rows(x) if mask is None else mask[:, f]) for f, x in enumerate(side.values())]
