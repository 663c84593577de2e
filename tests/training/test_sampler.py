"""Batches: every row once an epoch, the same from anywhere, no duplicates where none are wanted."""

from __future__ import annotations

from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gcl_kernels.training.errors import InputError
from gcl_kernels.training.sampler import WINDOW, Sampler


def drawn(sampler, count):
    return [next(sampler).tolist() for _ in range(count)]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(0, 20))
def test_a_sampler_goes_on_from_where_another_was(rows, batch_size, seed, before):
    rows = torch.arange(rows) * 3
    batch_size = min(batch_size, len(rows))
    first, second = (Sampler(rows, batch_size, seed=seed) for _ in range(2))
    drawn(first, before)
    second.seek(first.epoch, first.batch)
    assert drawn(second, 8) == drawn(first, 8)


def test_an_epoch_has_every_row_once_and_epochs_and_seeds_differ():
    epochs = {
        seed: [[*chain(*drawn(sampler, 3))] for _ in range(2)]
        for seed in (0, 1)
        for sampler in [Sampler(torch.arange(10, 22), 4, seed=seed)]
    }
    assert all(sorted(epoch) == list(range(10, 22)) for of_seed in epochs.values() for epoch in of_seed)
    assert len({tuple(epoch) for of_seed in epochs.values() for epoch in of_seed}) == 4


def test_the_end_of_an_epoch_is_seen_and_the_rows_left_over_wait():
    sampler = Sampler(torch.arange(5), 2)
    ends = []
    for _ in range(4):
        next(sampler)
        ends.append((sampler.epoch, sampler.batch, sampler.epoch_ended))
    assert ends == [(0, 1, False), (0, 2, True), (1, 1, False), (1, 2, True)]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=60),
    st.integers(2, 8),
    st.integers(0, 9),
)
def test_without_duplicates_no_id_comes_twice_in_a_batch_and_no_row_is_drawn_twice(pairs, batch_size, seed):
    ids = torch.tensor(pairs)
    try:
        sampler = Sampler(torch.arange(len(ids)), batch_size, seed=seed, ids=ids)
    except InputError:
        assert all(a[0] == b[0] or a[1] == b[1] for a in pairs for b in pairs)
        return
    batches = drawn(sampler, sampler.batches_per_epoch)
    for batch in batches:
        assert 2 <= len(batch) <= batch_size
        for column in ids[batch].T:
            assert len(column.unique()) == len(batch)
    rows = [*chain(*batches)]
    assert len(set(rows)) == len(rows)
    # A row is left out only where it fits no other that is left out.
    left = [pairs[row] for row in set(range(len(pairs))) - set(rows)]
    assert not any(a[0] != b[0] and a[1] != b[1] for a in left for b in left) or len(left) > WINDOW * batch_size


def test_without_duplicates_fills_batches_where_it_can():
    ids = torch.stack([torch.arange(64) // 2, torch.arange(64)], dim=1)
    sampler = Sampler(torch.arange(64), 8, ids=ids)
    assert [len(batch) for batch in drawn(sampler, sampler.batches_per_epoch)] == [8] * 8


def test_nothing_to_tell_apart_is_refused():
    with pytest.raises(InputError, match="expected rows of different queries and documents, got no two"):
        Sampler(torch.arange(3), 2, ids=torch.tensor([[1, 1], [1, 2], [1, 3]]))
