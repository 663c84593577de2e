"""The files that the evaluation command writes: means, metrics of each query, the ranking, and what was evaluated."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gcl_kernels.training.errors import DataError
from gcl_kernels.training.files import read_json, write_atomically, write_json_atomically
from gcl_kernels.training.metrics import average_precision, ndcg, precision, recall, reciprocal_rank
from gcl_kernels.training.ranking import Evaluation, mean
from gcl_kernels.training.significance import bootstrap_interval, paired_test

CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 500, 1000)

ABOUT = "evaluation.json"
"""What was evaluated, with intervals and comparison; output.json has nothing that the GCL authors' has not."""


def write_retrieval(path: Path, evaluation: Evaluation) -> None:
    """`{query: {document: score}}`, best first, a query in memory at a time."""
    assert evaluation.scores is not None
    rows = zip(evaluation.query_ids, evaluation.ranking, evaluation.scores, strict=True)

    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8") as file:
            for number, (query, positions, scores) in enumerate(rows):
                found = {
                    evaluation.document_ids[position]: score
                    for position, score in zip(positions.tolist(), scores.tolist(), strict=True)
                }
                file.write(f"{'{' if number == 0 else ', '}{json.dumps(query)}: {json.dumps(found)}")
            file.write("}")

    write_atomically(path, write)


def write_results(
    folder: Path, evaluation: Evaluation, top_k: int, compare_with: Path | None, about: Mapping[str, Any] | None = None
) -> None:
    """output.json, output.csv, per_query.csv and evaluation.json, and a table on the screen."""
    gains, judged = evaluation.gains, evaluation.judged
    cuts = [k for k in CUTS if k <= top_k]
    last = cuts[-1]
    summary = {
        f"mAP@{last}": mean(average_precision(gains, judged, last)),
        f"mrr@{last}": mean(reciprocal_rank(gains[:, :last], judged)),
        "NDCG@10": evaluation.means["NDCG@10"],
        "mERR": evaluation.means["ERR"],
        "mRBP7": evaluation.means["RBP.7"],
        "mRBP8": evaluation.means["RBP.8"],
        "mRBP9": evaluation.means["RBP.9"],
    }
    output = {
        "mAP": {f"MAP@{k}": mean(average_precision(gains, judged, k)) for k in cuts},
        "ndcg": {f"NDCG@{k}": mean(ndcg(gains, judged, k)) for k in cuts},
        "precision": {f"P@{k}": mean(precision(gains, judged, k)) for k in cuts},
        "recall": {f"Recall@{k}": mean(recall(gains, judged, k)) for k in cuts},
        "mrr": {f"MRR@{k}": mean(reciprocal_rank(gains[:, :k], judged)) for k in cuts},
        "hole": {f"Hole@{k}": mean(evaluation.holes[:, :k].sum(dim=1) / k) for k in cuts},
        "acc": {f"Accuracy@{k}": mean((gains[:, :k] > 0).any(dim=1).double()) for k in cuts},
        "summary": summary,
    }
    intervals = {name: bootstrap_interval(values.numpy()) for name, values in evaluation.per_query.items()}
    write_per_query(folder / "per_query.csv", evaluation)
    other = read_per_query(compare_with / "per_query.csv") if compare_with else {}
    print(f"{'metric':<10} {'mean':>7}  95% interval" + (f"   {compare_with}, difference, p" if compare_with else ""))
    comparison: dict[str, Any] = {}
    for name, values in evaluation.per_query.items():
        low, high = intervals[name]
        line = f"{name:<10} {evaluation.means[name]:7.4f}  [{low:.4f}, {high:.4f}]"
        shared = [row for row, query in enumerate(evaluation.query_ids) if query in other and name in other[query]]
        if shared:
            ours = values[shared].numpy()
            theirs = np.array([other[evaluation.query_ids[row]][name] for row in shared])
            comparison[name] = {
                "queries": len(shared), "ours": float(ours.mean()), "theirs": float(theirs.mean()),
                "interval": bootstrap_interval(ours - theirs), "p": paired_test(ours, theirs),
            }  # fmt: skip
            of_name = comparison[name]
            line += f"   {of_name['theirs']:.4f}, {of_name['ours'] - of_name['theirs']:+.4f}, p = {of_name['p']:.4f}"
        print(line)
    if compare_with:
        shared = sum(query in other for query in evaluation.query_ids)
        print(f"{shared} of {len(evaluation.query_ids)} queries are in both")
        theirs = read_about(compare_with).get("ground_truth")
        if about and theirs and theirs != about["ground_truth"]:
            print(f"{compare_with}: evaluated with another ground truth; differences are of that, too")
    write_json_atomically(folder / "output.json", output)
    content = {
        **(about or {}), "date": time.strftime("%Y-%m-%d %H:%M"), "queries": len(evaluation.query_ids), "interval": intervals,
    }  # fmt: skip
    if compare_with:
        content["comparison"] = {"with": str(compare_with), **comparison}
    write_json_atomically(folder / ABOUT, content, indent=1)

    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, summary)
            writer.writeheader()
            writer.writerow(summary)

    write_atomically(folder / "output.csv", write)


def read_about(folder: Path) -> dict[str, Any]:
    """What the evaluation.json of an output directory says; {} where there is none."""
    path = folder / ABOUT
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got another structure")
    return content


def write_per_query(path: Path, evaluation: Evaluation) -> None:
    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query", *evaluation.per_query])
            for query, values in evaluation.rows().items():
                writer.writerow([query, *values.values()])

    write_atomically(path, write)


def read_per_query(path: Path) -> dict[str, dict[str, float]]:
    """`{query: {metric: value}}` of a per_query.csv."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {
                row["query"]: {name: float(value) for name, value in row.items() if name != "query"}
                for row in csv.DictReader(file)
            }
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'") from None
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: expected a per_query.csv of this evaluator, got another file") from None
