"""`python -m gcl_kernels.training.demo`: plain CLIP against GCL on glyphs, from nothing, offline, in minutes.

Builds the glyph set, trains the same small model twice from the same seed with the same batches, once with constant
weights (plain CLIP) and once with the scores as weights (GCL), and shows what each has learnt to rank.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gcl_kernels.training.data import KEY_END
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.glyphs import LEVELS, GlyphSet, build, render
from gcl_kernels.training.memory import shown_peak
from gcl_kernels.training.options import parse_args, program
from gcl_kernels.training.ranking import Evaluation
from gcl_kernels.training.run import Run, train
from gcl_kernels.training.validation import Line, metrics_table

RUNS = {"CLIP": "constant", "GCL": "log"}
"""Score-to-weight function of each run."""

QUERIES_SHOWN = 3
"""Queries of each split in the picture: a dozen in all."""

SHOWN = 10
"""Ranks in the picture."""

_COLOURS = {80: "#1a7f37", 60: "#3b82d6", 30: "#e0a100", 10: "#c9733e", 0: "#b8b8b8"}


def main(argv: Sequence[str] | None = None) -> int:
    """Build, train twice, print the table, draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m gcl_kernels.training.demo", description="Plain CLIP against GCL on the glyphs of a font"
    )
    parser.add_argument("--out", default="demo_output", metavar="DIR", help="where data, logs and picture go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120, help="batches of each run")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--smoke", action="store_true", help="a few documents and steps, to see that everything works")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch_size = 2, 32
    out = Path(args.out)
    started = time.perf_counter()

    glyphs = build(queries=60, documents=400, seed=args.seed) if args.smoke else build(seed=args.seed)
    files = glyphs.write(out / "glyphs")
    pairs = sum(len(query.grades) for query in glyphs.queries)
    print(
        f"Unicode glyphs, derived relevance: {len(glyphs.documents)} documents, {len(glyphs.queries)} queries, "
        f"{pairs} graded pairs"
    )

    runs: dict[str, Run] = {}
    for name, score_to_weight in RUNS.items():
        # The demo begins anew each time.
        shutil.rmtree(out / "logs" / name, ignore_errors=True)
        runs[name] = train(
            parse_args(
                [
                    f"--train-data={files['in-domain'][0]}",
                    "--val-data", *(str(pairs) for pairs, _ in files.values()),
                    "--doc-meta", *(str(corpus) for _, corpus in files.values()),
                    "--left-keys=query", "--right-keys=title,image", "--right-weights=0.3,0.7",
                    "--weight-key=score", "--doc-id-key=document",
                    f"--score-to-weight={score_to_weight}", f"--steps={args.steps}", f"--batch-size={args.batch_size}",
                    "--lr=2e-3", "--warmup=12", f"--seed={args.seed}", f"--logs={out / 'logs'}", f"--name={name}",
                ]
            )
        )  # fmt: skip

    rows: list[Line] = []
    for split, (path, _) in files.items():
        by_chance = runs["CLIP"].random[str(path)]
        rows.append((split, "random", len(by_chance.query_ids), by_chance.means))
        found = {name: run.evaluations[str(path)] for name, run in runs.items()}
        rows += [("", name, len(of_run.query_ids), of_run.means) for name, of_run in found.items()]
    print("\nUnicode glyphs, derived relevance; means over queries; one seed\n")
    print(metrics_table(rows))
    print()
    for name, run in runs.items():
        print(f"{name:<5} {run.seconds:4.0f} s, {shown_peak(run.peak_bytes)}, score-to-weight {RUNS[name]}")

    picture = out / "rankings.png"
    draw(glyphs, {split: {name: run.evaluations[str(path)] for name, run in runs.items()}
                  for split, (path, _) in files.items()}, picture)  # fmt: skip
    judged = out / "judged.json"
    write_json_atomically(judged, glyphs.grades)
    models = [f"--model {shlex.quote(str(run.checkpoint))}" for run in runs.values()]
    corpus = shlex.quote(str(files["zero-shot"][1]))
    print(f"picture: {picture}\n{time.perf_counter() - started:.0f} s in all\n\nSearch the documents that training did not see, "
          f"both models side by side:\n\n    {program('gcl_kernels.training.serve')} {' '.join(models)} --corpus {corpus} "
          f"--judged {shlex.quote(str(judged))}")  # fmt: skip
    return 0


