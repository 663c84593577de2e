"""Evaluations on the way: what every `--val-data` file says of the model after a step, and which step was the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from gcl_kernels.training.encode import FieldEncoder
from gcl_kernels.training.inputs import TestFiles, columns_of
from gcl_kernels.training.ranking import Corpus, Evaluation, embed_corpus, evaluate, random_ranking
from gcl_kernels.training.train_options import TrainOptions

EMBED_ROWS = 512
"""Rows embedded at a time."""

TABLE_METRICS = ("NDCG@10", "ERR", "RBP.9")

Line = tuple[str, str, int, dict[str, float]]
"""A line of `metrics_table`: test set, run, number of queries, means."""


class Validation:
    """The evaluations of a run.

    `evaluations` and `random` are of the last step evaluated, by test file; `history` has `{step, test, metric: mean}` of
    every one, and `best` the largest mean of `--best-metric` over the files so far.
    """

    def __init__(self, args: TrainOptions, encoder: FieldEncoder, tests: TestFiles, say: Callable[[str], None]) -> None:
        self._args, self._encoder, self._tests, self._say = args, encoder, tests, say
        columns = columns_of(args)
        self._left = columns.left, dict(zip(args.left_keys, args.left_weights, strict=True))
        self._right = columns.right, dict(zip(args.right_keys, args.right_weights, strict=True))
        self.evaluations: dict[str, Evaluation] = {}
        self.random: dict[str, Evaluation] = {}
        self.history: list[dict[str, Any]] = []
        self.best = -math.inf

    def __len__(self) -> int:
        return len(self._tests.pairs)

    def has(self, step: int) -> bool:
        """Whether every file has been evaluated after a step."""
        return {line["test"] for line in self.history if line["step"] == step} >= self._tests.pairs.keys()

    def run(self, step: int) -> bool:
        """Evaluate the model as it is after `step`; whether it is the best so far."""
        embedded: dict[str, Corpus] = {}
        name = f"{self._args.name}: evaluation"
        # Without a file there is nothing to show a bar of.
        for path in tqdm(self._tests.pairs, desc=name, unit="file", disable=None if len(self) else True, leave=False):
            # Test sets often share a corpus; it is embedded once.
            meta = self._tests.corpus_of[path]
            if meta not in embedded:
                corpus = self._tests.corpora[meta]
                embedded[meta] = embed_corpus(self._encoder, corpus, self._right, batch_size=EMBED_ROWS)
            pairs = self._tests.pairs[path]
            found = evaluate(
                self._encoder, pairs, embedded[meta], self._left, top_k=self._args.top_k, batch_size=EMBED_ROWS
            )
            self.evaluations[path] = found
            # A run that ends between its last checkpoint and its results evaluates that checkpoint again.
            self.history[:] = [line for line in self.history if (line["step"], line["test"]) != (step, path)]
            self.history.append({"step": step, "test": path, **found.means})
            shown = "  ".join(f"{metric} {found.means[metric]:.4f}" for metric in TABLE_METRICS)
            self._say(f"step {step}  {path}  {shown}")
        if not (self._args.best_metric and self.evaluations):
            return False
        value = sum(found.means[self._args.best_metric] for found in self.evaluations.values()) / len(self)
        better = value > self.best
        self.best = max(self.best, value)
        return better

    def rank_at_random(self) -> None:
        """Fill `random`: what the metrics are where nothing has been learnt."""
        for path, found in self.evaluations.items():
            self.random[path] = random_ranking(self._tests.pairs[path], found.document_ids, top_k=self._args.top_k)

    def table(self) -> str:
        """The last evaluation of each file, the best beside it where that is another, and a random ranking."""
        measured = self._args.best_metric or TABLE_METRICS[0]
        steps = sorted({line["step"] for line in self.history})
        of_step = {step: [line for line in self.history if line["step"] == step] for step in steps}
        whole = [step for step in steps if len(of_step[step]) == len(self)]
        # Of equally good ones the first, as best.pt is.
        best = max(whole, key=lambda step: (sum(line[measured] for line in of_step[step]), -step), default=None)
        lines: list[Line] = []
        for path, found in self.evaluations.items():
            queries = len(found.query_ids)
            lines.append((path, f"{self._args.score_to_weight}, step {steps[-1]}", queries, found.means))
            if best is not None and best != steps[-1]:
                means = next(line for line in of_step[best] if line["test"] == path)
                kept = ", best.pt" if self._args.best_metric else ""
                lines.append(("", f"best {measured}, step {best}{kept}", queries, means))
            lines.append(("", "random ranking", queries, self.random[path].means))
        return metrics_table(lines)


def metrics_table(lines: Sequence[Line]) -> str:
    """A table with `TABLE_METRICS`, means over the queries."""
    sets, runs = max(len(test) for test, *_ in lines), max(len(run) for _, run, *_ in lines)
    names = "  ".join(f"{name:>7}" for name in TABLE_METRICS)
    head = f"{'test set':<{sets}}  {'run':<{runs}}  {'queries':>7}  {names}"
    table = [head, "-" * len(head)]
    for test, run, queries, means in lines:
        values = "  ".join(f"{means[name]:7.3f}" for name in TABLE_METRICS)
        table.append(f"{test:<{sets}}  {run:<{runs}}  {queries:>7}  {values}")
    return "\n".join(table)
