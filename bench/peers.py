"""This library and what a user would pick instead, each called as its users call it.

`peer(name)(case)` returns a function of `cases.Inputs` that gives the loss, or raises `Unsupported` with the reason,
which is a result: it stands in the peer's cell. A name with a colon, `module:function`, is anybody's
`function(lhs, rhs, logit_scale)`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.cases import LOGIT_BIAS, Case, Inputs
from gcl_kernels.training.openclip import import_open_clip

Loss = Callable[[Inputs], Tensor]


class Unsupported(Exception):
    """Why a peer has no figure."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def package(module: str) -> Any:
    return imported(lambda: importlib.import_module(module))


def imported(load: Callable[[], Any]) -> Any:
    """`load()`. A peer may fail to import in ways of its own; that is its result."""
    try:
        return load()
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0][:120]}") from error


def plain(case: Case) -> None:
    require(case.fields == 1, "has no fields")
    require(not case.ids, "masks no false negatives")
    require(not case.option, f"has no {case.option}")


def plain_pairs(case: Case) -> None:
    plain(case)
    require(case.n == case.m, "takes M = N only")


def on_gpu(case: Case) -> None:
    require(case.device == "cuda", f"unsupported device: {case.device}")


def ours(case: Case) -> Loss:
    import gcl_kernels

    if case.loss == "sigmoid" and not case.option:
        plain_pairs(case)
        return sigmoid(gcl_kernels.SigLipLoss())
    if case.fields == 1 and not case.ids and case.directions == "both" and case.n == case.m and not case.option:
        clip = gcl_kernels.ClipLoss()
        return lambda x: clip(x.lhs, x.rhs[0], x.logit_scale)
    return any_case(case, gcl_kernels)


def sigmoid(module: Callable[..., Tensor]) -> Loss:
    return lambda x: module(x.lhs, x.rhs[0], x.logit_scale, LOGIT_BIAS)


def any_case(case: Case, library: ModuleType) -> Loss:
    """By the functions of `gcl_kernels` or of `reference`, which have the same names."""
    if case.option in ("limits", "pairwise_softplus"):
        require(case.fields == 1 and case.directions == "both" and not case.ids, "measured by itself")
        return with_limits(library) if case.option == "limits" else by_pairs(library)
    bias = torch.linspace(-1, 1, case.m, device=case.device)
    options = {"false_negative_margin": {"false_negative_margin": 0.1}, "rhs_bias": {"rhs_bias": bias}}.get(
        case.option, {}
    )

    def loss(x: Inputs) -> Tensor:
        rhs = x.rhs[0] if len(x.rhs) == 1 else {str(i): y for i, y in enumerate(x.rhs)}
        left, right = x.ids or (None, None)
        return library.gcl_loss(
            x.lhs, rhs, x.logit_scale, directions=case.directions, lhs_ids=left, rhs_ids=right, **options
        )

    return loss


def with_limits(library: ModuleType) -> Loss:
    """CLIP's loss over the primitive with limits of similarity that hide few pairs."""

    def loss(x: Inputs) -> Tensor:
        limits = (torch.full_like(y.detach()[:, 0], 0.9) for y in (x.lhs, x.rhs[0]))
        row, col, positive = library.pairwise_logsumexp(
            x.lhs, x.rhs[0], x.logit_scale, **dict(zip(("lhs_limit", "rhs_limit"), limits, strict=True))
        )
        return ((row + col[: len(row)]) / 2 - positive).mean()

    return loss


def by_pairs(library: ModuleType) -> Loss:
    """SigLIP's loss over the sigmoid's primitive."""

    def loss(x: Inputs) -> Tensor:
        row, positive = library.pairwise_softplus(x.lhs, x.rhs[0], x.logit_scale, LOGIT_BIAS)
        return (row + torch.nn.functional.softplus(-positive)).mean()

    return loss


