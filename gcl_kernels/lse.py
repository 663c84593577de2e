"""`pairwise_logsumexp`: the one differentiable operation that everything else is composed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import backends, distributed, ops
from .backends import Lines, Want
from .backends.terms import without_tiny
from .derivatives import refuse_forward_mode
from .groups import ProcessGroupLike, resolve_group
from .pairs import Pairs
from .types import DIRECTIONS, POSITIVES, TRANSPORTS, Backend, Directions, Positives, Transport
from .validation import check_choice, check_device, check_tensor


class PairwiseLSE(NamedTuple):
    """Result of `pairwise_logsumexp`: float64 on every device but MPS (float32), differentiable.

    Attributes:
        row: (N,) logsumexp of row i over the columns it sees; -inf if none.
        col: (M,) logsumexp of column j over the rows it sees; -inf if none.
        positive: shaped as labels: `s[i, t_i]`; 0 for label -1.
    """

    row: Tensor
    col: Tensor
    positive: Tensor


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
    directions: Directions = "both",
    positives: Positives = "joined",
    known_upstream: PairwiseLSE | None = None,
    process_group: ProcessGroupLike = None,
    transport: Transport = "all_gather",
    backend: Backend | None = None,
) -> PairwiseLSE:
    """Row and column logsumexp of `s = logit_scale * lhs @ rhs.T + rhs_bias` and the positives' logits, without N x M memory.

    `row_i = logsumexp_j s_ij`, `col_j = logsumexp_i s_ij`, `positive_i = s[i, t_i]`, over the pairs that are visible.

    Args:
        lhs: (N, D) embeddings, float64, float32, bfloat16 or float16; used as given (normalise them first for CLIP).
        rhs: (M, D), same dtype and device.
        logit_scale: 1 / temperature; a float, or a tensor of one element, which may need a gradient.
        labels: (N,) or (N, P) integers: column of row i's positive(s), -1 for none. Default `t_i = i`, needing M >= N.
        lhs_ids: (N,) or (N, K) int64. A pair with equal ids >= 0 in any channel k is a false negative and leaves both
            logsumexps, unless it is labelled.
        rhs_ids: (M,) or (M, K) int64.
        lhs_limit: (N,) similarities, without a gradient. A pair leaves both logsumexps where `<x_i, y_j> > lhs_limit_i`, unless
            it is labelled. +inf hides nothing. Similarities are compared as they are computed, in float32 (float64 for float64
            inputs): within one rounding of its limit a pair may be hidden or not. It may then also be hidden in the forward and
            seen in the backward, which counts it as a pair whose softmax is 2 at most.
        rhs_limit: (M,), likewise: `<x_i, y_j> > rhs_limit_j`.
        rhs_bias: (M,) added to every logit of column j, positives too, without a gradient: minus the log of how often j is
            sampled, for negatives drawn by frequency (the logQ correction). Limits do not see it.
        directions: `"both"`, `"lhs_to_rhs"` (col is empty) or `"rhs_to_lhs"` (row is empty). What is empty costs nothing.
        positives: `"joined"`: positives are part of their row and column. `"apart"`: row and col are over negatives alone, for
            losses that treat them differently, without cancellation. A line without negatives is then -inf.
        known_upstream: gradients with respect to the result, by a caller that knows them up to one common factor before they
            exist, as in a loss that is linear in the result. Shaped as the result; None for a direction that is not computed.
            One direction then takes 6 N M D operations instead of 8. The backward reads the factor alone, so what is said here
            must hold; `GCL_KERNELS_DEBUG=1` checks it. It saves nothing over a process group.
        process_group: a `torch.distributed` group over which the problem is cut, a DeviceMesh of one dimension, or `"world"`:
            the default group at the time of the call, none if there is no group. Every rank passes its own rows of lhs and
            rhs, in any numbers, with their ids, limits and biases, and gets its own row, col and positive back, over all ranks'
            columns and rows.
            The default label of row i is its rank's column i. `labels` count the columns of all ranks' rhs in rank order
            (`gcl_kernels.distributed.first_column`). Ids are compared across ranks. Every rank must call, and run the
            backward. Gradients are those of the sum of all ranks' losses.
            `torch.compile(fullgraph=True)` takes it: the exchanges, the ranks' agreement first, are operators of the graph. All
            ranks must compile or none. What is refused while a graph is traced, such as a shape, other ranks learn only without
            `fullgraph=True`; with it they wait for the group's timeout.
        transport: of rhs: `"all_gather"` (whole on every rank) or `"ring"` (one rank's rows at a time, while they are used).
        backend: `"torch"`, `"triton"` or None. None takes Triton for CUDA and HIP tensors (float64 excepted) where it works,
            and otherwise torch, with one warning that says why.

    Returns:
        PairwiseLSE(row (N,), col (M,), positive shaped as labels) in natural-log units, float64 (float32 on MPS): at
        logit_scale 100 a float32 `row` near 100 would be known to 4e-6 only, which is the whole loss of a well-trained row.
        Gradients return in the input dtypes.

    NaN and infinity propagate as in dense PyTorch: every result that depends on a non-finite input is non-finite. Under
    autocast lhs and rhs are cast as `torch.matmul` would cast them. The forward takes 2 N M D floating-point operations, the
    backward 6 N M D; neither stores an N x M matrix. The result cannot be differentiated twice.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Values (label range, ids) are checked
            on CPU tensors. Elsewhere they are checked with `GCL_KERNELS_DEBUG=1` only, since it synchronises the device. With
            a process group every rank raises, and says which rank's arguments were refused or differ.
        RuntimeError: another rank did not answer within the group's timeout; or for forward-mode derivatives and
            `torch.func.grad`, which `gcl_kernels.reference` has.
    """
    group = resolve_group(process_group)
    check_choice("transport", transport, TRANSPORTS)
    with distributed.shared_failure(group):
        check_choice("directions", directions, DIRECTIONS)
        check_choice("positives", positives, POSITIVES)
        refuse_forward_mode("pairwise_logsumexp", lhs, rhs, logit_scale)
        inputs = {"labels": labels, "lhs_ids": lhs_ids, "rhs_ids": rhs_ids}
        inputs |= {"lhs_limit": lhs_limit, "rhs_limit": rhs_limit, "rhs_bias": rhs_bias}
        pairs = Pairs.of(lhs, rhs, logit_scale, group, **inputs)
        want = Want(directions != "rhs_to_lhs", directions != "lhs_to_rhs", positives == "joined")
        known = None if known_upstream is None else check_known_upstream(known_upstream, pairs, want)
        if group is not None:
            backends.choose(backend, pairs.lhs.device, pairs.lhs.dtype)  # raises if there is no such backend
    alike = {"directions": directions, "positives": positives}
    ranks = None if group is None else distributed.agree(group, transport, pairs, logit_scale, alike)
    row, col, positive = statistics(pairs, want, backend, known_upstream=known, ranks=ranks)
    return PairwiseLSE(row, col, positive[:, 0] if labels is None or labels.ndim == 1 else positive)


def check_known_upstream(known: PairwiseLSE, pairs: Pairs, want: Want) -> Lines:
    """Of every direction that is wanted, positives as (N, P)."""
    shapes = {"row": (pairs.n,) if want.row else None, "col": (pairs.m,) if want.col else None}
    checked = []
    for name, g in zip(Lines._fields, known, strict=True):
        label = f"known_upstream.{name}"
        if name == "positive":
            check_tensor(label, g, (1, 2))
            g = g.reshape(pairs.n, -1) if g.numel() == pairs.n * pairs.positives else g
        expected = (pairs.n, pairs.positives) if name == "positive" else shapes[name]
        if expected is None:
            g = None
        else:
            check_tensor(label, g, (len(expected),))
            check_device(label, g, pairs.lhs.device)
            if tuple(g.shape) != expected:
                raise ValueError(f"{label}: expected shape {expected}, got {tuple(g.shape)}")
        checked.append(g)
    return Lines(*checked)


def statistics(
    pairs: Pairs,
    want: Want,
    backend: str | None,
    *,
    known_upstream: Lines | None = None,
    ranks: distributed.Ranks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, col, positive (N, P)) in the statistics' dtype (`backends`), so that row - positive keeps its digits.

    A direction that is not wanted is an empty tensor and costs nothing, here or in the backward. `known_upstream` is explained
    in `ops.statistics`. It saves nothing over ranks, since col is known only once all ranks are done.

    `ranks`: the problem is cut over a process group whose ranks have agreed; row, col and positive are this rank's.
    """
    if ranks is None:
        return ops.statistics(pairs, want, backend, known_upstream)
    return statistics_of_parts([pairs], want, backend, ranks)[0]


def statistics_of_parts(
    parts: Sequence[Pairs], want: Want, backend: str | None, ranks: distributed.Ranks
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`statistics` of each part over ranks. Parts have one rhs, which travels once."""
    name = backends.choose(backend, parts[0].lhs.device, parts[0].lhs.dtype)
    of_parts = distributed.statistics_of_parts(parts, want, name, ranks)
    return [_without_tiny(lines, pairs) for lines, pairs in zip(of_parts, parts, strict=True)]


def _without_tiny(lines: tuple[Tensor, Tensor, Tensor], pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    if not pairs.limited:
        return lines
    row, col, positive = (without_tiny(x, pairs) for x in lines)
    return row, col, positive
