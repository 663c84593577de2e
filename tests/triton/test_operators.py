"""The custom operators with the Triton backend: what torch.library checks, and torch.compile over encoder and loss."""

import pytest
import torch

from gcl_kernels import MemoryBank, gcl_loss, nt_xent_loss, ops, supcon_loss
from gcl_kernels.backends import Need, Want
from gcl_kernels.pairs import Pairs

from .conftest import DEVICE, INTERPRETED

# what a tile computes past the end, from repeated rows and padding, is dropped
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_the_operator_passes_opcheck():
    lhs, rhs = (torch.randn(n, 16, device=DEVICE, requires_grad=True) for n in (5, 7))
    pairs = Pairs.of(lhs, rhs, torch.tensor(2.0, device=DEVICE))
    call = ops.Call(Want(True, True), Need(True, True, False), "triton")
    torch.library.opcheck(ops._forward, ops.arguments(pairs, None, call))


@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs"])
def test_compiles_to_one_graph(directions):
    encoder = torch.nn.Linear(6, 16, device=DEVICE)

    def loss(x, y, scale):
        return gcl_loss(encoder(x), encoder(y), scale, directions=directions, label_smoothing=0.1, backend="triton")

    x, y = torch.randn(9, 6, device=DEVICE), torch.randn(9, 6, device=DEVICE)
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    expected = torch.autograd.grad(loss(x, y, scale), [scale, *encoder.parameters()])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C++ compiler
    actual = torch.autograd.grad(compiled(x, y, scale), [scale, *encoder.parameters()])
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


def views_and_bank(x, y, scale, bank, backend):
    """Losses in which rows do not see themselves, and a bank that is not full."""
    classes = torch.arange(len(x), device=DEVICE) % 4 - 1
    losses = (
        nt_xent_loss(x, y, scale, backend=backend),
        supcon_loss(x, classes, scale, backend=backend),
        bank.logsumexp(x, scale, lhs_ids=classes, backend=backend).mean(),
    )
    return torch.stack([loss.double() for loss in losses]).sum()


def test_views_and_bank_are_those_of_the_torch_backend():
    x, y, rows = (torch.nn.functional.normalize(torch.randn(n, 16, device=DEVICE), dim=1) for n in (9, 9, 5))
    bank = MemoryBank(8, 16, device=DEVICE)
    bank.push(rows, ids=torch.arange(5, device=DEVICE) % 2)
    inputs = [v.requires_grad_() for v in (x, y, torch.tensor(9.0, device=DEVICE))]
    expected, actual = (
        [loss.detach(), *torch.autograd.grad(loss, inputs)]
        for loss in (views_and_bank(*inputs, bank, backend) for backend in ("torch", "triton"))
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


def gradients_on_rank(group):
    """Of one rank's half of a bfloat16 batch, by each transport, and of all of it by one process."""
    rank = torch.distributed.get_rank(group)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, 8, generator=g).bfloat16() for _ in range(2))
    own = slice(8 * rank, 8 * rank + 8)
    got = []
    for rows, transport in ((own, "all_gather"), (own, "ring"), (slice(None), None)):
        inputs = [v[rows].clone().requires_grad_() for v in (x, y)]
        options = {} if transport is None else {"process_group": group, "transport": transport}
        gcl_loss(*inputs, 2.0, backend="triton", **options).backward()
        got.append([v.grad if transport else 2 * v.grad[own] for v in inputs])
    return got


@pytest.mark.skipif(not INTERPRETED, reason="gloo moves CPU tensors")
def test_over_a_process_group(pool):
    """Parts of a gradient are added up in float32: some last digits differ, which float32 adds up in another order."""
    for *transports, one_process in pool.run(2, gradients_on_rank):
        for gradients in transports:
            for actual, expected in zip(gradients, one_process, strict=True):
                assert (actual != expected).sum() <= 2  # of 64
                torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA or HIP device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("directions", ["both", "lhs_to_rhs"])
def test_no_host_synchronisation(directions):
    inputs = inputs_on_gpu()
    gcl_loss(*inputs, directions=directions).backward()  # compiles, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gcl_loss(*inputs, directions=directions).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
def test_forward_and_backward_replay_from_a_cuda_graph():
    inputs = inputs_on_gpu()

    def gradients():
        return torch.autograd.grad(gcl_loss(*inputs), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    with torch.no_grad():
        for x, fresh in zip(inputs[:2], inputs_on_gpu(seed=1), strict=False):
            x.copy_(fresh)
    graph.replay()
    for actual, expected in zip(captured, gradients(), strict=True):
        assert torch.equal(actual, expected)


def inputs_on_gpu(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(300, 64, generator=g)) for _ in range(2))
    scale = torch.tensor(10.0, device=DEVICE, requires_grad=True)
    return *(v.to(DEVICE, torch.bfloat16).requires_grad_() for v in (x, y)), scale