def open_clip_losses() -> Any:
    """The module `open_clip.loss`, from its file alone where the package's other needs (torchvision, timm) are not installed."""
    with contextlib.suppress(Exception):
        import_open_clip()
        return importlib.import_module("open_clip.loss")
    package_spec = importlib.util.find_spec("open_clip")
    require(package_spec is not None, "cannot be imported: open_clip is not installed")
    folders = package_spec.submodule_search_locations if package_spec else None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path((folders or ["."])[0]) / "loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks a function's module up by its name
    spec.loader.exec_module(module)
    return module


def open_clip(case: Case) -> Loss:
    plain_pairs(case)
    losses = imported(open_clip_losses)
    if case.loss == "sigmoid":
        return sigmoid(losses.SigLipLoss())
    require(case.directions == "both", "has both directions only")
    clip = losses.ClipLoss()
    return lambda x: clip(x.lhs, x.rhs[0], x.logit_scale)


def open_clip_compiled(case: Case) -> Loss:
    eager = open_clip(case)
    torch._dynamo.reset()  # cases share this code, and after eight shapes of one code torch.compile gives up and runs it eagerly
    return torch.compile(eager, dynamic=False)


def dense(case: Case) -> Loss:
    """The formula as it stands in `reference`: what somebody who needs fields or ids would write."""
    import reference

    return any_case(case, reference)


def scaled(x: Inputs) -> Tensor:
    return x.logit_scale * x.lhs


def both_directions(case: Case, one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """The mean of `one` (rows, columns, labels) by rows and by columns; or one of them."""
    labels = torch.arange(case.n, device=case.device)

    def loss(x: Inputs) -> Tensor:
        lhs, rhs = scaled(x), x.rhs[0]
        if case.directions == "lhs_to_rhs":
            return one(lhs, rhs, labels)
        if case.directions == "rhs_to_lhs":
            return one(rhs, lhs, labels)
        return (one(lhs, rhs, labels) + one(rhs, lhs, labels)) / 2

    return loss


def as_rows(case: Case) -> None:
    """Of losses that take rows, columns and one label a row."""
    plain(case)
    require(case.directions == "lhs_to_rhs" or case.n == case.m, "takes M = N only for columns")


def linear_cross_entropy(case: Case, *, chunked: bool = False) -> Loss:
    """With the logits in memory, as it is by default; or `chunked`."""
    as_rows(case)
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    chosen = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    require(function is not None and (chosen is not None or not chunked), f"not in torch {torch.__version__}")
    options = {"options": chosen()} if chunked else {}  # pyright: ignore
    return both_directions(case, functools.partial(function, **options))  # pyright: ignore


def cut_cross_entropy(case: Case) -> Loss:
    as_rows(case)
    on_gpu(case)
    require(case.dtype in ("bf16", "fp16"), "takes bf16 and fp16 only")
    return both_directions(case, package("cut_cross_entropy").linear_cross_entropy)


def liger(case: Case) -> Loss:
    as_rows(case)
    on_gpu(case)
    module = package("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return both_directions(case, lambda rows, columns, labels: loss(columns, rows, labels))


def inf_cl(case: Case) -> Loss:
    plain_pairs(case)
    on_gpu(case)
    require(case.d % 256 == 0, "takes D in multiples of 256 only")
    module = package("inf_cl")

    def loss(x: Inputs) -> Tensor:
        def one(rows: Tensor, columns: Tensor) -> Tensor:
            return module.cal_flash_loss(rows, columns, scale=x.logit_scale).mean()

        lhs, rhs = x.lhs, x.rhs[0]
        if case.directions != "both":
            return one(lhs, rhs) if case.directions == "lhs_to_rhs" else one(rhs, lhs)
        return (one(lhs, rhs) + one(rhs, lhs)) / 2

    return loss


def sentence_transformers(case: Case) -> Loss:
    """MultipleNegativesRankingLoss of dot products; its model is replaced by one that hands on the embeddings, and its scale is a
    constant."""
    plain_pairs(case)
    require(case.directions != "rhs_to_lhs", "both directions, or lhs to rhs")
    with contextlib.suppress(Exception):
        import_open_clip()  # transformers imports torchvision, which beside CPU-only torch can be imported only after this
    losses = package("sentence_transformers.losses")
    utilities = package("sentence_transformers.util")
    options: dict[str, Any] = {"scale": case.logit_scale, "similarity_fct": utilities.dot_score}
    if case.directions == "both":
        options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    loss = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), **options)
    return lambda x: loss([{"sentence_embedding": x.lhs}, {"sentence_embedding": x.rhs[0]}], None)


