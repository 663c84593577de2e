"""sentence-transformers' ranking losses replaced: equal to theirs in every option, with weights, ids and memory of their own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import math
import pickle
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from gcl_kernels.integrations.open_clip.importing import import_torchvision
from tests.counting import LargestTensor

with contextlib.suppress(ModuleNotFoundError):
    import_torchvision()  # beside a CPU-only torch sentence-transformers cannot be imported otherwise
library = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed", exc_type=ImportError
)

from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim  # noqa: E402

from gcl_kernels.integrations.sentence_transformers import CachedGCLLoss, GCLLoss  # noqa: E402
from gcl_kernels.integrations.sentence_transformers import losses as integration  # noqa: E402
from gcl_kernels.integrations.sentence_transformers.text_ids import ids_of  # noqa: E402

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


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A BERT of two layers with random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("bert"))
    words = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    transformer = modules.Transformer(folder)
    return library.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")


QUERIES = ["a b", "c", "d e f", "a b", "g", "h"]
POSITIVES = ["i j k", "l", "m", "n o", "l", "q"]
NEGATIVES = ["r", "l", "c", "s t", "u", "g"]
COLUMNS = QUERIES, POSITIVES, NEGATIVES


def features(model, columns=COLUMNS):
    return [model.preprocess(column) for column in columns]


def of_texts(loss, model, labels=None, columns=COLUMNS):
    """The loss and the gradients of all parameters, those of the loss itself last."""
    model.zero_grad()
    loss.zero_grad()
    value = loss(features(model, columns), labels)
    value.backward()
    own = [x.grad for name, x in loss.named_parameters() if name.endswith("log_scale")]
    return [value.detach(), *(x.grad.clone() for x in model.parameters() if x.grad is not None), *own]


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


def equal_texts(kind, i, j):
    """The texts themselves, by the rule of `hide_duplicates`."""
    documents, n = POSITIVES + NEGATIVES, len(QUERIES)
    query = QUERIES[j % n] if j < n else None
    if kind == "query_to_doc":
        return documents[j] in (POSITIVES[i], QUERIES[i]) or query == QUERIES[i]
    if kind == "doc_to_doc":
        return documents[j] in (POSITIVES[i], QUERIES[i]) or query == QUERIES[i]
    if kind == "query_to_query":
        return query in (QUERIES[i], POSITIVES[i]) or POSITIVES[j] == POSITIVES[i]
    return query in (QUERIES[i], POSITIVES[i]) or POSITIVES[j] == POSITIVES[i]  # doc_to_query


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


@pytest.mark.parametrize("options", CASES)
def test_duplicates_are_no_negatives(model, options):
    given = [model(x)["sentence_embedding"].detach().double().requires_grad_() for x in features(model)]
    of_documents = torch.cat(given[1:])  # their columns are encoded together
    with mock.patch.object(
        model, "forward", side_effect=[{"sentence_embedding": x} for x in (given[0], of_documents)] * 2
    ):
        value = GCLLoss(model, **options, hide_duplicates=True)(features(model), None)
        other = GCLLoss(model, **options)(features(model), None)
    exact = expected(given, options, hidden=equal_texts)
    assert_close([value, *torch.autograd.grad(value, given)], [exact, *torch.autograd.grad(exact, given)])
    assert abs(other - exact) > 1e-3  # the texts matter


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


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives"])
def test_own_negatives_of_a_hardness_mode_are_hidden_alike(model, mode):
    """Without strength every mode is the same softmax."""
    columns = embeddings(4)
    columns[1] = (columns[0] + 0.9 * columns[1]).detach().requires_grad_()
    rule = {"false_negative_margin": 0.1}
    faint = GCLLoss(Nothing(), hardness_mode=mode, hardness_strength=1e-9, **rule)
    assert_close(value_and_gradients(faint, columns), value_and_gradients(GCLLoss(Nothing(), **rule), columns))
    faint = GCLLoss(model, hardness_mode=mode, hardness_strength=1e-9, hide_duplicates=True)
    plain = GCLLoss(model, hide_duplicates=True)
    assert_close(of_texts(faint, model), of_texts(plain, model), rtol=1e-4, atol=1e-6)


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


MATRYOSHKA = {"matryoshka_dims": [16, 8, 4], "matryoshka_weights": [1.0, 0.5, 2.0]}


@pytest.mark.parametrize("options", [{}, {"directions": ALL}])
@pytest.mark.parametrize("matryoshka", [False, True])
def test_over_a_model_the_losses_are_theirs_and_the_cached_one_is_the_plain_one(model, options, matryoshka):
    """Gradients of the loss times three, as those that a GradScaler multiplies."""
    kinds = [
        (theirs.MultipleNegativesRankingLoss, {}),
        (GCLLoss, {}),
        (theirs.CachedMultipleNegativesRankingLoss, {"mini_batch_size": 4}),
        (CachedGCLLoss, {"mini_batch_size": 4}),
        (GCLLoss, {"learnable_temperature": True, "hide_duplicates": True}),
        (CachedGCLLoss, {"mini_batch_size": 4, "learnable_temperature": True, "hide_duplicates": True}),
    ]
    results = []
    model.eval()  # without dropout
    for kind, more in kinds:
        forward = model.forward
        loss = kind(model, **options, **more)
        loss = theirs.MatryoshkaLoss(model, loss, **MATRYOSHKA) if matryoshka else loss
        scaled = type("Scaled", (torch.nn.Module,), {"forward": lambda self, *given: 3 * self.loss(*given)})()
        scaled.loss = loss
        results.append(of_texts(scaled, model))
        model.__dict__.pop("forward", None)
        assert model.forward == forward
    first, *others = results[:4]
    for other in others:
        assert_close(other, first, rtol=1e-3, atol=2e-5)
    assert len(results[4]) == len(first) + 1
    assert_close(results[5], results[4], rtol=1e-3, atol=2e-5)
    assert results[4][-1].abs() > 1e-2


def test_nothing_is_left_of_a_cached_forward(model):
    loss = CachedGCLLoss(model, hide_duplicates=True, learnable_temperature=True)
    loss(features(model), None).backward()
    assert "calculate_loss" not in vars(loss)
    assert loss.loss._ids is None
    with torch.no_grad():
        assert loss(features(model), None) > 0


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


def test_pickled_it_is_the_same_loss(model):
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
        RuntimeError, match=r"sentence-transformers [\d.]+: .* one with \['temperature_schedule'\] more"
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


def test_texts_are_equal_whatever_their_padding_and_order_matters():
    """Padded on either side, written one after the other with offsets, or with the lengths summed up: the same ids."""
    rows = [[5, 6, 7], [6, 5, 7], [5, 6], [5, 6, 7], [0]]
    right = torch.tensor([[*row, *[0] * (4 - len(row))] for row in rows])
    left = torch.tensor([[*[9] * (4 - len(row)), *row] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (4 - len(row)) for row in rows])
    flat = torch.tensor([token for row in rows for token in row])
    ends = torch.tensor([0, *itertools.accumulate(len(row) for row in rows)])
    given = [
        {"input_ids": right, "attention_mask": mask},
        {"input_ids": left, "attention_mask": mask.flip(1), "token_embeddings": torch.rand(5, 4)},
        {"input_ids": flat, "offsets": ends[:-1]},
        {"input_ids": flat[None], "cu_seq_lens_q": ends.int()},
    ]
    found = ids_of(given)
    for ids in found.docs:
        assert torch.equal(ids, found.queries)
    assert (found.queries >= 0).all()
    assert len(set(found.queries.tolist())) == 4
    assert found.queries[0] == found.queries[3]


def test_ids_of_what_is_no_text():
    pictures = torch.rand(3, 3, 4, 4)
    pictures[2] = pictures[0]
    first, second = ids_of([{"pixel_values": pictures}, {"pixel_values": pictures.flip(0)}]), pictures
    assert first.queries[0] == first.queries[2] == first.docs[0][0] != first.queries[1]
    with pytest.raises(
        ValueError, match=r"hide_duplicates: expected input_ids or one of pixel_values.* in column 1, got"
    ):
        ids_of([{"pixel_values": second}, {"bow": torch.rand(3, 9)}])
    with pytest.raises(ValueError, match=r"expected pixel_values of column 0 to have a row for each of 3 texts, got"):
        ids_of([{"input_ids": torch.ones(3, 2, dtype=torch.long), "pixel_values": torch.rand(8, 5)}])


def trained(model, loss, tmp_path, columns, **more):
    """SentenceTransformerTrainer's losses of a few steps, on a copy of the model."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    options = {"learning_rate": 1e-2, "logging_steps": 1, "num_train_epochs": 2, "seed": 0} | more
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no", **options
    )
    data = datasets.Dataset.from_dict(columns)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss, evaluator=evaluator()
    )
    trainer.train()
    evaluated = trainer.evaluate()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    return losses, evaluated, trainer


