"""The evaluator's command line: the authors' flags and files, metrics at every cut, and input that is half wrong."""

from __future__ import annotations

import csv
import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from gcl_kernels.training.evaluate import main
from gcl_kernels.training.evaluation_files import CUTS, write_results
from gcl_kernels.training.ground_truth import draw_queries
from gcl_kernels.training.openclip import TINY_MODEL, create_model
from gcl_kernels.training.ranking import grade
from gcl_kernels.training.significance import bootstrap_interval, paired_test
from tests.training.evaluating import evaluate, rewrite


def test_the_files_are_those_of_the_authors_and_bad_input_is_counted(files, capsys):
    torch.manual_seed(0)
    assert evaluate(files) == 0
    out = capsys.readouterr().out
    assert f"{files / 'test.csv'}: 1 bad rows skipped:" in out
    assert "expected all documents in the corpus, got 1 of 4 that are not, first '9'; they count as not found" in out
    assert "1 images could not be read" in out
    folder = files / "out"
    # 10 to 100 becomes 1 to 100; queries by the sum of their grades, documents by grade.
    grades = {
        "blue thing_{!@#~}_": {"9": 89, "2": 78},
        "red thing_{!@#~}_": {"1": 100, "2": 45},
        "green_{!@#~}_": {"3": 1},
    }
    assert json.loads((folder / "gt_results.json").read_text()) == grades
    assert list(json.loads((folder / "gt_results.json").read_text())) == list(grades)
    retrieval = json.loads((folder / "retrieval.json").read_text())
    assert retrieval.keys() == grades.keys()
    for found in retrieval.values():
        # The document whose only value is a broken image has no direction and cannot be found.
        assert found.keys() == {"1", "2", "3"}
        assert list(found.values()) == sorted(found.values(), reverse=True)
    output = json.loads((folder / "output.json").read_text())
    assert {"mAP", "ndcg", "precision", "recall", "mrr", "hole", "acc", "summary"} <= output.keys()
    assert output["ndcg"].keys() == {f"NDCG@{k}" for k in CUTS}
    with (folder / "output.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert list(line) == ["mAP@1000", "mrr@1000", "NDCG@10", "mERR", "mRBP7", "mRBP8", "mRBP9"]
    assert float(line["NDCG@10"]) == output["summary"]["NDCG@10"] == output["ndcg"]["NDCG@10"]
    with (folder / "per_query.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == list(grades)
    assert sum(float(row["NDCG@10"]) for row in rows) / 3 == pytest.approx(output["summary"]["NDCG@10"])


def test_pictures_may_lie_elsewhere_than_the_corpus(files, capsys):
    (files / "pictures").mkdir()
    for picture in files.glob("*.png"):
        picture.rename(files / "pictures" / picture.name)
    assert evaluate(files, f"--image-root={files / 'pictures'}") == 0
    assert "1 images could not be read" in capsys.readouterr().out, "the broken one"


def test_metrics_alone_are_those_of_the_files_and_a_run_equals_itself(files, capsys):
    assert evaluate(files) == 0
    first = json.loads((files / "out" / "output.json").read_text())
    assert all(isinstance(of_metric, dict) for of_metric in first.values()), "as the authors' aggregation expects"
    assert main([f"--output-dir={files / 'out'}", "--metric-only", f"--compare-with={files / 'out'}"]) == 0
    again = json.loads((files / "out" / "output.json").read_text())
    assert again == first
    comparison = json.loads((files / "out" / "evaluation.json").read_text())["comparison"]
    assert comparison["NDCG@10"]["p"] == 1
    assert comparison["NDCG@10"]["ours"] == comparison["NDCG@10"]["theirs"]
    assert "3 of 3 queries are in both" in capsys.readouterr().out


def test_a_given_ground_truth_decides_the_queries(files, capsys):
    path = files / "gt.json"
    path.write_text(json.dumps({"red thing_{!@#~}_": {"2": 7}, "other": {"1": 1}}))
    assert evaluate(files, f"--gt_results_path={path}") == 0
    assert "got 1 of 2 that it does not have, first 'other'; left out" in capsys.readouterr().out
    assert list(json.loads((files / "out" / "retrieval.json").read_text())) == ["red thing_{!@#~}_"]
    # Of the three documents found one is judged.
    assert json.loads((files / "out" / "output.json").read_text())["hole"]["Hole@3"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("option", ["--output-dir", "--features-path", "--gt_results_path"])
def test_a_folder_that_cannot_be_written_is_said_before_anything_is_read(files, capsys, option):
    (files / "file").write_text("")
    path = files / "file" if option == "--output-dir" else files / "file" / "x"
    rewrite(files / "test.csv", "query", "no query")  # a fault that reading would find
    assert evaluate(files, f"{option}={path}") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{files / 'file'}: expected a folder to write to, got '")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("kind", ["missing", "text", "other architecture", "tensor"])
def test_weights_that_the_model_cannot_have_are_one_line(files, capsys, kind):
    path = files / "model.pt"
    if kind == "text":
        path.write_text("a,b\n1,2\n")
    if kind == "other architecture":
        torch.save({"state_dict": {"positional_embedding": torch.ones(3, 3)}}, path)
    if kind == "tensor":
        torch.save(torch.ones(3), path)
    assert evaluate(files, f"--pretrained={path}") == 2
    message = capsys.readouterr().err
    assert message.startswith("--pretrained: expected ")
    assert str(path) in message
    assert TINY_MODEL in message
    assert len(message.splitlines()) == 1


def test_diverged_weights_are_one_line(files, capsys):
    weights = create_model(TINY_MODEL)[0].state_dict()
    torch.save({name: value * torch.nan for name, value in weights.items()}, files / "model.pt")
    assert evaluate(files, f"--pretrained={files / 'model.pt'}") == 2
    assert (
        capsys.readouterr().err == "expected finite embeddings, got NaN or infinity: training has probably diverged\n"
    )


def test_a_document_of_text_that_utf_8_has_not_is_left_out_by_its_name(files, capsys):
    rewrite(files / "corpus.json", "a blue square", "a blue \\ud83d square \U0001f642")
    assert evaluate(files) == 0
    assert "document '2': expected UTF-8 text, got half a surrogate pair" in capsys.readouterr().out
    assert "2" not in json.loads((files / "out" / "examples.json").read_text(encoding="utf-8"))["documents"]


def test_a_comparison_with_another_ground_truth_says_so(files, capsys):
    assert evaluate(files) == 0
    assert evaluate(files, "--weight-key=", "--compare-with", str(files / "out"), out="b") == 0
    assert "evaluated with another ground truth" in capsys.readouterr().out
    assert evaluate(files, "--compare-with", str(files / "out"), out="c") == 0
    assert "evaluated with another ground truth" not in capsys.readouterr().out


def test_the_number_of_queries_and_how_they_were_chosen_are_said(files, capsys):
    assert evaluate(files, "--top-q=2") == 0
    assert "2 of 3 queries, drawn by weight; --top-q -1 takes all\n" in capsys.readouterr().out
    about = json.loads((files / "out" / "evaluation.json").read_text())
    assert (about["queries"], about["queries_in_file"]) == (2, 3)
    assert (about["lowest_grade"], about["highest_grade"]) == (10, 100)
    examples = json.loads((files / "out" / "examples.json").read_text())["examples"]
    grades = {(example["query"], found["id"]): found["grade"] for example in examples for found in example["found"]}
    assert grades["red thing_{!@#~}_", "2"] == 50, "as it was given, not rescaled"
    assert grades["red thing_{!@#~}_", "3"] is None


def test_holes_are_documents_that_no_query_has_judged(tmp_path):
    (tmp_path / "gt_results.json").write_text(json.dumps({"p": {"a": 3}, "q": {"b": 1}}))
    found = {"p": {"x": 0.9, "b": 0.8, "a": 0.7}, "q": {"b": 0.5}}  # b was judged, for the other query
    (tmp_path / "retrieval.json").write_text(json.dumps(found))
    assert main([f"--output-dir={tmp_path}", "--metric-only"]) == 0
    holes = json.loads((tmp_path / "output.json").read_text())["hole"]
    assert [holes[f"Hole@{k}"] for k in (1, 2, 4)] == [1 / 2, 1 / 4, 1 / 8]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "expected JSON, got"),
        ('{"q": {"d": 1.5}}', "expected JSON {query: {document: whole grade >= 0}}, got another structure"),
        ("{}", "expected at least one query, got none"),
        ('{"other": {"d": 1}}', "got 1 of 1 that it does not have, first 'other'"),
    ],
)
def test_a_ground_truth_that_cannot_be_used_is_one_line_and_status_2(files, capsys, content, fault):
    (files / "gt.json").write_text(content)
    assert evaluate(files, f"--gt_results_path={files / 'gt.json'}") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{files / 'gt.json'}: ")
    assert fault in message
    assert len(message.splitlines()) == 1


