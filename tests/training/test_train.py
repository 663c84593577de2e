"""The command line, from a file to a checkpoint and a table."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from gcl_kernels.training.__main__ import main
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.loop import learning_rate
from gcl_kernels.training.openclip import TINY_MODEL, freeze_unused, import_open_clip
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.run import train

COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
KEYS = ["--left-keys=['query']", "--right-keys=['title', 'image']", "--weight-key=score"]


@pytest.fixture
def pairs_file(tmp_path):
    """Six colours: a query each, a document with picture and title, and one with either; nearer colours score more."""
    lines = ["query,title,image,score"]
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        other = COLOURS[(number + 1) % len(COLOURS)]
        lines += [
            f"{colour} thing,a {colour} square,{colour}.png,100",
            f"{colour} thing,,{other}.png,20",
            f"{colour} thing,some {colour},,50",
        ]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines))
    return path


def run(path, *options, keys=KEYS, name="run"):
    """Trains anew: a name is taken once."""
    shutil.rmtree(path.parent / "logs" / name, ignore_errors=True)
    argv = [
        f"--train-data={path}",
        *keys,
        f"--logs={path.parent / 'logs'}",
        f"--name={name}",
        "--batch-size=16",
        "--save-frequency=0",
        *options,
    ]
    return train(parse_args(argv))


def test_from_a_file_to_a_checkpoint_and_a_table(pairs_file, capsys):
    logs = pairs_file.parent / "logs"
    argv = [f"--train-data={pairs_file}", f"--val-data={pairs_file}", *KEYS, "--right-weights=[0.1, 0.9]", "--batch-size=6",
            "--epochs=2", f"--logs={logs}", "--name=first"]  # fmt: skip
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "18 pairs, 6 queries, 18 documents" in out
    head, _, ours, random = out.splitlines()[-5:-1]
    assert head.split() == ["test", "set", "run", "queries", "NDCG@10", "ERR", "RBP.9"]
    assert "log, step 6" in ours
    assert random.split()[:3] == ["random", "ranking", "6"]
    assert out.splitlines()[-1].endswith("step 6, checkpoint " + str(logs / "first" / "checkpoints" / "epoch_2.pt"))

    checkpoint = logs / "first" / "checkpoints" / "epoch_2.pt"
    content = torch.load(checkpoint, weights_only=True)
    assert set(content) == {"epoch", "name", "state_dict", "optimizer", "gcl_kernels"}
    assert (content["epoch"], content["name"]) == (2, "first")
    model = import_open_clip().create_model(TINY_MODEL, pretrained=str(checkpoint))
    for name, weight in model.state_dict().items():
        assert weight.equal(content["state_dict"][name]), name

    results = json.loads((logs / "first" / "results.json").read_text())
    assert len(results["loss"]) == 2 * 3
    assert all(math.isfinite(loss) for loss in results["loss"])
    assert results["metrics"][str(pairs_file)].keys() == results["random"][str(pairs_file)].keys() >= {"NDCG@10"}
    assert results["options"]["right_weights"] == [0.1, 0.9]


def test_training_learns_to_rank(pairs_file):
    result = run(pairs_file, f"--val-data={pairs_file}", "--steps=20", "--lr=2e-3", "--wd=0")
    assert result.losses[-1] < 0.5 * result.losses[0]
    found, by_chance = (of[str(pairs_file)].means["AP"] for of in (result.evaluations, result.random))
    assert found > 0.8 > by_chance + 0.2


def test_the_same_seed_gives_the_same_run_and_another_seed_another(pairs_file):
    losses = [run(pairs_file, "--steps=3", f"--seed={seed}").losses for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_scores_decide_the_loss_unless_the_weights_are_constant(pairs_file):
    constant, gcl = (
        run(pairs_file, "--steps=1", f"--score-to-weight={name}").losses for name in ("constant", "inverse_sqrt")
    )
    assert constant != gcl
    flat = pairs_file.with_name("flat.csv")
    header, *lines = pairs_file.read_text().splitlines()
    flat.write_text("\n".join([header, *(line.rsplit(",", 1)[0] + ",7" for line in lines)]))
    assert run(flat, "--steps=1", "--score-to-weight=inverse_sqrt").losses == pytest.approx(constant)
    linear = run(pairs_file, "--steps=1", "--score-to-weight=linear").losses
    assert linear != pytest.approx(constant)
    line = ["--score-to-weight=piecewise", "--knots=1:1,100:100"]
    assert run(pairs_file, "--steps=1", *line).losses == pytest.approx(linear)


def test_with_one_field_a_side_the_cross_field_loss_is_the_loss_once_more(pairs_file):
    keys = ["--left-keys=query", "--right-keys=title", "--weight-key=score", "--skip-bad-rows"]
    without, with_it = (
        run(pairs_file, "--steps=1", *more, keys=keys).losses[0] for more in ([], ["--cross-field-loss"])
    )
    assert with_it == pytest.approx(2 * without, rel=1e-5)


def test_the_cross_field_loss_passes_over_missing_values(pairs_file):
    without, with_it = (run(pairs_file, "--steps=2", *more).losses for more in ([], ["--cross-field-loss"]))
    assert all(math.isfinite(loss) for loss in with_it)
    assert with_it[0] > without[0]


def test_a_missing_value_has_no_effect(pairs_file):
    """A row without a title has the loss of a row whose document has no title field at all."""
    lines = [line for line in pairs_file.read_text().splitlines() if ",20" in line or "image" in line]
    pairs_file.write_text("\n".join(lines))
    both = run(pairs_file, "--steps=1").losses[0]
    image = run(pairs_file, "--steps=1", keys=["--left-keys=query", "--right-keys=image", "--weight-key=score"]).losses[
        0
    ]
    assert both == pytest.approx(image, rel=1e-5)


def test_rows_below_the_least_score_are_not_trained_on(pairs_file):
    all_rows, few = (run(pairs_file, "--epochs=1", "--batch-size=2", *more).losses for more in ([], ["--min-score=60"]))
    assert (len(all_rows), len(few)) == (9, 3)


def test_every_row_is_seen_once_an_epoch(pairs_file, monkeypatch):
    import gcl_kernels

    seen = []

    class Spy(gcl_kernels.GCLLoss):
        def forward(self, lhs, rhs, scores, logit_scale, **options):
            seen.append(options["rhs_ids"].tolist())
            return super().forward(lhs, rhs, scores, logit_scale, **options)

    monkeypatch.setattr(gcl_kernels, "GCLLoss", Spy)
    run(pairs_file, "--epochs=2", "--batch-size=6")
    epochs = [[row for batch in seen[start : start + 3] for row in batch] for start in (0, 3)]
    assert [len({tuple(row) for row in epoch}) for epoch in epochs] == [18, 18]
    assert epochs[0] != epochs[1]


def test_skipped_rows_are_counted_and_named(pairs_file, capsys):
    with pairs_file.open("a") as file:
        file.write("\nred thing,x\nred thing,x,none.png,1\n")
    run(pairs_file, "--steps=1", "--skip-bad-rows")
    out = capsys.readouterr().out
    assert "18 pairs" in out
    assert f"{pairs_file}: 2 bad rows skipped:" in out
    assert f"  {pairs_file}, line 20: expected 4 cells as in the header, got 2" in out
    assert f"  {pairs_file}, line 21: expected a readable image in column 'image', got no file" in out


def test_a_bad_file_is_one_line_and_status_2_without_a_traceback(pairs_file):
    pairs_file.write_text("query,title,image,score\na,A,,1\nb,B,,NaN\n")
    command = [sys.executable, "-m", "gcl_kernels.training", f"--train-data={pairs_file}", *KEYS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"{pairs_file}, line 3: expected a finite number >= 0 in column 'score', got 'NaN'\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--score-scaling=none", "--s-max=60"], "{path}: expected scores in [1, 60] with --score-scaling none, got 20 to 100"),
        (["--lock-image", "--lock-text"], "--lock-image and --lock-text: expected a tower that trains, got none with a field"),
        (["--score-to-weight=piecewise", "--knots=1:0,100:0"],
         "{path}: expected a pair with a weight > 0, got weights of 0 alone from --score-to-weight piecewise"),
        (["--context-length=2"],
         "{path}: expected values of the query that the model can tell apart, got one and the same in all rows within"),
        (["--min-score=101"], "{path}: expected a score >= --min-score 101, got 100 at most"),
        (["--model=ViT-X"], "expected a model name of open_clip, got 'ViT-X'"),
        (["--val-data=none.csv"], "none.csv: expected a readable file, got 'No such file or directory'"),
        (["--val-data={path}", "--doc-meta={meta}"],
         "{path}: expected all documents in the corpus, got 18 of 18 that are not, first 'a red square_{{!@#~}}_"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used_are_one_line_and_status_2(pairs_file, capsys, options, fault):
    meta = pairs_file.with_name("meta.json")
    meta.write_text("{}")
    argv = [f"--train-data={pairs_file}", *KEYS, f"--logs={pairs_file.parent}"]
    assert main([*argv, *(option.format(path=pairs_file, meta=meta) for option in options)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(fault.format(path=pairs_file))


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    rates = [learning_rate(step, 110, 10, 2.0) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0)
    assert rates[-1] < 0.001
    assert learning_rate(0, 1, 0, 2.0) == 2.0


def test_an_image_lost_on_the_way_is_a_missing_value_and_the_run_goes_on(pairs_file, capsys, monkeypatch):
    import gcl_kernels

    class Spy(gcl_kernels.GCLLoss):
        def forward(self, lhs, rhs, scores, logit_scale, **options):
            assert options["rhs_field_mask"].any(dim=1).all(), "a row with nothing left has given way to another"
            assert len(scores) == 20
            return super().forward(lhs, rhs, scores, logit_scale, **options)

    monkeypatch.setattr(gcl_kernels, "GCLLoss", Spy)
    for line in range(2):
        pairs_file.write_text(pairs_file.read_text() + f"\nlost {line},,lost.png,{line}")
    (pairs_file.parent / "lost.png").write_bytes(b"no image")
    result = run(pairs_file, "--steps=3", "--batch-size=20", "--check-images=none")
    assert all(math.isfinite(loss) for loss in result.losses)
    out = capsys.readouterr()
    assert "a file that cannot be decoded" in out.out
    assert "a file that cannot be decoded" in (pairs_file.parent / "logs" / "run" / "out.log").read_text(
        encoding="utf-8"
    )
    assert "1 images could not be read and were missing values" in out.out
    lost = json.loads((pairs_file.parent / "logs" / "run" / "results.json").read_text())["lost_images"]
    assert list(lost) == [str(pairs_file.parent / "lost.png")]


def test_false_negatives_are_masked_avoided_or_kept(tmp_path):
    path, keys = tmp_path / "pairs.csv", ["--left-keys=query", "--right-keys=title", "--weight-key=score"]
    path.write_text("\n".join(["query,title,score", *(f"q{n % 2},t{n},1" for n in range(12))]))
    mask, avoid, keep = (
        run(path, "--steps=2", f"--false-negatives={how}", keys=keys).losses[0] for how in ("mask", "avoid", "keep")
    )
    everything = run(path, "--steps=2", "--false-negatives=ratio:0", keys=keys).losses[0]
    nothing = run(path, "--steps=2", "--false-negatives=margin:2", keys=keys).losses[0]
    assert everything < avoid  # positives have a positive similarity, and so have most of their negatives
    assert nothing == pytest.approx(mask, rel=1e-5)
    # A mask leaves 7 of 12 documents for a query, an avoiding batch 2 of 2; softmax of near-equal logits is their log.
    assert avoid < mask < keep
    assert avoid < 1.5


def test_an_empty_test_set_is_passed_over_and_unknown_documents_are_counted(pairs_file, capsys):
    empty = pairs_file.with_name("empty.csv")
    empty.write_text("query,title,image,score\n")
    corpus = pairs_file.with_name("corpus.json")
    documents = {
        f"a {colour} square_{{!@#~}}_{colour}.png_{{!@#~}}_": {"title": colour, "image": None} for colour in COLOURS
    }
    corpus.write_text(json.dumps(documents))
    result = run(pairs_file, f"--val-data={empty}", "--steps=1", "--val-data", str(empty), str(pairs_file),
                 "--doc-meta", str(corpus), str(corpus))  # fmt: skip
    assert list(result.evaluations) == [str(pairs_file)]
    out = capsys.readouterr().out
    assert f"{empty}, line 2: expected at least one row after the header, got none; passed over" in out
    assert "got 12 of 18 that are not, first" in out


def test_a_loss_that_is_not_finite_is_one_line(pairs_file):
    with pytest.raises(InputError, match=r"step [2-9]: expected a finite loss, got nan; a smaller --lr"):
        run(pairs_file, "--steps=9", "--lr=1e30", "--wd=0")


def test_a_locked_tower_and_one_without_a_field_do_not_train(pairs_file):
    def weights(name, *options, **more):
        path = run(pairs_file, "--steps=1", "--save-frequency=1", *options, name=name, **more).checkpoint
        content = torch.load(path, weights_only=True)
        return content["state_dict"], sum(len(group["params"]) for group in content["optimizer"]["param_groups"])

    first, _ = weights("first", "--lr=1e-30", "--wd=0")
    image = {name for name in first if name.startswith("visual.")}
    text_keys = ["--left-keys=query", "--right-keys=title", "--weight-key=score"]
    for frozen, (changed, in_optimizer) in (
        (image, weights("locked", "--lock-image", "--lr=1e-2")),
        (image, weights("unused", "--lr=1e-2", "--skip-bad-rows", keys=text_keys)),
        (first.keys() - image - {"logit_scale"}, weights("text", "--lock-text", "--lr=1e-2")),
    ):
        for name, weight in first.items():
            assert ((weight - changed[name]).abs().max() < 1e-20) == (name in frozen), name
        # A weight that no field uses would not change either, but processes would wait for its gradient.
        assert in_optimizer == len(first) - len(frozen)


@pytest.mark.parametrize("options", [[], ["--mini-batch-size=4"]])
def test_a_locked_tower_s_running_statistics_do_not_change(pairs_file, options):
    """Of a ResNet; without the lock they do."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = pairs_file.parent / "Tiny-ResNet.json"
    model.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))

    def changed(name, *more):
        arguments = f"--model={model}", "--save-steps=1", "--lr=1e-3", *options, *more
        path = run(pairs_file, "--steps=3", *arguments, name=name).checkpoint
        states = [
            torch.load(path.with_name(file), weights_only=True)["state_dict"] for file in ("epoch_1.pt", path.name)
        ]
        return {name for name, value in states[0].items() if not value.equal(states[1][name])}

    locked, free = changed("locked", "--lock-image"), changed("free")
    assert not {name for name in locked if name.startswith("visual.")}
    assert any(name.startswith("transformer.") for name in locked)
    assert {"visual.bn1.running_mean", "visual.bn1.num_batches_tracked", "visual.conv1.weight"} <= free