def siglip_kernel(case: Case) -> Loss:
    require(case.loss == "sigmoid", "has a sigmoid loss only")
    plain_pairs(case)
    on_gpu(case)
    loss = package("siglip_kernel").fused_siglip_loss
    bias = torch.tensor(LOGIT_BIAS, device=case.device)
    return lambda x: loss(x.lhs, x.rhs[0], x.logit_scale.log(), bias)


def memeff(case: Case) -> Loss:
    """Its temperature is a number and takes no gradient. Features are said to be unit vectors, as they are; `stable=False` gives
    the loss's own gradient, where its default multiplies it by sqrt(N * temperature)."""
    require(case.directions == "both", "has both directions only")
    plain_pairs(case)
    on_gpu(case)
    module = package("memeff")
    clip = module.MemoryEfficientCLIPLoss(temperature=1 / case.logit_scale, normalized_inputs=True, stable=False)
    return lambda x: clip(x.lhs, x.rhs[0])


PEERS: dict[str, Callable[[Case], Loss]] = {
    "ours": ours,
    "open_clip": open_clip,
    "open_clip_compiled": open_clip_compiled,
    "dense": dense,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_chunked": functools.partial(linear_cross_entropy, chunked=True),
    "cut_cross_entropy": cut_cross_entropy,
    "liger": liger,
    "inf_cl": inf_cl,
    "sentence_transformers": sentence_transformers,
    "memeff": memeff,
    "siglip_kernel": siglip_kernel,
}
PACKAGES = {
    "ours": "gcl_kernels",
    "open_clip": "open_clip_torch",
    "open_clip_compiled": "open_clip_torch",
    "dense": "torch",
    "linear_cross_entropy": "torch",
    "linear_cross_entropy_chunked": "torch",
    "cut_cross_entropy": "cut-cross-entropy",
    "liger": "liger-kernel",
    "inf_cl": "inf-cl",
    "sentence_transformers": "sentence-transformers",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
}
# Peers whose logits are in memory: copies of N x M alive at their peak, in the logits' dtype.
DENSE_COPIES = {
    "open_clip": 5,
    "open_clip_compiled": 4,
    "dense": 8,
    "linear_cross_entropy": 4,
    "sentence_transformers": 4,
}
COMPILED = ("open_clip_compiled",)
# Peers that have a sigmoid loss.
SIGMOID = ("ours", "open_clip", "open_clip_compiled", "siglip_kernel")


def peer(name: str) -> Callable[[Case], Loss]:
    def known(case: Case) -> Loss:
        by_primitive = name == "dense" and case.option == "pairwise_softplus"
        require(case.loss == "softmax" or name in SIGMOID or by_primitive, "has no sigmoid loss")
        return PEERS[name](case)

    if ":" not in name:
        return known
    module, _, function = name.partition(":")

    def make(case: Case) -> Loss:
        plain(case)
        require(case.loss == "softmax", "takes no bias")
        loss = getattr(package(module), function)
        return lambda x: loss(x.lhs, x.rhs[0], x.logit_scale)

    return make


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(PACKAGES.get(name, name.partition(":")[0]))
    except importlib.metadata.PackageNotFoundError:
        return None
