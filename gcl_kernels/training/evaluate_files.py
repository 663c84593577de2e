"""``python -m gcl_kernels.training.evaluate``: evaluate a model on files in the GCL authors' formats, with their flags.

    python -m gcl_kernels.training.evaluate --test_csv query_1_product_id_1.csv --doc-meta corpus_2.json \\
        --model_name ViT-B-32 --pretrained model.pt --weight_key score_linear --left-keys "['query']" \\
        --right-keys "['image_local', 'title']" --right-weights "[0.9, 0.1]" --img-or-txt "[['txt'], ['img', 'txt']]" \\
        --context-length "[[77], [0, 77]]" --output-dir results

Writes into the output directory: output.json and output.csv (means), per_query.csv, gt_results.json, retrieval.json,
features.pt, and examples.json for :mod:`gcl_kernels.training.report`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gcl_kernels.training.checkpoint import write_atomically
from gcl_kernels.training.data import DataError, InputError, Pairs, read_documents, read_pairs, shown
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.evaluate import (
    NOTHING,
    Corpus,
    Evaluation,
    embed,
    embed_corpus,
    grade,
    grades_of,
    known_documents,
    minmax_grades,
    search,
)
from gcl_kernels.training.memory import peak_memory
from gcl_kernels.training.metrics import average_precision, ndcg, precision, recall, reciprocal_rank
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.options import parse_kinds, parse_list, parse_weights, positive
from gcl_kernels.training.significance import bootstrap_interval, paired_test

CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200, 500, 1000)

EXAMPLES, EXAMPLE_DOCUMENTS = 12, 8
"""Queries, and ranks of each, in examples.json."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The authors' flags; lists are Python literals or comma-separated."""
    parser = argparse.ArgumentParser(
        prog="python -m gcl_kernels.training.evaluate", description="Evaluate an open_clip model after the GCL protocol",
    )  # fmt: skip
    parser.add_argument("--test_csv", metavar="FILE", help="judged pairs: CSV, TSV, Parquet or webdataset")
    parser.add_argument("--doc-meta", metavar="FILE", help="JSON {id: {field: value}}, the corpus")
    parser.add_argument("--model_name", default="ViT-B-32")
    parser.add_argument("--pretrained", help="open_clip's tag or a checkpoint file")
    parser.add_argument("--batch-size", type=positive(int), default=256)
    parser.add_argument("--num_workers", type=positive(int), default=4, help="threads that decode images")
    parser.add_argument("--weight_key", help="column of the score; default: every judged pair has grade 1")
    parser.add_argument("--left-keys", type=parse_list, default=["text"])
    parser.add_argument("--right-keys", type=parse_list, default=["image_local", "title"])
    parser.add_argument("--left-weights", type=parse_weights, default=[1.0])
    parser.add_argument("--right-weights", type=parse_weights, default=[0.9, 0.1])
    parser.add_argument("--img-or-txt", type=parse_kinds, default=[["txt"], ["img", "txt"]])
    parser.add_argument(
        "--context-length", type=parse_list, help="[[77], [0, 77]]; the largest counts, 0 is the model's own"
    )
    parser.add_argument("--top-q", type=int, default=2000,
                        help="queries drawn with the sum of their grades as weight, as the authors draw them; -1: all",
                        )  # fmt: skip
    parser.add_argument("--top-k", type=positive(int), default=1000, help="documents ranked for each query")
    parser.add_argument("--doc-id-key", default="product_id")
    parser.add_argument("--query-id-key", help="default: the left columns, each followed by _{!@#~}_")
    parser.add_argument(
        "--gt_results_path", type=Path, metavar="FILE", help="ground truth to use, or where to write it"
    )
    parser.add_argument(
        "--features-path", type=Path, metavar="FILE", help="default: features.pt in the output directory"
    )
    parser.add_argument("--overwrite-feature", action="store_true", help="embed the corpus again")
    parser.add_argument(
        "--overwrite-retrieval", action="store_true", help="accepted; retrieval.json is always of this run"
    )
    parser.add_argument("--run-queries-cpu", action="store_true", help="search on the CPU")
    parser.add_argument(
        "--metric-only", action="store_true", help="only metrics, of gt_results.json and retrieval.json"
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--compare-with", type=Path, metavar="DIR", help="another output directory: paired tests per metric"
    )
    args = parser.parse_args(argv)
    if not args.metric_only and not (args.test_csv and args.doc_meta):
        parser.error("expected --test_csv and --doc-meta, or --metric-only")
    if args.top_q < 1 and args.top_q != -1:
        parser.error(f"--top-q: expected a number > 0, or -1 for all, got {args.top_q}")
    for side, keys, weights, kinds in zip(
        ("left", "right"), (args.left_keys, args.right_keys), (args.left_weights, args.right_weights), args.img_or_txt,
        strict=True,
    ):  # fmt: skip
        if not len(keys) == len(weights) == len(kinds):
            parser.error(f"--{side}-keys, --{side}-weights and --img-or-txt: expected as many of each, got {len(keys)}, "
                         f"{len(weights)} and {len(kinds)}")  # fmt: skip
    args.gt_results_path = args.gt_results_path or args.output_dir / "gt_results.json"
    args.features_path = args.features_path or args.output_dir / "features.pt"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; input that cannot be used gives its message and status 2."""
    args = parse_args(argv)
    started = time.perf_counter()
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        evaluation = from_files(args) if args.metric_only else from_model(args)
        write_results(args.output_dir, evaluation, args.top_k, args.compare_with)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{time.perf_counter() - started:.0f} s, peak resident memory {peak_memory(torch.device('cpu')) / 2**20:.0f} MiB"
    )
    return 0


def from_model(args: argparse.Namespace) -> Evaluation:
    """Read, embed, search, grade; writes the ground truth, the ranking, the features and the examples."""
    left, right = (
        (dict(zip(keys, kinds, strict=True)), dict(zip(keys, weights, strict=True)))
        for keys, kinds, weights in zip(
            (args.left_keys, args.right_keys), args.img_or_txt, (args.left_weights, args.right_weights), strict=True
        )
    )
    # Only ids and scores of the documents are taken from the pairs; the corpus has their fields.
    pairs = read_pairs(
        args.test_csv, left[0], {args.doc_id_key: "txt"}, args.weight_key, query_id_key=args.query_id_key,
        document_id_key=args.doc_id_key, skip_bad_rows=True,
    )  # fmt: skip
    if pairs.bad_count:
        print(
            f"{args.test_csv}: {pairs.bad_count} bad rows skipped:", *shown(pairs.bad_rows, pairs.bad_count), sep="\n  "
        )
    documents = read_documents(args.doc_meta, right[0], check_images="none")
    known_documents(args.test_csv, pairs, documents)
    grades = ground_truth(args, pairs)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [length for side in args.context_length or [] for length in (side if isinstance(side, list) else [side])]
    model, tokenizer, preprocess = create_model(
        args.model_name,
        pretrained=args.pretrained,
        context_length=max(map(int, lengths), default=0) or None,
        device=device,
    )
    encoder = FieldEncoder(model, tokenizer, preprocess, workers=args.num_workers)
    row_of = {identity: row for row, identity in reversed(list(enumerate(pairs.query_ids)))}
    queries = {key: [cells[row_of[query]] for query in grades] for key, cells in pairs.left.items()}
    query_vectors = embed(encoder, queries, *left, batch_size=args.batch_size)
    corpus = features(args, encoder, documents, right)
    where = "cpu" if args.run_queries_cpu else device
    ranking, scores = search(query_vectors.to(where), corpus.embeddings.to(where), args.top_k)
    if encoder.lost:
        print(f"{len(encoder.lost)} images could not be read and were missing values")
    evaluation = grade(grades, corpus.document_ids, ranking.cpu(), scores.cpu())
    write_retrieval(args.output_dir / "retrieval.json", evaluation)
    write_examples(args.output_dir / "examples.json", evaluation, documents, right[0], queries)
    return evaluation


def ground_truth(args: argparse.Namespace, pairs: Pairs) -> dict[str, dict[str, int]]:
    """The grades given in a file, or those of the pairs, of ``--top-q`` queries and their ``--top-k`` best documents."""
    path: Path = args.gt_results_path
    if path.exists():
        grades = read_grades(path)
        known = set(pairs.query_ids)
        if missing := [query for query in grades if query not in known]:
            counts = f"{len(missing)} of {len(grades)}"
            message = (
                f"{path}: expected queries of {args.test_csv}, got {counts} that it does not have, first '{missing[0]}'"
            )
            if len(missing) == len(grades):
                raise DataError(message)
            print(f"{message}; left out")
        return {query: of_query for query, of_query in grades.items() if query in known}
    weight: dict[str, float] = {}
    for query, gain in zip(pairs.query_ids, minmax_grades(pairs.scores), strict=True):
        weight[query] = weight.get(query, 0) + gain
    queries = sorted(draw_queries(weight, args.top_q), key=lambda query: -weight[query])
    grades = {
        query: dict(sorted(of_query.items(), key=lambda item: -item[1])[: args.top_k])
        for query, of_query in grades_of(pairs, queries).items()
    }
    write_json(path, grades)
    return grades


def draw_queries(weight: Mapping[str, float], count: int) -> list[str]:
    """``count`` of the queries, drawn by weight without replacement; all of them where ``count`` is -1 or they are fewer.

    The draw is the authors': pandas' ``sample(n=count, weights=..., random_state=1)`` from queries in alphabetical order.
    """
    queries = sorted(weight)
    if count < 0 or count >= len(queries):
        return queries
    chances = np.array([weight[query] for query in queries], dtype=np.float64)
    drawn = np.random.RandomState(1).choice(len(queries), count, replace=False, p=chances / chances.sum())
    return [queries[place] for place in drawn]


def read_grades(path: Path) -> dict[str, dict[str, int]]:
    """A ground-truth file ``{query: {document: whole grade >= 0}}``."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(of_query, dict)
        and of_query
        and all(isinstance(gain, int) and gain >= 0 for gain in of_query.values())
        for of_query in content.values()
    ):
        raise DataError(f"{path}: expected JSON {{query: {{document: whole grade >= 0}}}}, got another structure")
    if not content:
        raise DataError(f"{path}: expected at least one query, got none")
    return content


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got '{error.strerror}'") from None
    except ValueError as error:
        raise DataError(f"{path}: expected JSON, got '{error}'") from None


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda new: new.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8"))


