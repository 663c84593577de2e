"""A rank that dies or hangs ends all the others with an error within the group's timeout."""

import datetime
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import gcl_loss
from tests.distributed.pool import CONTEXT

TIMEOUT = 4  # seconds


def train(rank, path, fault, transport, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=3, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    torch.manual_seed(rank)
    x, y = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    for step in range(3):
        loss = gcl_loss(x, y, 2.0, process_group=dist.group.WORLD, transport=transport)
        if rank == 1 and step == 2:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        start = time.monotonic()
        try:
            loss.backward()
        except Exception as error:
            results.put((rank, type(error).__name__, str(error), time.monotonic() - start))
            os._exit(0)  # a group with a dead member cannot be taken down in order
    results.put((rank, "finished", "", 0.0))


@pytest.mark.parametrize(("fault", "transport"), [("dies", "all_gather"), ("hangs", "ring")])
def test_the_other_ranks_end_with_an_error(tmp_path, fault, transport):
    results = CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=train, args=(rank, str(tmp_path / "rendezvous"), fault, transport, results))
        for rank in range(3)
    ]
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
