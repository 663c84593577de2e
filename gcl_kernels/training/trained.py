"""How the model of a checkpoint was trained, and what follows for its evaluation where the command line says nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gcl_kernels.training.checkpoint import OURS
from gcl_kernels.training.train_options import kinds_by_name

DEFAULT_KEYS = {"left": ["text"], "right": ["image_local", "title"]}
DEFAULT_WEIGHTS = {"left": [1.0], "right": [0.9, 0.1]}
"""Of the default keys alone, as the GCL authors' evaluator has them; other fields weigh the same."""

ALONE = {"model_name": "ViT-B-32", "doc_id_key": "product_id", "score_scaling": "linear"}
"""Other defaults where no checkpoint says otherwise."""


def training_of(pretrained: str | None) -> dict[str, Any]:
    """`{"options": ..., "step": ...}` of a checkpoint of this harness; {} for open_clip's tags and other files."""
    if not pretrained or not Path(pretrained).is_file():
        return {}
    try:
        # Mapped into memory, the weights are not read.
        content = torch.load(pretrained, map_location="cpu", weights_only=True, mmap=True)
        ours = content.get(OURS)
        return {"options": dict(ours["options"]), "step": int(ours["step"])} if ours else {}
    except Exception:  # a checkpoint of others, or none at all: open_clip will say what is wrong with it
        return {}


def fill_in(args: argparse.Namespace, options: dict[str, Any]) -> list[str]:
    """Set what the command line left out, from the options of the training run; returns lines that say what was done."""
    taken: list[str] = []
    other: list[str] = []

    def settle(name: str, trained: Any, default: Any) -> None:
        if getattr(args, name) is None:
            setattr(args, name, default if trained is None else trained)
            if trained is not None:
                taken.append(f"{_flag(name)} {_text(trained)}")

    def compare(name: str, trained: Any, given: Any, same: bool) -> None:
        if not same:
            other.append(f"{_flag(name)} {_text(given)} (trained with {_text(trained)})")

    trained_kinds = options.get("img_or_txt") or [[], []]
    kinds_given = args.img_or_txt is not None
    kinds = args.img_or_txt or [[], []]
    for place, side in enumerate(("left", "right")):
        keys, weights = f"{side}_keys", f"{side}_weights"
        names = options.get(keys) or []
        kind_of = dict(zip(names, trained_kinds[place], strict=False))
        weight_of = dict(zip(names, options.get(weights) or [], strict=False))
        given = getattr(args, keys)
        if given is not None and names:
            compare(keys, names, given, set(given) == set(names))
        settle(keys, options.get(keys), DEFAULT_KEYS[side])
        chosen = getattr(args, keys)
        if not kinds_given:
            kinds[place] = [kind_of.get(key) or kind for key, kind in zip(chosen, kinds_by_name(chosen), strict=True)]
        elif names:
            now = dict(zip(chosen, kinds[place], strict=False))
            compare("img_or_txt", kind_of, now, all(now[key] == kind_of.get(key, now[key]) for key in now))
        known = [weight_of[key] for key in chosen] if all(key in weight_of for key in chosen) else None
        default = DEFAULT_WEIGHTS[side] if chosen == DEFAULT_KEYS[side] else [1.0] * len(chosen)
        if known and getattr(args, weights) is not None:
            compare(weights, known, getattr(args, weights), _same_shares(known, getattr(args, weights)))
        settle(weights, known, default)
    args.img_or_txt = kinds

    if args.context_length is not None and options:
        trained, given = options.get("context_length"), longest(args.context_length)
        compare("context_length", trained, given, trained == given)
    elif options.get("context_length"):
        settle("context_length", [options["context_length"]], None)
    for name, key in (("model_name", "model"), ("weight_key", "weight_key"), ("doc_id_key", "doc_id_key"),
                      ("query_id_key", "query_id_key"), ("score_scaling", "score_scaling")):  # fmt: skip
        if options.get(key) is not None and getattr(args, name) is not None and not name.endswith("id_key"):
            compare(name, options[key], getattr(args, name), options[key] == getattr(args, name))
        settle(name, options.get(key), ALONE.get(name))
    args.score_scaling = {"minmax": "linear"}.get(
        args.score_scaling, args.score_scaling
    )  # its name in older checkpoints
    lines = []
    if taken:
        lines.append(f"{args.pretrained}: as trained, {', '.join(taken)}")
    if other:
        lines.append(f"{args.pretrained}: other than trained, {', '.join(other)}")
    return lines


def longest(lengths: Sequence[Any] | None) -> int | None:
    """The largest of `[[77], [0, 77]]`; 0 and none are the model's own."""
    flat = [length for side in lengths or [] for length in (side if isinstance(side, (list, tuple)) else [side])]
    return max(map(int, flat), default=0) or None


def _same_shares(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(abs(x / sum(a) - y / sum(b)) < 1e-6 for x, y in zip(a, b, strict=True))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return ",".join(_text(item) for item in value)
    return "the model's own" if value is None else str(value)
