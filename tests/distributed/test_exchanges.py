"""What travels between ranks, in which order, and what a rank holds of it."""

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import gcl_loss
from gcl_kernels.backends import torch as backend
from gcl_kernels.distributed import agreement, exchange
from gcl_kernels.types import TRANSPORTS
from tests.counting import LargestTensor


class Exchanges:
    """What a rank does in order: sends, waits, products with a block of so many columns; bytes sent; the largest tensor."""

    def __init__(self, patch):
        self.events, self.sent, self.largest = [], 0, LargestTensor()
        for owner, name, note in (
            (agreement, "all_gather_single", lambda got, x, **_: self.send("gather", x.nbytes)),
            (exchange, "all_gather_single", lambda got, x, **_: self.send("gather", x.nbytes)),
            (dist, "all_to_all_single", lambda got, x, *_, **__: self.send("exchange", x.nbytes)),
            (dist, "batch_isend_irecv", lambda ops: self.send("send", ops[0].tensor.nbytes)),
            (exchange.Shift, "wait", lambda _: self.events.append("wait")),
            (backend, "forward", lambda pairs, *_: self.events.append(pairs.m)),
            (backend, "backward", lambda pairs, *_, **__: self.events.append(pairs.m)),
        ):
            patch.setattr(owner, name, self.noted(getattr(owner, name), note))

    def send(self, name, size):
        self.events.append(name)
        self.sent += size

    def noted(self, function, note):
        def run(*args, **kwargs):
            note(*args, **kwargs)
            return function(*args, **kwargs)

        return run


def exchanges_on_rank(group, transport, with_fields):
    """(Events of a forward, of a backward, bytes sent, whether a tensor was as large as all ranks' rhs)."""
    cols, d = 3 + dist.get_rank(group), 400
    g = torch.Generator().manual_seed(0)
    fields = {name: torch.randn(cols, d, generator=g).requires_grad_() for name in ("title", "image")}
    lhs, rhs = torch.randn(3, d, requires_grad=True), fields if with_fields else fields["title"]
    with pytest.MonkeyPatch.context() as patch:
        exchanges = Exchanges(patch)
        with exchanges.largest:
            loss = gcl_loss(lhs, rhs, 1.0, process_group=group, transport=transport)
            forward, exchanges.events = exchanges.events, []
            loss.backward()
    return forward, exchanges.events, exchanges.sent, exchanges.largest.nbytes >= 4 * 12 * d


def test_the_ring_sends_while_it_computes_and_never_holds_rhs(pool):
    """Of 3 ranks with 3, 4 and 5 columns: the next block is on its way before the products with this one."""
    for rank, (forward, backward, _, all_of_rhs) in enumerate(pool.run(3, exchanges_on_rank, "ring", False)):
        own, second, third = (3 + (rank - step) % 3 for step in range(3))
        agreement, statistics = ["gather"], ["exchange"]
        assert forward == [*agreement, "send", own, "wait", "send", second, "wait", third, *statistics]
        assert backward == [
            *["gather", "send", own],  # col; rhs
            *["send", "wait", "send", second],  # drhs leaves; rhs has come and goes on
            *["wait", "send", "wait", third],  # the drhs of the block in hand is waited for after its products only
            *["wait", "send", "wait"],
        ]
        assert not all_of_rhs


def test_all_gather_holds_rhs(pool):
    for forward, backward, _, all_of_rhs in pool.run(3, exchanges_on_rank, "all_gather", False):
        assert forward == ["gather", "gather", 12, "exchange"]
        assert backward == ["gather", 12, "exchange"]
        assert all_of_rhs


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_vector_a_document_travels(pool, transport):
    plain, fields = ([sent for *_, sent, _ in pool.run(3, exchanges_on_rank, transport, f)] for f in (False, True))
    assert fields == plain


def compiled_on_rank(group):
    """Gradients of the encoder and the scale, eager and compiled; the graphs that were compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    rank = dist.get_rank(group)
    torch.manual_seed(0)
    encoder, scale = torch.nn.Linear(6, 4, dtype=torch.float64), torch.tensor(2.0, requires_grad=True)
    x, y, ids = *torch.randn(2, 3 + rank, 6, dtype=torch.float64).unbind(), torch.arange(3 + rank) % 2

    def loss():
        images, texts = encoder(x), encoder(y)
        return gcl_loss(images, texts, scale, lhs_ids=ids, rhs_ids=ids, process_group=group, transport="ring")

    counter = CompileCounterWithBackend("aot_eager")  # needs no C++ compiler
    runs = [
        torch.autograd.grad(f(), [scale, *encoder.parameters()]) for f in (loss, torch.compile(loss, backend=counter))
    ]
    torch.compiler.reset()
    return *runs, counter.frame_count


def test_the_exchanges_and_what_surrounds_them_are_one_graph(pool):
    for eager, compiled, graphs in pool.run(2, compiled_on_rank):
        assert graphs == 1
        torch.testing.assert_close(compiled, eager)
