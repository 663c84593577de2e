"""Microbenchmarks of the Triton backend on a GPU: tile kernels, workspace budgets, field aggregation. Skipped without one.

Each round waits for the GPU: what is timed is the kernel, with its launch.
"""

import pytest
import torch

from bench import passes
from bench.cases import Case, build
from gcl_kernels import aggregate_fields, gcl_loss

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA or HIP device; an interpreter's times mean nothing", allow_module_level=True)

N = 16_384


@pytest.fixture(params=[256, 512, 768, 1024], ids=lambda d: f"D={d}")
def problem(request):
    x = build(Case("cuda", "bf16", N, N, request.param, logit_scale=100 / 7))
    return x.lhs.detach(), x.rhs[0].detach(), x.logit_scale.detach()


def waited(function):
    def run():
        result = function()
        torch.cuda.synchronize()
        return result

    return run


def test_forward_tiles(benchmark, problem):
    benchmark(waited(lambda: passes.forward("triton", problem)))


def test_backward_tiles(benchmark, problem):
    """The tile kernel without its products: no gradient is asked for but G is made."""
    statistics = passes.forward("triton", problem)
    benchmark(waited(lambda: passes.backward_tiles("triton", problem, statistics)))


@pytest.mark.parametrize("mib", [64, 256, 1024])
def test_workspace_budget(benchmark, problem, mib, monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", str(mib))
    leaves = [x.clone().requires_grad_() for x in problem]
    benchmark(waited(lambda: torch.autograd.grad(gcl_loss(*leaves), leaves)))


@pytest.mark.parametrize("fields", [1, 2, 4, 8])
def test_aggregation(benchmark, fields):
    x = [torch.randn(N, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(fields)]
    upstream = torch.randn_like(x[0])
    benchmark(waited(lambda: torch.autograd.grad(aggregate_fields(x), x, upstream)))