def features(
    args: argparse.Namespace, encoder: FieldEncoder, documents: dict[str, dict[str, str]], right: Any
) -> Corpus:
    """The corpus's embeddings, from the features file if it was made from the same things."""
    weights = Path(args.pretrained) if args.pretrained else None
    stamp = weights.stat().st_mtime_ns if weights and weights.exists() else 0
    made_from = [args.model_name, args.pretrained, stamp, args.context_length, args.doc_meta,
                 Path(args.doc_meta).stat().st_mtime_ns, list(right[0].items()), list(right[1].items())]  # fmt: skip
    made_from = json.dumps(made_from)
    if args.features_path.exists() and not args.overwrite_feature:
        try:
            content = torch.load(args.features_path, weights_only=True)
            if content["made_from"] == made_from:
                return Corpus(content["document_ids"], content["embeddings"])
            print(f"{args.features_path}: of another model or corpus; made again")
        except Exception:  # whatever torch.load says of a file that is none of ours
            print(f"{args.features_path}: cannot be read; made again")
    corpus = embed_corpus(encoder, documents, right, batch_size=args.batch_size)
    content = {"made_from": made_from, "document_ids": corpus.document_ids, "embeddings": corpus.embeddings.cpu()}
    write_atomically(args.features_path, lambda new: torch.save(content, new))
    return corpus


