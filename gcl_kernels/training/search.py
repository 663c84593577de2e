"""`python -m gcl_kernels.training.search`: search a corpus in the terminal with a trained model.

    python -m gcl_kernels.training.search "red shoe" --pretrained logs/first/checkpoints/best.pt --corpus corpus.json

Without a query it reads them from standard input, one a line. The corpus is embedded the first time; its vectors are kept in
--folder, and used again for the same model and documents alone. Without --index the search is exact, and up to a million
documents it is so by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcl_kernels.training import command, indexes, made_from
from gcl_kernels.training.data.faults import one_line
from gcl_kernels.training.embeddings_out import FORMS, export
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.options import Parser, parse_kinds, parse_list, parse_weights, positive
from gcl_kernels.training.search_model import SearchModel
from gcl_kernels.training.searching import Hit, Searcher

INDEXED_FROM = 1_000_000
"""Documents from which `--index auto` takes an index."""

LONGEST_TITLE = 100
"""Characters of a title that are shown."""

MEASURED = 100
"""Queries of a session on which an index is held against the exact search."""


def named_value(text: str) -> tuple[str, str]:
    """An argparse type: `NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text}")
    return name.strip(), value.strip()


def named_weights(text: str) -> dict[str, float]:
    """An argparse type: `title=0.3,image=0.7`."""
    try:
        pairs = dict(named_value(part) for part in text.split(","))
        return {name: float(value) for name, value in pairs.items()}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=WEIGHT,NAME=WEIGHT, got {text}") from None


def add_model_options(made: argparse.ArgumentParser) -> None:
    """The options that say which model it is; `load_model` reads them."""
    model = made.add_argument_group("model; what is left out is as the checkpoint was trained, if it says so")
    model.add_argument("--pretrained", required=True, help="a checkpoint file, or open_clip's tag")
    model.add_argument("--model", "--model-name", help="default: as trained, else ViT-B-32")
    add_field_options(model)


def add_field_options(model: Any) -> None:
    """The options of a group that say which fields a model's checkpoint was trained with, where it does not."""
    model.add_argument("--left-keys", type=parse_list, help="fields of the query; default: as trained, else text")
    model.add_argument("--right-keys", type=parse_list,
                       help="fields of the document; default: as trained, else image_local,title")  # fmt: skip
    model.add_argument("--left-weights", type=parse_weights, help="default: as trained, else equal")
    model.add_argument("--right-weights", type=parse_weights, help="default: as trained, else equal")
    model.add_argument("--img-or-txt", type=parse_kinds, metavar="KINDS",
                       help="txt;txt,img: kinds of the query's and the document's fields; default: as trained, else img "
                       "where the name contains 'image' or 'img'")  # fmt: skip
    model.add_argument("--context-length", type=positive(int), help="default: as trained")
    model.add_argument("--workers", type=positive(int), default=4, help="threads that decode images (default 4)")


def add_corpus_options(made: argparse.ArgumentParser) -> Any:
    """The options that say which documents are searched, and how; `opened` reads them. Returns their group."""
    corpus = made.add_argument_group("corpus")
    corpus.add_argument("--corpus", "--doc-meta", required=True, metavar="FILE",
                        help="JSON {id: {field: value}}, or CSV, TSV, Parquet or webdataset with a document a row")  # fmt: skip
    corpus.add_argument(
        "--doc-id-key", help="column that identifies the document, of a file of rows; default: by its name"
    )
    corpus.add_argument("--csv-separator", help="default: a tab for .tsv, else a comma")
    corpus.add_argument("--folder", type=Path, metavar="DIR",
                        help="where the vectors are kept; default: one in .gcl-search for each corpus and model")  # fmt: skip
    corpus.add_argument(
        "--batch-size", type=positive(int), default=256, help="documents embedded at a time (default 256)"
    )
    corpus.add_argument("--index", choices=("auto", "none", *indexes.KINDS), default="auto",
                        help=f"none: exact; faiss, hnswlib: approximate, and its recall is printed; auto: exact below "
                        f"{INDEXED_FROM:,} documents, and above it the one that is installed (default auto)")  # fmt: skip
    return corpus


def load_model(args: argparse.Namespace) -> SearchModel:
    return SearchModel.load(
        args.pretrained, model=args.model, left_keys=args.left_keys, right_keys=args.right_keys,
        left_weights=args.left_weights, right_weights=args.right_weights, img_or_txt=args.img_or_txt,
        context_length=args.context_length, workers=args.workers,
    )  # fmt: skip


def parser() -> Parser:
    made = Parser("gcl_kernels.training.search", description="Search a corpus with a trained model")
    made.add_argument("query", nargs="?", help="default: standard input, one query a line")
    made.add_argument("--image", metavar="FILE", help="a picture to search by, alone or with the text")
    made.add_argument("--query-field", type=named_value, action="append", default=[], metavar="NAME=VALUE",
                      help="another field of the query; may be repeated")  # fmt: skip
    made.add_argument("--query-weights", type=named_weights, metavar="NAME=WEIGHT,...",
                      help="of the query's fields, which are text and image unless the model names others: "
                      "text=0.7,image=0.3; default: as trained, else 1")  # fmt: skip
    made.add_argument("--weights", type=named_weights, metavar="NAME=WEIGHT,...",
                      help="of the documents' fields, for this search: title=0.3,image=0.7; default: as trained")  # fmt: skip
    made.add_argument("--where", type=named_value, action="append", default=[], metavar="COLUMN=VALUE",
                      help="only documents with this value; of one column several times: any of them")  # fmt: skip
    made.add_argument("--top-k", type=positive(int), default=10, help="documents shown (default 10)")
    made.add_argument("--show", type=parse_list, default=[], metavar="COLUMNS", help="columns printed beside the title")
    made.add_argument("--json", action="store_true", help="a JSON object a line for each query")

    corpus = add_corpus_options(made)
    corpus.add_argument(
        "--export", choices=tuple(FORMS), help="write ids and vectors, and search only if there is a query"
    )
    corpus.add_argument(
        "--out", type=Path, metavar="FILE", help="of --export; default: embeddings and the form's ending"
    )
    add_model_options(made)
    return made


def opened(args: argparse.Namespace, columns: Sequence[str], say: Any) -> tuple[Searcher, Path]:
    """The searcher that the options ask for, and the folder of its vectors."""
    model = load_model(args)
    for line in model.notes:
        say(line)
    name = made_from.short_id(f"{Path(args.corpus).absolute()} {Path(args.pretrained).absolute()}")[:8]
    folder = args.folder or Path(".gcl-search") / f"{Path(args.corpus).stem}-{Path(args.pretrained).stem}-{name}"
    started = time.perf_counter()
    searcher = Searcher.load(
        model, args.corpus, folder=folder, columns=columns, document_id_key=args.doc_id_key,
        separator=args.csv_separator, batch_size=args.batch_size, say=say,
    )  # fmt: skip
    say(f"{args.corpus}: {len(searcher)} documents of {searcher.vectors.shape[1]} dimensions, "
        f"{time.perf_counter() - started:.1f} s; vectors in {folder}")  # fmt: skip
    kind = args.index
    if kind == "auto":
        kind = (indexes.available() if len(searcher) >= INDEXED_FROM else None) or "none"
        if kind == "none" and len(searcher) >= INDEXED_FROM:
            say("exact search, as neither faiss nor hnswlib is installed")
    if kind != "none":
        searcher.use_index(kind, folder=folder, k=args.top_k, say=say)
    return searcher, folder


def line_of(searcher: Searcher, hit: Hit, shown: Sequence[str]) -> str:
    """A document as the terminal shows it; what is not printable is escaped."""
    title, document = searcher.title(hit.position), searcher.document(hit.position)
    short = title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 1]}…"
    more = [f"{column}={document[column][:LONGEST_TITLE]}" for column in shown if document[column]]
    return one_line(
        "  ".join(
            [
                f"{hit.score:7.4f}",
                short,
                *([] if title == hit.document_id else [f"[{hit.document_id[:LONGEST_TITLE]}]"]),
                *more,
            ]
        )
    )


def search(args: argparse.Namespace) -> None:
    """Open the corpus, export it if asked to, and answer queries."""
    # With --json standard output holds results alone.
    say = lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)  # noqa: E731
    where: dict[str, list[str]] = {}
    for column, value in args.where:
        where.setdefault(column, []).append(value)
    for kind in (args.index, args.export):
        if kind in indexes.KINDS:
            indexes.expect(kind)
    searcher, _ = opened(args, list(dict.fromkeys([*where, *args.show])), say)
    if where:
        say(f"{int(searcher.matching(where).sum())} of {len(searcher)} documents have "
            f"{', '.join(f'{column}={value}' for column, value in args.where)}")  # fmt: skip
    if args.export:
        files = export(searcher, args.export, args.out or Path(f"embeddings{FORMS[args.export]}"))
        say(f"{args.export}: {len(searcher)} vectors in {' and '.join(map(str, files))}")

    kinds = searcher.model.left[0]
    names = searcher.model.query_keys
    weights: dict[str, float] = args.query_weights or {}
    fixed = {**dict(args.query_field), **({names["image"]: args.image} if args.image else {})}
    query_weights = {names.get(key, key): value for key, value in weights.items()} or None
    if unknown := set(query_weights or ()) - {*kinds, *names.values()}:
        raise InputError(f"--query-weights: expected fields among {[*kinds, *names]}, got {sorted(unknown)}")
    asked = []

    def answer(text: str) -> None:
        values = {**fixed, **({names["text"]: text} if text else {})}
        started = time.perf_counter()
        vector = searcher.model.embed_query(values, query_weights)
        embedded = time.perf_counter()
        hits = searcher.search(vector, args.top_k, weights=args.weights, where=where or None)
        ended = time.perf_counter()
        if len(asked) < MEASURED:
            asked.append(vector)
        if args.json:
            found = [
                {"id": hit.document_id, "score": hit.score, "title": searcher.title(hit.position), **{
                    column: searcher.document(hit.position)[column] for column in args.show}}
                for hit in hits
            ]  # fmt: skip
            print(json.dumps({"query": values, "results": found}, ensure_ascii=False), flush=True)
            return
        what = ", ".join(values.values())
        print(
            f"\n{one_line(what)}  ({1e3 * (embedded - started):.0f} ms to embed, {1e3 * (ended - embedded):.1f} ms to search)"
        )
        for rank, hit in enumerate(hits, 1):
            print(f"{rank:3} {line_of(searcher, hit, args.show)}")
        if not hits:
            print("    nothing found")
        sys.stdout.flush()

    if args.query is not None or fixed:
        answer((args.query or "").strip())
    elif not args.export:
        interactive = sys.stdin.isatty()
        while True:
            if interactive:
                print("\nquery (empty to end): ", end="", flush=True)
            line = sys.stdin.readline()
            if not line or (interactive and not line.strip()):
                break
            if not line.strip():
                continue
            try:
                answer(line.strip())
            except InputError as error:  # one bad line does not end the others
                print(error, file=sys.stderr)
    if searcher.index is not None and asked:
        recalls = sum(searcher.recall(vector[None], args.top_k) for vector in asked) / len(asked)
        say(f"index of {searcher.index.kind}: recall@{args.top_k} {recalls:.3f} of the exact search, over the {len(asked)} "
            f"queries asked")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the command line says; input that cannot be used gives its message and status 2."""
    args = parser().parse_args(argv)
    return command.run(lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
