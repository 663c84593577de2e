import contextlib
import os
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


@pytest.fixture(scope="session")
def pool():
    """Ranks of gloo groups that wait for what to do."""
    from tests.distributed.pool import Pool

    pool = Pool()
    yield pool
    pool.close()


def expect_no_gloo_threads():
    """A group that something still refers to keeps its threads, and may abort the process at its end."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            names.append(path.read_text().strip())
    assert not [name for name in names if "gloo" in name]


# The files that take longest. With `--no-loadscope-reorder` workers take them first, so that at the end none waits for one.
LONGEST_FILES = (
    "tests/triton/test_interpreter.py",
    "tests/triton/test_aot.py",
    "tests/bench/test_gpu_session.py",
    "tests/training/test_checkpoint.py",
    "tests/training/test_experiments.py",
    "tests/training/test_train.py",
)


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.nodeid.partition("::")[0]
        return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)

    items.sort(key=place)  # stable: the rest keeps its order
