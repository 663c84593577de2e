"""Public contrastive losses, each as its users call it, for `check_loss`: `python -m gcl_kernels.testing --public`.

An adapter is a function of this module, and its attributes say what it offers. It imports its library when it is called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from ..integrations.importing import import_open_clip, import_torchvision

PUBLIC: list[Callable[..., Any]] = []
SCALE = ("logit_scale",)
ZERO = ("scale 0",)  # of losses that refuse it


def public(
    title: str,
    package: str,
    against: str = "clip",
    *,
    constant: tuple[str, ...] = (),
    gathers: bool = False,
    left_out: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Any]:
    def mark(function: Any) -> Any:
        function.title, function.package, function.against = title, package, against
        function.constant, function.gathers, function.left_out = constant, gathers, left_out
        PUBLIC.append(function)
        return function

    return mark


def number(scale: Any) -> float:
    return float(scale.detach()) if isinstance(scale, Tensor) else float(scale)


def temperature(scale: Any) -> float:
    return 1 / number(scale) if number(scale) else float("inf")


def world() -> dict[str, Any]:
    """rank and world_size."""
    if not distributed.is_initialized():
        return {"rank": 0, "world_size": 1}
    return {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}


def made_once(maker: Any) -> Any:
    """Objects are made as a trainer makes them: once, and outside of a graph that torch.compile makes."""
    return torch.compiler.disable(functools.cache(maker))


def both_ways(one: Callable[..., Tensor], lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    """The mean of `one` (rows, columns, labels) by rows and by columns."""
    labels = torch.arange(len(lhs), device=lhs.device)
    return (one(scale * lhs, rhs, labels) + one(scale * rhs, lhs, labels)) / 2


# ours


@public("gcl_kernels.ClipLoss", "gcl_kernels", gathers=True)
def clip_loss(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    from .. import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, **world())(lhs, rhs, scale)


@public("gcl_kernels.gcl_loss", "gcl_kernels")
def gcl_loss(
    lhs: Tensor,
    rhs: Tensor,
    scale: Any,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    lhs_ids: Tensor | None = None,
    rhs_ids: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    from .. import gcl_loss

    return gcl_loss(
        lhs,
        rhs,
        scale,
        weights=weights,
        labels=labels,
        lhs_ids=lhs_ids,
        rhs_ids=rhs_ids,
        process_group=process_group,
    )


@public("gcl_kernels.SigLipLoss", "gcl_kernels", "siglip", gathers=True)
def sigmoid_loss(lhs: Tensor, rhs: Tensor, scale: Any, bias: Any) -> Tensor:
    from .. import SigLipLoss

    return SigLipLoss(**world())(lhs, rhs, scale, bias)


@public("gcl_kernels.nt_xent_loss", "gcl_kernels", "nt_xent")
def nt_xent_loss(lhs: Tensor, rhs: Tensor, scale: Any, *, process_group: Any = None) -> Tensor:
    from .. import nt_xent_loss

    return nt_xent_loss(F.normalize(lhs, dim=1), F.normalize(rhs, dim=1), scale, process_group=process_group)


@public("gcl_kernels GCLLoss for sentence-transformers", "gcl_kernels", constant=SCALE, gathers=True, left_out=ZERO)
def gcl_loss_of_sentences(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    from ..integrations.sentence_transformers import GCLLoss

    return ranking(GCLLoss, number(scale))(features(lhs, rhs), None)


# open_clip


@public("open_clip.ClipLoss", "open_clip_torch", gathers=True)
def open_clip(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return import_open_clip().ClipLoss(**world())(lhs, rhs, scale)


@public("open_clip.ClipLoss(local_loss, gather_with_grad)", "open_clip_torch", gathers=True)
def open_clip_local(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return import_open_clip().ClipLoss(local_loss=True, gather_with_grad=True, **world())(lhs, rhs, scale)


@public("open_clip.SigLipLoss", "open_clip_torch", "siglip", gathers=True)
def open_clip_sigmoid(lhs: Tensor, rhs: Tensor, scale: Any, bias: Any) -> Tensor:
    import_open_clip()
    return importlib.import_module("open_clip.loss").SigLipLoss(**world())(lhs, rhs, scale, bias)


# torch


@public("F.linear_cross_entropy", "torch")
def linear_cross_entropy(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return both_ways(F.linear_cross_entropy, lhs, rhs, scale)  # pyright: ignore[reportAttributeAccessIssue]


@public("F.linear_cross_entropy, chunked", "torch")
def linear_cross_entropy_chunked(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
    one = functools.partial(F.linear_cross_entropy, options=options)  # pyright: ignore[reportAttributeAccessIssue]
    return both_ways(one, lhs, rhs, scale)


# sentence-transformers: a model that hands on the embeddings; scale is a number


@made_once
def ranking(loss: Any, scale: float, **options: Any) -> Any:
    """Both directions of dot products, the documents and queries of all ranks being negatives."""
    from sentence_transformers import util  # pyright: ignore[reportMissingImports]

    return loss(
        Embedded(torch.nn.Identity()),
        scale=scale,
        similarity_fct=util.dot_score,
        gather_across_devices=world()["world_size"] > 1,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
        **options,
    )


class Embedded(torch.nn.Sequential):
    """A model that hands on embeddings."""

    def forward(self, given: Any) -> Any:
        return given


def features(lhs: Tensor, rhs: Tensor) -> list[dict[str, Tensor]]:
    return [{"sentence_embedding": x} for x in (lhs, rhs)]


def sentence_transformers_losses() -> Any:
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()  # transformers needs it, and beside CPU-only torch it needs help
    return importlib.import_module("sentence_transformers.losses")


@public("MultipleNegativesRankingLoss", "sentence-transformers", constant=SCALE, gathers=True, left_out=ZERO)
def ranking_loss(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    losses = sentence_transformers_losses()
    return ranking(losses.MultipleNegativesRankingLoss, number(scale))(features(lhs, rhs), None)


class _ByBackward(torch.autograd.Function):
    """Of a loss whose gradients reach the leaves by `backward()` only: one is run in the forward pass, and its result kept."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            value = function(*leaves)
            value.backward()
        ctx.save_for_backward(*(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return None, *(upstream[0] * g for g in ctx.saved_tensors)


@public(
    "CachedMultipleNegativesRankingLoss",
    "sentence-transformers",
    constant=SCALE,
    gathers=True,
    left_out=(*ZERO, "backward twice", "torch.compile", "gradcheck"),
)
def cached_ranking_loss(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    loss = ranking(sentence_transformers_losses().CachedMultipleNegativesRankingLoss, number(scale), mini_batch_size=32)
    return _ByBackward.apply(lambda *sides: loss(features(*sides), None), lhs, rhs)  # pyright: ignore[reportReturnType]


# pytorch-metric-learning and lightly: two views, which they normalise; the temperature is a number


@made_once
def metric_learning(name: str, temperature: float, mean: bool = False) -> Any:
    module = importlib.import_module("pytorch_metric_learning")
    losses, reducers = (importlib.import_module(f"{module.__name__}.{x}") for x in ("losses", "reducers"))
    options = {"reducer": reducers.MeanReducer()} if mean else {}
    loss = getattr(losses, name)(temperature=temperature, **options)
    if not distributed.is_initialized():
        return loss
    return importlib.import_module(f"{module.__name__}.utils.distributed").DistributedLossWrapper(loss)


def of_classes(loss: Any, lhs: Tensor, rhs: Tensor) -> Tensor:
    """Each pair is a class of its own."""
    labels = torch.arange(len(lhs), device=lhs.device).repeat(2) + world()["rank"] * len(lhs)
    return loss(torch.cat((lhs, rhs)), labels)


@public("pytorch_metric_learning NTXentLoss", "pytorch-metric-learning", "nt_xent", constant=SCALE, gathers=True)
def metric_learning_nt_xent(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return of_classes(metric_learning("NTXentLoss", temperature(scale)), lhs, rhs)


@public("pytorch_metric_learning SupConLoss", "pytorch-metric-learning", "nt_xent", constant=SCALE, gathers=True)
def metric_learning_supcon(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return of_classes(metric_learning("SupConLoss", temperature(scale)), lhs, rhs)


@public(
    "pytorch_metric_learning SupConLoss(reducer=MeanReducer())",
    "pytorch-metric-learning",
    "nt_xent",
    constant=SCALE,
    gathers=True,
)
def metric_learning_supcon_mean(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return of_classes(metric_learning("SupConLoss", temperature(scale), mean=True), lhs, rhs)


@public("lightly NTXentLoss", "lightly", "nt_xent", constant=SCALE, gathers=True)
def lightly_nt_xent(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    return lightly_loss(temperature(scale), world()["world_size"] > 1)(lhs, rhs)


@made_once
def lightly_loss(temperature: float, gather: bool) -> Any:
    import_torchvision()
    loss = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss
    return loss(temperature=temperature, gather_distributed=gather)


# of two libraries of kernels for GPUs, what a CPU can run


@public("memeff.MemoryEfficientCLIPLoss", "memeff", constant=SCALE)
def memeff(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss
    return loss(temperature=temperature(scale), normalized_inputs=True, stable=False)(lhs, rhs)


@public("siglip_kernel.fused_siglip_loss", "siglip-kernel", "siglip")
def siglip_kernel(lhs: Tensor, rhs: Tensor, scale: Any, bias: Any) -> Tensor:
    return importlib.import_module("siglip_kernel").fused_siglip_loss(lhs, rhs, scale.log(), bias)


@public("siglip_kernel's siglip_loss_reference", "siglip-kernel", "siglip")
def siglip_kernel_reference(lhs: Tensor, rhs: Tensor, scale: Any, bias: Any) -> Tensor:
    """From its file alone: the package asks for a CUDA device when it is imported."""
    return _siglip_kernel_reference().siglip_loss_reference(lhs, rhs, scale, bias)


@functools.cache
def _siglip_kernel_reference() -> Any:
    package = importlib.util.find_spec("siglip_kernel")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'siglip_kernel'", name="siglip_kernel")
    path = Path(package.submodule_search_locations[0]) / "reference.py"
    spec = importlib.util.spec_from_file_location("siglip_kernel_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks a function's module up by its name
    spec.loader.exec_module(module)
    return module