def write_retrieval(path: Path, evaluation: Evaluation) -> None:
    """``{query: {document: score}}``, best first, a query in memory at a time."""
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


def write_examples(path: Path, evaluation: Evaluation, documents: Any, kinds: dict[str, str], queries: Any) -> None:
    """What the first queries have found, with the cells of the documents, for the report."""
    examples = []
    for row, query in enumerate(evaluation.query_ids[:EXAMPLES]):
        text = " ".join(cells[row] for cells in queries.values())
        found = [
            {
                "id": evaluation.document_ids[position],
                "grade": int(gain),
                **documents[evaluation.document_ids[position]],
            }
            for position, gain in zip(
                evaluation.ranking[row, :EXAMPLE_DOCUMENTS].tolist(), evaluation.gains[row].tolist(), strict=False
            )
        ]
        examples.append({"query": query, "text": text, "found": found})
    write_json(path, {"kinds": kinds, "examples": examples})


def from_files(args: argparse.Namespace) -> Evaluation:
    """The metrics of a ground truth and a ranking that are there already."""
    grades, path = read_grades(args.gt_results_path), args.output_dir / "retrieval.json"
    found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(of_query, dict) for of_query in found.values()):
        raise DataError(f"{path}: expected JSON {{query: {{document: score}}}}, got another structure")
    if missing := [query for query in grades if query not in found]:
        print(
            f"{path}: expected a ranking for every query, got none for {len(missing)}, first '{missing[0]}'; they score 0"
        )
    documents = list(dict.fromkeys(document for query in grades for document in found.get(query, ())))
    place = {document: number for number, document in enumerate([*documents, NOTHING])}
    width = max((len(found.get(query, ())) for query in grades), default=0)
    ranking = torch.full((len(grades), width), place[NOTHING])
    for row, query in enumerate(grades):
        # Equal scores stay in the order of the file.
        best = sorted(found.get(query, {}).items(), key=lambda item: -item[1])
        ranking[row, : len(best)] = torch.tensor([place[document] for document, _ in best], dtype=torch.int64)
    return grade(grades, [*documents, NOTHING], ranking)


