"""What a run will learn from, said before its first step: grades, weights, negatives, texts that the context cuts."""

from __future__ import annotations

import random

import pytest
import torch

from gcl_kernels.training.batches import has_negatives
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.preflight import cut_texts, most_frequent
from gcl_kernels.training.ranking import minmax
from gcl_kernels.training.run import train
from gcl_kernels.training.scaling import spread


def write(path, scores, *, text="title {n}", query="query {n}"):
    rows = [f"{query.format(n=n)},{text.format(n=n)},{score}" for n, score in enumerate(scores)]
    path.write_text("\n".join(["query,title,score", *rows]))
    return path


def run(path, *options):
    """What a run of one step prints."""
    argv = [f"--train-data={path}", "--left-keys=query", "--right-keys=title", "--weight-key=score", "--steps=1",
            f"--logs={path.parent / 'logs'}", "--name", f"run{random.random()}", "--batch-size=8"]  # fmt: skip
    return train(parse_args([*argv, *options]))


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]


def pareto(count, seed=0):
    generator = random.Random(seed)
    return [int(generator.paretovariate(1) * 2) for _ in range(count)]


def test_heavy_tails_are_one_warning_with_numbers_and_a_scaling_that_spreads_them(tmp_path, capsys):
    scores = pareto(400)
    path = write(tmp_path / "clicks.csv", scores)
    run(path)
    grades = minmax(torch.tensor(scores, dtype=torch.float64))
    share, (low, high) = (grades == 1).double().mean().item(), (grades.min().item(), grades.max().item())
    assert share > 0.9
    (line,) = warnings(capsys)
    assert f"{share:.1%} of the rows have grade 1 (lowest {low}, median 1, highest {high})" in line
    assert "effective rows in a batch of 8; --score-scaling log or rank spreads them" in line
    for scaling in ("log", "rank"):
        run(path, f"--score-scaling={scaling}")
        assert not warnings(capsys)
    run(path, "--score-to-weight=constant")
    assert not warnings(capsys)


@pytest.mark.parametrize(
    ("scores", "options", "said"),
    [
        ([5] * 16, [], "all 16 rows have one weight: the loss is plain cross-entropy, whatever --score-to-weight"),
        ([1] * 19 + [5], [], "95.0% of the rows have grade 1 (lowest 1, median 1, highest 100), so their weights are equal"),
        ([*range(1, 19)], ["--score-to-weight=piecewise", "--knots=1:0,99:0,100:1", "--batch-size=18"],
         "a few rows have nearly all the weight: 1.0 effective rows in a batch of 18"),
        ([*range(1, 17)], ["--score-to-weight=piecewise", "--knots=1:0,99:0,100:1"],
         "50% of the batches have weights of 0 alone, and teach nothing"),
        ([*range(1, 17)], ["--score-to-weight=piecewise", "--knots=1:0,99:0,100:1", "--loss=sigmoid"],
         "50% of the batches have weights of 0 alone, and only push pairs apart"),
    ],
)  # fmt: skip
def test_weights_that_hardly_differ_or_few_of_which_count(tmp_path, capsys, scores, options, said):
    run(write(tmp_path / "pairs.csv", scores), *options)
    found = warnings(capsys)
    assert any(said in line for line in found), found
    # Where the scores themselves are one score, no scaling helps.
    assert not any("--score-scaling" in line for line in found)


@pytest.mark.parametrize(
    ("rows", "options", "trains"),
    [
        ("a,A,1,1,1 a,B,2,1,2 a,C,3,1,3", [], False),
        ("a,A,1,1,1 b,A,2,1,1 c,A,3,1,1", [], False),
        ("a,A,1,1,1 b,B,2,1,2 c,C,3,1,3", [], True),
        ("a,A,1,1,1 b,B,2,1,2 c,C,3,1,3", ["--query-id-key=q"], False),
        ("a,A,1,1,1 b,B,2,2,1 c,C,3,3,1", ["--doc-id-key=d"], False),
        ("a,A,1,1,1 b,B,2,1,2 c,C,3,1,3", ["--batch-size=1"], False),
        ("a,A,1,1,1", [], False),
        ("a,A,1,1,1 a,B,2,1,2 a,C,3,1,3", ["--false-negatives=keep"], True),
        ("a,A,1,1,1 a,A,2,1,2 a,A,3,1,3", ["--false-negatives=keep"], False),
        ("a,A,1,1,1 a,B,2,1,2 a,C,3,1,3", ["--steps=0"], True),
    ],
)
def test_without_a_single_negative_nothing_is_trained(tmp_path, rows, options, trains):
    """Rows of one query or of one document are no negatives of each other: the loss of such batches is 0 whatever the model."""
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["query,title,score,q,d", *rows.split()]))
    if trains:
        assert all(loss > 0.01 for loss in run(path, *options).losses)
        return
    with pytest.raises(InputError, match=r"without a single negative: the loss would be 0 and nothing learnt"):
        run(path, *options)
    assert not (tmp_path / "logs").exists(), "what was refused leaves nothing"


