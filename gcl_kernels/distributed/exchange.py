"""What moves bytes between ranks, and what is differentiable of it.

Every exchange moves bytes and adds nothing up. Sums over ranks are made here, in rank order, so the same inputs give the same
bits.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .agreement import Ranks

if dist.is_available():
    # Import this module now, before any group exists. Its functions store the current default group as a default argument.
    # Imported later (by the compiler or open_clip) they keep that group's threads alive after destroy_process_group, and the
    # process may abort at exit.
    import torch.distributed.nn.functional

# the same, but loads the compiler as this file is imported.)
outside_compiled_graphs: Any = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]


# torch 2.13 renames it; it stays bound late, so that what is sent can be counted
def all_gather_single(got: Tensor, x: Tensor, group: Any) -> None:
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(got, x, group=group)


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
    """`sent` on its way to the next rank of the ring while one of `rows` rows comes from the one before."""

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
    # An all_reduce would move 2 x instead of (world - 1) x, but in which order it adds depends on the backend and its algorithm,
    # and may differ between ranks. What is summed here is small: a scalar or one vector of D numbers.
    return all_rows(x[None], (1,) * dist.get_world_size(group), group, "a sum over ranks").sum(dim=0)


def sum_gradients(x: Tensor, factor: float, group: Any) -> Tensor:
    """x; its gradient is `factor` times the sum over ranks of theirs."""
    return _SumGradients.apply(x, factor, group)  # pyright: ignore[reportReturnType]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, group):
        ctx.factor, ctx.group = factor, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.factor * total(g, ctx.group), None, None
