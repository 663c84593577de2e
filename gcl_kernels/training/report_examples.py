"""The part of the report that shows what queries retrieve: images or texts, framed by grade."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gcl_kernels.training.data import KEY_END, load_image
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.examples import drawn, extremes
from gcl_kernels.training.files import read_json

DRAWN = 3
"""Queries shown beside the best, the median and the worst."""

LEVELS = {67: ("#1a7f37", "upper third"), 34: ("#e0a100", "middle third"), 1: ("#c9733e", "lower third")}
"""Colours by the least gain, 1 to 100, and what that is of the scale of grades."""

NOT_JUDGED = "#8a8a8a"

Examples = dict[str, Any]
"""The content of an examples.json, with its examples by query."""


def read_examples(path: Path, ground_truth: str | None) -> Examples | None:
    """The examples of a run; None, with a line, where they are of another evaluation than its metrics."""
    content = read_json(path)
    try:
        examples = {**content, "examples": {example["query"]: example for example in content["examples"]}}
        of = content["about"].get("ground_truth")
        assert isinstance(content["documents"], dict)
    except (KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"{path}: expected examples of this version's evaluate, got another structure") from None
    if of != ground_truth:
        print(f"{path}: of another ground truth than the metrics beside it; left out")
        return None
    return examples


def choose(
    examples: Mapping[str, Examples],
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]],
    metric: str,
    wanted: Sequence[str] | None,
) -> dict[str, str]:
    """The queries to show, `{query: why}`, of those that every run has.

    Without `wanted`: the best, the median and the worst by the metric's mean over the runs, and `DRAWN` at random. A single
    number in `wanted` is how many to draw instead of these; otherwise it has queries, by text or id.

    Raises:
        InputError: a wanted query that is not there.
    """
    shared = [
        query for query in next(iter(examples.values()))["examples"]
        if all(query in examples[run]["examples"] and query in per_query[run] for run in examples)
    ]  # fmt: skip
    if wanted and not (len(wanted) == 1 and wanted[0].isdecimal()):
        by_name = {name: query for query in shared for name in (*texts_of(examples, query), query)}
        if missing := [text for text in wanted if text not in by_name]:
            raise InputError(
                f"--queries: expected queries among the {len(shared)} that examples.json of every run has, got '{missing[0]}'; "
                f"some of them: {', '.join(texts_of(examples, query)[0] for query in drawn(shared)[:5])}"
            )
        return {by_name[text]: "chosen" for text in wanted}
    if wanted:
        return dict.fromkeys(drawn(shared)[: int(wanted[0])], "drawn")
    values = {query: sum(per_query[run][query][metric] for run in examples) for query in shared}
    named = {query: name for name, query in extremes(values).items()}
    rest = [query for query in drawn(shared) if query not in named][:DRAWN]
    return named | dict.fromkeys(rest, "drawn")


def texts_of(examples: Mapping[str, Examples], query: str) -> tuple[str, str]:
    """A query in words, and its id without what the authors write after a column."""
    return next(iter(examples.values()))["examples"][query]["text"], query.removesuffix(KEY_END)


def draw_examples(
    figure: Any, examples: Mapping[str, Examples], chosen: Mapping[str, str], metric: str,
    per_query: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:  # fmt: skip
    """What each query retrieves in every run, a block of lines a query, and a legend of the colours."""
    from matplotlib.patches import Patch

    runs = list(examples)
    found = {(query, run): examples[run]["examples"][query]["found"] for query in chosen for run in runs}
    columns = max(map(len, found.values()))
    about = next(iter(examples.values()))["about"]
    low, high = about.get("lowest_grade"), about.get("highest_grade")
    scale = f"grades {low:g} to {high:g}: " if low is not None and high is not None else "grades: "
    figure.suptitle(
        f"The first {columns} documents; the number is the grade. The best, median and worst query by {metric}, and others "
        f"drawn at random" if "best" in chosen.values() else f"The first {columns} documents; the number is the grade",
        fontsize=11,
    )  # fmt: skip
    blocks = figure.subfigures(len(chosen), 1, squeeze=False)[:, 0]
    for number, (block, (query, why)) in enumerate(zip(blocks, chosen.items(), strict=True)):
        block.set_facecolor("#f4f4f4" if number % 2 else "white")
        text = shortened(texts_of(examples, query)[0], 110)
        block.suptitle(f"{why}: {text}", fontsize=10, x=0.01, ha="left", weight="bold", parse_math=False)
        grid = block.subplots(len(runs), columns, squeeze=False)
        for line, run in zip(grid, runs, strict=True):
            for axes in line:
                axes.set(xticks=[], yticks=[])
                axes.axis("off")
            for axes, document in zip(line, found[query, run], strict=False):
                axes.axis("on")
                cells = {"id": document["id"], **examples[run]["documents"].get(document["id"], {})}
                draw_document(axes, {**document, **cells, "grade": document["grade"]}, examples[run]["kinds"])
            line[0].axis("on")
            label = f"{wrapped(run, 20, 2)}\n{metric} {per_query[run][query][metric]:.3f}"
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
    labels = [Patch(color=colour, label=scale * (least == 67) + text) for least, (colour, text) in LEVELS.items()]
    figure.legend(
        handles=[*labels, Patch(color=NOT_JUDGED, label="not judged, counts as 0")], loc="outside lower center", ncol=4,
        frameon=False, fontsize=9,
    )  # fmt: skip


def draw_document(axes: Any, document: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    image = next((document[key] for key, kind in kinds.items() if kind == "img" and document.get(key)), None)
    text = next((document[key] for key, kind in kinds.items() if kind == "txt" and document.get(key)), document["id"])
    try:
        if image:
            axes.imshow(load_image(image))
    except Exception:  # a picture for people: what cannot be decoded is shown by its text
        image = None
    if not image:
        axes.text(0.5, 0.5, wrapped(str(text)), ha="center", va="center", fontsize=7, transform=axes.transAxes,
                  parse_math=False)  # fmt: skip
    gain, grade = document["gain"], document["grade"]
    colour = next((colour for least, (colour, _) in LEVELS.items() if gain >= least), NOT_JUDGED)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
    axes.set_xlabel(
        "not judged" if grade is None else f"{grade:g}", fontsize=9, color=colour, labelpad=4, weight="bold"
    )


def shortened(text: str, length: int) -> str:
    """At most so many characters, cut between words, with an ellipsis where something is missing."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    whole = text[: length - 1].rpartition(" ")[0]
    # In a single word that is longer there is no better place.
    return f"{whole} …" if whole else f"{text[: length - 1]}…"


def wrapped(text: str, width: int = 16, lines: int = 5) -> str:
    """Lines of whole words, as far as these fit, with an ellipsis where something is missing."""
    words = " ".join(shortened(word, width) for word in text.split())
    return "\n".join(textwrap.wrap(words, width, max_lines=lines, placeholder=" …", break_on_hyphens=False))
