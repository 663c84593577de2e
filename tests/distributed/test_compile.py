"""torch.compile over a process group: one graph, the values and gradients of eager code."""

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import ClipLoss, GCLLoss, SigLipLoss, gcl_loss, sigmoid_loss, supcon_loss
from tests.distributed.pool import error_of

D = 5
LOSSES = {
    "ring": lambda x, y, scale, group: gcl_loss(x, y, scale, process_group=group, transport="ring"),
    "all_gather": lambda x, y, scale, group: gcl_loss(x, y, scale, process_group=group),
    "weights": lambda x, y, scale, group: GCLLoss(normalize="mean", process_group=group)(
        x, y, 1 + y.detach()[:, 0].abs(), scale
    ),
    "margin, default labels": lambda x, y, scale, group: gcl_loss(
        x, y, scale, false_negative_margin=0.1, process_group=group
    ),
    "smoothing": lambda x, y, scale, group: gcl_loss(
        x, y, scale, label_smoothing=0.1, z_loss=0.01, reduction="sum", process_group=group
    ),
    "one direction, ids": lambda x, y, scale, group: gcl_loss(
        x,
        y,
        scale,
        labels=torch.arange(len(x)),
        lhs_ids=torch.arange(len(x)),
        rhs_ids=torch.arange(len(x)) % 2,
        directions="lhs_to_rhs",
        process_group=group,
    ),
    "sigmoid, ring": lambda x, y, scale, group: sigmoid_loss(
        x, y, scale, -scale, process_group=group, transport="ring"
    ),
    "sigmoid": lambda x, y, scale, group: sigmoid_loss(x, y, scale, -scale, process_group=group),
    "sigmoid of each row": lambda x, y, scale, group: sigmoid_loss(
        x, y, scale, -1.0, reduction="none", process_group=group
    ).sum(),
}
# what needs other ranks' columns by a count that is known only as it runs
BROKEN = {
    "labels of columns": lambda x, y, scale, group: gcl_loss(
        x, y, scale, labels=torch.arange(len(x)), process_group=group
    ),
    "margin": lambda x, y, scale, group: gcl_loss(
        x,
        y,
        scale,
        labels=torch.arange(len(x)),
        false_negative_margin=0.1,
        directions="lhs_to_rhs",
        process_group=group,
    ),
    "SupCon": lambda x, y, scale, group: (
        supcon_loss(x, torch.arange(len(x)) % 2, scale, process_group=group) + 0 * y.sum()
    ),
    "ClipLoss, local_loss": None,  # of MODULES
}
MODULES = {  # over the default group, of 4
    "ClipLoss": ClipLoss(world_size=4),
    "ClipLoss, gather_with_grad": ClipLoss(gather_with_grad=True, world_size=4),
    "SigLipLoss, bidir": SigLipLoss(world_size=4),
    "ClipLoss, local_loss": ClipLoss(True, True, world_size=4),
    "SigLipLoss, gather": SigLipLoss(world_size=4, dist_impl="gather"),
}


def values(loss, rank):
    g = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(3 + rank, D, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    value = loss(x, y, scale)
    return [value.detach(), *torch.autograd.grad(value, (x, y, scale))]


def compiled_on_rank(group, name, fullgraph):
    rank = dist.get_rank(group)
    if name in MODULES:
        module = MODULES[name]
        module.rank = rank
        bias = (-1.0,) if isinstance(module, SigLipLoss) else ()
        loss = lambda x, y, scale: module(x, y, scale, *bias)  # noqa: E731
    else:
        loss = lambda x, y, scale: {**LOSSES, **BROKEN}[name](x, y, scale, group)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")  # needs no C++ compiler
    got = values(compiled, rank), values(loss, rank)
    torch.compiler.reset()
    return got


@pytest.mark.parametrize("name", [*LOSSES, *(name for name in MODULES if name not in BROKEN)])
def test_one_graph_as_eager(pool, name):
    for compiled, eager in pool.run(4 if name in MODULES else 2, compiled_on_rank, name, True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_harmless(pool, name):
    for compiled, eager in pool.run(4 if name in MODULES else 2, compiled_on_rank, name, False):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)


def different_on_rank(group, what):
    """What a rank is told where rank 1 differs, in a graph; the group is fit for the next call."""
    differs = dist.get_rank(group) == 1
    x = torch.ones(4, 3)
    options = {"label_smoothing": 0.1} if differs and what == "option" else {}
    scale = torch.tensor(2.5 if differs and what == "scale" else 2.0)

    def loss():
        return gcl_loss(x, x, scale, process_group=group, **options)

    eager = differs and what == "eager"
    error = error_of(loss if eager else torch.compile(loss, fullgraph=True, backend="aot_eager"))
    torch.compiler.reset()
    gcl_loss(x, x, 2.0, process_group=group)
    return str(error)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("option", "label_smoothing: expected the same on every rank, got 0.0 on rank 0 and 0.1 on rank 1"),
        ("scale", "logit_scale: expected the same on every rank, got 2.0 on rank 0 and 2.5 on rank 1"),
        ("eager", "torch.compile: expected the same on every rank, got a graph on rank 0 and nothing on rank 1"),
    ],
)
def test_ranks_agree_inside_the_graph(pool, what, message):
    for error in pool.run(3, different_on_rank, what):
        assert message in error