def test_pairs_that_come_again_with_other_scores_are_counted(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    rows = [f"q{n},t{n},{n}" for n in range(6)]
    path.write_text("\n".join(["query,title,score", *rows, "q1,t1,9", "q1,t1,8", "q2,t2,2", "q3,t3,9"]))
    run(path)
    assert warnings(capsys) == [
        f"warning: {path}: 2 pairs of query and document come more than once, with different scores; all of their rows are "
        "trained on"
    ]


def test_batches_without_negatives_are_counted(tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["query,title,score", *(f"{'one' if n else 'two'},t{n},{n}" for n in range(12))]))
    run(path, "--batch-size=4")
    assert "67% of the batches have no negative, and teach nothing" in warnings(capsys)[0]
    run(path, "--batch-size=4", "--loss=sigmoid")
    assert "67% of the batches have no negative, and only pull pairs together" in warnings(capsys)[0]


def test_texts_that_the_context_cuts_are_counted_by_field(tmp_path, capsys):
    # A token a word, and one at either end of the 16: 14 words fit.
    rows = [f"{chr(97 + n)} {'a ' * 13},{chr(97 + n)} {'a ' * (15 if n < 4 else 3)},{n}" for n in range(16)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(["query,title,score", *rows]))
    run(path)
    (line,) = warnings(capsys)
    assert line == "warning: the context of 16 tokens cuts 25% of 'title'; --context-length takes more"
    run(path, "--context-length=32")
    assert not warnings(capsys)
    run(path, "--dry-run")
    out = capsys.readouterr().out
    assert "text: the context of 16 tokens cuts 0.0% of 'query', 25.0% of 'title'" in out


def test_a_text_that_just_fits_is_not_cut():
    tokenizer = create_model()[1]
    texts = ["a " * count for count in (1, 13, 14, 15, 40)]
    assert cut_texts({"text": texts}, {"text": "txt"}, tokenizer) == {"text": 2 / 5}
    assert cut_texts({"text": ["", ""], "image": ["a.png"]}, {"text": "txt", "image": "img"}, tokenizer) == {}


def test_a_dry_run_describes_grades_and_weights(tmp_path, capsys):
    run(
        write(tmp_path / "pairs.csv", [0] * 10 + [*range(1, 11)]),
        "--dry-run",
        "--score-to-weight=linear",
        "--batch-size=20",
    )
    out = capsys.readouterr().out
    assert (
        "grades: 1, 1, 1, 10, 50, 90, 100 at the quantiles 0%, 5%, 25%, 50%, 75%, 95%, 100%; 50.0% of the rows have the lowest"
        in out
    )
    grades = minmax(torch.tensor([0.0] * 10 + [*map(float, range(1, 11))], dtype=torch.float64)).double()
    effective = (grades.sum() ** 2 / (grades**2).sum()).item()
    assert f"weights: {effective:.1f} effective rows in a batch of 20" in out
    assert "loss of the first step" in out


def test_test_sets_whose_grades_collapse_are_said(tmp_path, capsys):
    path = write(tmp_path / "clicks.csv", pareto(400))
    train_on = write(tmp_path / "pairs.csv", range(16))
    run(train_on, f"--val-data={path}")
    (line,) = warnings(capsys)
    assert line.startswith(f"warning: {path}: 9")
    run(train_on, f"--val-data={path}", "--score-scaling=rank")
    assert not warnings(capsys)


def test_values_that_the_model_cannot_tell_apart(tmp_path):
    same = "the same long beginning of every title there is in all of this whole file {n}"
    with pytest.raises(ValueError, match=r"expected values of the document that the model can tell apart"):
        run(write(tmp_path / "pairs.csv", range(16), text=same))
    run(write(tmp_path / "pairs.csv", range(16), text=same), "--context-length=32")


def test_scalings_increase_and_rank_is_uniform():
    scores = torch.tensor([0, 7, 1, 1, 1000, 7, 7], dtype=torch.float64)
    assert spread(scores, "rank").tolist() == [1, 5, 2.5, 2.5, 7, 5, 5]
    assert spread(scores, "linear").equal(scores)
    assert spread(scores, "log").equal((1 + scores).log())
    for scaling in ("linear", "log", "rank"):
        grades = minmax(spread(scores, scaling))
        assert (grades[scores.argsort()].diff() >= 0).all()
        assert (grades.min(), grades.max()) == (1, 100)


def test_the_scaling_makes_the_weights_and_the_grades(tmp_path):
    """A run on scores scaled by hand is the run that scales them."""
    scores = pareto(40)
    by_hand = spread(torch.tensor(scores, dtype=torch.float64), "rank").tolist()
    one = write(tmp_path / "one.csv", scores)
    two = write(tmp_path / "two.csv", by_hand)
    a = run(one, f"--val-data={one}", "--score-scaling=rank")
    b = run(two, f"--val-data={two}", "--score-scaling=minmax")
    assert a.losses == b.losses
    assert a.evaluations[str(one)].means == b.evaluations[str(two)].means
    assert parse_args(["--train-data=a", "--left-keys=q", "--right-keys=t", "--weight-key=s", "--score-scaling=minmax"]
                      ).score_scaling == "linear"  # fmt: skip


def test_negatives_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 5):
        for _ in range(40):
            ids = torch.randint(0, 2, (count, 2), generator=generator)
            pairs = [(a, b) for a in ids.tolist() for b in ids.tolist()]
            assert has_negatives(ids, masked=True) == any(a[0] != b[0] and a[1] != b[1] for a, b in pairs)
            assert has_negatives(ids, masked=False) == any(a != b for a, b in pairs)


def test_the_most_frequent_value():
    assert most_frequent(torch.tensor([3.0, 1.0, 3.0, 2.0])) == (3.0, 0.5)
