"""Options of a training run: what is refused, what is read from a file, what a column is by default."""

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gcl_kernels.training
from gcl_kernels.training import TrainOptions
from gcl_kernels.training.options import parse_args, parse_kinds, parse_knots, parse_list, parse_weights
from gcl_kernels.training.train_options import by_similarity

KEYS = ["--left-keys=['query']", "--right-keys=['title', 'image']", "--weight-key=score"]
REQUIRED = ["--train-data=pairs.csv", *KEYS]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--left-keys=[]"], "--left-keys: expected different column names, got []"),
        (["--right-keys=title,title"], "--right-keys: expected different column names"),
        (["--right-weights=1"], "--right-weights: expected 2 weights as in --right-keys, got 1"),
        (["--right-weights=1,-1"], "expected numbers >= 0, not all 0, got 1,-1"),
        (["--right-weights=0,0"], "expected numbers >= 0, not all 0, got 0,0"),
        (["--img-or-txt=[['txt'],['txt']]"], "--img-or-txt: expected 2 right kinds as in --right-keys, got 1"),
        (["--img-or-txt=[['txt'],['txt','sound']]"], "expected two lists of 'txt' and 'img'"),
        (["--left-keys=['query'"], "expected a Python list or comma-separated values"),
        (["--left-keys=[__import__('os')]"], "expected a Python list or comma-separated values"),
        (["--val-data", "a.csv", "b.csv", "--doc-meta=c.json"], "--doc-meta: expected one file for each of the 2"),
        (["--csv-separator=ab"], "--csv-separator: expected one character, got 'ab'"),
        (["--score-to-weight=cubic"], "--score-to-weight: expected one of 'constant', 'linear'"),
        (
            ["--score-to-weight=piecewise"],
            "--knots: expected with 'piecewise' and only there, got None with 'piecewise'",
        ),
        (
            ["--knots=1:1,100:2"],
            "--knots: expected with 'piecewise' and only there, got ((1.0, 1.0), (100.0, 2.0)) with 'log'",
        ),
        (
            ["--score-to-weight=piecewise", "--knots=1:1,100"],
            "expected SCORE:WEIGHT pairs, a comma between them, got 1:1,100",
        ),
        (["--score-to-weight=piecewise", "--knots=1:1,50:2"], "scores increasing from <= 1 to >= 100"),
        (["--score-to-weight=piecewise", "--knots=1:1,50:2", "--s-max=50"], "scores increasing from <= 1 to >= 100"),
        (["--batch-size=0"], "expected a number > 0, got 0"),
        (["--lr=nan"], "expected a number > 0, got nan"),
        (["--epochs=two"], "invalid int value: 'two'"),
        (["--wd=-1"], "expected --warmup and --wd >= 0"),
        (["--steps=0", "--dry-run"], "--dry-run: expected --steps > 0, got 0"),
        (
            ["--torchcompile", "--grad-checkpointing", "--lock-text"],
            "--torchcompile: expected no --grad-checkpointing beside --lock-image or --lock-text, got both",
        ),
    ],
)
def test_a_bad_command_line_is_refused(capsys, options, fault):
    with pytest.raises(SystemExit) as caught:
        parse_args([*REQUIRED, *options])
    assert caught.value.code == 2
    assert fault in capsys.readouterr().err


def test_lists_are_literals_or_comma_separated():
    assert (
        parse_list("['title', 'image']")
        == parse_list("title, image")
        == parse_list("('title','image')")
        == ["title", "image"]
    )
    assert parse_weights("[0.1, .9]") == parse_weights("0.1,0.9") == [0.1, 0.9]
    assert parse_knots("[[1, 0.1], (100, 5)]") == parse_knots("1:0.1, 100:5") == [[1, 0.1], [100, 5]]
    assert parse_kinds("[['txt'], ['txt', 'img']]") == parse_kinds("txt;txt,img") == [["txt"], ["txt", "img"]]
    with pytest.raises(argparse.ArgumentTypeError):
        parse_kinds("txt")


def test_the_defaults_say_what_a_column_is():
    args = parse_args(
        ["--train-data=x", "--left-keys=query,query_img", "--right-keys=title,image_local", "--weight_key=score"]
    )
    assert args.img_or_txt == [["txt", "img"], ["txt", "img"]]
    assert (args.left_weights, args.right_weights) == ([1.0, 1.0], [1.0, 1.0])
    assert args.weight_key == "score"
    assert (args.score_to_weight, args.weight_normalize, args.false_negatives) == ("log", "mean", "mask")
    assert by_similarity(args.false_negatives) == {}
    assert by_similarity("margin:0.1") == {"false_negative_margin": 0.1}
    assert by_similarity("ratio:0.95") == {"false_negative_ratio": 0.95}
    assert parse_args([*REQUIRED, "--csv-separator=\\t"]).csv_separator == "\t"


