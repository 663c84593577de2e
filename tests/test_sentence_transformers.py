"""`gcl_loss` and the recipes beside the losses of sentence-transformers that people know them from: value and gradients."""

import pytest
import torch
from torch.nn import functional as F

from gcl_kernels import gcl_loss, pairwise_logsumexp
from tests.test_recipes import MINED, N, X, Y, recipe  # noqa: F401 (a fixture)
from tests.test_views import assert_same, peer

SCALE = 9.0
LENGTHS = torch.linspace(0.5, 3.0, N, dtype=torch.float64)[:, None]
RAW = tuple((LENGTHS * v.detach()).requires_grad_() for v in (X, Y))  # theirs normalises
NEGATIVES = tuple((LENGTHS * MINED[:, k].detach()).requires_grad_() for k in range(2))
MULTIPLE, SYMMETRIC = "MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"


def assert_theirs(ours, inputs, name=MULTIPLE, **options):
    """`ours` of the normalised embeddings is the named loss of the embeddings."""
    theirs = peer("sentence_transformers.sentence_transformer.losses", name)(
        torch.nn.Identity(), scale=SCALE, **options
    )
    assert_same(
        lambda: ours(*(F.normalize(v, dim=1) for v in inputs)),
        lambda: theirs.compute_loss_from_embeddings(list(inputs), None),
        inputs,
    )


def test_one_direction():
    assert_theirs(lambda x, y: gcl_loss(x, y, SCALE, directions="lhs_to_rhs"), RAW)


def test_mined_documents_that_all_queries_see():
    def ours(x, y, *mined):
        return gcl_loss(x, torch.cat([y, *mined]), SCALE, directions="lhs_to_rhs")

    assert_theirs(ours, (*RAW, *NEGATIVES))


@pytest.mark.filterwarnings("ignore:The MultipleNegativesSymmetricRankingLoss is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [(SYMMETRIC, {}), (MULTIPLE, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"})],
    ids=["symmetric", "per_direction"],
)
def test_both_directions(name, options):
    assert_theirs(lambda x, y: gcl_loss(x, y, SCALE), RAW, name, **options)


def test_query_query_and_document_document_negatives():
    """Theirs has the positive in the denominator twice, once a direction, where the recipe has it once."""

    def ours(x, y):
        out, own = pairwise_logsumexp(x, y, SCALE), torch.arange(N)
        options = {"labels": torch.full_like(own, -1), "lhs_ids": own, "rhs_ids": own, "directions": "lhs_to_rhs"}
        sides = [pairwise_logsumexp(side, side, SCALE, **options).row for side in (x, y)]
        return (torch.stack([out.row, out.col, *sides]).logsumexp(dim=0) - out.positive).mean()

    four = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    assert_theirs(ours, RAW, directions=four)


def test_hardness(recipe):  # noqa: F811
    options = {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0}
    assert_theirs(lambda x, y: recipe["hardness"](x, y, SCALE, 5.0), RAW, **options)
