"""Options of a training run: what is refused, what is read from a file, what a column is by default."""

import argparse

import pytest

from gcl_kernels.training.options import by_similarity, parse_args, parse_kinds, parse_knots, parse_list, parse_weights

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
