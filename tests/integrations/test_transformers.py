"""`ContrastiveModel`: the library's own losses, and Trainer around it."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gcl_kernels.integrations.transformers import ComputeLoss, ContrastiveModel
from reference import gcl_loss, sigmoid_loss
from tests.counting import LargestTensor
from tests.integrations.encoders import MODELS, batch, clip, rows, siglip  # first: skips where transformers is absent

from transformers import Trainer, TrainingArguments  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def inputs(n=6):
    given = batch(n)
    return {name: given[name] for name in ("input_ids", "pixel_values")}


def embeddings(model, given):
    found = model(**{name: given[name] for name in ("input_ids", "pixel_values")})
    return found.image_embeds, found.text_embeds


def check_same(ours, theirs, model):
    parameters = list(model.parameters())
    mine, others = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs)
    size = max(1.0, theirs.item())  # of the weights, and so of the gradients
    for a, b in zip(mine, others, strict=True):
        if a is None or b is None:
            assert all(x is None or not x.any() for x in (a, b))
        else:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("name", MODELS)
def test_plain_it_is_the_model_s_own_loss(name):
    model = MODELS[name]()
    given = inputs()
    kind = "sigmoid" if name == "SiglipModel" else "softmax"
    output = ContrastiveModel(model, loss=kind)(**given)
    theirs = model(**given, return_loss=True)
    check_same(output.loss, theirs.loss, model)
    torch.testing.assert_close(output.image_embeds, theirs.image_embeds)
    torch.testing.assert_close(output.text_embeds, theirs.text_embeds)
    assert set(output) == {"loss", "image_embeds", "text_embeds"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_scores_weigh_and_ids_hide(name, kind):
    model = MODELS[name]()
    if kind == "sigmoid" and name != "SiglipModel":
        model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))
    given = batch(6)
    loss = ContrastiveModel(model, loss=kind, score_to_weight="linear")(**given).loss
    scale, options = model.logit_scale.exp(), {"lhs_ids": given["ids"], "rhs_ids": given["ids"]}
    options["weights"] = given["scores"]
    if kind == "softmax":
        expected = gcl_loss(*embeddings(model, given), scale, **options)
    else:
        expected = sigmoid_loss(*embeddings(model, given), scale, model.logit_bias, **options)
    check_same(loss, expected.to(loss), model)
    assert (loss - ContrastiveModel(model, loss=kind)(**inputs()).loss).abs() > 1e-3


def trained(model, folder, data, compute_loss_func=None, **options):
    """The Trainer, with the losses of its steps as `losses`."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "num_train_epochs": 1,
    }
    fixed = {
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(folder, **(defaults | fixed | options))
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_loss_func=compute_loss_func)
    trainer.train()
    trainer.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_trains_as_a_loop_does(accumulated, tmp_path):
    data = [row | {"unknown_column": 1} for row in rows(8)]  # columns are kept or dropped as they should be
    model = ContrastiveModel(clip(), score_to_weight="linear")
    options = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"gradient_accumulation_steps": accumulated, "train_sampling_strategy": "sequential"}
    trainer = trained(model, tmp_path, data, **options)
    alone = clip()
    optimizer = torch.optim.SGD(alone.parameters(), 0.1)
    losses = []
    for step in range(2):
        given = {name: value[4 * step : 4 * step + 4] for name, value in batch(8).items()}
        loss = gcl_loss(
            *embeddings(alone, given), alone.logit_scale.exp(), weights=given["scores"],
            lhs_ids=given["ids"], rhs_ids=given["ids"],
        ).float()  # fmt: skip
        (loss / accumulated).backward()
        losses.append(loss.item())
        if (step + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
    expected = losses if accumulated == 1 else [sum(losses) / 2]
    assert [float(loss) for loss in trainer.losses] == pytest.approx(expected, rel=1e-3)
    for a, b in zip(model.model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_trainer_evaluates_and_predicts(tmp_path):
    model, data = ContrastiveModel(clip(), score_to_weight="log"), rows(8)
    trainer = trained(model, tmp_path, data)
    halves = [{name: value[i : i + 4] for name, value in batch(8).items()} for i in (0, 4)]
    model.eval()
    with torch.no_grad():
        expected = [model(**half) for half in halves]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(e.loss.item() for e in expected) / 2, rel=1e-5)
    text, image = trainer.predict(data).predictions
    torch.testing.assert_close(torch.from_numpy(text), torch.cat([e.text_embeds for e in expected]))
    torch.testing.assert_close(torch.from_numpy(image), torch.cat([e.image_embeds for e in expected]))


def test_checkpoints_resume_and_the_encoder_saves_as_ever(tmp_path):
    data = [{name: row[name] for name in ("input_ids", "pixel_values")} for row in rows(8)]
    through = trained(ContrastiveModel(clip()), tmp_path / "a", data, num_train_epochs=2)
    trained(ContrastiveModel(clip()), tmp_path / "b", data, num_train_epochs=2, save_strategy="steps", save_steps=2)
    model = ContrastiveModel(clip())
    arguments = TrainingArguments(
        tmp_path / "b", per_device_train_batch_size=4, num_train_epochs=2, report_to=[], use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for a, b in zip(model.parameters(), through.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    model.save_pretrained(tmp_path / "encoder")
    loaded = type(model.model).from_pretrained(tmp_path / "encoder")
    assert loaded.state_dict().keys() == clip().state_dict().keys()
    for a, b in zip(loaded.parameters(), model.model.parameters(), strict=True):
        assert torch.equal(a, b)


WEIGHED = {"score_to_weight": "log", "normalize": "mean"}
OF_RANKS = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def on_rank(folder, world):
    """Train, evaluate and predict as one of `world` processes with a share of every batch, and save what came out."""
    share = {"per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 4 // world}
    share |= {"ddp_backend": "gloo"} if world > 1 else {}
    trainer = trained(ContrastiveModel(clip(), **WEIGHED), folder, rows(8), **OF_RANKS, **share)
    found = trainer.losses, trainer.evaluate()["eval_loss"], trainer.predict(rows(8)).predictions
    if trainer.is_world_process_zero():
        torch.save([*found, trainer.accelerator.unwrap_model(trainer.model).state_dict()], folder / "found.pt")
    if world > 1:
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        torch.distributed.barrier()
        os._exit(
            0
        )  # the interpreter's end may wait for ever for threads of a group that DistributedDataParallel still has


def test_two_ranks_train_as_one_process(tmp_path):
    program = f"import pathlib, {__name__} as here; here.on_rank(pathlib.Path({str(tmp_path)!r}), 2)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][-3000:] + said[1][-3000:]
    losses, evaluated, predicted, parameters = torch.load(tmp_path / "found.pt", weights_only=False)
    on_rank(tmp_path, 1)
    expected = torch.load(tmp_path / "found.pt", weights_only=False)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert evaluated == pytest.approx(expected[1], rel=1e-5)
    for ours, theirs in zip(predicted, expected[2], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for name, value in expected[3].items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-4, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    model = ContrastiveModel(clip()).train()
    plain = torch.autograd.grad(model(**inputs()).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    assert model.model.is_gradient_checkpointing
    for a, b in zip(torch.autograd.grad(model(**inputs()).loss, list(model.parameters())), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_reaches_the_encoder():
    model = ContrastiveModel(clip())
    plain = model(**inputs())
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs())
    assert not torch.equal(output.image_embeds.float(), plain.image_embeds)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.05, atol=0.05)


def test_no_matrix_of_all_pairs_is_stored():
    model, n = ContrastiveModel(clip()), 1500
    given = {"input_ids": torch.randint(1, 48, (n, 2)), "pixel_values": torch.randn(n, 3, 8, 8)}
    with LargestTensor() as largest:
        model(**given).loss.backward()
    assert largest.numel < n * n


def test_copies_and_pickles_compute_the_same():
    model = ContrastiveModel(siglip(), loss="sigmoid", score_to_weight="log")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch(4)).loss, model(**batch(4)).loss)


class WithScale(torch.nn.Module):
    """A model whose outputs have what a loss of outputs needs."""

    def __init__(self):
        super().__init__()
        self.clip = clip()

    def forward(self, input_ids, pixel_values):
        image, text = embeddings(self.clip, {"input_ids": input_ids, "pixel_values": pixel_values})
        return {"image_embeds": image, "text_embeds": text, "logit_scale": self.clip.logit_scale.exp()}


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_loss_of_outputs_trains_as_the_model_does(accumulated, tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "per_device_train_batch_size": 3}
    options |= {"gradient_accumulation_steps": accumulated, "train_sampling_strategy": "sequential"}
    data = [{k: row[k] for k in ("input_ids", "pixel_values", "scores")} for row in rows(6)]
    labelled = [{"labels" if k == "scores" else k: v for k, v in row.items()} for row in data]
    whole = trained(ContrastiveModel(clip(), score_to_weight="log"), tmp_path, data, **options)
    compute = ComputeLoss(score_to_weight="log")
    outer = trained(WithScale(), tmp_path, labelled, compute_loss_func=compute, label_names=["labels"], **options)
    assert len(outer.losses) == 2 / accumulated
    assert outer.losses == pytest.approx(whole.losses, rel=1e-5)
    for a, b in zip(outer.model.clip.parameters(), whole.model.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert outer.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=1e-5)


def test_a_loss_of_outputs_at_a_fixed_scale():
    model, given = clip(), batch(6)
    outputs = model(**inputs())
    loss = ComputeLoss(logit_scale=3.0)(outputs, torch.zeros(6))
    torch.testing.assert_close(loss, gcl_loss(*embeddings(model, given), 3.0).float())
    torch.testing.assert_close(ComputeLoss(logit_scale=3.0)(outputs, torch.zeros(6), torch.tensor(12)), loss / 2)


@pytest.mark.parametrize(
    ("options", "labels", "error"),
    [
        ({}, torch.zeros(6), r"outputs: expected a logit_scale .* got CLIPOutput .* ContrastiveModel\(model\)"),
        ({"logit_scale": 3.0}, None, r"labels: expected a column 'labels'.* gradient accumulation, got None"),
    ],
)
def test_a_loss_of_outputs_says_where_it_would_be_wrong(options, labels, error):
    with pytest.raises(ValueError, match=error):
        ComputeLoss(**options)(clip()(**inputs()), labels)


def test_replicas_of_one_process_are_refused():
    with pytest.raises(RuntimeError, match=r"expected one process for each GPU, .* got torch.nn.DataParallel"):
        ContrastiveModel(clip())._replicate_for_data_parallel()


def test_features_in_a_form_that_nobody_knows_are_refused():
    model = clip()
    model.get_text_features = lambda input_ids: {"features": None}
    with pytest.raises(RuntimeError, match=r"transformers [\d.]+: expected get_text_features to give .*, got dict"):
        ContrastiveModel(model)(**inputs())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"loss": "hinge"}, "loss: expected"),
        ({"loss": "sigmoid"}, "loss: expected 'softmax' for CLIPModel, which has no logit_bias"),
        ({"directons": "both"}, "directons: expected an option of loss='softmax'"),
        ({"reduction": "none"}, "reduction: expected one that gives a single loss"),
        ({"lhs_field_weights": [1.0]}, "lhs_field_weights: expected an option"),
        ({"score_to_weight": "logs"}, "score_to_weight"),
        ({"process_group": "all"}, "process_group"),
    ],
)
def test_wrong_options_are_refused_when_it_is_made(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        ContrastiveModel(clip(), **arguments)


def test_a_model_that_is_no_dual_encoder_is_refused():
    with pytest.raises(TypeError, match=r"model: expected a dual encoder .* got CLIPText(Transformer|Model)"):
        ContrastiveModel(clip().text_model)
    with pytest.raises(TypeError, match="normalize: expected an option of loss='sigmoid'"):
        ContrastiveModel(siglip(), loss="sigmoid", normalize="mean")


@pytest.mark.parametrize(
    ("score_to_weight", "changed", "error"),
    [
        ("log", {"scores": None}, "scores: expected .*score_to_weight='log', got None"),
        (None, {}, "scores: expected None"),
        ("log", {"pixel_values": None}, "pixel_values: expected a tensor"),
        ("log", {"token_type_ids": torch.zeros(6, 6)}, "token_type_ids: expected an argument of CLIPModel"),
    ],
)
def test_wrong_inputs_are_refused(score_to_weight, changed, error):
    with pytest.raises((TypeError, ValueError), match=error):
        ContrastiveModel(clip(), score_to_weight=score_to_weight)(**(batch(6) | changed))


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as caught:
        ContrastiveModel(torch.nn.Identity())
    assert str(caught.value) == "transformers: expected the package transformers, got none: pip install transformers"
