"""What there is to learn, asked before the first step: an error where it is nothing, else a warning with the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gcl_kernels.training.batches import BatchStatistics, statistics_of
from gcl_kernels.training.data import PairFile
from gcl_kernels.training.errors import DataError
from gcl_kernels.training.inputs import TestFiles
from gcl_kernels.training.ranking import minmax
from gcl_kernels.training.sampler import Sampler
from gcl_kernels.training.train_options import TrainOptions, weights_of

NEARLY_ALL = 0.9
"""A share of the rows from which on they are as good as all."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

BATCHES_LOOKED_AT, ROWS_LOOKED_AT = 100, 1000

CUT_SAID = 0.01
"""The share of cut texts from which on a run says so without being asked."""


@dataclass(frozen=True)
class Facts:
    """What a run will train on.

    Args:
        grades: the scaled scores (R,) of the rows trained on.
        weights: their weights, not normalised.
        alike: share of the rows that have the most frequent grade, `grade`.
        scores_alike: share of the rows that have the most frequent score as it stands in the file.
        batches: of the first batches.
        cut: share of the texts that the context cuts, by field, where the tokenizer tells.
        context: its length in tokens.
        same: the sides, `"query"` or `"document"`, of which the model sees one and the same value in all rows.
    """

    grades: Tensor
    weights: Tensor
    grade: float
    alike: float
    scores_alike: float
    batches: BatchStatistics
    cut: Mapping[str, float]
    context: int
    same: tuple[str, ...] = ()

    @property
    def quantiles(self) -> list[float]:
        ordered = self.grades.sort().values
        return [ordered[round(share * (len(ordered) - 1))].item() for share in QUANTILES]

    @property
    def lowest_share(self) -> float:
        """Share of the rows at the lowest grade that occurs."""
        return (self.grades == self.grades.min()).double().mean().item()