def evaluator():
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    names = [str(k) for k in range(4)]
    queries, corpus = dict(zip(names, QUERIES, strict=False)), dict(zip(names, POSITIVES, strict=False))
    cut = {"mrr_at_k": [2], "ndcg_at_k": [2], "accuracy_at_k": [1], "precision_recall_at_k": [1], "map_at_k": [2]}
    return InformationRetrievalEvaluator(queries, corpus, {name: {name} for name in names}, **cut)


TEXTS = {"anchor": QUERIES[:4] * 2, "positive": POSITIVES[:4] * 2, "negative": NEGATIVES[:4] * 2}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_trainer_has_the_same_losses_and_evaluates(model, tmp_path):
    pairs = (
        (GCLLoss, theirs.MultipleNegativesRankingLoss, {}),
        (CachedGCLLoss, theirs.CachedMultipleNegativesRankingLoss, {"gradient_accumulation_steps": 2}),
        (GCLLoss, theirs.MultipleNegativesRankingLoss, {"bf16": True}),
    )
    for ours, other, more in pairs:
        (a, at_end, _), (b, at_their_end, _) = (
            trained(copy.deepcopy(model), kind, tmp_path, TEXTS, **more) for kind in (ours, other)
        )
        tolerance = 3e-2 if more.get("bf16") else 1e-3
        assert len(a) >= 2
        assert a == pytest.approx(b, rel=tolerance)
        assert at_end["eval_loss"] == pytest.approx(at_their_end["eval_loss"], rel=2 * tolerance)
        assert "eval_cosine_ndcg@2" in at_end


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", [GCLLoss, CachedGCLLoss])
def test_the_trainer_passes_scores_and_trains_the_temperature(model, tmp_path, kind):
    def loss(model):
        options = {"score_to_weight": "linear", "score_range": (0, 1), "normalize": "mean"}
        return kind(model, **options, hide_duplicates=True, learnable_temperature=True)

    scores = {"score": [0.1, 0.9, 0.4, 1.0] * 2}
    losses, _, trainer = trained(copy.deepcopy(model), loss, tmp_path, TEXTS | scores)
    assert all(map(math.isfinite, losses))
    assert abs(trainer.loss.temperature - 0.05) > 1e-5
    other, *_ = trained(copy.deepcopy(model), loss, tmp_path, TEXTS | {"score": [0.5] * 8})
    assert losses[0] != pytest.approx(other[0], rel=1e-4)  # scores are looked at
    card = trainer.model.model_card_data
    assert "2404.08535" in str(card.citations)