def write_results(folder: Path, evaluation: Evaluation, top_k: int, compare_with: Path | None) -> None:
    """output.json, output.csv and per_query.csv, and a table on the screen."""
    gains, judged = evaluation.gains, evaluation.judged
    cuts = [k for k in CUTS if k <= top_k]
    mean = lambda values: float(values.mean())  # noqa: E731
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
    output: dict[str, Any] = {
        "mAP": {f"MAP@{k}": mean(average_precision(gains, judged, k)) for k in cuts},
        "ndcg": {f"NDCG@{k}": mean(ndcg(gains, judged, k)) for k in cuts},
        "precision": {f"P@{k}": mean(precision(gains, judged, k)) for k in cuts},
        "recall": {f"Recall@{k}": mean(recall(gains, judged, k)) for k in cuts},
        "mrr": {f"MRR@{k}": mean(reciprocal_rank(gains[:, :k], judged)) for k in cuts},
        "hole": {f"Hole@{k}": mean(evaluation.holes[:, :k].sum(dim=1) / k) for k in cuts},
        "acc": {f"Accuracy@{k}": mean((gains[:, :k] > 0).any(dim=1).double()) for k in cuts},
        "summary": summary,
        "queries": len(evaluation.query_ids),
        "interval": {name: bootstrap_interval(values.numpy()) for name, values in evaluation.per_query.items()},
    }
    write_per_query(folder / "per_query.csv", evaluation)
    other = read_per_query(compare_with / "per_query.csv") if compare_with else {}
    print(f"{'metric':<10} {'mean':>7}  95% interval" + (f"   {compare_with}, difference, p" if compare_with else ""))
    comparison = {}
    for name, values in evaluation.per_query.items():
        low, high = output["interval"][name]
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
        output["comparison"] = {"with": str(compare_with), **comparison}
    write_json(folder / "output.json", output)

    def write(new: Path) -> None:
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, summary)
            writer.writeheader()
            writer.writerow(summary)

    write_atomically(folder / "output.csv", write)


def write_per_query(path: Path, evaluation: Evaluation) -> None:
    def write(new: Path) -> None:
        with new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query", *evaluation.per_query])
            for query, values in evaluation.rows().items():
                writer.writerow([query, *values.values()])

    write_atomically(path, write)


def read_per_query(path: Path) -> dict[str, dict[str, float]]:
    """``{query: {metric: value}}`` of a per_query.csv."""
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
