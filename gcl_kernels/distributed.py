"""The primitive over a process group: rank r holds some rows of lhs and some of rhs, and only rhs travels.

The N x M plane is cut by rows, so a rank does 8 N M D / world and nothing twice. Two transports of rhs:

``"all_gather"``: every rank gets all of rhs at once and keeps it for the backward, O(M D) memory.
``"ring"``: rank to rank, one rank's rows at a time, sent on while they are used; rhs is never whole anywhere, O(M D / world).

Besides rhs (and, in the backward, its gradient in float32) what travels is O(M) a rank: ids, and each rank's part of col.

Every exchange moves bytes and adds nothing up: sums over ranks are made here, in rank order (all-gather) or in the ring's
order, so the same inputs give the same bits. The first exchange of a call is always the agreement (``agree``): sizes, and what
has to be alike on all ranks, so that a difference is an error on every rank instead of a hang or a wrong number.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .validation import check_choice, may_read

if dist.is_available():
    # torch's compiler and open_clip import it in the middle of things, and its functions keep the group that there is then, as a
    # default argument. That group's threads outlive destroy_process_group, and one that frees a tensor while Python shuts down
    # aborts the process. Here there is no group yet, as a rule.
    import torch.distributed.nn.functional

TRANSPORTS = ("all_gather", "ring")
MESSAGE_BYTES = 1024  # of one rank's part of the agreement

# torch.compile breaks its graph here: an exchange is not traced, what comes before and after it is. (torch.compiler.disable does
# the same, but loads the compiler as this file is imported.)
outside_compiled_graphs: Any = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]


# torch 2.13 renames it; it stays bound late, so that what is sent can be counted
def all_gather_single(got: Tensor, x: Tensor, group: Any) -> None:
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(got, x, group=group)


@dataclass(frozen=True)
class Ranks:
    """Who holds what, as the ranks of ``group`` have agreed: rank r has rows[r] rows of lhs and cols[r] of rhs."""

    group: Any
    transport: str
    rank: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def n(self) -> int:
        return sum(self.rows)

    @property
    def m(self) -> int:
        return sum(self.cols)

    def columns(self, rank: int) -> slice:
        """Where that rank's columns stand among all."""
        start = sum(self.cols[:rank])
        return slice(start, start + self.cols[rank])

    @property
    def first_column(self) -> int:
        return self.columns(self.rank).start

    def all_columns(self, x: Tensor) -> Tensor:
        """(M, ...) of every rank's x (cols[rank], ...), in rank order; differentiable, every rank's use of it counted."""
        return all_rows(x, self.cols, self.group, "a statistic")

    def total(self, x: Tensor) -> Tensor:
        """The sum of x, alike in shape, over ranks; differentiable, every rank's use of it counted."""
        return total(x, self.group)


# ---- agreement


def check_group(process_group: Any, transport: str) -> None:
    check_choice("transport", transport, TRANSPORTS)
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group: expected None or a torch.distributed.ProcessGroup that this process is a member of, got "
            f"{type(process_group).__name__} {process_group!r}"
        )


