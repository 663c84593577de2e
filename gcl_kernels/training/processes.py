"""The processes that torchrun starts, or the only one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process's rank among `world`, its device, and the group of all, None for one process."""

    rank: int
    world: int
    device: torch.device
    group: Any

    @property
    def first(self) -> bool:
        """True in the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def start() -> Iterator[Processes]:
    """Join the group that torchrun's environment describes: NCCL on CUDA devices, gloo elsewhere."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world == 1:
        yield Processes(0, 1, device, None)
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), world, device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
