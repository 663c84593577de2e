"""sentence-transformers' ranking losses replaced: equal to theirs in every option, with weights, ids and memory of their own."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from gcl_kernels.integrations.importing import import_torchvision
from tests.counting import LargestTensor

with contextlib.suppress(ModuleNotFoundError):
    import_torchvision()  # beside a CPU-only torch sentence-transformers cannot be imported otherwise
library = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed", exc_type=ImportError
)

from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402, F401
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim  # noqa: E402

from gcl_kernels.integrations.sentence_transformers import CachedGCLLoss, GCLLoss  # noqa: E402
from gcl_kernels.integrations.sentence_transformers import losses as integration  # noqa: E402

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


def test_option_sets_are_all_that_theirs_takes():
    taken = 0
    hardness = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
    for directions, mode, hard in itertools.product(DIRECTIONS, ("joint", "per_direction"), hardness):
        with contextlib.suppress(ValueError):
            theirs.MultipleNegativesRankingLoss(Nothing(), 20.0, cos_sim, False, directions, mode, hard, 3.0)
            taken += 1
    assert taken == len(OPTIONS)


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def dense(columns, scale, directions, hidden=None, limit=None, hard=0.0):
    """(N,) log Z - positive, with what `hidden(kind, i, j)` says left out of Z; N x N, in float64."""
    q, *docs = (F.normalize(x.double(), dim=1) for x in columns)
    n, y = len(q), torch.cat(docs)
    positive = (q * docs[0]).sum(1)
    sides = {"query_to_doc": (q, y), "query_to_query": (q, q), "doc_to_query": (docs[0], q), "doc_to_doc": (docs[0], y)}
    terms = []
    for kind in directions:
        x, other = sides[kind]
        similarity = x @ other.T
        s = scale * similarity
        mask = torch.zeros_like(s, dtype=torch.bool)
        for i, j in itertools.product(range(n), range(len(other))):
            same_row, is_positive = j % n == i, kind.endswith("query") or j < n
            if kind in ("query_to_query", "doc_to_doc"):
                mask[i, j] |= same_row
            elif same_row and is_positive:
                continue
            elif hard:
                s[i, j] = s[i, j] + hard * similarity[i, j].detach() * (kind == "query_to_doc")
            if hidden is not None:
                mask[i, j] |= hidden(kind, i, j)
            if limit is not None:
                mask[i, j] |= bool(similarity[i, j] > limit(positive)[i])
                if kind in ("query_to_doc", "doc_to_query") and is_positive:
                    mask[i, j] |= bool(similarity[i, j] > limit(positive)[j % n])
        terms.append(s.masked_fill(mask, -torch.inf).logsumexp(dim=1))
    return torch.stack(terms), positive * scale


CASES = [
    {},
    SYMMETRIC,
    {"directions": ALL},
    {"directions": ALL, "hardness_mode": "all_negatives", "hardness_strength": 3.0},
    {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
]


def expected(columns, options, scale=20.0, weights=None, **rules):
    hard = options.get("hardness_strength", 0.0)
    terms, positive = dense(columns, scale, options.get("directions", ALL[:1]), hard=hard, **rules)
    z = terms.mean(0) if "partition_mode" in options else terms.logsumexp(0)
    return ((z - positive) * (1.0 if weights is None else weights)).mean()


@pytest.mark.parametrize("rule", [{"false_negative_margin": 0.1}, {"false_negative_ratio": 0.8}])
@pytest.mark.parametrize("options", CASES)
def test_false_negatives_are_those_above_the_positive(options, rule):
    columns = embeddings(3)
    columns[1] = (columns[0] + 0.9 * columns[1]).detach().requires_grad_()  # most positives are similar, and not all

    def limit(positive):
        return positive + 0.1 if "false_negative_margin" in rule else 0.8 * positive

    exact = expected(columns, options, limit=limit)
    ours = value_and_gradients(GCLLoss(Nothing(), **options, **rule), columns)
    assert_close(ours, [exact.detach(), *torch.autograd.grad(exact, columns)])
    assert abs(value_and_gradients(GCLLoss(Nothing(), **options), columns)[0] - exact) > 1e-3


@pytest.mark.parametrize("options", CASES)
def test_scores_weigh_rows(options):
    columns = embeddings(3)
    scores = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.75, 0.1, 0.9], dtype=torch.float64)
    for name, normalize in (("linear", None), ("log", "mean")):
        loss = GCLLoss(Nothing(), **options, score_to_weight=name, score_range=(0, 1), normalize=normalize)
        weights = 1 + 99 * scores if name == "linear" else (2 + 99 * scores).log()
        weights = weights if normalize is None else weights / weights.mean()
        exact = expected(columns, options, weights=weights)
        assert_close(value_and_gradients(loss, columns, scores), [exact, *torch.autograd.grad(exact, columns)])


def test_labels_that_are_no_scores_are_refused_by_name():
    loss = GCLLoss(Nothing(), score_to_weight="log")
    for labels in (None, torch.ones(N, 2), torch.ones(N - 1)):
        with pytest.raises(ValueError, match=r"labels: expected \(7,\) scores .* a column of the data set named label"):
            loss.compute_loss_from_embeddings(embeddings(2), labels)
    with pytest.raises(ValueError, match=r"scores: expected numbers in \[1, 100\] .*score_range"):
        loss.compute_loss_from_embeddings(embeddings(2), torch.full((N,), 0.5))


@pytest.mark.parametrize("options", CASES)
def test_a_learned_temperature_has_the_gradient_of_the_formula(options):
    columns = embeddings(3)
    loss = GCLLoss(Nothing(), **options, learnable_temperature=True).double()
    value = loss.compute_loss_from_embeddings(columns)
    log_scale = loss.log_scale.detach().requires_grad_()
    exact = expected(columns, options, scale=log_scale.exp())
    inputs = [*columns, loss.log_scale], [*columns, log_scale]
    assert_close(torch.autograd.grad(value, inputs[0]), torch.autograd.grad(exact, inputs[1]))
    assert loss.temperature == pytest.approx(1 / 20)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    assert loss.temperature == pytest.approx(1 / 100)


@pytest.mark.parametrize(
    "options",
    [o for o in CASES if "hardness_mode" not in o]
    + [
        {"hardness_mode": m, "hardness_strength": 2.0}
        for m in ("in_batch_negatives", "hard_negatives", "all_negatives")
    ],
)
def test_no_matrix_of_all_pairs(options):
    n = 1500
    columns = embeddings(3, n, 8, torch.float32)
    loss = GCLLoss(Nothing(), **options, false_negative_margin=0.1)
    with LargestTensor() as largest:
        loss.compute_loss_from_embeddings(columns).backward()
    assert largest.numel < n * n
    with LargestTensor() as largest:
        theirs.MultipleNegativesRankingLoss(Nothing(), **options).compute_loss_from_embeddings(columns, None)
    assert largest.numel >= n * n


@pytest.mark.parametrize("options", CASES)
def test_bfloat16_is_near_the_exact_value(options):
    columns = embeddings(3, 64, 32)
    exact = GCLLoss(Nothing(), **options).compute_loss_from_embeddings(columns)
    rounded = [x.detach().bfloat16().requires_grad_() for x in columns]
    ours = GCLLoss(Nothing(), **options).compute_loss_from_embeddings(rounded)
    other = theirs.MultipleNegativesRankingLoss(Nothing(), **options).compute_loss_from_embeddings(rounded, None)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= abs(other.float() - exact) + 0.02
    ours.backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in rounded)


def test_the_signature_is_theirs_and_options_of_our_own_follow_by_name():
    pairs = (GCLLoss, theirs.MultipleNegativesRankingLoss), (CachedGCLLoss, theirs.CachedMultipleNegativesRankingLoss)
    for ours, other in pairs:
        parameters = inspect.signature(ours).parameters.values()
        positional = [p.replace(annotation=p.empty) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == [p.replace(annotation=p.empty) for p in inspect.signature(other).parameters.values()]
        assert isinstance(ours(Nothing()), other)


def test_the_model_card_shows_options_and_both_papers():
    loss = GCLLoss(Nothing(), score_to_weight="linear", score_range=(0, 1), hide_duplicates=True, **SYMMETRIC)
    other = theirs.MultipleNegativesRankingLoss(Nothing(), **SYMMETRIC)
    added = {"score_to_weight": "linear", "s_max": 100.0, "score_range": (0.0, 1.0), "hide_duplicates": True}
    assert loss.get_config_dict() == other.get_config_dict() | added
    assert loss.citation.endswith(other.citation)
    assert "2404.08535" in loss.citation
    cached = CachedGCLLoss(Nothing(), false_negative_margin=0.1)
    plain = theirs.CachedMultipleNegativesRankingLoss(Nothing())
    assert cached.get_config_dict() == plain.get_config_dict() | {"false_negative_margin": 0.1}
    assert "2101.06983" in cached.citation
    assert "2404.08535" in cached.citation
    assert GCLLoss(Nothing()).get_config_dict() == theirs.MultipleNegativesRankingLoss(Nothing()).get_config_dict()


def test_pickled_it_is_the_same_loss():
    loss = GCLLoss(Nothing(), score_to_weight="log", learnable_temperature=True)
    again = pickle.loads(pickle.dumps(loss))
    assert again.get_config_dict() == loss.get_config_dict()
    assert again.temperature == loss.temperature


def test_what_it_cannot_compute_is_refused():
    with pytest.raises(ValueError, match=r"similarity_fct: expected util.cos_sim or util.dot_score"):
        GCLLoss(Nothing(), similarity_fct=euclidean_sim)
    with pytest.raises(ValueError, match=r"hide_duplicates: expected a call of forward"):
        GCLLoss(Nothing(), hide_duplicates=True).compute_loss_from_embeddings(embeddings(2))
    with pytest.raises(ValueError, match=r"embeddings: expected those of two columns or more, got 1"):
        GCLLoss(Nothing()).compute_loss_from_embeddings(embeddings(1))
    with pytest.raises(ValueError, match=r"false_negative_margin: expected"):
        CachedGCLLoss(Nothing(), false_negative_margin=-1.0)


def test_a_class_with_arguments_that_nobody_knows_is_refused(monkeypatch):
    class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
        def __init__(self, model, scale=20.0, temperature_schedule=None):
            raise NotImplementedError

    monkeypatch.setattr(integration, "MultipleNegativesRankingLoss", MultipleNegativesRankingLoss)
    with pytest.raises(
        RuntimeError, match=r"sentence_transformers [\d.]+: .* one with \['temperature_schedule'\] more"
    ):
        GCLLoss(Nothing())


def test_without_the_library_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "import gcl_kernels.integrations.sentence_transformers as integration\n"
        "try: integration.GCLLoss\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("sentence_transformers: expected the package sentence-transformers >= 6.0, got none: pip")
