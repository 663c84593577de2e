"""The command line of `python -m gcl_kernels.training`, made from `TrainOptions`, and options from a YAML file."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from gcl_kernels.training.option_values import OptionError, flag_of
from gcl_kernels.training.train_options import GROUPS, TrainOptions, kinds_of_options


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
        return action.help if action.default in (None, [], False, "", -math.inf) else super()._get_help_string(action)


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


READERS: dict[str, Callable[[str], Any]] = {
    "left_keys": parse_list,
    "right_keys": parse_list,
    "left_weights": parse_weights,
    "right_weights": parse_weights,
    "img_or_txt": parse_kinds,
    "knots": parse_knots,
    "score_scaling": lambda name: {"minmax": "linear"}.get(name, name),
}
"""How the command line writes what is no plain number or text."""


def parser_of_options() -> Parser:
    """The parser with a flag for each field of `TrainOptions`.

    Made here, since no library was found that keeps the flags as they are: jsonargparse writes names with underscores and
    wants a value after a switch, tyro reads neither `a,b` nor Python's lists, and both word an error in several lines.
    """
    parser = Parser(
        "gcl_kernels.training", description="Train an open_clip model on (query, document, score) rows with GCL.",
        formatter_class=Help,
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help="YAML {option: value}; where both have an option, the command line wins"
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for field, kind in zip(dataclasses.fields(TrainOptions), kinds_of_options().values(), strict=True):
        about = field.metadata
        given: dict[str, Any] = {key: about[key] for key in ("help", "metavar", "nargs", "choices") if key in about}
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if default is dataclasses.MISSING or about.get("required"):
            given["required"] = True
        else:
            given["default"] = default
        if kind is bool:
            given["action"] = "store_true"
        elif get_origin(kind) is Literal:
            given["choices"] = get_args(kind)
        if kind in (int, float) or field.name in READERS:
            given["type"] = READERS.get(field.name, kind)
        groups[about["group"]].add_argument(flag_of(field.name), *about.get("also", ()), **given)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> TrainOptions:
    """The command line of `python -m gcl_kernels.training`."""
    parser = parser_of_options()
    argv = list(sys.argv[1:] if argv is None else argv)
    config, _ = parser_of_config().parse_known_args(argv)
    values = vars(parser.parse_args([*(config_argv(config.config, parser) if config.config else []), *argv]))
    del values["config"]
    try:
        return TrainOptions(**values)
    except OptionError as error:
        parser.error(error.as_flags)
