"""Variants of a training run against a baseline, over data sets and seeds.

    python -m gcl_kernels.training.experiments --data glyphs chorus=DIR emoji=DIR --seeds 5 --out experiments
    python -m gcl_kernels.training.experiments --data chorus=DIR \\
        --compare log log+false-negatives=avoid log+false-negatives=keep

A variant is a score-to-weight function and, each after a `+`, options of the training command. The first of a comparison
is its baseline: by default `constant`, which is plain cross-entropy, against every function.

Every cell (data set, variant, seed) is a training run in a fresh process; a cell whose results.json is finished is not run
again, so that the command can be stopped and repeated (one that ran with other options or files is refused). Runs of one seed
differ in the variant alone: same data, initial weights, batches and steps. `--report FILE` writes the tables of what
there is, in Markdown. Commands that differ in `--section NAME` write a section each of one file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gcl_kernels.training import made_from
from gcl_kernels.training import options as training_options
from gcl_kernels.training.batches import LITTLE, batch_statistics
from gcl_kernels.training.checkpoint import PLACES
from gcl_kernels.training.experiment_data import DATA, Files
from gcl_kernels.training.experiment_tables import METRICS, Cells, differences_to_first, summary_row, table_of_test
from gcl_kernels.training.folder import NOT_IN_NAMES, finished
from gcl_kernels.training.splits import SPLITS

BASELINE = "constant"
FUNCTIONS = (BASELINE, "linear", "inverse", "inverse_sqrt", "log")

BEGIN, END = "<!-- experiments -->", "<!-- end experiments -->"
"""What stands between these lines of a report is written anew; what stands around them stays. A section's have its name."""


def parse_data(text: str) -> tuple[str, Path | None]:
    """`NAME` or `NAME=DIR`."""
    name, _, folder = text.partition("=")
    if name not in DATA:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DATA)}, got {name}")
    return name, Path(folder) if folder else None


def parse_word(text: str) -> str:
    if not re.fullmatch(r"\w+", text):
        raise argparse.ArgumentTypeError(f"expected a word, got {text}")
    return text


