"""`python -m gcl_kernels.training.evaluate`: evaluate a model on files in the GCL authors' formats, with their flags.

    python -m gcl_kernels.training.evaluate --test_csv query_1_product_id_1.csv --doc-meta corpus_2.json \\
        --model_name ViT-B-32 --pretrained model.pt --weight_key score_linear --left-keys "['query']" \\
        --right-keys "['image_local', 'title']" --right-weights "[0.9, 0.1]" --img-or-txt "[['txt'], ['img', 'txt']]" \\
        --context-length "[[77], [0, 77]]" --output-dir results

A checkpoint of `gcl_kernels.training` says how it was trained: then `--test_csv`, `--doc-meta`, `--pretrained` and
`--output-dir` are enough.

Writes into the output directory: output.json and output.csv (means), per_query.csv, evaluation.json (what was evaluated,
intervals, comparison), gt_results.json, retrieval.json, features.pt, and examples.json for `gcl_kernels.training.report`.
Of these only features.pt is used again, by the same model on the same corpus.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training import made_from
from gcl_kernels.training.data import Pairs, image_fault, read_documents, read_pairs, shown
from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.errors import DataError, InputError
from gcl_kernels.training.evaluate_options import parse_args
from gcl_kernels.training.evaluation_files import read_about, write_results, write_retrieval
from gcl_kernels.training.examples import write_examples
from gcl_kernels.training.files import make_folder, read_json, write_atomically
from gcl_kernels.training.ground_truth import NAME, ground_truth, read_grades
from gcl_kernels.training.memory import peak_memory, shown_peak
from gcl_kernels.training.openclip import create_model
from gcl_kernels.training.ranking import (
    NOTHING,
    Corpus,
    Evaluation,
    Grades,
    embed,
    embed_corpus,
    fullest_rows,
    grade,
    known_documents,
    say_contradictions,
    search,
)
from gcl_kernels.training.scaling import spread
from gcl_kernels.training.trained import longest

Documents = Mapping[str, Mapping[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; input that cannot be used gives its message and status 2."""
    args = parse_args(argv)
    started = time.perf_counter()
    try:
        for folder in {args.output_dir, *(path.parent for path in (args.gt_results_path, args.features_path) if path)}:
            make_folder(folder)
        evaluation, about = from_files(args) if args.metric_only else from_model(args)
        write_results(args.output_dir, evaluation, args.top_k, args.compare_with, about)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or args.output_dir}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - started:.0f} s, {shown_peak(peak_memory(torch.device('cpu')))}")
    return 0


