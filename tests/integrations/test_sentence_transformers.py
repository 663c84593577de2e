"""sentence-transformers' ranking losses replaced: equal to theirs in every option, with weights, ids and memory of their own."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from gcl_kernels.integrations.open_clip.importing import import_torchvision

with contextlib.suppress(ModuleNotFoundError):
    import_torchvision()  # beside a CPU-only torch sentence-transformers cannot be imported otherwise
library = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed", exc_type=ImportError
)

from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score  # noqa: E402

from gcl_kernels.integrations.sentence_transformers import CachedGCLLoss, GCLLoss  # noqa: E402

DIRECTIONS = [
    ("query_to_doc", *more)
    for k in range(4)
    for more in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), k)
]
OPTIONS = [
    {"directions": directions, "partition_mode": mode, "hardness_mode": hardness, "hardness_strength": 3.0 if hardness else 0.0}
    for directions, mode in [*((d, "joint") for d in DIRECTIONS), *((d, "per_direction") for d in DIRECTIONS[:4:2])]
    for hardness in (None, "in_batch_negatives", "hard_negatives", "all_negatives")
]  # fmt: skip
N, D = 7, 5


class Nothing(torch.nn.Module):
    """A model that embeds nothing: losses of embeddings need none."""

    def __getitem__(self, k):
        return self


def embeddings(columns, n=N, d=D, dtype=torch.float64):
    g = torch.Generator().manual_seed(columns)
    return [torch.randn(n, d, generator=g, dtype=dtype, requires_grad=True) for _ in range(columns)]


def value_and_gradients(loss, columns, labels=None):
    value = loss.compute_loss_from_embeddings(columns, labels)
    return [value.detach(), *torch.autograd.grad(value, columns)]


def assert_close(ours, other, **options):
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, **options)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("similarity", [cos_sim, dot_score])
def test_every_option_set_is_theirs(negatives, similarity):
    for options in OPTIONS:
        columns = embeddings(2 + negatives)
        scale = 20.0 if similarity is cos_sim else 0.7
        results = [
            value_and_gradients(kind(Nothing(), scale, similarity, **options), columns)
            for kind in (GCLLoss, theirs.MultipleNegativesRankingLoss)
        ]
        assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("negatives", [0, 3])
def test_every_cached_option_set_is_theirs(negatives):
    for options in OPTIONS:
        results = []
        for kind in (CachedGCLLoss, theirs.CachedMultipleNegativesRankingLoss):
            reps = [[x.detach().requires_grad_() for x in column.split(3)] for column in embeddings(2 + negatives)]
            value = kind(Nothing(), mini_batch_size=3, **options).calculate_loss(reps, with_backward=True)
            assert not value.requires_grad
            results.append([value, *(x.grad for column in reps for x in column)])
        assert_close(*results, rtol=1e-10, atol=1e-12)


def test_option_sets_are_all_that_they_take():
    assert len(OPTIONS) == 40
