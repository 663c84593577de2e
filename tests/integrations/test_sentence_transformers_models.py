"""sentence-transformers' ranking losses replaced, over models of texts and pictures and in its trainer."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from gcl_kernels.integrations.sentence_transformers.text_ids import ids_of
from tests.integrations.test_sentence_transformers import (  # skips where the library is absent
    ALL,
    CASES,
    CachedGCLLoss,
    GCLLoss,
    Nothing,
    assert_close,
    embeddings,
    expected,
    library,
    modules,
    theirs,
    value_and_gradients,
)

WORDS = ["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz", "red", "blue", "shoe", "hat"]


def tokenizer(**tokens):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    of_words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens |= {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=of_words, model_max_length=16, **tokens)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A BERT of two layers with random weights, and a tokenizer of letters."""
    from transformers import BertConfig, BertModel

    folder = str(tmp_path_factory.mktemp("bert"))
    tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)).save_pretrained(folder)
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


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_page_s_example_trains(model, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="datasets is not installed")
    page = (Path(__file__).parents[2] / "docs" / "sentence_transformers.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    trained = copy.deepcopy(model)
    before = [x.detach().clone() for x in trained.parameters()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(library, "SentenceTransformer", lambda name: trained)
    exec(code, {})
    assert any((x != y).any() for x, y in zip(trained.parameters(), before, strict=True))


def test_a_temperature_can_have_a_learning_rate_of_its_own(model, tmp_path):
    """As the page says."""
    options = {"learning_rate": 0.0, "learning_rate_mapping": {"log_scale": 1e-2}}
    *_, trainer = trained(
        copy.deepcopy(model), lambda m: GCLLoss(m, learnable_temperature=True), tmp_path, TEXTS, **options
    )
    assert abs(trainer.loss.temperature - 0.05) > 1e-4
    assert torch.equal(next(trainer.model.parameters()), next(model.parameters()))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_pictures_and_texts_of_a_clip(tmp_path):
    """The second and the last picture are one."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = size | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 27, "bos_token_id": 26}
    vision = size | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(tmp_path)
    cut = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(cut, tokenizer(eos_token="z")).save_pretrained(tmp_path)
    clip = library.SentenceTransformer(modules=[modules.Transformer(str(tmp_path))], device="cpu")
    pictures = [image.new("RGB", (8, 8), color) for color in ("red", "blue", "white", "blue")]
    columns = ["a b z", "c z", "d z", "a z"], pictures
    plain, other, hiding, cached = (
        of_texts(loss, clip, None, columns)
        for loss in (
            GCLLoss(clip),
            theirs.MultipleNegativesRankingLoss(clip),
            GCLLoss(clip, hide_duplicates=True),
            CachedGCLLoss(clip, mini_batch_size=2, hide_duplicates=True),
        )
    )
    assert_close(plain, other, rtol=1e-3, atol=1e-5)
    assert_close(cached, hiding, rtol=1e-3, atol=1e-5)
    assert hiding[0] < plain[0]
