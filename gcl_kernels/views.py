"""Losses of rows against each other, as self-supervised learning has them: NT-Xent (SimCLR) and SupCon."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, distributed
from .backends import Lines, Want, statistics_dtype
from .derivatives import refuse_forward_mode
from .groups import ProcessGroupLike, local_tensor, resolve_group
from .lse import statistics
from .pairs import Pairs
from .row_losses import denominator
from .types import REDUCTIONS, TRANSPORTS, Backend, Reduction, Transport
from .validation import INTEGERS, check_choice, check_device, check_tensor

if TYPE_CHECKING:  # some builds of torch have no distributed
    from torch.distributed import ProcessGroup


def nt_xent_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: Reduction = "mean",
    process_group: ProcessGroupLike = None,
    transport: Transport = "all_gather",
    backend: Backend | None = None,
) -> Tensor:
    """NT-Xent, the loss of SimCLR (arXiv 2002.05709): each of 2N views finds its other view, without 2N x 2N memory.

    With `z = cat([x, y])`, `s_ij = logit_scale <z_i, z_j>` and p(i) the other view of i, which is i + N or i - N:

        l_i = logsumexp_{j != i} s_ij  -  s_{i,p(i)}

    Args:
        x: (N, D) one view of each example, float64, float32, bfloat16 or float16; used as given: normalise it first.
        y: (N, D) the other view, same dtype and device.
        logit_scale: 1 / temperature: a float or a one-element tensor, which may need a gradient. SimCLR's temperature of 0.1
            is a logit_scale of 10.
        reduction: `"mean"` is sum(l) / 2N, and `"weighted_mean"` the same, `"sum"` is sum(l), `"none"` is l, (2N,), x's rows
            first.
        process_group: as in `gcl_loss`: every rank passes its own views of its own examples, in any number, and a view's
            negatives are all ranks' views. Averaged by DistributedDataParallel, gradients are those of the joined batch.
        transport: as in `pairwise_logsumexp`.
        backend: as in `pairwise_logsumexp`.

    Returns:
        0-d loss, or (2N,) for `"none"`; float32 (float64 for float64 inputs). It takes 24 N^2 D floating-point operations with
        its gradient, 32 N^2 D with `"none"` or over ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; with a process group on every rank.
        RuntimeError: for forward-mode derivatives and `torch.func.grad`.
    """
    group = resolve_group(process_group)
    with distributed.shared_failure(group):
        refuse_forward_mode("nt_xent_loss", x, y, logit_scale)
        x, y = local_tensor("x", x, group), local_tensor("y", y, group)
        for name, view in (("x", x), ("y", y)):
            check_tensor(name, view, (2,))
        if x.shape != y.shape:
            raise ValueError(f"y: expected {tuple(x.shape)}, the shape of x, got {tuple(y.shape)}")
        if x.dtype != y.dtype:
            raise TypeError(f"y: expected the dtype of x, {x.dtype}, got {y.dtype}")
        check_device("y", y, x.device, "x")
        pairs = _checked("x", torch.cat([x, y]), logit_scale, reduction, transport, group, backend)
    ranks = _agreed("nt_xent_loss", pairs, logit_scale, reduction, transport, group)
    n = len(x)
    other = (torch.arange(2 * n, device=x.device) + n) % (2 * n) + (0 if ranks is None else ranks.first_column)
    pairs = replace(_without_self(pairs, ranks), labels=other[:, None])
    divisor = denominator(None, pairs.labels, pairs.lhs, reduction, ranks)
    known = None
    if divisor is not None and ranks is None:
        g = pairs.lhs.new_full((pairs.n,), 1.0, dtype=statistics_dtype(x.device)) / divisor
        known = Lines(g, None, -g[:, None])
    row, _, positive = statistics(pairs, Want(True, False), backend, known_upstream=known, ranks=ranks)
    return _reduced(row - positive[:, 0], divisor, x)


def supcon_loss(
    features: Tensor,
    classes: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: Reduction = "mean",
    process_group: ProcessGroupLike = None,
    transport: Transport = "all_gather",
    backend: Backend | None = None,
) -> Tensor:
    """Supervised contrastive loss, L_out of SupCon (arXiv 2004.11362), without N x N memory.

    With `s_ij = logit_scale <x_i, x_j>` and P(i) the other rows of i's class:

        l_i = logsumexp_{j != i} s_ij  -  1/|P(i)| sum_{p in P(i)} s_ip

    The mean over P(i) is taken of the class's sum of rows, in O(N D), whatever the classes' sizes.

    Args:
        features: (N, D), float64, float32, bfloat16 or float16; used as given: normalise them first. Several views of an
            example are several rows of its class, `torch.cat([view_1, view_2])` beside `classes.repeat(2)`.
        classes: (N,) integers. A row below 0 has no class: it has no positive and is everybody's negative.
        logit_scale: 1 / temperature: a float or a one-element tensor, which may need a gradient.
        reduction: a row alone in its class has l_i = 0. `"mean"` is sum(l) / N. `"weighted_mean"` is sum(l) divided by how many
            rows have a positive, 0 if none has. `"sum"` is sum(l). `"none"` is l, (N,).
        process_group: as in `gcl_loss`: every rank passes its own rows, in any number. A class is one over all ranks. Besides
            what `transport` says all ranks' features travel in float64, and each rank holds O(N D) of all ranks' rows.
        transport: as in `pairwise_logsumexp`.
        backend: as in `pairwise_logsumexp`.

    Returns:
        0-d loss, or (N,) for `"none"`; float32 (float64 for float64 inputs). It takes 6 N^2 D floating-point operations with
        its gradient, 8 N^2 D with `"none"` or over ranks.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; with a process group on every rank.
        RuntimeError: for forward-mode derivatives and `torch.func.grad`.
    """
    group = resolve_group(process_group)
    with distributed.shared_failure(group):
        refuse_forward_mode("supcon_loss", features, logit_scale)
        features, classes = local_tensor("features", features, group), local_tensor("classes", classes, group)
        pairs = _checked("features", features, logit_scale, reduction, transport, group, backend)
        check_tensor("classes", classes, (1,), INTEGERS)
        check_device("classes", classes, features.device, "features")
        if len(classes) != pairs.n:
            raise ValueError(f"classes: expected ({pairs.n},), one a row of features, got {tuple(classes.shape)}")
    ranks = _agreed("supcon_loss", pairs, logit_scale, reduction, transport, group)
    x = pairs.lhs.to(statistics_dtype(features.device))  # once: what comes back is added up before it is rounded
    others, count = _others_of_class(x, classes.to(torch.int64), ranks)
    pairs = _without_self(pairs, ranks)
    nobody = torch.full_like(count, -1)[:, None]
    labelled = torch.where(count > 0, 0, -1)[:, None]  # for the number of rows that have a positive
    divisor = denominator(None, labelled, pairs.lhs, reduction, ranks)
    known = None
    if divisor is not None and ranks is None:
        known = Lines((count > 0).to(x.dtype) / divisor, None, torch.zeros_like(nobody, dtype=x.dtype))
    pairs = replace(pairs, labels=nobody)
    row, _, _ = statistics(pairs, Want(True, False), backend, known_upstream=known, ranks=ranks)
    positive = pairs.logit_scale * (x * others).sum(dim=1) / count.clamp(min=1)
    return _reduced(torch.where(count > 0, row - positive, 0.0), divisor, features)


def _others_of_class(x: Tensor, classes: Tensor, ranks: distributed.Ranks | None) -> tuple[Tensor, Tensor]:
    """(N, D) the sum of the other rows of each row's class, over all ranks, and (N,) how many these are."""
    mine, rows, labels = slice(None), x, classes
    if ranks is not None:
        known = ranks.known() if isinstance(ranks, distributed.GraphRanks) else ranks
        mine, labels = known.columns(known.rank), known.all_columns(classes, "classes")
        rows = known.all_columns(x, "features")
    ordered, order = labels.sort(stable=True)
    changes = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(torch.int64)])
    number = torch.empty_like(order).scatter(0, order, changes.cumsum(0))  # of the class of each row, from 0
    size = torch.zeros_like(number).index_put((number,), torch.ones_like(number), accumulate=True)
    total = torch.zeros_like(rows).index_put((number,), rows, accumulate=True)  # in a fixed order
    number = number[mine]
    return total[number] - x, torch.where(classes >= 0, size[number] - 1, 0)


