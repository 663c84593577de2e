"""`python -m gcl_kernels.training.split`: the four sets of the GCL protocol from one file of scored pairs.

    python -m gcl_kernels.training.split pairs.csv --out split

80% of the queries and 50% of the documents are those of training, drawn by a seed, whatever the order of the rows. Their
pairs are the training set, in_domain.csv; the other three sets have new queries, new documents, or both. Of each of these a
part goes to a validation file, whose queries the test file does not have.

Writes, into the output directory, the CSV files, the two corpora (train_documents.json, novel_documents.json) and
split.json, which says what was done. Prints the commands that train and evaluate on them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcl_kernels.training import command, made_from
from gcl_kernels.training.data import DOCUMENT_IDS, Columns, PairFile, columns_in, first_of, shown
from gcl_kernels.training.data.documents import emptier
from gcl_kernels.training.data.tables import listed
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.files import make_folder, write_json_atomically
from gcl_kernels.training.options import Parser, parse_kinds, parse_list
from gcl_kernels.training.splits import CORPORA, MANIFEST, SPLITS, novelty, stem_of, write_corpus, write_pairs
from gcl_kernels.training.train_options import kinds_by_name

AT_ONCE = 4096
"""Rows in memory at a time."""


def share(text: str) -> float:
    """An argparse type: a number from 0 up to, not including, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share >= 0 and < 1, got {text}")
    return value


def parser() -> Parser:
    made = Parser(
        "gcl_kernels.training.split", description="The four sets of the GCL protocol from one file of scored pairs"
    )
    made.add_argument("pairs", metavar="FILE", help="CSV, TSV, Parquet or webdataset, as training reads them")
    made.add_argument("--out", type=Path, default=Path("split"), metavar="DIR", help="default: split")
    made.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    made.add_argument("--train-queries", type=share, default=0.8, metavar="SHARE", help="default 0.8")
    made.add_argument("--train-documents", type=share, default=0.5, metavar="SHARE", help="default 0.5")
    made.add_argument("--validation", type=share, default=0.25, metavar="SHARE",
                      help="of the queries of the three held-out sets, those that go to their validation files instead of the "
                      "test files; 0: no validation files (default 0.25)")  # fmt: skip
    made.add_argument("--left-keys", type=parse_list, help="columns of the query; default: query")
    made.add_argument("--right-keys", type=parse_list,
                      help="columns of the document; default: all that are neither query nor score nor an id")  # fmt: skip
    made.add_argument("--weight-key", "--weight_key", help="column of the score, a number >= 0; default: score")
    made.add_argument("--img-or-txt", type=parse_kinds, metavar="KINDS",
                      help="txt;txt,img: kinds of the left and right columns; default: img where the name contains 'image' or "
                      "'img'")  # fmt: skip
    made.add_argument("--query-id-key", help="column that identifies the query; default: query_id if there is one, else "
                      "the left columns together")  # fmt: skip
    made.add_argument("--doc-id-key", help=f"column that identifies the document; default: the first of "
                      f"{', '.join(DOCUMENT_IDS)} that is there, else the right columns together")  # fmt: skip
    made.add_argument("--csv-separator", help="default: a tab for .tsv, else a comma")
    made.add_argument("--dataset-type", choices=("auto", "csv", "parquet", "webdataset"), default="auto",
                      help="auto: by the file's ending")  # fmt: skip
    made.add_argument("--check-images", choices=("decode", "exists", "none"), default="decode",
                      help="what reading does with image files; rows with bad ones are left out (default decode)")  # fmt: skip
    made.add_argument("--overwrite", action="store_true", help="replace the files of an earlier split")
    return made


def columns_of(args: argparse.Namespace) -> Columns:
    """What the columns mean: as the command line says, else by their names.

    Raises:
        InputError: a column that nothing names.
    """
    found: list[str] | None = None
    if args.left_keys is None or args.right_keys is None or args.weight_key is None or args.doc_id_key is None:
        found = columns_in(args.pairs, separator=args.csv_separator, dataset_type=args.dataset_type)

    def by_custom(option: str, name: str) -> str:
        if found is None or name not in found:
            among = (
                "columns that are not known before they are read" if found is None else f"the columns {listed(found)}"
            )
            raise InputError(f"{args.pairs}: expected {option}, or a column '{name}', got {among}")
        return name

    left = args.left_keys or [by_custom("--left-keys", "query")]
    score = args.weight_key or by_custom("--weight-key", "score")
    taken = {*left, score}
    query_id = args.query_id_key or first_of(["query_id"], [name for name in found or [] if name not in taken])
    document_id = args.doc_id_key or first_of(DOCUMENT_IDS, [name for name in found or [] if name not in taken])
    right = args.right_keys or [name for name in found or [] if name not in {*taken, query_id, document_id}]
    if not right:
        raise InputError(f"{args.pairs}: expected --right-keys, or columns beside query, score and ids, got none")
    kinds = args.img_or_txt or [kinds_by_name(left), kinds_by_name(right)]
    if [len(side) for side in kinds] != [len(left), len(right)]:
        raise InputError(f"--img-or-txt: expected a kind for each of {left} and of {right}, got {kinds}")
    left_kinds, right_kinds = (dict(zip(keys, of, strict=True)) for keys, of in zip((left, right), kinds, strict=True))
    return Columns(left_kinds, right_kinds, score, query_id, document_id)


