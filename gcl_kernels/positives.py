"""`positives_of`: labels of several positives a row, from ids."""

from __future__ import annotations

import torch
from torch import Tensor

from .validation import check_device, check_tensor


def positives_of(lhs_ids: Tensor, rhs_ids: Tensor | None = None) -> Tensor:
    """Labels that name every column with the row's id, in O(N log M + N P) and without an N x M matrix.

    Args:
        lhs_ids: (N,) int64 ids of the rows. An id below 0 is nobody's.
        rhs_ids: (M,) int64 ids of the columns, by default lhs_ids: row i's labels then have column i among them. Over a process
            group these are the ids of all ranks' columns, in rank order.

    Returns:
        (N, P) int64: the columns j with `rhs_ids[j] == lhs_ids[i] >= 0`, ascending, then -1. P is the largest number of them
        of a row, 1 at least. Its value is read from the device, which the host waits for. It is what `labels` of `gcl_loss`
        and `pairwise_logsumexp` take.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tensor("lhs_ids", lhs_ids, (1,), (torch.int64,))
    rhs_ids = lhs_ids if rhs_ids is None else rhs_ids
    check_tensor("rhs_ids", rhs_ids, (1,), (torch.int64,))
    check_device("rhs_ids", rhs_ids, lhs_ids.device, "lhs_ids")
    for name, ids in (("lhs_ids", lhs_ids), ("rhs_ids", rhs_ids)):
        if not len(ids):
            raise ValueError(f"{name}: expected at least one id, got shape {tuple(ids.shape)}")
    ordered, order = rhs_ids.sort(stable=True)
    first = torch.searchsorted(ordered, lhs_ids)
    count = torch.searchsorted(ordered, lhs_ids, right=True) - first
    count = torch.where(lhs_ids >= 0, count, 0)
    p = torch.arange(max(1, int(count.max())), device=lhs_ids.device)
    place = (first[:, None] + p).clamp(max=len(order) - 1)
    return torch.where(p < count[:, None], order[place], -1)