def facts_of(
    args: TrainOptions, pairs: PairFile, rows: tuple[Tensor, Tensor, Sampler], tokenizer: Callable[..., Tensor]
) -> Facts:
    """The facts of a run; `rows` is what `training_rows` has returned."""
    scores, _, sampler = rows
    grades = scores[sampler.rows]
    grade, alike = most_frequent(grades)
    looked_at = sampler.rows[:: max(1, len(sampler.rows) // ROWS_LOOKED_AT)][:ROWS_LOOKED_AT]
    sample = pairs.take(looked_at.tolist())
    kinds = pairs.columns.left, pairs.columns.right
    cut: dict[str, float] = {}
    for of_side, cells in zip(kinds, (sample.left, sample.right), strict=True):
        cut |= cut_texts(cells, of_side, tokenizer)
    sides = (
        ("query", kinds[0], sample.left, sample.query_ids),
        ("document", kinds[1], sample.right, sample.document_ids),
    )
    return Facts(
        grades=grades,
        weights=weights_of(args).not_normalized(grades),
        grade=grade,
        alike=alike,
        scores_alike=most_frequent(pairs.scores[sampler.rows])[1],
        batches=statistics_of(args, *rows, most=BATCHES_LOOKED_AT),
        cut=cut,
        context=tokenizer([""]).shape[1],
        same=tuple(
            side
            for side, of_side, cells, side_ids in sides
            if len(set(side_ids)) > 1 and all(indistinct(cells[key], of_side[key], tokenizer) for key in of_side)
        ),
    )


def most_frequent(values: Tensor) -> tuple[float, float]:
    """The most frequent of (N,) values, and its share."""
    different, counts = values.unique(return_counts=True)
    place = counts.argmax()
    return different[place].item(), (counts[place] / len(values)).item()


def cut_texts(
    cells: Mapping[str, list[str]], kinds: Mapping[str, str], tokenizer: Callable[..., Tensor]
) -> dict[str, float]:
    """The share of the texts of each field that the context cuts.

    A text is cut if one token more changes its ids, or would be another than padding.
    """
    shares: dict[str, float] = {}
    empty = tokenizer([""])
    for key, kind in kinds.items():
        texts = [cell for cell in cells[key] if cell] if kind == "txt" else []
        if not texts:
            continue
        different = list(dict.fromkeys(texts))
        try:
            longer = tokenizer(different, context_length=empty.shape[1] + 1)
        except TypeError:  # a tokenizer of one context only
            continue
        cut = (longer[:, :-1] != tokenizer(different)).any(dim=1) | (longer[:, -1] != empty[0, -1])
        of_text = dict(zip(different, cut.tolist(), strict=True))
        shares[key] = sum(of_text[text] for text in texts) / len(texts)
    return shares


def indistinct(cells: list[str], kind: str, tokenizer: Callable[..., Tensor]) -> bool:
    """Whether the model sees one and the same in all cells of a field."""
    different = list(dict.fromkeys(cells))
    if len(different) == 1 or kind == "img":
        return len(different) == 1
    # A missing value is another than any text.
    return "" not in different and len(tokenizer(different).unique(dim=0)) == 1


def expect_something_to_learn(args: TrainOptions, facts: Facts) -> None:
    """Raise DataError where every step would leave the model as it is."""
    batches = facts.batches
    if not facts.weights.any():
        raise DataError(f"{args.train_data}: expected a pair with a weight > 0, got weights of 0 alone from "
                        f"--score-to-weight {args.score_to_weight}: nothing would be learnt")  # fmt: skip
    if batches.without_negatives == 1:
        then = "the loss would be 0 and nothing learnt" if args.loss == "softmax" else "nothing would tell them apart"
        raise DataError(
            f"{args.train_data}: expected rows of different queries and documents in a batch, got batches of "
            f"{batches.rows:.0f} without a single negative: {then}; a larger --batch-size, other ids, or --false-negatives keep"
        )
    for side in facts.same:
        raise DataError(
            f"{args.train_data}: expected values of the {side} that the model can tell apart, got one and the same in all rows "
            f"within its context of {facts.context} tokens: nothing would be learnt"
        )


def warnings_of(args: TrainOptions, facts: Facts, tests: TestFiles) -> list[str]:
    """What makes a run learn less than it seems to, a line each."""
    batches, found = facts.batches, []
    # The terms of a sigmoid are of one pair each, where a softmax needs a positive and a negative.
    pull, push = (
        ("teach nothing",) * 2 if args.loss == "softmax" else ("only pull pairs together", "only push pairs apart")
    )
    if batches.without_negatives:
        found.append(f"{batches.without_negatives:.0%} of the batches have no negative, and {pull}")
    if batches.without_weight:
        found.append(f"{batches.without_weight:.0%} of the batches have weights of 0 alone, and {push}")
    if args.score_to_weight != "constant":
        plain = "cross-entropy" if args.loss == "softmax" else "sigmoid loss"
        found += weight_warnings(facts, plain)
    for path, pairs in tests.pairs.items():
        scores = torch.tensor(pairs.scores, dtype=torch.float64)
        grade, share = most_frequent(minmax(scores))
        if share >= NEARLY_ALL and most_frequent(scores)[1] < NEARLY_ALL:
            found.append(f"{path}: {share:.0%} of the judged pairs have grade {grade:g}, which the metrics cannot tell apart; "
                         f"--score-scaling log or rank spreads them")  # fmt: skip
    cut = {field: share for field, share in facts.cut.items() if share >= CUT_SAID}
    if cut:
        shares = ", ".join(f"{share:.0%} of '{field}'" for field, share in cut.items())
        found.append(f"the context of {facts.context} tokens cuts {shares}; --context-length takes more")
    return found


def weight_warnings(facts: Facts, plain: str) -> list[str]:
    """One line at most on weights that hardly differ, or of which a few have nearly all."""
    batches = facts.batches
    effective = f"{batches.effective_rows:.1f} effective rows in a batch of {batches.rows:.0f}"
    if (facts.weights == facts.weights[0]).all():
        return [f"all {len(facts.weights)} rows have one weight: the loss is plain {plain}, whatever --score-to-weight"]
    if facts.alike >= NEARLY_ALL:
        low, *_, high = facts.quantiles
        middle = facts.quantiles[len(QUANTILES) // 2]
        spread = "; --score-scaling log or rank spreads them" if facts.scores_alike < NEARLY_ALL else ""
        return [f"{facts.alike:.1%} of the rows have grade {facts.grade:g} (lowest {low:g}, median {middle:g}, highest "
                f"{high:g}), so their weights are equal, {effective}{spread}"]  # fmt: skip
    if batches.effective_rows < (1 - NEARLY_ALL) * batches.rows:
        return [f"a few rows have nearly all the weight: {effective}; --score-to-weight log or linear spreads it"]
    return []


def described(facts: Facts) -> str:
    """The facts in lines, for a dry run."""
    names = ", ".join(f"{share:.0%}" for share in QUANTILES)
    grades = ", ".join(f"{grade:g}" for grade in facts.quantiles)
    batches = facts.batches
    lines = [
        f"grades: {grades} at the quantiles {names}; {facts.lowest_share:.1%} of the rows have the lowest",
        f"weights: {batches.effective_rows:.1f} effective rows in a batch of {batches.rows:.0f}",
    ]
    if facts.cut:
        shares = ", ".join(f"{share:.1%} of '{field}'" for field, share in facts.cut.items())
        lines.append(f"text: the context of {facts.context} tokens cuts {shares}")
    return "\n".join(lines)
