"""A rank that dies or hangs in the midst of an exchange ends all the others with an error within the group's timeout."""

import datetime
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import gcl_loss
from gcl_kernels.distributed import exchange as exchanges
from tests.distributed.pool import CONTEXT

TIMEOUT = 4  # seconds


def fail(fault):
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def train(rank, path, fault, transport, exchange, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=3, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    torch.manual_seed(rank)
    x, y = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    waiting = exchanges.waiting
    for step in range(3):
        if rank == 1 and step == 2:
            exchanges.waiting = lambda what, group: fail(fault) if what == exchange else waiting(what, group)
        start = time.monotonic()
        try:
            gcl_loss(x, y, 2.0, process_group=dist.group.WORLD, transport=transport).backward()
        except Exception as error:
            results.put((rank, type(error).__name__, str(error), time.monotonic() - start))
            os._exit(0)  # a group with a dead member cannot be taken down in order
    results.put((rank, "finished", "", 0.0))


@pytest.mark.parametrize("fault", ["dies", "hangs"])
@pytest.mark.parametrize(
    ("transport", "exchange"),
    [
        ("all_gather", "the all-gather of rhs"),
        ("all_gather", "the exchange of gradients of rhs"),
        ("ring", "the ring of rhs"),
        ("ring", "the ring of gradients of rhs"),
    ],
)
def test_the_other_ranks_end_with_an_error(tmp_path, fault, transport, exchange):
    results = CONTEXT.SimpleQueue()
    arguments = str(tmp_path / "rendezvous"), fault, transport, exchange, results
    processes = [CONTEXT.Process(target=train, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in (processes[0], processes[2]):
        process.join(60)
        assert process.exitcode == 0, "a rank still waits"
    processes[1].kill()
    processes[1].join()
    got = sorted(results.get() for _ in range(2))
    assert [rank for rank, *_ in got] == [0, 2]
    for rank, kind, message, seconds in got:
        assert kind == "RuntimeError", message
        assert f"got no answer on rank {rank} of 3: another rank has died, hangs or has stopped" in message
        assert seconds < 2 * TIMEOUT
