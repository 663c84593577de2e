"""The bytes, messages and products of the model of `bench.distributed` against the collectives that are called."""

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tqdm", reason="tqdm, of the benchmarks, is not installed")

from bench import distributed as bench
from bench import distributed_model as model
from gcl_kernels import gcl_loss, sigmoid_loss

N, D = 24, 5


def sent_on_rank(group, method):
    world = dist.get_world_size(group)
    x, y = (torch.randn(N // world, D).requires_grad_() for _ in range(2))
    options = {"process_group": group, "transport": method.split(", ")[1]}
    with bench.Products() as products, bench.counted_sends(group) as calls:
        if "sigmoid" in method:
            sigmoid_loss(x, y, 2.0, -1.0, **options).backward()
        else:
            gcl_loss(x, y, 2.0, **options).backward()
    return [*(sum(call[what] for call in calls.values()) for what in ("bytes", "messages")), products.flops]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("method", [model.GATHER, model.RING, model.SIGMOID_GATHER, model.SIGMOID_RING])
def test_the_model_counts_what_is_sent_and_multiplied(pool, world, method):
    steps = model.passes(method, world, N, D, size=4)
    expected = [sum(model.sent(step, world) for step in steps), sum(step.messages for step in steps)]
    flops = sum(step.flops for step in steps)
    for *sent, products in pool.run(world, sent_on_rank, method):
        assert sent == expected
        assert products == pytest.approx(flops, rel=1e-2)  # and a few of O(world)


def test_only_the_last_gradients_of_a_ring_are_waited_for():
    rates = model.Rates(flops=1.0, bandwidth=1.0, link="none")
    compute_bound = model.Pass(flops=400.0, rows=1.0, gradients=2.0)
    assert model.seconds(compute_bound, 4, rates) == 400 + 2
    send_bound = model.Pass(flops=4.0, rows=10.0, gradients=20.0)
    assert model.seconds(send_bound, 4, rates) == 10 + 2 * 30 + 20 + 20
    assert model.seconds(compute_bound, 1, rates) == 400
