"""Which rows make each batch: a function of (seed, epoch, batch), so that a run can go on from anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gcl_kernels.training.errors import InputError

WINDOW = 16
"""A batch without duplicates looks at this many times its size of rows; what it passes over waits for the next one."""


class Sampler:
    """Batches of `rows` in a new random order every epoch, for ever; `epoch` and `batch` say which comes next.

    Args:
        rows: (R,) int64, the rows to draw from; `batch_size` is at most R.
        least: batches of fewer rows are left out.
        ids: (R, K) int64. Given, no two rows of a batch have an equal id in any column; a batch that finds no further row
            ends short. None: the last rows of an epoch, too few for a batch, wait for another epoch.
    """

    def __init__(
        self, rows: Tensor, batch_size: int, *, seed: int = 0, least: int = 1, ids: Tensor | None = None
    ) -> None:
        self.rows, self.batch_size = rows, batch_size
        self._seed, self._least, self._ids = seed, least, ids
        self.epoch, self.batch = 0, 0
        self._plan = self._batches(0)

    @property
    def batches_per_epoch(self) -> int:
        """Of the present epoch; the same for all epochs unless `ids` were given."""
        return len(self._plan)

    @property
    def epoch_ended(self) -> bool:
        return self.batch == len(self._plan)

    def seek(self, epoch: int, batch: int) -> None:
        """Go to where another sampler with the same arguments was."""
        self.epoch, self.batch = epoch, batch
        self._plan = self._batches(epoch)

    def first(self, count: int | None = None) -> list[Tensor]:
        """The first batches of the present epoch, at most `count`; the sampler stays where it is."""
        return [self.rows[places] for places in self._plan[:count]]

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> Tensor:
        if self.epoch_ended:
            self.seek(self.epoch + 1, 0)
        self.batch += 1
        return self.rows[self._plan[self.batch - 1]]

    def _batches(self, epoch: int) -> list[Tensor]:
        """The places in `rows` of every batch of an epoch."""
        # The generator of a CPU looks at the low 32 bits alone.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**32)
        order = torch.randperm(len(self.rows), generator=generator)
        if self._ids is None:
            whole = len(order) // self.batch_size * self.batch_size
            return list(order[:whole].split(self.batch_size))
        return self._without_duplicates(order.tolist(), self._ids)

    def _without_duplicates(self, order: list[int], ids: Tensor) -> list[Tensor]:
        batches, waiting, start = [], [], 0
        while waiting or start < len(order):
            stop = max(start, start + WINDOW * self.batch_size - len(waiting))
            candidates, start = waiting + order[start:stop], min(stop, len(order))
            taken, waiting = [], []
            seen: set[tuple[int, int]] = set()
            for number, place in enumerate(candidates):
                if len(taken) == self.batch_size:
                    waiting += candidates[number:]
                    break
                keys = set(enumerate(ids[place].tolist()))
                if seen & keys:
                    waiting.append(place)
                else:
                    seen |= keys
                    taken.append(place)
            batches.append(torch.tensor(taken))
        # The last batches are of the few queries that most rows have: a batch of one row has no negative at all.
        enough = [batch for batch in batches if len(batch) >= max(self._least, 2)]
        if not enough:
            raise InputError("--false-negatives avoid: expected rows of different queries and documents, got no two")
        return enough