@contextlib.contextmanager
def shared_failure(process_group: Any) -> Iterator[None]:
    """A rank that fails in here, before the agreement, tells the others, which would wait for it otherwise."""
    try:
        yield
    except Exception as error:
        if process_group is not None:
            _exchange(process_group, {"error": f"{type(error).__name__}: {error}"[: MESSAGE_BYTES // 2]})
        raise


@outside_compiled_graphs
def agree(
    process_group: Any,
    transport: str,
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    alike: Mapping[str, Any],
) -> Ranks:
    """The sizes of every rank, after all were seen to have called with what has to be alike, ``alike`` among it.

    Raises:
        ValueError: on every rank, naming the argument, the ranks and what differed.
    """
    needs = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in (lhs, rhs, logit_scale)]
    if isinstance(logit_scale, Tensor):
        logit_scale = float(logit_scale.detach()) if may_read(logit_scale) else math.nan
    mine = {
        "rows": lhs.shape[0],
        "cols": rhs.shape[0],
        "label_range": _range(labels),
        "scale": float(logit_scale),  # NaN where it may not be read
        "alike": {
            "transport": transport,
            "lhs and rhs": f"D = {lhs.shape[1]}, {str(lhs.dtype).removeprefix('torch.')} on {lhs.device.type}",
            "labels": "None" if labels is None else "labels" if labels.ndim == 1 else "(N, P) labels",
            "lhs_ids": "None" if lhs_ids is None else f"{lhs_ids.shape[1] if lhs_ids.ndim == 2 else 1} channels of ids",
            "requires_grad of lhs, rhs, logit_scale": str(needs),
            **{name: str(value) for name, value in alike.items()},
        },
    }
    rank, got = dist.get_rank(process_group), _exchange(process_group, mine)
    for q, other in enumerate(got):
        if "error" in other:
            raise ValueError(f"process_group: expected valid arguments on every rank, got on rank {q} {other['error']}")
    first = got[0]
    for q, other in enumerate(got):
        for name in dict.fromkeys((*first["alike"], *other["alike"])):
            values = first["alike"].get(name, "nothing"), other["alike"].get(name, "nothing")
            if values[0] != values[1]:
                raise ValueError(
                    f"{name}: expected the same on every rank, got {values[0]} on rank 0 and {values[1]} on rank {q}"
                )
        scales = first["scale"], other["scale"]
        if not (math.isclose(*scales, rel_tol=1e-5) or all(map(math.isnan, scales))):
            raise ValueError(
                f"logit_scale: expected the same on every rank, got {scales[0]} on rank 0 and {scales[1]} on rank {q}"
            )
    ranks = Ranks(
        process_group,
        transport if len(got) > 1 else "all_gather",  # nobody to pass rhs on to
        rank,
        tuple(other["rows"] for other in got),
        tuple(other["cols"] for other in got),
    )
    for q, other in enumerate(got):
        low, high = other["label_range"]
        if low < -1 or high >= ranks.m:
            raise ValueError(
                f"labels: expected columns 0..{ranks.m - 1} of all ranks' rhs, or -1 for none, got values from {low} to "
                f"{high} on rank {q}"
            )
    return ranks


def _range(labels: Tensor | None) -> tuple[int, int]:
    return (-1, -1) if labels is None or not may_read(labels) else (int(labels.min()), int(labels.max()))


def _exchange(group: Any, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's ``mine``, read on the host: over the group's CPU backend where it has one ("cpu:gloo,cuda:nccl"), else over
    the device, which the host then waits for."""
    text = json.dumps(mine).encode()
    if len(text) > MESSAGE_BYTES:
        raise ValueError(f"process_group: expected options of at most {MESSAGE_BYTES} characters, got {len(text)}")
    device_types = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    device = "cpu" if "cpu" in device_types else device_types[0]
    message = torch.frombuffer(bytearray(text.ljust(MESSAGE_BYTES)), dtype=torch.uint8).to(device)
    world = dist.get_world_size(group)
    got = message.new_empty(world * MESSAGE_BYTES)
    with waiting("the agreement on sizes and options", group):
        all_gather_single(got, message, group=group)
    return [json.loads(bytes(part.tolist())) for part in got.cpu().split(MESSAGE_BYTES)]


@outside_compiled_graphs
def first_column(rhs: Tensor, process_group: Any) -> int:
    """Where this rank's rows of rhs stand among all ranks' columns: what to add to labels that count its own."""
    cols = [other["cols"] for other in _exchange(process_group, {"cols": len(rhs)})]
    return sum(cols[: dist.get_rank(process_group)])


# ---- what moves bytes


@contextlib.contextmanager
def waiting(what: str, group: Any) -> Iterator[None]:
    """Says in which exchange, and what it may mean, that another rank did not answer."""
    try:
        yield
    except RuntimeError as error:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"process_group: expected every rank to take part in {what}, got no answer on rank {rank} of {world}: another rank "
            f"has died, hangs or has stopped with an error of its own ({str(error).splitlines()[0]})"
        ) from error


def as_bytes(x: Tensor) -> Tensor:
    """A contiguous tensor's memory: what is only moved needs no dtype that a transport knows."""
    return x.reshape(-1).view(torch.uint8)


def gather(x: Tensor, sizes: Sequence[int], group: Any, what: str) -> Tensor:
    """Every rank's x (sizes[rank], ...) one after the other. Where sizes differ the shorter are padded on their way."""
    most = max(sizes)
    x = x.detach().contiguous()
    if len(x) < most:
        x = torch.cat([x, x.new_zeros((most - len(x), *x.shape[1:]))])
    got = x.new_empty((len(sizes) * most, *x.shape[1:]))
    with waiting(what, group):
        all_gather_single(as_bytes(got), as_bytes(x), group=group)
    if min(sizes) == most:
        return got
    return torch.cat([part[:size] for part, size in zip(got.split(most), sizes, strict=True)])


def bring_home(x: Tensor, sizes: Sequence[int], group: Any, rank: int, what: str) -> Tensor:
    """(world, sizes[rank], ...): what each rank holds, in its x (sum(sizes), ...), for this one."""
    row = x.element_size() * math.prod(x.shape[1:])
    got = x.new_empty((len(sizes), sizes[rank], *x.shape[1:]))
    with waiting(what, group):
        dist.all_to_all_single(
            as_bytes(got),
            as_bytes(x.detach().contiguous()),
            [row * sizes[rank]] * len(sizes),
            [row * size for size in sizes],
            group=group,
        )
    return got


class Shift:
    """``sent`` on its way to the next rank of the ring while one of ``rows`` rows comes from the one before."""

    def __init__(self, sent: Tensor, rows: int, ranks: Ranks, what: str):
        self.sent = sent.detach().contiguous()  # kept until it is gone
        self.got = sent.new_empty((rows, *sent.shape[1:]))
        self.what, self.group = what, ranks.group
        after, before = (
            dist.get_global_rank(ranks.group, (ranks.rank + step) % ranks.world) for step in (1, -1)
        )  # fmt: skip
        with waiting(what, ranks.group):
            self.works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, as_bytes(self.sent), after, ranks.group),
                    dist.P2POp(dist.irecv, as_bytes(self.got), before, ranks.group),
                ]
            )

    def wait(self) -> Tensor:
        with waiting(self.what, self.group):
            for work in self.works:
                work.wait()
        return self.got


