"""The inputs of one step after another, made in a thread while the step before runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from gcl_kernels.training.data import PairFile
from gcl_kernels.training.encode import FieldEncoder, Inputs
from gcl_kernels.training.errors import DataError
from gcl_kernels.training.processes import Processes
from gcl_kernels.training.sampler import Sampler


@dataclass(frozen=True)
class Place:
    """Where the sampler is after drawing a batch: the epoch, the number of batches drawn of it, whether it ends there."""

    epoch: int
    number: int
    ends_epoch: bool

    @classmethod
    def of(cls, sampler: Sampler) -> Place:
        return cls(sampler.epoch, sampler.batch, sampler.epoch_ended)

    @property
    def epochs_done(self) -> int:
        return self.epoch + self.ends_epoch


@dataclass(frozen=True)
class Batch:
    """The inputs of one step, on the CPU, and the place after it."""

    rows: Tensor
    left: Inputs
    left_mask: Tensor
    right: Inputs
    right_mask: Tensor
    place: Place


class Feeder:
    """Makes this process's share of every batch; with `distinct` each value of a field is there once."""

    def __init__(
        self, pairs: PairFile, encoder: FieldEncoder, sampler: Sampler, group: Processes, *, distinct: bool
    ) -> None:
        self._pairs, self._encoder, self._sampler, self._group = pairs, encoder, sampler, group
        self._distinct = distinct

    def batches(self, count: int) -> Iterator[Batch]:
        """The next `count` of them, one made ahead."""
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self._next) if count > 0 else None
            # The first takes longest where files lie far away, and the first step waits for all processes.
            if coming:
                coming.result()
            self._group.meet()
            for number in range(count):
                assert coming
                batch = coming.result()
                if number + 1 < count:
                    coming = thread.submit(self._next)
                yield batch

    def _next(self) -> Batch:
        sampler, columns = self._sampler, self._pairs.columns
        rows = next(sampler)[self._group.rank :: self._group.world]
        place = Place.of(sampler)
        while True:
            cells = self._pairs.take(rows.tolist())
            left, left_mask = self._encoder.prepare(cells.left, columns.left, distinct=self._distinct)
            right, right_mask = self._encoder.prepare(cells.right, columns.right, distinct=self._distinct)
            whole = left_mask.any(dim=1) & right_mask.any(dim=1)
            if whole.all():
                return Batch(rows, left, left_mask, right, right_mask, place)
            if not whole.any():
                raise DataError(f"{self._pairs.path}: expected a readable value in some row of a batch, got none")
            # An image was lost, and a row has nothing left. Another row takes its place; ids hide the copies from each other.
            rows = torch.where(whole, rows, rows[whole][0])
