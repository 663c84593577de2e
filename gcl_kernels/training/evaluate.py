"""`python -m gcl_kernels.training.evaluate`: evaluate a model on files in the GCL authors' formats, with their flags.

    python -m gcl_kernels.training.evaluate --test_csv query_1_product_id_1.csv --doc-meta corpus_2.json \\
        --model_name ViT-B-32 --pretrained model.pt --weight_key score_linear --left-keys "['query']" \\
        --right-keys "['image_local', 'title']" --right-weights "[0.9, 0.1]" --img-or-txt "[['txt'], ['img', 'txt']]" \\
        --context-length "[[77], [0, 77]]" --output-dir results

Writes into the output directory: output.json and output.csv (means), per_query.csv, gt_results.json, retrieval.json,
features.pt, and examples.json for `gcl_kernels.training.report`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training.data import read_documents, read_pairs, shown
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.errors import DataError, InputError
from gcl_kernels.training.evaluation_files import write_examples, write_results, write_retrieval
from gcl_kernels.training.files import read_json, write_atomically
from gcl_kernels.training.ground_truth import ground_truth, read_grades
from gcl_kernels.training.memory import peak_memory, shown_peak
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.options import Parser, parse_kinds, parse_list, parse_weights, positive
from gcl_kernels.training.ranking import (
    NOTHING,
    Corpus,
    Evaluation,
    embed,
    embed_corpus,
    grade,
    known_documents,
    search,
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The authors' flags; lists are Python literals or comma-separated."""
    parser = Parser(
        "gcl_kernels.training.evaluate", description="Evaluate an open_clip model after the GCL protocol",
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
    print(f"{time.perf_counter() - started:.0f} s, {shown_peak(peak_memory(torch.device('cpu')))}")
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


if __name__ == "__main__":
    sys.exit(main())