def test_queries_are_drawn_as_the_authors_draw_them(files, capsys):
    weight = {f"query {n}": n + 1 for n in reversed(range(12))}
    # What pandas 3.1 gives for .groupby("query").sum().sample(n=4, weights="weight", random_state=1).
    assert draw_queries(weight, 4) == ["query 3", "query 7", "query 0", "query 11"]
    assert draw_queries(weight, -1) == draw_queries(weight, 12) == sorted(weight)
    assert evaluate(files, "--top-q=1") == 0
    assert len(json.loads((files / "out" / "gt_results.json").read_text())) == 1
    with pytest.raises(SystemExit):
        evaluate(files, "--top-q=0")
    assert "--top-q: expected a number > 0, or -1 for all, got 0" in capsys.readouterr().err


@given(st.integers(0, 2**31), st.sampled_from([3, 40]), st.sampled_from([1, 100]))
def test_every_cut_is_that_of_trec_eval(tmp_path_factory, seed, top_k, largest):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec-eval-terrier is the oracle and is not installed")
    generator = torch.Generator().manual_seed(seed)
    documents = [f"d{number}" for number in range(60)]
    grades = {
        f"q{query}": {
            documents[place]: int(torch.randint(1, largest + 1, (), generator=generator))
            for place in torch.randperm(60, generator=generator)[: 1 + 9 * query].tolist()
        }
        for query in range(4)
    }
    ranking = torch.stack([torch.randperm(60, generator=generator)[:top_k] for _ in grades])
    folder = tmp_path_factory.mktemp("out")
    write_results(folder, grade(grades, documents, ranking), 1000, None)
    output = json.loads((folder / "output.json").read_text())
    cuts = ",".join(map(str, CUTS))
    oracle = pytrec_eval.RelevanceEvaluator(
        grades, {f"{name}.{cuts}" for name in ("ndcg_cut", "map_cut", "recall", "P")}
    )
    run = {
        query: {documents[place]: 1000.0 - rank for rank, place in enumerate(places)}
        for query, places in zip(grades, ranking.tolist(), strict=True)
    }
    expected = oracle.evaluate(run)
    names = {
        "ndcg": ("NDCG", "ndcg_cut"),
        "mAP": ("MAP", "map_cut"),
        "recall": ("Recall", "recall"),
        "precision": ("P", "P"),
    }
    for key, (ours, theirs) in names.items():
        for k in CUTS:
            mean = sum(of_query[f"{theirs}_{k}"] for of_query in expected.values()) / len(expected)
            assert output[key][f"{ours}@{k}"] == pytest.approx(mean, abs=1e-9), (key, k)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(60):
        values = torch.rand(40, generator=generator).numpy()
        low, high = bootstrap_interval(values)
        assert low < values.mean() < high
        held += low < 0.5 < high
    assert 52 <= held <= 60
    assert bootstrap_interval([0.3, 0.3]) == (0.3, 0.3)


def test_the_paired_test_is_exact_for_few_queries_and_sees_a_shift_only_where_there_is_one():
    # Of the 8 ways to sign three differences, two are as far from 0 as all of one sign.
    assert paired_test([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    assert paired_test([1, 1, 0, 0], [0, 0, 1, 1]) == 1
    assert paired_test([0.5] * 5, [0.5] * 5) == 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, generator=generator).numpy()
    base = torch.randn(100, generator=generator).numpy()
    assert paired_test(base + 0.2 * noise + 0.1, base) < 0.01
    assert paired_test(base + 0.2 * (noise - noise.mean()) + 0.001, base) > 0.5
