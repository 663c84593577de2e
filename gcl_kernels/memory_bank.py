"""`MemoryBank`: a queue of past embeddings as more negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .distributed import shared_failure
from .groups import ProcessGroupLike, resolve_group
from .lse import pairwise_logsumexp
from .types import Backend, Transport
from .validation import DTYPES, check_device, check_tensor


class MemoryBank(nn.Module):
    """The last `size` embeddings that were pushed, detached: negatives beyond the batch (MoCo, arXiv 1911.05722; cross-batch
    memory, arXiv 1912.06798).

        out = pairwise_logsumexp(x, y, logit_scale, directions="lhs_to_rhs")
        row = torch.logaddexp(out.row, bank.logsumexp(x, logit_scale))
        loss = (row - out.positive).mean()
        bank.push(y)

    is the loss of x against `cat([y, bank])`. A column of the bank costs no product for its own gradient, 6 N S D operations
    with the gradient of x instead of 8.

    It is a module for `state_dict`, `load_state_dict` and `to`: its buffers are `features` (S, D), `ids` (S,) and `count`, how
    many rows were ever pushed. Nothing is read on the host, and shapes are the same full or not.

    *Several processes.* A bank is each process's own. Where every rank pushes its own rows, `logsumexp(..., process_group=)`
    makes the negatives those of all ranks' banks; without a group a rank sees its own. Where every rank pushes all ranks' rows
    (gathered in rank order) all banks are equal, and no group is needed. Banks that differ must stay outside of what
    DistributedDataParallel wraps: it copies the buffers of rank 0 to all ranks, unless `broadcast_buffers=False`. So does a
    checkpoint that rank 0 alone writes: save each rank's.

    Args:
        size: S >= 1, how many rows it keeps.
        dim: D.
        dtype: of `features`; default: torch's default dtype.
        device: of the buffers.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    features: Tensor
    ids: Tensor
    count: Tensor

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        for name, number in (("size", size), ("dim", dim)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.register_buffer("features", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("ids", torch.full((size,), -1, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def size(self) -> int:
        return self.features.shape[0]

    def extra_repr(self) -> str:
        return f"{self.size}, {self.features.shape[1]}, dtype={self.features.dtype}"

    @torch.no_grad()
    def push(self, rows: Tensor, ids: Tensor | None = None) -> None:
        """Takes rows (N, D) in the bank's dtype, in place of the oldest; of more than S the last S.

        What was computed before keeps the rows it saw, so it may be called before the backward, too.

        Args:
            rows: (N, D) embeddings, N may be 0.
            ids: (N,) int64, for `lhs_ids` of `logsumexp`; -1, the default, is nobody's.
        """
        check_tensor("rows", rows, (2,))
        if rows.shape[1] != self.features.shape[1]:
            raise ValueError(f"rows: expected (N, {self.features.shape[1]}), got {tuple(rows.shape)}")
        check_device("rows", rows, self.features.device, "the bank")
        if ids is None:
            ids = torch.full((len(rows),), -1, device=rows.device)
        check_tensor("ids", ids, (1,), (torch.int64,))
        check_device("ids", ids, rows.device, "rows")
        if len(ids) != len(rows):
            raise ValueError(f"ids: expected ({len(rows)},), one a row, got {tuple(ids.shape)}")
        kept = min(len(rows), self.size)
        skipped = len(rows) - kept
        place = (self.count + skipped + torch.arange(kept, device=rows.device)) % self.size
        # new tensors, not in place: a graph that is still to be differentiated holds the old
        self.features = self.features.index_copy(0, place, rows[skipped:].to(self.features.dtype))
        self.ids = self.ids.index_copy(0, place, ids[skipped:])
        self.count = self.count + len(rows)

    def logsumexp(
        self,
        x: Tensor,
        logit_scale: Tensor | float,
        *,
        lhs_ids: Tensor | None = None,
        lhs_limit: Tensor | None = None,
        process_group: ProcessGroupLike = None,
        transport: Transport = "all_gather",
        backend: Backend | None = None,
    ) -> Tensor:
        """(N,) `logsumexp_j logit_scale <x_i, b_j>` over the bank's rows; -inf if there is none.

        Differentiable in x and the scale.

        Args:
            x: (N, D) on the bank's device. In another dtype than the bank's it is the bank that is converted.
            logit_scale: as in `pairwise_logsumexp`, like everything below.
            lhs_ids: (N,) int64. A bank's row with an equal id >= 0 is a false negative and left out.
            lhs_limit: (N,). A row of the bank with `<x_i, b_j> > lhs_limit_i` is left out.
            process_group: over all ranks' banks.
            transport: of the banks.
            backend: as in `pairwise_logsumexp`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        group = resolve_group(process_group)
        with shared_failure(group):
            check_tensor("x", x, (2,))
            check_device("x", x, self.features.device, "the bank")
        absent = torch.arange(self.size, device=self.count.device) >= self.count
        return pairwise_logsumexp(
            x,
            self.features.to(x.dtype),
            logit_scale,
            labels=torch.full((len(x),), -1, device=x.device),
            lhs_ids=lhs_ids,
            rhs_ids=None if lhs_ids is None else self.ids,
            lhs_limit=lhs_limit,
            rhs_bias=torch.where(absent, -math.inf, 0.0),
            directions="lhs_to_rhs",
            process_group=group,
            transport=transport,
            backend=backend,
        ).row