def draw(glyphs: GlyphSet, evaluations: dict[str, dict[str, Evaluation]], path: Path) -> None:
    """Draw the first ranks of some queries of each split, `evaluations[split][run]`, with the grade under each glyph.

    The queries are the first of each split, in the set's own random order, that have ten documents with all words or
    the same base letter (with fewer, a perfect ranking has little to show) and that no split before has shown.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    names = list(next(iter(evaluations.values())))
    chosen: list[tuple[str, int, str]] = []
    for split, of_split in evaluations.items():
        first = of_split[names[0]]
        texts = [identity.removesuffix(KEY_END) for identity in first.query_ids]
        rich = [row for row in range(len(texts)) if (first.judged[row] >= 50).sum() >= SHOWN] or list(range(len(texts)))
        seen = {text for _, _, text in chosen}
        chosen += [(split, row, texts[row]) for row in rich if texts[row] not in seen][:QUERIES_SHOWN]

    characters = {glyph.identity: glyph.character for glyph in glyphs.documents}
    grades = glyphs.grades  # as derived; those of the evaluation are rescaled to 1..100
    block = SHOWN + 0.7  # columns of one run, and a gap
    inches = len(chosen) * 0.8
    figure = Figure(figsize=(16, inches + 1.5), dpi=110)
    axes = figure.add_axes((0.19, 0.01, 0.80, inches / (inches + 1.5)))
    axes.set(xlim=(0, len(names) * block - 0.7), ylim=(len(chosen), 0))
    axes.axis("off")
    for number, name in enumerate(names):
        title = f"{name} (weights: {RUNS[name]})"
        axes.text(number * block + SHOWN / 2, -0.2, title, ha="center", size=14, weight="bold")
    for line, (split, row, text) in enumerate(chosen):
        if line and split != chosen[line - 1][0]:
            axes.axhline(line - 0.015, color="#bbbbbb", xmin=-0.23, clip_on=False, linewidth=1)
        axes.text(-0.25, line + 0.4, text, ha="right", va="center", size=13 if len(text) < 24 else 10, weight="bold")
        axes.text(-0.25, line + 0.72, split, ha="right", va="center", size=10, color="#666666")
        for number, name in enumerate(names):
            evaluation = evaluations[split][name]
            for rank, position in enumerate(evaluation.ranking[row, :SHOWN].tolist()):
                identity = evaluation.document_ids[position]
                grade = grades[text].get(identity, 0)
                colour = next(colour for least, colour in _COLOURS.items() if grade >= least)
                left, image = number * block + rank, render(characters[identity], 64)
                axes.imshow(image, extent=(left + 0.09, left + 0.91, line + 0.72, line + 0.06), aspect="auto", zorder=1)
                axes.add_patch(Rectangle((left + 0.07, line + 0.04), 0.86, 0.9, fill=False, ec=colour, lw=2.5))
                axes.add_patch(Rectangle((left + 0.07, line + 0.72), 0.86, 0.22, color=colour, lw=0))
                axes.text(left + 0.5, line + 0.835, str(grade or "–"), ha="center", va="center", size=9, color="white")
    axes.set_xlim(0, len(names) * block - 0.7)
    axes.set_ylim(len(chosen), 0)
    top = 1 - 0.3 / figure.get_figheight()
    figure.suptitle(
        f"The first {SHOWN} glyphs that each run retrieves; derived relevance "
        "(from Unicode's own structure, no human judgement)",
        size=15,
        y=top,
        va="center",
    )
    labels = {least: f"{text} ({least}+)" for least, text in LEVELS.items()} | {0: "not judged: counts as 0"}
    figure.legend(
        handles=[Patch(color=_COLOURS[least], label=label) for least, label in labels.items()],
        loc="center",
        bbox_to_anchor=(0.5, top - 0.38 / figure.get_figheight()),
        ncol=len(labels),
        frameon=False,
        fontsize=12,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
