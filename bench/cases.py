"""What is measured: one call of a loss, its shapes and its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from gcl_kernels.types import Directions

SHORT_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, short in SHORT_NAMES.items() for name in (short, str(dtype).removeprefix("torch."))}
PASSES = ("forward", "backward", "both")
DRAWS = ("isotropic", "clustered")
LOSSES = ("softmax", "sigmoid")
# What else a loss may be asked for, beside the fields of a case: limits of similarity or a bias of the columns on the primitive's
# softmax, a margin of false negatives of `gcl_loss`, and the sigmoid's primitive.
OPTIONS = ("", "limits", "false_negative_margin", "rhs_bias", "pairwise_softplus")

LOGIT_BIAS = -10.0  # of a sigmoid: SigLIP's start

CLUSTER = 16  # rows that share a centre: a query has so many near ties


@dataclass(frozen=True)
class Case:
    device: str
    dtype: str
    n: int
    m: int
    d: int
    directions: Directions = "both"
    passes: str = "both"
    logit_scale: float = 100.0
    draw: str = "clustered"
    fields: int = 1  # of the right-hand side
    ids: bool = False
    loss: str = "softmax"
    option: str = ""
    graph: bool = False  # a step captured once in a CUDA graph and replayed: no host in the time

    @property
    def flops(self) -> int:
        """Of the least work without N x M memory, by which rates are counted: 8 N M D, 6 for one direction and for a sigmoid; 2
        forward alone."""
        least = {"forward": 2, "backward": 6 if self.directions == "both" and self.loss == "softmax" else 4}
        if self.option == "pairwise_softplus":
            least["backward"] = 6  # its upstream gradient is not known beforehand
        return (sum(least.values()) if self.passes == "both" else least[self.passes]) * self.n * self.m * self.d

    @property
    def title(self) -> str:
        shape = f"N = {self.n:,}" + (f", M = {self.m:,}" if self.m != self.n else "") + f", D = {self.d:,}"
        extras = [self.dtype, f"{self.draw}, scale {self.logit_scale:g}"]
        extras += [self.directions] if self.directions != "both" else []
        extras += [f"{self.passes} only"] if self.passes != "both" else []
        extras += [f"{self.fields} fields"] if self.fields > 1 else []
        extras += [self.loss] if self.loss != "softmax" else []
        extras += [self.option] if self.option else []
        return ", ".join([shape, *extras, *["ids"] * self.ids, *["CUDA graph"] * self.graph])

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass
class Inputs:
    lhs: Tensor  # (N, D)
    rhs: list[Tensor]  # a field each, (M, D)
    logit_scale: Tensor
    ids: tuple[Tensor, Tensor] | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.lhs, *self.rhs, self.logit_scale]


def build(case: Case, seed: int = 0) -> Inputs:
    """Fresh random unit vectors. `isotropic`: pairs are strangers. `clustered`: as a half-trained model gives them: rows in
    clusters of near ties, positives at cosines from 0.3 to 0.9. Drawn where they are used: a CPU takes a minute for N = 2^20."""
    where = case.device if case.device == "cuda" else "cpu"
    g = torch.Generator(where).manual_seed(seed)
    unit = torch.nn.functional.normalize
    n, m, d = case.n, case.m, case.d

    def noise(rows: int) -> Tensor:
        return unit(torch.randn(rows, d, generator=g, device=where))

    x = noise(n)
    fields = []
    if case.draw == "clustered":
        centres = noise(-(-n // CLUSTER))
        x = unit(0.7 * centres[torch.arange(n, device=where) // CLUSTER] + 0.7 * x)
    for _ in range(case.fields):
        y = noise(m)
        if case.draw == "clustered":
            pairs = min(n, m)
            cosine = torch.empty(pairs, 1, device=where).uniform_(0.3, 0.9, generator=g)
            apart = unit(y[:pairs] - (y[:pairs] * x[:pairs]).sum(dim=1, keepdim=True) * x[:pairs])
            y[:pairs] = cosine * x[:pairs] + (1 - cosine**2).sqrt() * apart
        fields.append(y)
    dtype = DTYPES[case.dtype]

    def leaf(v: Tensor) -> Tensor:
        return v.to(case.device, dtype).requires_grad_()

    scale = torch.tensor(case.logit_scale, device=case.device, dtype=torch.promote_types(dtype, torch.float32))
    ids = None
    if case.ids:
        left = torch.randint(max(n // 4, 1), (n,), generator=g, device=where)
        right = torch.cat([left, torch.randint(max(n // 4, 1), (max(m - n, 0),), generator=g, device=where)])[:m]
        ids = left.to(case.device), right.to(case.device)
    return Inputs(leaf(x), [leaf(y) for y in fields], scale.requires_grad_(), ids)


def product(
    *,
    devices: Sequence[str],
    dtypes: Sequence[str],
    ns: Sequence[int],
    ms: Sequence[int] | None,
    ds: Sequence[int],
    directions: Sequence[Directions],
    passes: Sequence[str],
    scales: Sequence[float],
    draws: Sequence[str],
    fields: Sequence[int],
    ids: Sequence[bool],
) -> list[Case]:
    return [
        Case(device, SHORT_NAMES[DTYPES[dtype]], n, m or n, d, direction, which, scale, draw, n_fields, masked)
        for device in devices
        for dtype in dtypes
        for n, m, d in itertools.product(ns, ms or [0], ds)
        for direction, which in itertools.product(directions, passes)
        for scale, draw in itertools.product(scales, draws)
        for n_fields, masked in itertools.product(fields, ids)
    ]


SMALL_N = (64, 128, 256, 512, 1024, 2048, 4096)
OTHER_CURVES_N = (64, 256, 1024, 4096)  # of other dtypes and losses


def curves(device: str, largest: int | None = None) -> list[tuple[Case, tuple[str, ...]]]:
    """The scaling curves of a device, each case with its peers: N, dtypes, losses, D, number of fields, and each option alone.

    `largest`: bounds every N, for a run that only tries the command.
    """
    cpu = device == "cpu"
    dtype, other_dtype, n, d, dense_limit = (
        ("fp32", "bf16", 4096, 512, 16_384) if cpu else ("bf16", "fp32", 32_768, 768, 65_536)
    )
    n = min(n, largest or n)
    base = Case(device, dtype, n, n, d, logit_scale=100 / 7)
    ours, beside = ("ours",), ("ours", "open_clip")
    sigmoid = {"loss": "sigmoid", "logit_scale": 10.0}
    peers_of_sigmoid = (*beside, *(() if cpu else ("siglip_kernel",)))
    others = [size for size in (*OTHER_CURVES_N, n) if size <= dense_limit]
    ns = (*SMALL_N, 8192, 16_384, 32_768, 65_536, *(() if cpu else (131_072, 262_144, 524_288, 1_048_576)))
    changed: list[tuple[dict, tuple[str, ...]]] = [
        *(({"n": n, "m": n}, beside if n <= dense_limit else ours) for n in ns),
        *(({"n": n, "m": n, "dtype": other_dtype}, beside) for n in others),
        *(({"n": n, "m": n, **sigmoid}, peers_of_sigmoid) for n in others),
        *(({"n": n, "m": n, "dtype": other_dtype, **sigmoid}, peers_of_sigmoid) for n in others),
        *(({"d": d}, beside) for d in (64, 256, 512, 768, 1024) if d != base.d),
        *(({"fields": f}, (*ours, "dense")) for f in (2, 4, 8)),
        ({"ids": True}, (*ours, "dense")),
        *(({"option": option}, (*ours, "dense")) for option in OPTIONS[1:-1]),
        ({"option": OPTIONS[-1], **sigmoid}, (*ours, "dense")),
        ({"directions": "lhs_to_rhs"}, (*ours, "linear_cross_entropy", "linear_cross_entropy_chunked")),
        ({"passes": "forward"}, beside),
        ({"logit_scale": 100.0}, beside),
        ({"logit_scale": 100.0, "draw": "isotropic"}, beside),
    ]
    found = dict.fromkeys((replace(base, **change), peers) for change, peers in changed)
    return [(case, peers) for case, peers in found if largest is None or case.n <= largest]
