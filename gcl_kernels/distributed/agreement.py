"""What the ranks agree on before they exchange anything: sizes, and what has to be alike.

A difference is then an error on every rank instead of a hang or a wrong number. The agreement is always the first exchange of
a call.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..pairs import OPTIONAL, Pairs
from ..validation import may_read
from .exchange import all_gather_single, all_rows, outside_compiled_graphs, total, waiting

MESSAGE_BYTES = 1024  # of one rank's part of the agreement


@dataclass(frozen=True)
class Ranks:
    """Who holds what, as the ranks of `group` have agreed: rank r has rows[r] rows of lhs and cols[r] of rhs."""

    group: Any
    transport: str
    rank: int
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def n(self) -> int:
        return sum(self.rows)

    @property
    def m(self) -> int:
        return sum(self.cols)

    def columns(self, rank: int) -> slice:
        """Where that rank's columns stand among all."""
        start = sum(self.cols[:rank])
        return slice(start, start + self.cols[rank])

    @property
    def first_column(self) -> int:
        return self.columns(self.rank).start

    def all_columns(self, x: Tensor, what: str = "a statistic") -> Tensor:
        """(M, ...) of every rank's x (cols[rank], ...), in rank order; differentiable, every rank's use of it counted."""
        return all_rows(x, self.cols, self.group, what)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x, alike in shape, over ranks; differentiable, every rank's use of it counted."""
        return total(x, self.group)


@contextlib.contextmanager
def shared_failure(process_group: Any) -> Iterator[None]:
    """A rank that fails in here, before the agreement, tells the others, which would wait for it otherwise."""
    try:
        yield
    except Exception as error:
        if process_group is not None:
            _exchange(process_group, {"error": f"{type(error).__name__}: {error}"[: MESSAGE_BYTES // 2]})
        raise


def agree(
    process_group: Any, transport: str, pairs: Pairs, logit_scale: Tensor | float, alike: Mapping[str, Any]
) -> Ranks:
    """The sizes of every rank, after all were seen to have called with what has to be alike, `alike` among it.

    `logit_scale` is the caller's: a float can be compared on every device.

    Raises:
        ValueError: on every rank, naming the argument, the ranks and what differed.
    """
    return agree_on_parts(process_group, transport, {"": pairs}, logit_scale, alike)[0]


@outside_compiled_graphs
def agree_on_parts(
    process_group: Any,
    transport: str,
    parts: Mapping[str, Pairs],
    logit_scale: Tensor | float,
    alike: Mapping[str, Any],
) -> list[Ranks]:
    """`agree` of each part, in one exchange. Parts have one rhs.

    Raises:
        ValueError: on every rank, naming the argument, the ranks and what differed.
    """
    (_, pairs), *others = parts.items()
    needs = [torch.is_grad_enabled() and x.requires_grad for x in pairs.differentiable]
    if isinstance(logit_scale, Tensor):
        logit_scale = float(logit_scale.detach()) if may_read(logit_scale) else math.nan
    mine = {
        "rows": [part.n for part in parts.values()],
        "cols": pairs.m,
        "label_range": _range([part.labels for part in parts.values()]),
        "scale": float(logit_scale),  # NaN where it may not be read
        "alike": {
            "transport": transport,
            "lhs and rhs": f"D = {pairs.d}, {str(pairs.lhs.dtype).removeprefix('torch.')} on {pairs.lhs.device.type}",
            **{name: _described(getattr(pairs, name)) for name in OPTIONAL},
            "requires_grad of lhs, rhs, logit_scale": str(needs),
            **{f"parts[{name}]": _summary(part) for name, part in others},
            **{name: str(value) for name, value in alike.items()},
        },
    }
    rank, got = dist.get_rank(process_group), _everybodys(process_group, mine)
    first = got[0]
    for q, other in enumerate(got):
        for name in dict.fromkeys((*first["alike"], *other["alike"])):
            values = first["alike"].get(name, "nothing"), other["alike"].get(name, "nothing")
            if values[0] != values[1]:
                raise ValueError(
                    f"{name}: expected the same on every rank, got {values[0]} on rank 0 and {values[1]} on rank {q}"
                )
        scales = first["scale"], other["scale"]
        if not (math.isclose(*scales, rel_tol=1e-5) or all(map(math.isnan, scales))):
            raise ValueError(
                f"logit_scale: expected the same on every rank, got {scales[0]} on rank 0 and {scales[1]} on rank {q}"
            )
    ranks = [
        Ranks(
            process_group,
            transport if len(got) > 1 else "all_gather",  # nobody to pass rhs on to
            rank,
            tuple(other["rows"][part] for other in got),
            tuple(other["cols"] for other in got),
        )
        for part in range(len(parts))
    ]
    m = ranks[0].m
    for q, other in enumerate(got):
        low, high = other["label_range"]
        if low < -1 or high >= m:
            raise ValueError(
                f"labels: expected columns 0..{m - 1} of all ranks' rhs, or -1 for none, got values from {low} to "
                f"{high} on rank {q}"
            )
    return ranks


def _described(x: Tensor | None) -> str:
    return "None" if x is None else f"a tensor (..., {x.shape[1]})" if x.ndim == 2 else "a tensor (...)"


def _summary(pairs: Pairs) -> str:
    """What has to be alike of a part, in few characters."""
    given = [f"{name} {tuple(x.shape[1:])}" for name, x in pairs.tensors() if name in OPTIONAL]
    return ", ".join([*given, f"requires_grad={torch.is_grad_enabled() and pairs.lhs.requires_grad}"])


def _range(labels: Sequence[Tensor | None]) -> tuple[int, int]:
    seen = [(int(x.min()), int(x.max())) for x in labels if x is not None and may_read(x)]
    return min((low for low, _ in seen), default=-1), max((high for _, high in seen), default=-1)


def _everybodys(group: Any, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's `mine`; where a rank has failed instead, its failure is every rank's error."""
    got = _exchange(group, mine)
    for q, other in enumerate(got):
        if "error" in other:
            raise ValueError(f"process_group: expected valid arguments on every rank, got on rank {q} {other['error']}")
    return got


def _exchange(group: Any, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's `mine`, read on the host: over the group's CPU backend where it has one ("cpu:gloo,cuda:nccl"), else over
    the device, which the host then waits for."""
    text = json.dumps(mine).encode()
    if len(text) > MESSAGE_BYTES:
        raise ValueError(f"process_group: expected options of at most {MESSAGE_BYTES} characters, got {len(text)}")
    device_types = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    device = "cpu" if "cpu" in device_types else device_types[0]
    message = torch.frombuffer(bytearray(text.ljust(MESSAGE_BYTES)), dtype=torch.uint8).to(device)
    world = dist.get_world_size(group)
    got = message.new_empty(world * MESSAGE_BYTES)
    with waiting("the agreement on sizes and options", group):
        all_gather_single(got, message, group=group)
    return [json.loads(bytes(part.tolist())) for part in got.cpu().split(MESSAGE_BYTES)]


@outside_compiled_graphs
def first_column(rhs: Tensor, process_group: Any) -> int:
    """Where this rank's rows of rhs stand among all ranks' columns: what to add to labels that count its own.

    Args:
        rhs: (M, D), this rank's rows. Only their number is looked at.
        process_group: a `torch.distributed.ProcessGroup`. Every rank must call.

    Raises:
        ValueError: on every rank, if another rank fails at this moment.
    """
    cols = [other["cols"] for other in _everybodys(process_group, {"cols": len(rhs)})]
    return sum(cols[: dist.get_rank(process_group)])
