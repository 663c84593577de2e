"""`--loss sigmoid` from the command line: a bias that is learned, saved, resumed and left alone by evaluation."""

from __future__ import annotations

import json

import pytest
import torch

from gcl_kernels import sigmoid_loss
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.evaluate import main as evaluate
from gcl_kernels.training.openclip import create_model, import_open_clip
from gcl_kernels.training.options import parse_args
from tests.training.test_train import COLOURS, KEYS, pairs_file, run  # noqa: F401  # the fixture

SIGMOID = "--loss=sigmoid"


def results(pairs_file, name="run"):  # noqa: F811
    return json.loads((pairs_file.parent / "logs" / name / "results.json").read_text())


def weights_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_scale_and_bias_start_where_siglip_starts_and_are_learned(pairs_file):  # noqa: F811
    run(pairs_file, SIGMOID, "--steps=1", "--lr=1e-30")
    assert results(pairs_file)["logit_scale"] == pytest.approx(10)
    assert results(pairs_file)["logit_bias"] == pytest.approx(-10)
    trained = run(pairs_file, SIGMOID, "--steps=8", "--lr=2e-3")
    assert results(pairs_file)["logit_bias"] != pytest.approx(-10, abs=1e-4)
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    assert weights_of(trained.checkpoint)["logit_bias"].item() == results(pairs_file)["logit_bias"]


def test_the_start_is_what_the_options_say(pairs_file):  # noqa: F811
    run(pairs_file, SIGMOID, "--steps=1", "--lr=1e-30", "--logit-scale=20", "--logit-bias=-3")
    assert results(pairs_file)["logit_scale"] == pytest.approx(20)
    assert results(pairs_file)["logit_bias"] == pytest.approx(-3)


def test_the_loss_is_sigmoid_loss_of_the_weights(pairs_file, monkeypatch):  # noqa: F811
    seen = []

    def remembered(lhs, rhs, scale, bias, **options):
        seen.append((lhs, rhs, scale, bias, options))
        return sigmoid_loss(lhs, rhs, scale, bias, **options)

    monkeypatch.setattr("gcl_kernels.sigmoid_loss", remembered)
    options = ("--steps=1", "--lr=1e-30", "--score-to-weight=linear", "--right-weights=1,3")
    loss = run(pairs_file, SIGMOID, *options).losses[0]
    ((lhs, rhs, scale, bias, options),) = seen
    assert options["rhs_field_weights"] == {"title": 1.0, "image": 3.0}
    assert options["lhs_ids"] is not None
    assert options["weights"].mean().item() == pytest.approx(1)
    assert loss == sigmoid_loss(lhs, rhs, scale, bias, **options).item()
    # scores of 20, 50 and 100 are grades of 1, 38 and 100
    distinct = options["weights"].unique()
    torch.testing.assert_close(distinct / distinct.min(), torch.tensor([1.0, 38.0, 100.0]))


def test_gradient_caching_and_a_resumed_run_end_the_same(pairs_file):  # noqa: F811
    whole = run(pairs_file, SIGMOID, "--steps=4", "--save-steps=2", name="whole")
    cached = run(pairs_file, SIGMOID, "--steps=4", "--mini-batch-size=5", name="cached")
    torch.testing.assert_close(cached.losses, whole.losses, rtol=1e-5, atol=0)
    halfway = whole.checkpoint.parent / "epoch_2.pt"
    resumed = run(pairs_file, SIGMOID, "--steps=4", f"--resume={halfway}", name="resumed")
    assert resumed.losses == whole.losses
    for name, weight in weights_of(whole.checkpoint).items():
        assert weight.equal(weights_of(resumed.checkpoint)[name]), name


def test_the_checkpoint_is_evaluated_and_trained_on(pairs_file, capsys):  # noqa: F811
    trained = run(pairs_file, SIGMOID, "--steps=2", "--logit-bias=-7", "--lr=1e-30", f"--val-data={pairs_file}")
    corpus, out = pairs_file.with_name("corpus.json"), pairs_file.with_name("evaluation")
    corpus.write_text(
        json.dumps({f"a {colour} square": {"title": f"a {colour} square", "image": ""} for colour in COLOURS})
    )
    files = f"--pretrained={trained.checkpoint}", f"--test-csv={pairs_file}", f"--doc-meta={corpus}"
    evaluate([*files, f"--output-dir={out}", "--doc-id-key=title"])
    capsys.readouterr()
    for loss in ("softmax", "sigmoid"):
        run(pairs_file, f"--loss={loss}", "--steps=1", "--lr=1e-30", f"--pretrained={trained.checkpoint}", name="next")
        assert results(pairs_file, "next").get("logit_bias") == (pytest.approx(-7) if loss == "sigmoid" else None)
    model = import_open_clip().create_model("ViT-Tiny-8-32px", pretrained=str(trained.checkpoint), init_logit_bias=0.0)
    assert model.logit_bias.item() == pytest.approx(-7)


def test_pretrained_weights_without_a_bias_begin_with_siglips_and_keep_their_scale(pairs_file):  # noqa: F811
    softmax = run(pairs_file, "--steps=1", "--lr=1e-30", "--logit-scale=33", name="softmax")
    run(pairs_file, SIGMOID, "--steps=1", "--lr=1e-30", f"--pretrained={softmax.checkpoint}")
    assert results(pairs_file)["logit_scale"] == pytest.approx(33)
    assert results(pairs_file)["logit_bias"] == pytest.approx(-10)


def test_a_model_with_a_bias_of_its_own_keeps_it():
    model, *_ = create_model(biased=True)
    assert model.logit_bias.item() == 0
    assert create_model()[0].logit_bias is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [SIGMOID, "--false-negatives=margin:0.1"],
            "--false-negatives: expected mask, avoid or keep beside --loss sigmoid",
        ),
        (["--logit-bias=-10"], "--logit-bias: expected --loss sigmoid beside it"),
        ([SIGMOID, "--logit-bias=nan"], "--logit-bias: expected a finite number, got nan"),
        (["--loss=hinge"], "--loss: invalid choice: 'hinge'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--train-data=x.csv", *KEYS, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_curves_lines_and_results_have_the_same_scale_and_bias(pairs_file, monkeypatch):  # noqa: F811
    logged = {}
    monkeypatch.setattr(
        "gcl_kernels.training.tracking.Tracker.log", lambda _, step, values: logged.setdefault(step, values)
    )
    run(pairs_file, SIGMOID, "--steps=2", "--lr=1e-2", "--log-every-n-steps=1")
    last = results(pairs_file)
    assert -10 != logged[1]["logit_bias"] != logged[2]["logit_bias"] == last["logit_bias"]
    line = (pairs_file.parent / "logs" / "run" / "out.log").read_text().split("step 2/2")[1]
    assert f"  logit scale {last['logit_scale']:.2f}  logit bias {last['logit_bias']:.2f}  " in line
    run(pairs_file, "--steps=1")
    assert "logit bias" not in (pairs_file.parent / "logs" / "run" / "out.log").read_text()


@pytest.mark.parametrize(("first", "then"), [("softmax", "sigmoid"), ("sigmoid", "softmax")])
def test_a_run_is_not_resumed_with_the_other_loss(pairs_file, first, then):  # noqa: F811
    begun = run(pairs_file, f"--loss={first}", "--steps=1", name="begun")
    message = (
        f"{begun.checkpoint}: expected --loss {first}, as it was trained, got {then}; --pretrained takes its weights"
    )
    with pytest.raises(InputError) as refused:
        run(pairs_file, f"--loss={then}", "--steps=2", f"--resume={begun.checkpoint}")
    assert str(refused.value).startswith(message)
