"""Microbenchmarks of the PyTorch backend: `pytest bench/ --benchmark-save NAME`, then `--benchmark-compare`.

Tile shapes, workspace budgets, field aggregation. Times of two runs compare only on the same machine in the same state.
"""

import pytest
import torch

from bench import passes
from bench.cases import Case, build
from gcl_kernels import aggregate_fields, backends, gcl_loss

N, D = 2048, 512


@pytest.fixture
def problem():
    x = build(Case("cpu", "fp32", N, N, D, logit_scale=100 / 7))
    return x.lhs.detach(), x.rhs[0].detach(), x.logit_scale.detach()


@pytest.mark.parametrize(
    "tile", [(256, 256), (512, 512), (1024, 512), (1024, 1024), (2048, 512), (2048, 2048)], ids=str
)
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_tile(benchmark, problem, step, tile):
    with backends.settings(tile=tile):
        if step == "forward":
            benchmark(passes.forward, "torch", problem)
        else:
            benchmark(passes.backward, "torch", problem, passes.forward("torch", problem))


@pytest.mark.parametrize("mib", [8, 16, 32, 256])
def test_workspace_budget(benchmark, problem, mib, monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", str(mib))
    leaves = [x.clone().requires_grad_() for x in problem]
    benchmark(lambda: torch.autograd.grad(gcl_loss(*leaves), leaves))


@pytest.mark.parametrize("fields", [1, 2, 4, 8])
def test_aggregation(benchmark, fields):
    x = [torch.randn(N, D, requires_grad=True) for _ in range(fields)]
    upstream = torch.randn(N, D)
    benchmark(lambda: torch.autograd.grad(aggregate_fields(x), x, upstream))
