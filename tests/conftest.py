import os
import pickle
from pathlib import Path

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
        torch.multiprocessing.spawn(_rank, (function, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
        return [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(2)]

    return run


def _rank(rank, function, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        result = function(rank)
    finally:
        torch.distributed.destroy_process_group()
    expect_no_gloo_threads()
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))


def expect_no_gloo_threads():
    """A group that something still refers to keeps its threads, and may abort the process at its end."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in names if "gloo" in name]