def from_model(args: argparse.Namespace) -> tuple[Evaluation, dict[str, Any]]:
    """Read, embed, search, grade; writes the ground truth, the ranking, the features and the examples."""
    left, right = (
        (dict(zip(keys, kinds, strict=True)), dict(zip(keys, weights, strict=True)))
        for keys, kinds, weights in zip(
            (args.left_keys, args.right_keys), args.img_or_txt, (args.left_weights, args.right_weights), strict=True
        )
    )
    for line in args.notes:
        print(line)
    pairs = judged_pairs(args, left[0])
    documents = read_documents(
        args.doc_meta, right[0], check_images="none", skip_bad_rows=True, image_root=args.image_root
    )
    known_documents(args.test_csv, pairs, documents)
    scaled = spread(torch.tensor(pairs.scores, dtype=torch.float64), args.score_scaling).tolist()
    grades, given, which = ground_truth(args, replace(pairs, scores=scaled))
    queries_in_file = len(set(pairs.query_ids))
    if len(grades) < queries_in_file:
        print(f"{len(grades)} of {queries_in_file} queries, {which}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)  # random weights are at least the same ones each time
    model, tokenizer, preprocess = create_model(
        args.model_name, pretrained=args.pretrained, context_length=longest(args.context_length), device=device
    )
    encoder = FieldEncoder(model, tokenizer, preprocess, workers=args.num_workers)
    kinds = right[0]
    parts = {
        **made_from.corpus_parts(model, tokenizer, preprocess, documents, kinds),
        "fields": [[key, kinds[key], right[1][key]] for key in kinds],
    }
    corpus = features(args, encoder, parts, documents, right)
    row_of = fullest_rows(pairs.query_ids, pairs.left)
    queries = {key: [cells[row_of[query]] for query in grades] for key, cells in pairs.left.items()}
    query_vectors = embed(encoder, queries, *left, batch_size=args.batch_size)
    where = "cpu" if args.run_queries_cpu else device
    ranking, scores = search(query_vectors.to(where), corpus.embeddings.to(where), args.top_k)
    if encoder.lost:
        print(f"{len(encoder.lost)} images could not be read and were missing values")
    evaluation = grade(grades, corpus.document_ids, ranking.cpu(), scores.cpu())

    scale = [gain for of_query in grades.values() for gain in of_query.values()] if given else pairs.scores
    about = {
        "test_csv": args.test_csv, "doc_meta": args.doc_meta, "model": args.model_name, "pretrained": args.pretrained,
        "step": args.training.get("step"), "queries_in_file": queries_in_file, "queries_are": which,
        "documents": len(documents), "lowest_grade": min(scale), "highest_grade": max(scale),
        "ground_truth": made_from.digest([grades]),
    }  # fmt: skip
    path = args.output_dir / RANKING
    write_retrieval(path, evaluation)
    made_from.record(path, {**asked(args), **parts, "ground truth": about["ground_truth"]})
    texts = [" ".join(filter(None, cells)) for cells in zip(*queries.values(), strict=True)]
    write_examples(
        args.output_dir / "examples.json", evaluation, documents, kinds, texts, None if given else pairs, about=about
    )
    return evaluation, about


def judged_pairs(args: argparse.Namespace, left: dict[str, str]) -> Pairs:
    """The judged pairs: of the documents their ids alone, as the corpus has their fields."""
    pairs = read_pairs(
        args.test_csv, left, {args.doc_id_key: "txt"}, args.weight_key, query_id_key=args.query_id_key,
        document_id_key=args.doc_id_key, skip_bad_rows=True, separator=args.csv_separator, dataset_type=args.dataset_type,
        image_root=args.image_root,
    )  # fmt: skip
    if pairs.bad_count:
        print(
            f"{args.test_csv}: {pairs.bad_count} bad rows skipped:", *shown(pairs.bad_rows, pairs.bad_count), sep="\n  "
        )
    say_contradictions(args.test_csv, pairs)
    return pairs


def features(
    args: argparse.Namespace, encoder: FieldEncoder, parts: made_from.Parts, documents: Documents, right: Any
) -> Corpus:
    """The corpus's embeddings: from the features file if it was made from the same things, else made again.

    Raises:
        InputError: a file that is not this evaluator's, or one given by hand that was made from other things; neither is
            overwritten unless `--overwrite-feature` says so.
    """
    path = args.features_path or args.output_dir / "features.pt"
    if path.exists() and not args.overwrite_feature:
        keep = "--overwrite-feature replaces it, another --features-path keeps it"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            then, lost = content["made_from"], content.get("lost", {})
            corpus = Corpus(content["document_ids"], content["embeddings"])
        except Exception:  # whatever torch.load says of a file that is none of ours
            raise InputError(
                f"{path}: expected features of this evaluator, got a file that it cannot read; {keep}"
            ) from None
        other = made_from.difference(then, parts) if isinstance(then, dict) else "what it was made from is not known"
        readable = sum(image_fault(image) is None for image in lost) if not other else 0
        if readable:
            other = f"{readable} images that can be read now"
        if not other:
            print(f"{path}: used again, {len(corpus.document_ids)} documents")
            encoder.lost.update(lost)
            return corpus
        if args.features_path:
            raise InputError(f"{path}: expected features of the same model and corpus, got others: {other}; {keep}")
        print(f"{path}: made again: {other}")
    before = set(encoder.lost)
    corpus = embed_corpus(encoder, documents, right, batch_size=args.batch_size)
    content = {
        "made_from": parts, "document_ids": corpus.document_ids, "embeddings": corpus.embeddings.cpu(),
        "lost": {image: fault for image, fault in encoder.lost.items() if image not in before},
    }  # fmt: skip
    write_atomically(path, lambda new: torch.save(content, new))
    return corpus


RANKING = "retrieval.json"


def asked(args: argparse.Namespace) -> made_from.Parts:
    """What the command line asks for, as far as a ranking depends on it; files by their content."""

    def content(path: str | None) -> str | None:
        return made_from.digest_of_file(Path(path)) if path and Path(path).exists() else path

    parts = {
        "--test-csv": content(args.test_csv),
        "--doc-meta": content(args.doc_meta),
        "--pretrained": content(args.pretrained),
    }
    names = ("model_name", "left_keys", "right_keys", "left_weights", "right_weights", "img_or_txt", "context_length",
             "weight_key", "doc_id_key", "query_id_key", "top_q", "top_k")  # fmt: skip
    return parts | {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}


def from_files(args: argparse.Namespace) -> tuple[Evaluation, dict[str, Any]]:
    """The metrics of a ground truth and a ranking that are there already."""
    truth, path = args.gt_results_path or args.output_dir / NAME, args.output_dir / RANKING
    grades, found = read_grades(truth), read_json(path)
    if not isinstance(found, dict) or not all(isinstance(of_query, dict) for of_query in found.values()):
        raise DataError(f"{path}: expected JSON {{query: {{document: score}}}}, got another structure")
    check_ranking(args, path, truth, grades)
    if missing := [query for query in grades if query not in found]:
        print(
            f"{path}: expected a ranking for every query, got none for {len(missing)}, first '{missing[0]}'; they score 0"
        )
    documents = sorted({document for query in grades for document in found.get(query, ())}, reverse=True)
    place = {document: number for number, document in enumerate([*documents, NOTHING])}
    width = max((len(found.get(query, ())) for query in grades), default=0)
    ranking = torch.full((len(grades), width), place[NOTHING])
    for row, query in enumerate(grades):
        # Equal scores by document id, descending, as in the ranking itself.
        best = sorted(found.get(query, {}).items(), key=lambda item: (-item[1], place[item[0]]))
        ranking[row, : len(best)] = torch.tensor([place[document] for document, _ in best], dtype=torch.int64)
    about = {**read_about(args.output_dir), "ground_truth": made_from.digest([grades])}
    return grade(grades, [*documents, NOTHING], ranking), about


def check_ranking(args: argparse.Namespace, path: Path, truth: Path, grades: Grades) -> None:
    """Refuse a ranking that was made for other options than are given, or beside another run's ground truth."""
    then = made_from.recorded(path)
    if then is None:
        print(f"{path}: nothing says what it was made from; taken as it is")
        return
    given = {name: value for name, value in asked(args).items() if name.lstrip("-").replace("-", "_") in args.given}
    if other := made_from.difference({name: then.get(name) for name in given}, given):
        raise InputError(f"{path}: expected a ranking made from the same things, got one that differs in {other}; "
                         f"without --metric-only it is made again")  # fmt: skip
    if then.get("ground truth") != made_from.digest([grades]):
        if not args.gt_results_path and made_from.recorded(truth) is not None:
            raise InputError(f"{truth}: expected the ground truth that {path.name} was made with, got that of another run; "
                             f"without --metric-only both are made again")  # fmt: skip
        print(f"{truth}: not the ground truth that {path.name} was made with; taken as given")


if __name__ == "__main__":
    sys.exit(main())