def test_what_the_embeddings_do_not_use_is_found_by_use():
    """Models for a sigmoid loss have a bias, those that caption have a decoder; no gradient reaches them, and processes wait."""
    model = import_open_clip().CLIP(
        8,
        {"image_size": 16, "patch_size": 16, "layers": 1, "width": 8, "head_width": 8},
        {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
        init_logit_bias=-10.0,
    )
    model.extra = torch.nn.BatchNorm1d(8)
    model.train()
    model.visual.eval()
    before = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    images, tokens = torch.zeros(2, 3, 16, 16), torch.ones(2, 4, dtype=torch.int64)

    def embed():
        torch.rand(3)
        return {"a": model.encode_image(images)}, [model.extra(model.encode_text(tokens)), model.logit_scale.exp()]

    assert freeze_unused(model, embed) == ["logit_bias"]
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["logit_bias"]
    assert torch.get_rng_state().equal(before)
    assert [module.training for module in model.modules()] == modes
    assert model.extra.num_batches_tracked == 0
    assert all(weight.grad is None for weight in model.parameters())
    unused = freeze_unused(model, lambda: model.encode_text(tokens))
    assert {name.partition(".")[0] for name in unused} == {"visual", "logit_scale", "extra"}


def test_no_steps_evaluate_the_model_as_it_is(pairs_file):
    first = run(pairs_file, "--steps=1", "--lr=1e-30", "--wd=0", "--save-frequency=1", f"--val-data={pairs_file}")
    again = run(
        pairs_file,
        "--steps=0",
        f"--pretrained={first.checkpoint}",
        f"--val-data={pairs_file}",
        "--seed=5",
        name="again",
    )
    assert again.losses == []
    assert again.evaluations[str(pairs_file)].rows() == first.evaluations[str(pairs_file)].rows()
    assert not (pairs_file.parent / "logs" / "again" / "checkpoints").exists()


def test_the_logit_scale_starts_and_stays_where_it_is_told(pairs_file):
    def scale(*options):
        run(pairs_file, "--steps=2", "--lr=1e-30", *options)
        return json.loads((pairs_file.parent / "logs" / "run" / "results.json").read_text())["logit_scale"]

    assert scale() == pytest.approx(1 / 0.07)
    assert scale("--logit-scale=5") == pytest.approx(5)
    assert scale("--logit-scale=200") == pytest.approx(100)
    assert scale("--logit-scale=200", "--logit-scale-max=1000") == pytest.approx(200)


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_mixed_precision_trains_nearly_the_same_and_its_scaler_is_saved(pairs_file, precision):
    exact = run(pairs_file, "--steps=1", "--grad-clip-norm=1").losses
    # The scaler of float16 begins so high that it may leave out the first steps.
    mixed = run(pairs_file, "--steps=6", "--grad-clip-norm=1", "--lr=2e-3", f"--precision={precision}", name=precision)
    assert mixed.losses[0] == pytest.approx(exact[0], rel=0.02)
    assert mixed.losses[0] != exact[0]
    assert mixed.losses[-1] < 0.8 * mixed.losses[0]
    assert ("scaler" in torch.load(mixed.checkpoint, weights_only=True)) == (precision == "amp")


def test_a_dry_run_prints_the_plan_and_writes_nothing(pairs_file, capsys):
    run(pairs_file, "--dry-run", "--epochs=3", "--batch-size=6")
    out = capsys.readouterr().out
    assert "plan: 9 steps of 6 rows on 1 process(es), 18 rows an epoch" in out
    assert "7.6 M parameters" in out
    assert "min of training" in out
    assert not (pairs_file.parent / "logs").exists()