def _checked(
    name: str,
    x: Tensor,
    logit_scale: Tensor | float,
    reduction: Reduction,
    transport: Transport,
    group: ProcessGroup | None,
    backend: str | None,
) -> Pairs:
    """Rows of x against rows of x."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("transport", transport, TRANSPORTS)
    check_tensor(name, x, (2,))
    if 0 in x.shape:
        raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(x.shape)}")
    pairs = Pairs.of(x, x, logit_scale, group)
    if group is not None:
        backends.choose(backend, pairs.lhs.device, pairs.lhs.dtype)  # raises if there is no such backend
    return pairs


def _agreed(
    name: str, pairs: Pairs, logit_scale: Tensor | float, reduction: str, transport: str, group: ProcessGroup | None
) -> distributed.Ranks | None:
    if group is None:
        return None
    return distributed.agree(group, transport, pairs, logit_scale, {"loss": name, "reduction": reduction})


def _without_self(pairs: Pairs, ranks: distributed.Ranks | None) -> Pairs:
    """With ids under which a row does not see itself, and sees everyone else."""
    own = torch.arange(pairs.n, device=pairs.lhs.device)[:, None] + (0 if ranks is None else ranks.first_column)
    return replace(pairs, lhs_ids=own, rhs_ids=own)


def _reduced(losses: Tensor, divisor: Tensor | float | None, x: Tensor) -> Tensor:
    loss = losses if divisor is None else losses.sum() / divisor
    return loss.to(torch.promote_types(x.dtype, torch.float32))
