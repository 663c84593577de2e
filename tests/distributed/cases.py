"""Problems cut over ranks, and what a rank does with its part; imported by the test processes and by the ranks."""

import dataclasses

import torch
import torch.distributed as dist

from gcl_kernels import GCLLoss, gcl_loss, pairwise_logsumexp, testing
from gcl_kernels.pairs import OPTIONAL


@dataclasses.dataclass(frozen=True)
class Cut:
    """A problem and how many of its rows and columns each rank holds."""

    problem: testing.Problem
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def of(self, rank):
        """(rows, columns) of a rank."""
        return tuple(slice(sum(x[:rank]), sum(x[: rank + 1])) for x in (self.rows, self.cols))

    @property
    def default_labels(self):
        """Row i of a rank and column i of the same rank."""
        return torch.cat([sum(self.cols[:r]) + torch.arange(n) for r, n in enumerate(self.rows)])

    def joined(self, dtype):
        """The batch of one process, labels made explicit."""
        batch = self.problem.build(dtype)
        return dataclasses.replace(batch, options={"labels": self.default_labels, **batch.options})

    def part(self, dtype, rank):
        """A rank's own leaf tensors, and its options."""
        batch, (rows, cols) = self.problem.build(dtype), self.of(rank)
        lhs, rhs = (x.detach()[s].requires_grad_() for x, s in ((batch.lhs, rows), (batch.rhs, cols)))
        options = {name: x[cols if OPTIONAL[name][0] == "cols" else rows] for name, x in batch.options.items()}
        return testing.Batch(lhs, rhs, batch.logit_scale.detach().requires_grad_(), options)


def upstream(cut):
    """Gradients of row, col and positive of the joined problem: those of `testing.value_and_gradients`."""
    g = torch.Generator().manual_seed(0)
    n, m = sum(cut.rows), sum(cut.cols)
    shape = (n, cut.problem.positives) if cut.problem.positives else (n,)
    return [torch.rand(size, generator=g, dtype=torch.float64) for size in ((n,), (m,), shape)]


def weighted_sum(outputs, gradients):
    """Nothing visible (-inf) gets no gradient."""
    return sum((torch.where(v.isinf(), 0.0, v.double()) * g).sum() for v, g in zip(outputs, gradients, strict=True))


def primitive_on_rank(group, cut, dtype, transport, positives="joined"):
    """Two runs of (row, col, positive, dlhs, drhs, dscale)."""
    rank, runs = dist.get_rank(group), []
    rows, cols = cut.of(rank)
    gradients = [g[s] for g, s in zip(upstream(cut), (rows, cols, rows), strict=True)]
    for _ in range(2):
        batch = cut.part(dtype, rank)
        options = {**batch.options, "positives": positives, "process_group": group, "transport": transport}
        outputs = pairwise_logsumexp(*batch.differentiable, **options)
        weighted_sum(outputs, gradients).backward()
        runs.append([*(v.detach() for v in outputs), *(x.grad for x in batch.differentiable)])
    return runs


def loss_on_rank(group, cut, dtype, transport, weights, options):
    """(loss, dlhs, drhs, dscale)."""
    rank = dist.get_rank(group)
    batch = cut.part(dtype, rank)
    weights = None if weights is None else weights[cut.of(rank)[0]]
    loss = gcl_loss(
        *batch.differentiable, weights=weights, **batch.options, **options, process_group=group, transport=transport
    )
    loss.sum().backward()
    return [loss.detach(), *(x.grad for x in batch.differentiable)]


def fields(rows, cols, seed):
    """({name: (N, D)}, {name: (M, D)}) and masks with gaps, of the joined problem."""
    g = torch.Generator().manual_seed(seed)
    n, m, d = sum(rows), sum(cols), 5
    lhs = {k: torch.randn(n, d, generator=g, dtype=torch.float64) for k in ("query", "tags")}
    rhs = {k: torch.randn(m, d, generator=g, dtype=torch.float64) for k in ("title", "image")}
    masks = [torch.rand(k, 2, generator=g) > 0.3 for k in (n, m)]
    scores = torch.randint(1, 101, (n,), generator=g).double()
    return lhs, rhs, masks, scores


def field_loss_on_rank(group, rows, cols, seed, options):
    """(loss, gradient of each field)."""
    rank = dist.get_rank(group)
    r, c = (slice(sum(x[:rank]), sum(x[: rank + 1])) for x in (rows, cols))
    lhs, rhs, masks, scores = fields(rows, cols, seed)
    lhs = {k: x[r].clone().requires_grad_() for k, x in lhs.items()}
    rhs = {k: x[c].clone().requires_grad_() for k, x in rhs.items()}
    module = GCLLoss(**options, process_group=group, transport="ring")
    loss = module(lhs, rhs, scores[r], 3.0, lhs_field_mask=masks[0][r], rhs_field_mask=masks[1][c])
    loss.backward()
    return [loss.detach(), *(x.grad for x in (*lhs.values(), *rhs.values()))]