def test_options_from_a_file_are_checked_like_the_command_line_which_goes_before_them(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "train_data: pairs.csv\nleft-keys: [query]\nright-keys: [title, image]\nright-weights: [0.1, 0.9]\nweight_key: score\n"
        "val-data: [a.csv, b.csv]\nlr: 0.003\ncross-field-loss: true\nskip-bad-rows: false\nseed: 3\n"
    )
    args = parse_args([f"--config={config}", "--seed=4"])
    assert (args.train_data, args.left_keys, args.right_weights) == ("pairs.csv", ["query"], [0.1, 0.9])
    assert (args.val_data, args.lr, args.cross_field_loss, args.skip_bad_rows) == (
        ["a.csv", "b.csv"],
        0.003,
        True,
        False,
    )
    assert args.seed == 4
    for content, fault in (
        ("learning-rate: 1", "expected options of this command in"),
        ("lr: fast", "--lr: invalid float value: 'fast'"),
        ("cross-field-loss: 1", "expected true or false for 'cross-field-loss'"),
        ("- lr", "expected a mapping {option: value}"),
        ("a: [", "expected YAML in"),
        (None, "expected a readable file"),
    ):
        config.unlink(missing_ok=True)
        if content:
            config.write_text(content)
        with pytest.raises(SystemExit):
            parse_args([*REQUIRED, f"--config={config}"])
        assert fault in capsys.readouterr().err


def options(**more):
    return TrainOptions(**{"train_data": "pairs.csv", "left_keys": ["query"], "right_keys": ["title", "image"],
                           "weight_key": "score", "name": "run"} | more)  # fmt: skip


def test_options_from_python_are_those_of_the_command_line():
    line = parse_args([*REQUIRED, "--name=run", "--lr=1", "--right-weights=1,2", "--val-data", "a", "b", "--score-scaling=minmax",
                       "--false-negatives=margin:0.1", "--dry-run", "--steps=3"])  # fmt: skip
    assert line == options(
        train_data=Path("pairs.csv"), right_keys=("title", "image"), lr=1, right_weights=(1, 2), val_data=[Path("a"), "b"],
        score_scaling="minmax", false_negatives="margin:0.1", dry_run=True, steps=np.int64(3),
    )  # fmt: skip
    # What a checkpoint holds is read with `weights_only`: plain types alone.
    plain = vars(options(lr=np.float32(0.5), train_data=Path("x"), steps=np.int64(3)))
    assert {type(value) for value in plain.values()} <= {str, int, float, bool, list, type(None)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        line.lr = 2


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"batch_size": 0}, "batch_size: expected a number > 0, got 0"),
        ({"batch_size": "8"}, "batch_size: expected a whole number, got 8"),
        ({"batch_size": 8.5}, "batch_size: expected a whole number, got 8.5"),
        ({"batch_size": None}, "batch_size: expected a whole number, got None"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"lr": float("nan")}, "lr: expected a number > 0, got nan"),
        ({"dry_run": 1}, "dry_run: expected True or False, got 1"),
        ({"loss": "hinge"}, "loss: expected one of softmax, sigmoid, got hinge"),
        ({"best_metric": "F1", "val_data": ["a"]}, "best_metric: expected one of NDCG@10"),
        ({"left_keys": "query"}, "left_keys: expected a list, got query"),
        ({"left_keys": []}, "left_keys: expected different column names, got []"),
        ({"right_weights": [0, 0]}, "right_weights: expected numbers >= 0, not all 0, got [0, 0]"),
        ({"right_weights": [1]}, "right_weights: expected 2 weights as in right_keys, got 1"),
        (
            {"doc_meta": ["c"], "val_data": ["a", "b"]},
            "doc_meta: expected one file for each of the 2 in val_data, got 1",
        ),
        ({"false_negatives": "margin:-1"}, "false_negatives: expected a number >= 0 after margin:, got margin:-1"),
        ({"loss": "softmax", "logit_bias": 1.0}, "logit_bias: expected loss sigmoid beside it"),
    ],
)
def test_bad_options_from_python_name_the_argument(given, fault):
    with pytest.raises(ValueError, match=re.escape(fault)) as caught:
        options(**given)
    assert "--" not in str(caught.value)


def test_every_option_is_documented_with_its_default_and_has_a_flag(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainOptions):
        assert field.metadata["help"]
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", shown, re.MULTILINE)
        (row,) = [line for line in TrainOptions.__doc__.splitlines() if line.startswith(f"    | `{field.name}` ")]
        default = "required" if field.name in ("left_keys", "right_keys", "weight_key") else repr(
            getattr(TrainOptions, field.name, [])
        )  # fmt: skip
        assert f"| {default} |" in row


def test_what_users_call_is_imported_when_it_is_asked_for():
    code = (
        "import sys, gcl_kernels.training as t; assert not {'open_clip', 'gcl_kernels.training.run'} & {*sys.modules}\n"
        "from gcl_kernels.training import TrainOptions, train\n"
        "import inspect; assert inspect.isfunction(train) and inspect.isclass(TrainOptions)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gcl_kernels.training.nothing
