"""The options of a training run, `TrainOptions`: what they mean, their defaults, and what of them is refused.

Options that mean what they mean in open_clip bear open_clip's names; those of GCL bear Marqtune's.
"""

# ruff: noqa: RUF009 - the functions that stand for defaults return `dataclasses.field`

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_type_hints

from gcl_kernels import score_to_weight
from gcl_kernels.score_to_weight import WeightsOfScores
from gcl_kernels.training.metrics import NAMES
from gcl_kernels.training.openclip import TINY_MODEL
from gcl_kernels.training.option_values import (
    OptionError,
    column_names,
    false_negatives,
    field_weights,
    finite,
    kinds,
    named,
    not_none,
    plain,
    positive,
    whole,
)

GROUPS = ("data", "loss", "training", "logs, checkpoints and evaluation on the way")
"""In which options are listed."""


def _option(
    group: int, default: Any, help: str, *, check: Callable[[Any], str | None] | None = None, **on_command_line: Any
) -> Any:
    """A field: its help, what its values have to be (None: any, else what was expected), and how the command line has it."""
    metadata = {"group": GROUPS[group], "help": help, "check": check, **on_command_line}
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_data, _loss, _train, _runs = (partial(_option, group) for group in range(len(GROUPS)))
_LISTS = "a Python list or comma-separated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    # The table of the options is added to this text below.
    """What a training run is to do; `gcl_kernels.training.train` does it.

    The command line `python -m gcl_kernels.training` has the same options by the same names: `batch_size` is
    `--batch-size`. Paths may be `pathlib.Path`; every value is kept as a plain one, as checkpoints hold them.

    Raises:
        InputError: a ValueError that names the option, what was expected and what came.
        TypeError: a name that is none of these.
    """

    train_data: str = _data("", "CSV or TSV with a header line, Parquet, or webdataset tar files (one, a folder, a pattern)",
                            metavar="FILE", required=True)  # fmt: skip
    val_data: list[str] = _data([], "such files to evaluate on", metavar="FILE", nargs="*")
    dataset_type: Literal["auto", "csv", "parquet", "webdataset"] = _data("auto", "auto: by the file's ending")
    doc_meta: list[str] = _data([], "JSON {id: {field: value}}, corpus of each --val-data file; default: that file's documents",
                                metavar="FILE", nargs="*")  # fmt: skip
    left_keys: list[str] = dataclasses.field(
        metadata={"group": GROUPS[0], "help": f"columns of the query, {_LISTS}", "check": column_names}
    )
    right_keys: list[str] = dataclasses.field(
        metadata={"group": GROUPS[0], "help": f"columns of the document, {_LISTS}", "check": column_names}
    )
    weight_key: str = dataclasses.field(
        metadata={"group": GROUPS[0], "help": "column of the score, a number >= 0", "also": ["--weight_key"]}
    )
    img_or_txt: list[list[str]] = _data(
        [], "[['txt'], ['txt', 'img']]: kinds of the left and right columns; default: img where the name contains 'image' "
        "or 'img'", check=kinds, metavar="KINDS",
    )  # fmt: skip
    query_id_key: str | None = _data(None, "column that identifies the query; default: the left columns together")
    doc_id_key: str | None = _data(None, "column that identifies the document; default: the right columns together")
    csv_separator: str | None = _data(None, "default: a tab for .tsv, else a comma")
    image_root: str | None = _data(
        None, "folder that relative image paths start from; default: that of the file which names them", metavar="DIR"
    )
    skip_bad_rows: bool = _data(False, "leave bad rows out and say which, instead of stopping")
    check_images: Literal["decode", "exists", "none"] = _data(
        "decode", "what reading does with image files; those that fail later are missing values"
    )

    loss: Literal["softmax", "sigmoid"] = _loss(
        "softmax", "softmax: GCL's, of CLIP; sigmoid: SigLIP's with weighted positives, and a bias that is learned"
    )
    score_to_weight: str = _loss(
        "log", "log, linear, inverse_sqrt (the best of the GCL paper), inverse, constant (plain CLIP), piecewise"
    )
    knots: list[list[float]] | None = _loss(
        None,
        "of --score-to-weight piecewise, which is linear between them: 1:0.1,50:1,100:5",
        metavar="SCORE:WEIGHT,...",
    )
    score_scaling: Literal["linear", "log", "rank", "none"] = _loss(
        "linear", "linear (also called minmax): scores become int((s - min) / (max - min) * 99 + 1) over the file; log, rank: "
        "so do their log(1 + s), for clicks, or their ranks; grades of --val-data likewise; none: scores are in [1, s_max] "
        "already",
    )  # fmt: skip
    s_max: float = _loss(100.0, "largest score, with --score-scaling none", check=positive)
    min_score: float = _loss(
        -math.inf, "leave training rows with a lower score out: judged not relevant, so no positives"
    )
    weight_normalize: Literal["mean", "none"] = _loss("mean", "divide weights by the batch mean")
    false_negatives: str = _loss(
        "mask", "rows of one query or one document in a batch: mask them from each other's negatives, avoid them (batches "
        "without duplicates), or keep them as negatives; margin:0.1 and ratio:0.95 mask them, and pairs more similar than the "
        "positive's similarity plus 0.1, or times 0.95, as well (default mask)", check=false_negatives, metavar="HOW",
    )  # fmt: skip
    left_weights: list[float] = _loss([], f"weight of each left field, {_LISTS}; default: equal", check=field_weights)
    right_weights: list[float] = _loss([], f"weight of each right field, {_LISTS}; default: equal", check=field_weights)
    cross_field_loss: bool = _loss(False, "add the mean of the loss over all pairs of fields")
    logit_scale: float | None = _loss(
        None, "at the start; default: the model's own, and 10 for --loss sigmoid on random weights",
        check=positive, metavar="X",
    )  # fmt: skip
    logit_bias: float | None = _loss(
        None, "at the start, of --loss sigmoid; default: the model's own, or -10", check=finite, metavar="X"
    )
    logit_scale_max: float = _loss(100.0, "it is kept at or below", check=positive, metavar="X")

    model: str = _train(TINY_MODEL, "any open_clip model name, or a model configuration NAME.json")
    pretrained: str | None = _train(None, "open_clip's tag or a checkpoint file; default: random weights")
    context_length: int | None = _train(None, "text tokens; default: the model's own", check=positive)
    batch_size: int = _train(512, "rows of a process and step", check=positive)
    mini_batch_size: int | None = _train(
        None, "gradient caching: the encoders see N rows at a time, the loss the whole batch", check=positive, metavar="N"
    )  # fmt: skip
    accum_freq: int = _train(1, "open_clip's name for it: a step has K times --batch-size rows, encoded --batch-size at a time",
                             check=positive, metavar="K")  # fmt: skip
    epochs: int = _train(10, "passes over the training file", check=positive)
    steps: int | None = _train(None, "number of batches in all, instead of --epochs; 0: only evaluate", check=whole)
    lr: float = _train(5e-4, "learning rate after the warm-up; pretrained models take less, some 1e-5", check=positive)
    wd: float = _train(0.2, "weight decay of AdamW; gains and biases have none")
    beta1: float = _train(0.9, "of AdamW, for the mean of the gradient")
    beta2: float = _train(0.98, "of AdamW, for the mean of its square")
    eps: float = _train(1e-6, "of AdamW", check=positive)
    warmup: int = _train(100, "steps; at most a tenth of the run is used")
    lr_scheduler: Literal["cosine", "const"] = _train("cosine", "after the warm-up")
    grad_clip_norm: float | None = _train(None, "largest norm of the gradient", check=positive, metavar="X")
    precision: Literal["fp32", "amp_bf16", "amp"] | None = _train(
        None, "amp: float16 with a gradient scaler; default: amp_bf16 on CUDA, fp32 elsewhere"
    )
    lock_image: bool = _train(False, "do not train the image tower")
    lock_text: bool = _train(False, "do not train the text tower")
    grad_checkpointing: bool = _train(False, "recompute activations in the backward")
    torchcompile: bool = _train(False, "torch.compile both towers")
    seed: int = _train(0, "of the initial weights, the batches and dropout")
    workers: int = _train(4, "threads that decode images", check=positive)
    top_k: int = _train(1000, "documents ranked for each query in evaluation", check=positive)
    dry_run: bool = _train(False, "read the data, build the model, run two steps, print the plan and stop")

    # torchrun takes --logs for an ambiguous start of options of its own, wherever it stands.
    logs: str = _runs("logs", "under torchrun: --logs-dir", also=["--logs-dir"], metavar="DIR")
    name: str = _runs("", "results go to LOGS/NAME; default: the date and time")
    save_frequency: int = _runs(1, "save after every N epochs; 0: only at the end", check=whole, metavar="N")
    save_steps: int = _runs(0, "and after every N steps; 0: not", check=whole, metavar="N")
    keep_last: int = _runs(3, "keep the K newest checkpoints, and best.pt; 0: all", check=whole, metavar="K")
    resume: str | None = _runs(
        None, "go on from a checkpoint of this harness; latest: epoch_latest.pt of LOGS/NAME if there is one; last-good: the "
        "newest of LOGS/NAME that can be read", metavar="PATH",
    )  # fmt: skip
    val_frequency: int = _runs(0, "evaluate after every N epochs; 0: only at the end", check=whole, metavar="N")
    val_steps: int = _runs(0, "and after every N steps; 0: not", check=whole, metavar="N")
    best_metric: str | None = _runs(
        None, f"keep best.pt, by the mean over --val-data of one of {', '.join(NAMES)}", choices=NAMES, metavar="NAME"
    )
    report_to: str = _runs("", "tensorboard, wandb, or both with a comma", metavar="NAMES")
    log_every_n_steps: int | None = _runs(
        None, "a line and a point of the curves after every N steps; default: a point every 10, and lines at intervals of 10 s "
        "to 5 min", check=positive, also=["--log-every"], metavar="N",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field, kind in zip(dataclasses.fields(self), kinds_of_options().values(), strict=True):
            self._set(field.name, plain(field, kind, getattr(self, field.name)))
        if not self.img_or_txt:
            self._set("img_or_txt", [kinds_by_name(self.left_keys), kinds_by_name(self.right_keys)])
        for place, side in enumerate(("left", "right")):
            keys, weights = getattr(self, f"{side}_keys"), getattr(self, f"{side}_weights")
            kinds = self.img_or_txt[place]
            if not weights:
                self._set(f"{side}_weights", [1.0] * len(keys))
            elif len(weights) != len(keys):
                raise OptionError(f"{named(f'{side}_weights')}: expected {len(keys)} weights as in {named(f'{side}_keys')}, "
                                  f"got {len(weights)}")  # fmt: skip
            if len(kinds) != len(keys):
                raise OptionError(f"{named('img_or_txt')}: expected {len(keys)} {side} kinds as in {named(f'{side}_keys')}, "
                                  f"got {len(kinds)}")  # fmt: skip
        if self.csv_separator is not None:
            self._set("csv_separator", {"\\t": "\t", "tab": "\t"}.get(self.csv_separator, self.csv_separator))
        for name, fault in self._faults():
            raise OptionError(f"{named(name)}: {fault}")
        self._set("name", self.name or time.strftime("%Y_%m_%d-%H_%M_%S"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _faults(self) -> list[tuple[str, str]]:
        """Options that do not go with others, and what is wrong with them."""
        found: list[tuple[str, str]] = []
        try:
            weights_of(self)
        except ValueError as error:
            argument, _, fault = str(error).partition(": ")
            found.append((argument, fault))
        unknown = set(filter(None, self.report_to.split(","))) - {"tensorboard", "wandb"}
        locked = self.lock_image or self.lock_text
        rules = [
            (self.loss == "sigmoid" and bool(by_similarity(self.false_negatives)), "false_negatives",
             f"mask, avoid or keep beside {named('loss')} sigmoid", self.false_negatives),
            (self.loss == "softmax" and self.logit_bias is not None, "logit_bias",
             f"{named('loss')} sigmoid beside it, since a softmax has none", self.logit_bias),
            (self.doc_meta and len(self.doc_meta) != len(self.val_data), "doc_meta",
             f"one file for each of the {len(self.val_data)} in {named('val_data')}", len(self.doc_meta)),
            (self.csv_separator is not None and len(self.csv_separator) != 1, "csv_separator",
             "one character", f"'{self.csv_separator}'"),
            # torch.compile: "Activation checkpoint rematerialization [...] does not support RNG ops", of a tower without
            # gradients.
            (self.torchcompile and self.grad_checkpointing and locked, "torchcompile",
             f"no {named('grad_checkpointing')} beside {named('lock_image')} or {named('lock_text')}", "both"),
            (self.dry_run and self.steps == 0, "dry_run", f"{named('steps')} > 0", 0),
            (self.best_metric and not self.val_data, "best_metric", f"{named('val_data')} to measure it on", "none"),
            (unknown, "report_to", "tensorboard or wandb", ", ".join(sorted(unknown))),
            (not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1), "beta1",
             f"{named('beta1')} and {named('beta2')} in [0, 1)", f"{self.beta1} and {self.beta2}"),
            (self.warmup < 0 or not self.wd >= 0, "wd",
             f"{named('warmup')} and {named('wd')} >= 0", f"{self.warmup} and {self.wd}"),
        ]  # fmt: skip
        return found + [(name, f"expected {what}, got {came}") for broken, name, what, came in rules if broken]


def kinds_of_options() -> dict[str, Any]:
    """What type each option is, None where it may be left out not among them: `{"lr": float, "steps": int, ...}`."""
    return {name: not_none(hint) for name, hint in get_type_hints(TrainOptions).items()}


def kinds_by_name(keys: Sequence[str]) -> list[str]:
    """The default of `img_or_txt` for the fields of a side."""
    return ["img" if "image" in str(key).lower() or "img" in str(key).lower() else "txt" for key in keys]


def by_similarity(false_negatives: str) -> dict[str, float]:
    """What goes with `false_negatives` to `gcl_kernels.GCLLoss`: the margin or the ratio, if it is one."""
    name, colon, number = false_negatives.partition(":")
    return {f"false_negative_{name}": float(number)} if colon else {}


def weighting(options: TrainOptions) -> dict[str, Any]:
    """What goes with `options.score_to_weight` to `gcl_kernels.score_to_weight`, for scores as the run scales them."""
    return {
        "s_max": options.s_max if options.score_scaling == "none" else 100.0,
        "knots": options.knots,
        "normalize": None if options.weight_normalize == "none" else options.weight_normalize,
    }


def weights_of(options: TrainOptions) -> WeightsOfScores:
    """The function from scaled scores to weights.

    Raises:
        ValueError: the name of none, or knots that do not fit.
    """
    name: Any = options.score_to_weight
    return score_to_weight(name, **weighting(options))


def _described() -> str:
    """A table of all options, from the same words as the command line's help."""
    hints = TrainOptions.__annotations__
    rows = ["    | option | type | default | meaning |", "    |---|---|---|---|"]
    for field in dataclasses.fields(TrainOptions):
        has_default = field.default is not dataclasses.MISSING
        default = repr(field.default) if has_default else "[]" if field.default_factory is list else "required"
        cells = [f"`{field.name}`", f"`{hints[field.name]}`", default, field.metadata["help"]]
        rows.append(f"    | {' | '.join(cell.replace('|', 'or') for cell in cells)} |")
    return "\n".join(rows)


TrainOptions.__doc__ = f"{TrainOptions.__doc__}\n{_described()}\n    "