def drawn(ids: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """A share of the distinct ids, sorted; which ones depends on the ids and the generator alone."""
    distinct = ids.unique()
    order = torch.randperm(len(distinct), generator=generator)
    return distinct[order[: round(fraction * len(distinct))]].sort().values


def parts(pairs: PairFile, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows (N,), bool, have a new query, a new document, and a query of the validation part."""
    generator = torch.Generator().manual_seed(args.seed)
    queries, documents = pairs.query_numbers, pairs.document_numbers
    old = drawn(queries, args.train_queries, generator)
    novel_query = ~torch.isin(queries, old)
    novel_document = ~torch.isin(documents, drawn(documents, args.train_documents, generator))
    # Of old and of new queries the same share, so that none of the three sets is left without.
    validation = torch.cat([drawn(queries[novel_query == new], args.validation, generator) for new in (False, True)])
    return novel_query, novel_document, torch.isin(queries, validation)


class Writer:
    """Writes the rows of a file of pairs into the folder."""

    def __init__(self, pairs: PairFile, folder: Path) -> None:
        self.pairs, self.folder, columns = pairs, folder.resolve(), pairs.columns
        self.kinds = {**columns.left, **columns.right}
        names = [name for name in ("document", "document_id", "id of the document") if name not in columns.names]
        self.document_id = columns.document_id_key or names[0]
        keys = [columns.query_id_key, *columns.left, self.document_id, *columns.right, columns.weight_key]
        self.header = list(dict.fromkeys(key for key in keys if key))

    def rows(self, chosen: Tensor) -> Iterator[dict[str, str]]:
        columns = self.pairs.columns
        for numbers in chosen.split(AT_ONCE):
            taken = self.pairs.take(numbers.tolist())
            for row in range(len(taken)):
                cells = {key: of[row] for side in (taken.left, taken.right) for key, of in side.items()}
                cells = {key: self.relative(cell) if self.kinds[key] == "img" else cell for key, cell in cells.items()}
                score, identity = taken.scores[row], taken.document_ids[row]
                cells[str(columns.weight_key)] = str(int(score)) if score == int(score) else repr(score)
                if columns.query_id_key:
                    cells[columns.query_id_key] = taken.query_ids[row]
                # All cells of a document after each other make a long id.
                cells[self.document_id] = identity if columns.document_id_key else made_from.short_id(identity)
                yield cells

    def relative(self, path: str) -> str:
        """An image's path as seen from the folder that is written."""
        try:
            return os.path.relpath(path, self.folder) if path else ""
        except ValueError:  # another drive of Windows
            return path

    def write(self, name: str, chosen: Tensor) -> dict[str, Any]:
        """One file of pairs, and its numbers."""
        path = (self.folder / stem_of(name)).with_suffix(".csv")
        write_pairs(path, self.header, ([cells[key] for key in self.header] for cells in self.rows(chosen)))
        queries, documents = self.pairs.query_numbers[chosen], self.pairs.document_numbers[chosen]
        return {
            "file": path.name, "rows": len(chosen), "queries": len(queries.unique()), "documents": len(documents.unique())
        }  # fmt: skip

    def write_corpus(self, name: str, chosen: Tensor) -> int:
        """The documents of some rows, each of its fullest row."""
        documents: dict[str, dict[str, str]] = {}
        for cells in self.rows(chosen):
            document = {key: cells[key] for key in self.pairs.columns.right}
            known = documents.setdefault(cells[self.document_id], document)
            if known != document:
                documents[cells[self.document_id]] = min(known, document, key=emptier)
        write_corpus(self.folder / name, documents)
        return len(documents)


def split(args: argparse.Namespace) -> None:
    """Read, draw, write, and say what was written."""
    make_folder(args.out)
    if (args.out / MANIFEST).exists() and not args.overwrite:
        raise InputError(f"{args.out}: expected a folder without a split, got one: --overwrite replaces it")
    columns = columns_of(args)
    pairs = PairFile(
        args.pairs, columns, separator=args.csv_separator, dataset_type=args.dataset_type,
        check_images=args.check_images, skip_bad_rows=True,
    )  # fmt: skip
    if pairs.bad_count:
        print(
            f"{args.pairs}: {pairs.bad_count} bad rows left out:", *shown(pairs.bad_rows, pairs.bad_count), sep="\n  "
        )
    novel_query, novel_document, validation = parts(pairs, args)
    writer = Writer(pairs, args.out)
    ids = f"{columns.query_id_key or 'of the query itself'}, {columns.document_id_key or 'made of the document'}"
    print(f"columns: query {', '.join(columns.left)}; document {', '.join(columns.right)}; score {columns.weight_key}; "
          f"ids {ids}")  # fmt: skip
    print(f"\n{'set':<28}{'rows':>10}{'queries':>10}{'documents':>11}  file")
    sets: dict[str, dict[str, Any]] = {}
    for name in SPLITS:
        new_query, new_document = novelty(name)
        rows = (novel_query == new_query) & (novel_document == new_document)
        # Training has its rows whole: its queries come again in the novel documents, where some are for validation.
        held_out = name != "in-domain" and args.validation > 0
        found = {name: rows & ~validation, f"validation {name}": rows & validation} if held_out else {name: rows}
        for title, chosen in found.items():
            sets[title] = writer.write(title, chosen.nonzero().flatten())
            sets[title]["corpus"] = CORPORA[new_document]
            of = sets[title]
            shown_title = f"{title} (training)" if title == "in-domain" else title
            print(f"{shown_title:<28}{of['rows']:>10}{of['queries']:>10}{of['documents']:>11}  {of['file']}")
    for name in SPLITS:  # of a split that this one replaces
        if f"validation {name}" not in sets:
            (args.out / f"validation_{stem_of(name)}.csv").unlink(missing_ok=True)
    counts = {
        CORPORA[new]: writer.write_corpus(CORPORA[new], (novel_document == new).nonzero().flatten())
        for new in (False, True)
    }
    for name, count in counts.items():
        print(f"{'corpus':<28}{'':>10}{'':>10}{count:>11}  {name}")
    content = {
        "made_of": str(args.pairs), "seed": args.seed, "shares": [args.train_queries, args.train_documents, args.validation],
        "left_keys": list(columns.left), "right_keys": list(columns.right),
        "img_or_txt": [list(columns.left.values()), list(columns.right.values())], "weight_key": columns.weight_key,
        "query_id_key": columns.query_id_key, "doc_id_key": writer.document_id, "bad_rows": pairs.bad_count,
        "sets": sets, "corpora": counts,
    }  # fmt: skip
    write_json_atomically(args.out / MANIFEST, content, indent=1)
    for title, of in sets.items():
        if not of["rows"]:
            print(f"warning: {title}: no rows, as {args.pairs} has too few queries or documents for it")
    if not sets["in-domain"]["rows"]:
        raise InputError(f"{args.pairs}: expected rows for the training set, got none: another --seed, or other shares")
    print("", *commands(args.out, content), sep="\n")


def commands(folder: Path, content: dict[str, Any]) -> list[str]:
    """The commands that train on a split and evaluate on its last set, to paste."""
    kinds = ";".join(",".join(side) for side in content["img_or_txt"])
    options = ["--left-keys", ",".join(content["left_keys"]), "--right-keys", ",".join(content["right_keys"])]
    options += ["--img-or-txt", kinds, "--weight-key", content["weight_key"], "--doc-id-key", content["doc_id_key"]]
    if content["query_id_key"]:
        options += ["--query-id-key", content["query_id_key"]]
    names = [title for title, of in content["sets"].items() if title.startswith("validation") and of["rows"]]
    found = [content["sets"][title] for title in names]
    if found:
        options += ["--val-data", *(str(folder / of["file"]) for of in found)]
        options += ["--doc-meta", *(str(folder / of["corpus"]) for of in found), "--best-metric", "NDCG@10"]
    train = [
        "gcl-train",
        "--train-data",
        str(folder / content["sets"]["in-domain"]["file"]),
        *options,
        "--name",
        folder.name,
    ]
    model = f"logs/{folder.name}/checkpoints/{'best' if found else 'epoch_latest'}.pt"
    test = content["sets"]["zero-shot"]
    evaluate = ["gcl-evaluate", "--test-csv", str(folder / test["file"]), "--doc-meta", str(folder / test["corpus"])]
    evaluate += ["--pretrained", model, "--output-dir", f"results/{folder.name}"]
    return ["train:    " + shlex.join(train), "evaluate: " + shlex.join(evaluate)]


def main(argv: Sequence[str] | None = None) -> int:
    """Split a file as the command line says; input that cannot be used gives its message and status 2."""
    args = parser().parse_args(argv)
    return command.run(lambda: split(args))


if __name__ == "__main__":
    sys.exit(main())
