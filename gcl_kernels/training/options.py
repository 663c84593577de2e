"""The command line of `python -m gcl_kernels.training`, and options from a YAML file.

Flags that mean what they mean in open_clip bear open_clip's names; those of GCL bear Marqtune's.
"""

from __future__ import annotations

import argparse
import ast
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gcl_kernels import score_to_weight
from gcl_kernels.training.metrics import NAMES
from gcl_kernels.training.openclip import TINY_MODEL
from gcl_kernels.training.scaling import SCALINGS


def parse_list(text: str) -> list[Any]:
    """A Python literal list, or values separated by commas: `"['title', 'image']"` or `title,image`."""
    text = text.strip()
    if text[:1] in ("[", "("):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise argparse.ArgumentTypeError(f"expected a Python list or comma-separated values, got {text}") from None
        return list(value) if isinstance(value, (list, tuple)) else [value]
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_weights(text: str) -> list[float]:
    """A list of numbers >= 0, not all 0."""
    try:
        weights = [float(value) for value in parse_list(text)]
    except (TypeError, ValueError):
        weights = []
    if not (weights and all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0):
        raise argparse.ArgumentTypeError(f"expected numbers >= 0, not all 0, got {text}")
    return weights


def parse_kinds(text: str) -> list[list[str]]:
    """`"[['txt'], ['txt', 'img']]"` or `"txt;txt,img"`: the kinds of the left fields, then of the right ones."""
    kinds = parse_list(text) if text.strip()[:1] in ("[", "(") else [parse_list(side) for side in text.split(";")]
    if len(kinds) != 2 or not all(isinstance(side, (list, tuple)) and set(side) <= {"txt", "img"} for side in kinds):
        raise argparse.ArgumentTypeError(f"expected two lists of 'txt' and 'img', got {text}")
    return [list(side) for side in kinds]


def kinds_by_name(keys: Sequence[str]) -> list[str]:
    """The default of `--img-or-txt` for the fields of a side."""
    return ["img" if "image" in str(key).lower() or "img" in str(key).lower() else "txt" for key in keys]


