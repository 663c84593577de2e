import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # small shapes: threads only wait for each other

# `make test` draws the same cases every time; `make properties` draws new ones, many more.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("test", max_examples=60, derandomize=True, **common)
settings.register_profile("properties", max_examples=2000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


@pytest.fixture
def two_ranks(tmp_path):
    """Runs ``function(rank)`` in two gloo processes; returns their results."""

    def run(function):
        path = tmp_path / "rendezvous"
        context = torch.multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        ranks = [context.Process(target=_rank, args=(function, rank, str(path), results)) for rank in range(2)]
        for process in ranks:
            process.start()
        got = dict(results.get() for _ in ranks)
        for process in ranks:
            process.join()
            assert process.exitcode == 0
        return [got[rank] for rank in range(2)]

    return run


def _rank(function, rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        results.put((rank, function(rank)))
    finally:
        torch.distributed.destroy_process_group()
