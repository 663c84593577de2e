"""The processes that torchrun starts, or the only one.

What one process does for long while the others wait (evaluation, saving, a download) is waited for in the store that the
processes met in, by asking it again and again. A collective would end with an error after the group's timeout.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from gcl_kernels.training.errors import ElsewhereError

T = TypeVar("T")

TIMEOUT: timedelta | None = None
"""Of the group's collectives; None is PyTorch's own, 10 minutes on NCCL and 30 on gloo."""

LONGEST_PAUSE = 0.2  # seconds between two looks at the store
FAREWELL_SECONDS = 10.0
"""How long the first process, in which the store may live, waits for the others to end."""

_FAILED, _LEFT = "failed", "left"


class Processes:
    """This process's rank among `world`, its device, and the group of all, None for one process."""

    def __init__(self, rank: int, world: int, device: torch.device, group: Any = None, store: Any = None) -> None:
        self.rank, self.world, self.device, self.group = rank, world, device, group
        self._store = store
        self._meetings = 0

    @property
    def first(self) -> bool:
        """True in the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. A collective: all ranks come to it at about the same time."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def meet(self) -> None:
        """Wait until every rank is here, however long that takes.

        Raises:
            ElsewhereError: another rank has failed.
        """
        if self.group is None:
            return
        self._meetings += 1
        name = f"meeting {self._meetings}"
        self._store.add(name, 1)
        self._wait(lambda: self._store.add(name, 0) >= self.world)

    def alone(self, work: Callable[[], T]) -> T | None:
        """`work()` in the first process, while the others wait: its result there, None elsewhere."""
        result = work() if self.first else None
        self.meet()
        return result

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work()` in every process, in one of each machine before the others: what it downloads, they find."""
        leads = self.group is None or int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        result = work() if leads else None
        self.meet()
        if not leads:
            result = work()
        return result  # pyright: ignore[reportReturnType]

    def _wait(self, there: Callable[[], bool]) -> None:
        pause = 0.001
        while not there():
            if self._store.check([_FAILED]):
                raise ElsewhereError("another process of the run has failed")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)

    def _speaks_of_failure(self) -> bool:
        """Whether this rank is the first to say that it failed."""
        mine = str(self.rank)
        return bytes(self._store.compare_set(_FAILED, "", mine)).decode() == mine

    def _leave(self) -> None:
        """The store ends with its host, so the others leave before it."""
        self._store.add(_LEFT, 1)
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.first and self._store.add(_LEFT, 0) < self.world and time.monotonic() < deadline:
            time.sleep(0.01)


@contextlib.contextmanager
def start() -> Iterator[Processes]:
    """Join the group that torchrun's environment describes: NCCL on CUDA devices, gloo elsewhere.

    A rank that fails makes the others, where they wait for it, fail with `ElsewhereError`; of several that fail alike,
    one keeps its own error.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world == 1:
        yield Processes(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=PrefixStore("group", store), rank=rank, world_size=world, timeout=TIMEOUT
    )
    group = Processes(rank, world, device, dist.group.WORLD, PrefixStore("gcl_kernels", store))
    try:
        yield group
        group.meet()
    except ValueError as error:
        # Faults of the input; as a rule every rank meets them, and one is enough to say so.
        if isinstance(error, ElsewhereError) or group._speaks_of_failure():
            raise
        raise ElsewhereError(str(error)) from None
    except BaseException:
        group._speaks_of_failure()
        raise
    finally:
        # Where the store is gone, its host is.
        with contextlib.suppress(RuntimeError):
            group._leave()
        dist.destroy_process_group()