def parse_knots(text: str) -> list[list[float]]:
    """`1:0.1,50:1,100:5` or `"[[1, 0.1], [50, 1], [100, 5]]"`: scores and their weights."""
    try:
        pairs = [knot.split(":") if isinstance(knot, str) else knot for knot in parse_list(text)]
        return [[float(score), float(weight)] for score, weight in pairs]
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected SCORE:WEIGHT pairs, a comma between them, got {text}") from None


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type: a finite number > 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def finite(text: str) -> float:
    """An argparse type: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def whole(text: str) -> int:
    """An argparse type: a whole number >= 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text}")
    return value


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage; `module` is what `python -m` runs it by."""

    def __init__(self, module: str, **options: Any) -> None:
        super().__init__(prog=program(module), **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def program(module: str) -> str:
    """The command that was given: a console script's name, or `python -m MODULE`."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    stem = name.removesuffix(".exe").removesuffix("-script.py")
    return stem if stem.startswith("gcl-") else f"python -m {module}"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Show a default where there is one to show."""
        return action.help if action.default in (None, [], False, -math.inf) else super()._get_help_string(action)


def parser_of_config() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def config_argv(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a YAML file as a command line: every value goes through the same checks."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config: expected a readable file, got '{path}': {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config: expected YAML in '{path}', got {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        parser.error(f"--config: expected a mapping {{option: value}} in '{path}', got {type(content).__name__}")
    actions = {
        name.lstrip("-").replace("_", "-"): action for action in parser._actions for name in action.option_strings
    }
    argv = []
    for key, value in content.items():
        action = actions.get(str(key).replace("_", "-"))
        if action is None or key in ("config", "help"):
            parser.error(f"--config: expected options of this command in '{path}', got '{key}'")
        flag = action.option_strings[0]
        if action.nargs == 0:
            if not isinstance(value, bool):
                parser.error(f"--config: expected true or false for '{key}' in '{path}', got {value!r}")
            argv += [flag] if value else []
        elif action.nargs == "*":
            argv += [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]
        elif value is not None:
            argv.append(f"{flag}={value}")
    return argv


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m gcl_kernels.training`."""
    parser = Parser(
        "gcl_kernels.training", description="Train an open_clip model on (query, document, score) rows with GCL.",
        formatter_class=Help,
    )  # fmt: skip
    lists = "a Python list or comma-separated"

    parser.add_argument(
        "--config", metavar="FILE", help="YAML {option: value}; where both have an option, the command line wins"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--train-data", required=True, metavar="FILE",
                      help="CSV or TSV with a header line, Parquet, or webdataset tar files (one, a folder, a pattern)",
                      )  # fmt: skip
    data.add_argument("--val-data", nargs="*", default=[], metavar="FILE", help="such files to evaluate on")
    data.add_argument("--dataset-type", choices=("auto", "csv", "parquet", "webdataset"), default="auto",
                      help="auto: by the file's ending")  # fmt: skip
    data.add_argument("--doc-meta", nargs="*", default=[], metavar="FILE",
                      help="JSON {id: {field: value}}, corpus of each --val-data file; default: that file's documents",
                      )  # fmt: skip
    data.add_argument("--left-keys", required=True, type=parse_list, help=f"columns of the query, {lists}")
    data.add_argument("--right-keys", required=True, type=parse_list, help=f"columns of the document, {lists}")
    data.add_argument("--weight-key", "--weight_key", required=True, help="column of the score, a number >= 0")
    data.add_argument("--img-or-txt", type=parse_kinds, metavar="KINDS",
                      help="[['txt'], ['txt', 'img']]: kinds of the left and right columns; default: img where the name "
                      "contains 'image' or 'img'")  # fmt: skip
    data.add_argument("--query-id-key", help="column that identifies the query; default: the left columns together")
    data.add_argument("--doc-id-key", help="column that identifies the document; default: the right columns together")
    data.add_argument("--csv-separator", help="default: a tab for .tsv, else a comma")
    data.add_argument(
        "--skip-bad-rows", action="store_true", help="leave bad rows out and say which, instead of stopping"
    )

    data.add_argument("--check-images", choices=("decode", "exists", "none"), default="decode",
                      help="what reading does with image files; those that fail later are missing values")  # fmt: skip

    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax",
                      help="softmax: GCL's, of CLIP; sigmoid: SigLIP's with weighted positives, and a bias that is learned",
                      )  # fmt: skip
    loss.add_argument("--score-to-weight", default="log",
                      help="log, linear, inverse_sqrt (the best of the GCL paper), inverse, constant (plain CLIP), piecewise",
                      )  # fmt: skip
    loss.add_argument("--knots", type=parse_knots, metavar="SCORE:WEIGHT,...",
                      help="of --score-to-weight piecewise, which is linear between them: 1:0.1,50:1,100:5")  # fmt: skip
    loss.add_argument("--score-scaling", type=lambda name: {"minmax": "linear"}.get(name, name),
                      choices=(*SCALINGS, "none"), default="linear",
                      help="linear (also called minmax): scores become int((s - min) / (max - min) * 99 + 1) over the file; "
                      "log, rank: so do their log(1 + s), for clicks, or their ranks; grades of --val-data likewise; none: "
                      "scores are in [1, s_max] already")  # fmt: skip
    loss.add_argument("--s-max", type=positive(float), default=100.0, help="largest score, with --score-scaling none")
    loss.add_argument("--min-score", type=float, default=-math.inf,
                      help="leave training rows with a lower score out: judged not relevant, so no positives")  # fmt: skip
    loss.add_argument(
        "--weight-normalize", choices=("mean", "none"), default="mean", help="divide weights by the batch mean"
    )
    loss.add_argument("--false-negatives", type=parse_false_negatives, default="mask", metavar="HOW",
                      help="rows of one query or one document in a batch: mask them from each other's negatives, avoid them "
                      "(batches without duplicates), or keep them as negatives; margin:0.1 and ratio:0.95 mask them, and pairs "
                      "more similar than the positive's similarity plus 0.1, or times 0.95, as well (default mask)")  # fmt: skip
    loss.add_argument("--left-weights", type=parse_weights, help=f"weight of each left field, {lists}; default: equal")
    loss.add_argument(
        "--right-weights", type=parse_weights, help=f"weight of each right field, {lists}; default: equal"
    )
    loss.add_argument(
        "--cross-field-loss", action="store_true", help="add the mean of the loss over all pairs of fields"
    )

    loss.add_argument("--logit-scale", type=positive(float), metavar="X",
                      help="at the start; default: the model's own, and 10 for --loss sigmoid on random weights")  # fmt: skip
    loss.add_argument("--logit-bias", type=finite, metavar="X",
                      help="at the start, of --loss sigmoid; default: the model's own, or -10")  # fmt: skip
    loss.add_argument(
        "--logit-scale-max", type=positive(float), default=100.0, metavar="X", help="it is kept at or below"
    )

    train = parser.add_argument_group("training")
    train.add_argument(
        "--model", default=TINY_MODEL, help="any open_clip model name, or a model configuration NAME.json"
    )
    train.add_argument("--pretrained", help="open_clip's tag or a checkpoint file; default: random weights")
    train.add_argument("--context-length", type=positive(int), help="text tokens; default: the model's own")
    train.add_argument("--batch-size", type=positive(int), default=512, help="rows of a process and step")
    train.add_argument("--mini-batch-size", type=positive(int), metavar="N",
                       help="gradient caching: the encoders see N rows at a time, the loss the whole batch")  # fmt: skip
    train.add_argument("--accum-freq", type=positive(int), default=1, metavar="K",
                       help="open_clip's name for it: a step has K times --batch-size rows, encoded --batch-size at a time",
                       )  # fmt: skip
    train.add_argument("--epochs", type=positive(int), default=10, help="passes over the training file")
    train.add_argument("--steps", type=whole, help="number of batches in all, instead of --epochs; 0: only evaluate")
    train.add_argument("--lr", type=positive(float), default=5e-4,
                       help="learning rate after the warm-up; pretrained models take less, some 1e-5")  # fmt: skip
    train.add_argument("--wd", type=float, default=0.2, help="weight decay of AdamW; gains and biases have none")
    train.add_argument("--beta1", type=float, default=0.9, help="of AdamW, for the mean of the gradient")
    train.add_argument("--beta2", type=float, default=0.98, help="of AdamW, for the mean of its square")
    train.add_argument("--eps", type=positive(float), default=1e-6, help="of AdamW")
    train.add_argument("--warmup", type=int, default=100, help="steps; at most a tenth of the run is used")
    train.add_argument("--lr-scheduler", choices=("cosine", "const"), default="cosine", help="after the warm-up")
    train.add_argument("--grad-clip-norm", type=positive(float), metavar="X", help="largest norm of the gradient")
    train.add_argument("--precision", choices=("fp32", "amp_bf16", "amp"),
                       help="amp: float16 with a gradient scaler; default: amp_bf16 on CUDA, fp32 elsewhere")  # fmt: skip
    train.add_argument("--lock-image", action="store_true", help="do not train the image tower")
    train.add_argument("--lock-text", action="store_true", help="do not train the text tower")
    train.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward")
    train.add_argument("--torchcompile", action="store_true", help="torch.compile both towers")
    train.add_argument("--seed", type=int, default=0, help="of the initial weights, the batches and dropout")
    train.add_argument("--workers", type=positive(int), default=4, help="threads that decode images")
    train.add_argument(
        "--top-k", type=positive(int), default=1000, help="documents ranked for each query in evaluation"
    )
    train.add_argument("--dry-run", action="store_true",
                       help="read the data, build the model, run two steps, print the plan and stop")  # fmt: skip

    runs = parser.add_argument_group("logs, checkpoints and evaluation on the way")
    # torchrun takes --logs for an ambiguous start of options of its own, wherever it stands.
    runs.add_argument("--logs", "--logs-dir", default="logs", metavar="DIR", help="under torchrun: --logs-dir")
    runs.add_argument("--name", help="results go to LOGS/NAME; default: the date and time")
    runs.add_argument("--save-frequency", type=whole, default=1, metavar="N",
                      help="save after every N epochs; 0: only at the end")  # fmt: skip
    runs.add_argument("--save-steps", type=whole, default=0, metavar="N", help="and after every N steps; 0: not")
    runs.add_argument("--keep-last", type=whole, default=3, metavar="K",
                      help="keep the K newest checkpoints, and best.pt; 0: all")  # fmt: skip
    runs.add_argument("--resume", metavar="PATH",
                      help="go on from a checkpoint of this harness; latest: epoch_latest.pt of LOGS/NAME if there is one; "
                      "last-good: the newest of LOGS/NAME that can be read")  # fmt: skip
    runs.add_argument("--val-frequency", type=whole, default=0, metavar="N",
                      help="evaluate after every N epochs; 0: only at the end")  # fmt: skip
    runs.add_argument("--val-steps", type=whole, default=0, metavar="N", help="and after every N steps; 0: not")
    runs.add_argument("--best-metric", choices=NAMES, metavar="NAME",
                      help=f"keep best.pt, by the mean over --val-data of one of {', '.join(NAMES)}")  # fmt: skip
    runs.add_argument("--report-to", default="", metavar="NAMES", help="tensorboard, wandb, or both with a comma")
    runs.add_argument("--log-every-n-steps", type=positive(int), metavar="N",
                      help="a line and a point of the curves after every N steps; default: a point every 10, and lines at "
                      "intervals of 10 s to 5 min")  # fmt: skip
    argv = list(sys.argv[1:] if argv is None else argv)
    config, _ = parser_of_config().parse_known_args(argv)
    args = parser.parse_args([*(config_argv(config.config, parser) if config.config else []), *argv])

    if args.img_or_txt is None:
        args.img_or_txt = [kinds_by_name(args.left_keys), kinds_by_name(args.right_keys)]
    for side, keys, kinds in zip(("left", "right"), (args.left_keys, args.right_keys), args.img_or_txt, strict=True):
        weights = getattr(args, f"{side}_weights") or [1.0] * len(keys)
        setattr(args, f"{side}_weights", weights)
        if not keys or len(set(keys)) != len(keys) or not all(isinstance(key, str) for key in keys):
            parser.error(f"--{side}-keys: expected different column names, got {keys}")
        if len(weights) != len(keys):
            parser.error(f"--{side}-weights: expected {len(keys)} weights as in --{side}-keys, got {len(weights)}")
        if len(kinds) != len(keys):
            parser.error(f"--img-or-txt: expected {len(keys)} {side} kinds as in --{side}-keys, got {len(kinds)}")
    try:
        score_to_weight(args.score_to_weight, **weighting(args))
    except ValueError as error:
        argument, _, fault = str(error).partition(":")
        parser.error(f"--{argument.replace('_', '-')}:{fault}")
    if args.loss == "sigmoid" and by_similarity(args.false_negatives):
        parser.error(
            f"--false-negatives: expected mask, avoid or keep beside --loss sigmoid, got {args.false_negatives}"
        )
    if args.loss == "softmax" and args.logit_bias is not None:
        parser.error(
            f"--logit-bias: expected --loss sigmoid beside it, since a softmax has none, got {args.logit_bias:g}"
        )
    if args.doc_meta and len(args.doc_meta) != len(args.val_data):
        files, corpora = len(args.val_data), len(args.doc_meta)
        parser.error(f"--doc-meta: expected one file for each of the {files} in --val-data, got {corpora}")
    if args.csv_separator is not None:
        args.csv_separator = str({"\\t": "\t", "tab": "\t"}.get(args.csv_separator, args.csv_separator))
        if len(args.csv_separator) != 1:
            parser.error(f"--csv-separator: expected one character, got '{args.csv_separator}'")
    if args.torchcompile and args.grad_checkpointing and (args.lock_image or args.lock_text):
        # torch.compile: "Activation checkpoint rematerialization [...] does not support RNG ops", of a tower without gradients.
        parser.error("--torchcompile: expected no --grad-checkpointing beside --lock-image or --lock-text, got both")
    if args.dry_run and args.steps == 0:
        parser.error("--dry-run: expected --steps > 0, got 0")
    if args.best_metric and not args.val_data:
        parser.error("--best-metric: expected --val-data to measure it on, got none")
    if unknown := set(filter(None, args.report_to.split(","))) - {"tensorboard", "wandb"}:
        parser.error(f"--report-to: expected tensorboard or wandb, got {', '.join(sorted(unknown))}")
    if not (0 <= args.beta1 < 1 and 0 <= args.beta2 < 1):
        parser.error(f"expected --beta1 and --beta2 in [0, 1), got {args.beta1} and {args.beta2}")
    if args.warmup < 0 or args.wd < 0:
        parser.error(f"expected --warmup and --wd >= 0, got {args.warmup} and {args.wd}")
    args.name = args.name or time.strftime("%Y_%m_%d-%H_%M_%S")
    return args


def parse_false_negatives(text: str) -> str:
    """`mask`, `avoid`, `keep`, `margin:NUMBER` or `ratio:NUMBER`."""
    name, colon, number = text.partition(":")
    if text not in ("mask", "avoid", "keep"):
        if name not in ("margin", "ratio") or not colon:
            raise argparse.ArgumentTypeError(f"expected mask, avoid, keep, margin:NUMBER or ratio:NUMBER, got {text}")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number >= 0 after {name}:, got {number}")
    return text


def by_similarity(false_negatives: str) -> dict[str, float]:
    """What goes with `--false-negatives` to `gcl_kernels.GCLLoss`: the margin or the ratio, if it is one."""
    name, colon, number = false_negatives.partition(":")
    return {f"false_negative_{name}": float(number)} if colon else {}


def weighting(args: argparse.Namespace) -> dict[str, Any]:
    """What goes with `args.score_to_weight` to `gcl_kernels.score_to_weight`, for scores as the run scales them."""
    return {
        "s_max": args.s_max if args.score_scaling == "none" else 100.0,
        "knots": args.knots,
        "normalize": None if args.weight_normalize == "none" else args.weight_normalize,
    }