@outside_compiled_graphs
def all_rows(x: Tensor, sizes: Sequence[int], group: Any, what: str) -> Tensor:
    """Every rank's x (sizes[rank], ...) one after the other; differentiable, every rank's use of it counted."""
    return _Gather.apply(x, sizes, group, what)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group, what):
        ctx.sizes, ctx.group, ctx.what = sizes, group, what
        return gather(x, sizes, group, f"the gathering of {what}")

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        what = f"the exchange of gradients of {ctx.what}"
        return bring_home(g, ctx.sizes, ctx.group, dist.get_rank(ctx.group), what).sum(dim=0), None, None, None


@outside_compiled_graphs
def total(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks of x, alike in shape on all; in rank order, differentiable, every rank's use of it counted."""
    return all_rows(x[None], (1,) * dist.get_world_size(group), group, "a sum over ranks").sum(dim=0)


def sum_values(x: Tensor, factor: float, group: Any) -> Tensor:
    """The sum over ranks of x; its gradient, which is alike on all ranks, goes back to each rank's x times ``factor``."""
    value = total(x.detach(), group)
    return value + factor * (x - x.detach())


def sum_gradients(x: Tensor, factor: float, group: Any) -> Tensor:
    """x; its gradient is ``factor`` times the sum over ranks of theirs."""
    return _SumGradients.apply(x, factor, group)  # pyright: ignore[reportReturnType]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, group):
        ctx.factor, ctx.group = factor, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.factor * total(g, ctx.group), None, None


# ---- the primitive


@outside_compiled_graphs
def statistics(
    lhs: Tensor,
    rhs: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None,
    lhs_ids: Tensor | None,
    rhs_ids: Tensor | None,
    want: tuple[bool, bool],
    backend: str,
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """``lse.logsumexp_statistics`` of this rank's rows and columns: (row (N,), col (M,), positive (N, P)), N and M its own.

    labels (N, P): columns of all ranks' rhs in rank order; None: row i's positive is this rank's column i.
    """
    if labels is None:
        labels = ranks.first_column + torch.arange(lhs.shape[0], device=lhs.device)[:, None]
    return _Statistics.apply(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, want, backend, ranks)  # pyright: ignore


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, want, backend, ranks):
        forward = backends.load(backend).forward
        if rhs_ids is not None:
            rhs_ids = gather(rhs_ids, ranks.cols, ranks.group, "the all-gather of rhs_ids")
        kind, n = backends.statistics_dtype(lhs.device), lhs.shape[0]
        row = lhs.new_full((n if want[0] else 0,), -math.inf, dtype=kind)
        parts = lhs.new_empty((ranks.m if want[1] else 0,), dtype=kind)  # of col: over this rank's rows
        positive = torch.zeros(labels.shape, dtype=kind, device=lhs.device)
        if ranks.transport == "all_gather":
            rhs = gather(rhs, ranks.cols, ranks.group, "the all-gather of rhs")
            blocks = [(slice(0, ranks.m), rhs)]
        else:
            blocks = ((cols, block) for _, cols, block in around_the_ring(rhs, ranks))
        with torch.autocast(lhs.device.type, enabled=False):
            for cols, block in blocks:
                ids = None if rhs_ids is None else rhs_ids[cols]
                r, c, p = forward(lhs, block, logit_scale, labels_within(labels, cols), lhs_ids, ids, *want)
                row = torch.logaddexp(row, r) if want[0] else row
                parts[cols if want[1] else slice(0)] = c
                positive += p  # 0 where the label lies in another block
        col = parts
        if want[1]:
            col = bring_home(parts, ranks.cols, ranks.group, ranks.rank, "the exchange of col").logsumexp(dim=0)
        ctx.save_for_backward(lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, row, col, positive)
        ctx.want, ctx.backend, ctx.ranks = want, backend, ranks
        ctx.set_materialize_grads(False)
        return row, col, positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_row, g_col, g_positive):  # pyright: ignore[reportIncompatibleMethodOverride]
        lhs, rhs, logit_scale, labels, lhs_ids, rhs_ids, row, col, positive = ctx.saved_tensors
        ranks, (need_lhs, need_rhs, need_scale) = ctx.ranks, ctx.needs_input_grad[:3]
        backward = backends.load(ctx.backend).backward
        ring = ranks.transport == "ring"
        g_row = g_row if ctx.want[0] else None
        if ctx.want[1]:
            # Whether this rank's loss uses its col or not, the others' rows need to know.
            lines = torch.stack([col, torch.zeros_like(col) if g_col is None else g_col.to(col)], dim=1)
            col, g_col = gather(lines, ranks.cols, ranks.group, "the all-gather of col and its gradient").unbind(1)

        wide = torch.promote_types(lhs.dtype, torch.float32)  # of parts, which are rounded once they are added up
        dlhs = drhs = None
        dscale = torch.zeros((), dtype=row.dtype, device=lhs.device)
        homebound: Shift | None = None
        for owner, cols, block in [(None, slice(0, ranks.m), rhs)] if not ring else around_the_ring(rhs, ranks):
            dlhs_part, drhs_part, dscale_part = backward(
                lhs,
                block,
                logit_scale,
                labels_within(labels, cols),
                lhs_ids,
                None if rhs_ids is None else rhs_ids[cols],
                row,
                col[cols] if ctx.want[1] else col,
                positive,
                g_row,
                g_col[cols] if ctx.want[1] else None,
                g_positive,
                need_lhs,
                need_rhs,
                need_scale,
                dtype=wide,
            )
            if need_lhs:
                dlhs = dlhs_part if dlhs is None else dlhs.add_(dlhs_part)
            if need_scale:
                dscale += dscale_part
            if need_rhs and owner is None:
                parts = bring_home(drhs_part, ranks.cols, ranks.group, ranks.rank, "the exchange of gradients of rhs")
                drhs = parts.sum(dim=0)
            elif need_rhs and owner is not None:
                drhs = drhs_part if homebound is None else drhs_part.add_(homebound.wait())
                homebound = Shift(drhs, ranks.cols[owner - 1], ranks, "the ring of gradients of rhs")
        if homebound is not None:
            drhs = homebound.wait()
        return (
            None if dlhs is None else dlhs.to(lhs.dtype),
            None if drhs is None else drhs.to(rhs.dtype),
            dscale.to(logit_scale) if need_scale else None,
            *[None] * 6,
        )


def around_the_ring(rhs: Tensor, ranks: Ranks) -> Iterator[tuple[int, slice, Tensor]]:
    """Every rank's rhs (whose, its place among the columns, the rows), from this rank's backwards, sent on while it is used."""
    for step in range(ranks.world):
        owner = (ranks.rank - step) % ranks.world
        shift = None
        if step < ranks.world - 1:
            shift = Shift(rhs, ranks.cols[owner - 1], ranks, "the ring of rhs")
        yield owner, ranks.columns(owner), rhs
        if shift is not None:
            rhs = shift.wait()


def labels_within(labels: Tensor, cols: slice) -> Tensor:
    """Labels counted from the block's first column; -1 for those outside."""
    return torch.where((labels >= cols.start) & (labels < cols.stop), labels - cols.start, -1)