def options_of(variant: str) -> list[str]:
    """`log+min-score=1` as options of the training command."""
    function, *options = variant.split("+")
    return [f"--score-to-weight={function}", *(f"--{option}" for option in options)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m gcl_kernels.training.experiments`; what it does not know goes to every run."""
    parser = argparse.ArgumentParser(
        prog="python -m gcl_kernels.training.experiments", description="Variants of a training run on several data sets; "
        "further options (--steps=200, ...) go to every training run", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--data", nargs="+", type=parse_data, default=[("glyphs", None)], metavar="NAME[=DIR]",
                        help=f"data sets among {', '.join(DATA)}, with the folder of those that are not built in")  # fmt: skip
    parser.add_argument("--compare", nargs="+", action="append", metavar="VARIANT",
                        help="a baseline and what is compared with it: score-to-weight functions, with options of a run each "
                        f"after a +; may come several times; default: {' '.join(FUNCTIONS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 (default 5)")
    parser.add_argument("--out", type=Path, default=Path("experiments"), metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the tables go (default: OUT/results.md)")
    parser.add_argument("--section", type=parse_word, metavar="NAME",
                        help="the tables' section of a report to which several commands write")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="run nothing, only write the tables")
    args, args.options = parser.parse_known_args(argv)
    unknown = [option for option in args.options if not option.startswith("--")]
    if unknown:
        parser.error(f"expected further options as --NAME=VALUE, got {unknown}")
    args.compare = args.compare or [list(FUNCTIONS)]
    for variant in variants(args):
        # What a run would refuse is refused before the first one.
        training_options.parse_args(
            ["--train-data=-", "--left-keys=-", "--right-keys=-", "--weight-key=-", *args.options, *options_of(variant)]
        )
    args.report = args.report or args.out / "results.md"
    return args


def variants(args: argparse.Namespace) -> list[str]:
    """Those of all comparisons, each once."""
    return list(dict.fromkeys(variant for comparison in args.compare for variant in comparison))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cells that are missing, and write the report after each seed of them."""
    args = parse_args(argv)
    files = {name: DATA[name].files(source, args.out / "data" / name) for name, source in args.data}
    cells = [(name, variant, seed) for name, _ in args.data for variant in variants(args) for seed in range(args.seeds)]
    for name, variant, seed in cells:
        check_cell(args, name, variant, seed, files[name])
    failed, ran = [], False
    # All variants of a seed before the next seed: what is there at any time is a fair comparison.
    for seed in () if args.report_only else range(args.seeds):
        missing = [cell for cell in cells if cell[2] == seed and not finished(results_file(args.out, *cell))]
        if missing and ran:
            write_report(args, files)
        progress = tqdm(missing, desc=f"seed {seed}", unit="cell", disable=not missing)
        for name, variant, _ in progress:
            progress.set_postfix_str(f"{name} {variant}")
            ran = True
            if not run_cell(args, name, variant, seed, files[name]):
                failed.append(results_file(args.out, name, variant, seed).with_name("log.txt"))
    write_report(args, files)
    print(args.report)
    for log in failed:
        print(f"failed: see {log}", file=sys.stderr)
    return 1 if failed else 0


def results_file(out: Path, name: str, variant: str, seed: int) -> Path:
    """Where a cell's results are; `piecewise+knots=1:0,100:1` makes no name that Windows allows, so its colons are `_` there."""
    folder = "".join("_" if letter in NOT_IN_NAMES else letter for letter in variant)
    return out / name / folder / f"seed_{seed}" / "results.json"


def run_argv(args: argparse.Namespace, name: str, variant: str, seed: int, files: Files) -> list[str]:
    """The options of a cell's training run."""
    folder = results_file(args.out, name, variant, seed).parent
    return [
        f"--train-data={files['in-domain'][0]}",
        "--val-data", *(str(pairs) for pairs, _ in files.values()), "--doc-meta", *(str(corpus) for _, corpus in files.values()),
        *(option.format(folder=args.out / "data" / name) for option in DATA[name].options), *args.options,
        *options_of(variant), f"--seed={seed}", f"--logs={folder.parent}", f"--name={folder.name}",
    ]  # fmt: skip


def check_cell(args: argparse.Namespace, name: str, variant: str, seed: int, files: Files) -> None:
    """Refuse a cell that ran with other options than it would now; where files lie does not matter."""
    results = results_file(args.out, name, variant, seed)
    if not finished(results):
        return
    then = json.loads(results.read_text(encoding="utf-8")).get("options", {})
    now = vars(training_options.parse_args(run_argv(args, name, variant, seed, files)))
    elsewhere = {"train_data", "val_data", "doc_meta", "model", *PLACES}
    different = [key for key in then.keys() & now.keys() - elsewhere if then[key] != now[key]]
    if different:
        changes = ", ".join(f"--{key.replace('_', '-')} {then[key]}, got {now[key]}" for key in sorted(different))
        raise SystemExit(f"{results}: expected options as when it ran, {changes}; another --out keeps both")
    recorded = made_from.recorded(results)
    other = "" if recorded is None else made_from.difference(recorded, parts_of(args, name, files))
    if other:
        raise SystemExit(f"{results}: expected files as when it ran, got others: {other}; another --out keeps both")


def parts_of(args: argparse.Namespace, name: str, files: Files) -> made_from.Parts:
    """What a cell's results depend on besides its options: the contents of its files."""
    paths = {
        f"{split} {kind}": path
        for split, pair in files.items()
        for kind, path in zip(("pairs", "corpus"), pair, strict=True)
    }
    for option in (option.format(folder=args.out / "data" / name) for option in (*DATA[name].options, *args.options)):
        key, _, value = option.partition("=")
        if key == "--model" and Path(value).is_file():
            paths["model"] = Path(value)
    return {what: made_from.digest_of_file(path) for what, path in paths.items()}


def run_cell(args: argparse.Namespace, name: str, variant: str, seed: int, files: Files) -> bool:
    """Train once in a fresh process, whose output goes to log.txt; True when it has finished."""
    results = results_file(args.out, name, variant, seed)
    results.parent.mkdir(parents=True, exist_ok=True)
    # What a run that was broken off has left: a cell begins anew.
    results.unlink(missing_ok=True)
    shutil.rmtree(results.with_name("checkpoints"), ignore_errors=True)
    command = [sys.executable, "-m", "gcl_kernels.training", *run_argv(args, name, variant, seed, files)]
    with results.with_name("log.txt").open("w", encoding="utf-8") as log:
        subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TQDM_DISABLE": "1"}, check=False
        )
    # A hundred megabytes each; a cell is its results.
    shutil.rmtree(results.with_name("checkpoints"), ignore_errors=True)
    done = finished(results)
    if done:
        made_from.record(results, parts_of(args, name, files))
    return done


def write_report(args: argparse.Namespace, files: Mapping[str, Files]) -> None:
    """Write the Markdown tables of all cells that are there."""
    report = args.report
    report.parent.mkdir(parents=True, exist_ok=True)
    old = report.read_text(encoding="utf-8") if report.exists() else ""
    marks = [mark.replace(" -->", f": {args.section} -->") if args.section else mark for mark in (BEGIN, END)]
    before, begin, rest = old.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        # A section is added to what is there.
        before, after = f"{old}\n" if old and args.section else "# Experiments\n\n", "\n"
    tables = "\n".join(report_lines(args, files))
    report.write_text(f"{before}{marks[0]}\n{tables}\n{marks[1]}{after}", encoding="utf-8")


def report_lines(args: argparse.Namespace, files: Mapping[str, Files]) -> list[str]:
    lines = [
        "Written by `python -m gcl_kernels.training.experiments`; every row comes from the runs' `results.json`.",
        "",
        "- The first row of a table is the baseline of the others. `constant` is cross-entropy (plain CLIP); the others weigh a",
        "  pair by its score. Runs of one seed share data, initial weights, batches and steps.",
        "- Each value is the mean over queries and seeds; ± is the standard deviation over seeds.",
        "- *difference* is the mean of the paired differences to the baseline, each query's values averaged over the seeds, with",
        "  its 95% bootstrap interval over queries, and *relative* the same over the mean of the baseline.",
        "- *p* is Fisher's paired randomisation test over queries, two-sided, not corrected for the number of rows.",
        "- *Effective rows* of a batch are (Σ w)² / Σ w². Documents of *little weight* are those whose best pair weighs less",
        f"  than {LITTLE:g} of the mean pair. Repeated queries and documents, kept as negatives, leave the loss a *floor*;",
        "  *loss* is the mean over the last tenth of the steps, *logit scale* the last one.",
    ]
    if any("loss=sigmoid" in variant.split("+") for variant in variants(args)):
        lines += [
            "- With `loss=sigmoid` the loss is SigLIP's, of each pair alone: `constant+loss=sigmoid` is SigLIP's itself, and",
            "  weights are those of positives. Its values are no softmax's, so *loss* compares rows of one loss alone.",
        ]
    for name, _ in args.data:
        data = DATA[name]
        lines += [
            "",
            f"**{name}**: relevance {data.relevance}. {novelty(args, name, files[name])}",
            "",
            f"`{' '.join(data.options)}`",
        ]
    for comparison in args.compare:
        lines += comparison_lines(args, files, comparison)
    return lines


def comparison_lines(args: argparse.Namespace, files: Mapping[str, Files], comparison: Sequence[str]) -> list[str]:
    """The tables of a baseline and what is compared with it."""
    found = {name: {variant: read_cells(args, name, variant) for variant in comparison} for name, _ in args.data}
    cells = {
        (name, split): {variant: of_test(results, pairs) for variant, results in found[name].items()}
        for name, _ in args.data
        for split, (pairs, _) in files[name].items()
    }
    differences = {test: differences_to_first(of_variant) for test, of_variant in cells.items()}
    tests = [test for test in cells if differences[test]]
    lines = ["", f"## {', '.join(comparison[1:])} against {comparison[0]}", ""]
    lines += [
        f"{METRICS[0]} relative to `{comparison[0]}`, in bold where p < 0.05, and in brackets the number of seeds "
        "(details below):",
        "",
        f"| test set | {' | '.join(comparison)} |",
        "|---" * (len(comparison) + 1) + "|",
        *(summary_row(test, cells[test], differences[test]) for test in tests),
    ]
    for name, source in args.data:
        tables = []
        for test in (test for test in tests if test[0] == name):
            tables += [
                "",
                f"#### {name}, {test[1]} ({SPLITS[test[1]]})",
                "",
                *table_of_test(cells[test], differences[test]),
            ]
        if tables:
            lines += ["", f"### {name}", "", *batch_table(args, name, found[name], files[name]), *tables]
            lines += ["", f"`{command(args, name, source, found[name])}`"]
    return lines


def read_cells(args: argparse.Namespace, name: str, variant: str) -> dict[int, dict]:
    """`{seed: results.json}` of the cells that are there."""
    paths = {seed: results_file(args.out, name, variant, seed) for seed in range(args.seeds)}
    return {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if finished(path)}


def of_test(results: Mapping[int, dict], test: Path) -> Cells:
    """What the cells say of one test set. By the file's name: the folder may have been elsewhere when the cell ran."""
    return {
        seed: values
        for seed, of_cell in results.items()
        for path, values in of_cell["per_query"].items()
        if Path(path).name == test.name
    }


def command(args: argparse.Namespace, name: str, source: Path | None, found: Mapping[str, Mapping[int, dict]]) -> str:
    """What repeats the runs of a comparison on a data set, or of some of its rows: leave out the others but the first."""
    folder = "" if source is None else "=DIR"
    there = [variant for variant, results in found.items() if results]
    seeds = max(map(len, found.values()))
    words = ["python -m gcl_kernels.training.experiments", f"--data {name}{folder}", f"--seeds {seeds}"]
    return " ".join([*words, *args.options, "--compare", *there])


def novelty(args: argparse.Namespace, name: str, files: Files) -> str:
    """How much of the novel queries a model from random weights can know."""
    if "novel query" not in files:
        return ""
    run = training_options.parse_args(run_argv(args, name, BASELINE, 0, files))
    texts = [key for key, kind in zip(run.right_keys, run.img_or_txt[1], strict=True) if kind == "txt"]

    def words(split: str, keys: Sequence[str]) -> set[str]:
        with files[split][0].open(encoding="utf-8", newline="") as file:
            return {
                word for row in csv.DictReader(file) for key in keys for word in re.findall(r"\w+", row[key].lower())
            }

    novel, queries = words("novel query", run.left_keys), words("in-domain", run.left_keys)
    shares = [len(novel & known) / len(novel) * 100 for known in (queries, queries | words("in-domain", texts))]
    seen = f"{shares[0]:.0f}% are in training queries, {shares[1]:.0f}% in training queries or documents."
    return f"Of the different words of the novel queries, {seen}"


def batch_table(
    args: argparse.Namespace, name: str, found: Mapping[str, Mapping[int, dict]], files: Files
) -> list[str]:
    """What each variant makes of the batches, and where its loss ends."""
    biased = any("logit_bias" in cell for cells in found.values() for cell in cells.values())
    rows = [
        "| variant | rows of a batch | effective rows | documents of little weight | floor | loss | logit scale |"
        + " logit bias |" * biased,
        "|---" * (7 + biased) + "|",
    ]
    for variant, cells in found.items():
        if not cells:
            continue
        facts = batch_statistics(training_options.parse_args(run_argv(args, name, variant, min(cells), files)))
        losses = [np.mean(cell["loss"][-max(1, len(cell["loss"]) // 10) :]) for cell in cells.values() if cell["loss"]]
        loss = f"{np.mean(losses):.2f}" if losses else ""
        scale, bias = (mean_of(cells, name) for name in ("logit_scale", "logit_bias"))
        rows.append(
            f"| {variant} | {facts.rows:.0f} | {facts.effective_rows:.0f} | {facts.little_weight * 100:.0f}% | "
            f"{facts.floor:.2f} | {loss} | {scale} |" + f" {bias} |" * biased
        )
    return rows


def mean_of(cells: Mapping[int, dict], name: str) -> str:
    """Of a number that runs end with, over those that have it."""
    values = [cell[name] for cell in cells.values() if name in cell]
    return f"{np.mean(values):.1f}" if values else ""


if __name__ == "__main__":
    sys.exit(main())
