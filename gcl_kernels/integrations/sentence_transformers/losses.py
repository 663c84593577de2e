"""`GCLLoss` and `CachedGCLLoss`: MultipleNegativesRankingLoss and its cached form with weights, and without N x N memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import distributed
from ...false_negatives import FalseNegatives
from ...groups import resolve_group
from ...losses import false_negatives_of
from ...score_to_weight import Knots, ScoreToWeight
from ...score_to_weight import score_to_weight as by_name
from ...types import BACKEND_NAMES, Backend, ScoreToWeightName, WeightNormalization
from ...validation import check_choice
from ..importing import check_arguments, import_torchvision
from .ranking import Ranking, TextIds
from .text_ids import ids_of

try:
    with contextlib.suppress(ModuleNotFoundError):  # a model of pictures needs it, one of texts does not
        import_torchvision()
    import sentence_transformers
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ImportError(
        "sentence_transformers: expected the package sentence-transformers >= 6.0, got none: "
        "pip install sentence-transformers"
    ) from None
from sentence_transformers import util

try:
    from sentence_transformers.sentence_transformer.losses import (  # pyright: ignore[reportMissingImports]
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
except ModuleNotFoundError as error:
    raise RuntimeError(
        f"sentence-transformers: expected version 6 or later, got {sentence_transformers.__version__}"
    ) from error

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]

KNOWN = "sentence_transformers", "version 6"
MAX_SCALE = 100.0  # of a learned temperature, as in CLIP
CITATION = """
@misc{zhu2024generalizedcontrastivelearningmultimodal,
      title={Generalized Contrastive Learning for Multi-Modal Retrieval and Ranking},
      author={Tianyu Zhu and Myong Chol Jung and Jesse Clark},
      year={2024},
      eprint={2404.08535},
      archivePrefix={arXiv},
      primaryClass={cs.IR},
      url={https://arxiv.org/abs/2404.08535},
}
"""


class GCLLoss(MultipleNegativesRankingLoss):
    """Drop-in for `MultipleNegativesRankingLoss` of sentence-transformers 6: equal to it until one of the options below is used.

        l_i = w_i * ( log Z_i - scale * sim(q_i, d_i) )        Z_i as in MultipleNegativesRankingLoss

    Args:
        model: the SentenceTransformer.
        scale: 1 / temperature.
        similarity_fct: `util.cos_sim` or `util.dot_score`.
        gather_across_devices: the documents and queries of all ranks are negatives.
        directions: as in MultipleNegativesRankingLoss, like the next three.
        partition_mode: `"joint"` or `"per_direction"`.
        hardness_mode: which negatives weigh more.
        hardness_strength: how much more.
        score_to_weight: weights w of the data set's label column, which then holds scores: a name or callable as in
            `gcl_kernels.score_to_weight`, which also explains the next four. None (default): w = 1, labels are not looked at.
        s_max: the highest score.
        score_range: (lowest, highest) of scores in another unit, as (0, 1) for similarities.
        knots: of `"piecewise"`.
        normalize: `"mean"` divides by the batch's mean weight; of all ranks' batches with `gather_across_devices`.
        false_negative_margin: m: a document or query leaves Z_i where it is more similar than the positive plus m, as in
            `gcl_loss`. In query_to_query and doc_to_doc row i's positive is compared.
        false_negative_ratio: r: likewise where it is more similar than r times the positive.
        hide_duplicates: True: texts that equal row i's query or positive, and the positives of an equal query, are none of row
            i's negatives. Texts are compared by their tokens (pictures by their pixels), across ranks, too. No sampler needs to
            keep duplicates out of a batch then.
        learnable_temperature: True: scale is where training starts, `logit_scale` what it is now, at most 100. The optimizer of
            SentenceTransformerTrainer trains it with the model. Its gradient is averaged over ranks.
        backend: as in `gcl_loss`.

    Raises:
        TypeError, ValueError: an option that is wrong whatever the batch is refused here, everything else when called.
        RuntimeError: the sentence-transformers that is installed has a MultipleNegativesRankingLoss with other arguments.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        *,
        score_to_weight: ScoreToWeightName | ScoreToWeight | None = None,
        s_max: float = 100.0,
        score_range: tuple[float, float] | None = None,
        knots: Knots | None = None,
        normalize: WeightNormalization | None = None,
        false_negative_margin: float | None = None,
        false_negative_ratio: float | None = None,
        hide_duplicates: bool = False,
        learnable_temperature: bool = False,
        backend: Backend | None = None,
    ) -> None:
        check_arguments(MultipleNegativesRankingLoss, GCLLoss, *KNOWN, "compute_loss_from_embeddings", exactly=True)
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        _check_similarity(similarity_fct)
        if backend is not None:
            check_choice("backend", backend, BACKEND_NAMES)
        weights_of = by_name(
            "constant" if score_to_weight is None else score_to_weight,
            s_max=s_max,
            score_range=score_range,
            knots=knots,
            normalize=normalize,
        )
        self.weights_of = None if score_to_weight is None else weights_of
        self.false_negatives: FalseNegatives = false_negatives_of(false_negative_margin, false_negative_ratio)
        self.hide_duplicates = hide_duplicates
        self.backend: Backend | None = backend
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale))) if learnable_temperature else None
        self._ids: TextIds | None = None  # of the batch that is in forward

    @property
    def logit_scale(self) -> Tensor | float:
        """1 / temperature as it is now."""
        if self.log_scale is None:
            return self.scale
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    @property
    def temperature(self) -> float:
        scale = self.logit_scale
        return 1.0 / (scale.item() if isinstance(scale, Tensor) else scale)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """0-d loss of `sentence_features`, one entry a column; `labels` are the scores, (N,), or None."""
        sentence_features = list(sentence_features)
        with self.knowing_texts(sentence_features):
            return super().forward(sentence_features, labels)  # pyright: ignore[reportArgumentType]

    def knowing_texts(self, sentence_features: list[dict[str, Tensor]]) -> _Texts:
        """A context in which embeddings are those of the texts of `sentence_features`."""
        return _Texts(self, sentence_features)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """0-d; `embeddings` (N, D) of queries, positives and columns of mined negatives; `labels` (N,) scores, or None."""
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected those of two columns or more, got {len(embeddings)}")
        group = resolve_group("world") if self.gather_across_devices else None
        with distributed.shared_failure(group):
            if _check_similarity(self.similarity_fct):
                embeddings = [F.normalize(x, dim=1) for x in embeddings]
            queries, *docs = embeddings
            if {x.shape for x in docs} != {queries.shape}:
                raise ValueError(f"embeddings: expected one shape (N, D), got {[tuple(x.shape) for x in embeddings]}")
            if self.hide_duplicates and self._ids is None:
                raise ValueError(
                    "hide_duplicates: expected a call of forward, which gets the texts, got embeddings alone"
                )
            weights = self._weights(labels, len(queries))
        if weights is not None and group is not None and self.weights_of is not None and self.weights_of.normalize:
            total, count = distributed.total(torch.stack([weights.sum(), weights.new_tensor(len(weights))]), group)
            weights = weights * torch.where(total > 0, count / total, 1.0)
        hard = self.hardness_mode if self.hardness_strength > 0 else None
        if hard == "hard_negatives" and len(docs) == 1:
            hard = None
        ranking = Ranking(
            frozenset(self.directions),
            self.partition_mode,
            hard,
            float(self.hardness_strength),
            self.false_negatives,
            self.backend,
        )
        scale = self._scale_over_ranks()
        return ranking.loss(queries, docs, scale, weights=weights, ids=self._ids, group=group)

    def _weights(self, labels: Tensor | None, n: int) -> Tensor | None:
        if self.weights_of is None:
            return None
        if not isinstance(labels, Tensor) or labels.shape != (n,):
            got = tuple(labels.shape) if isinstance(labels, Tensor) else labels
            raise ValueError(
                f"labels: expected ({n},) scores for score_to_weight={self.weights_of.function!r}, from a column of the data "
                f"set named label or score, got {got}"
            )
        # over ranks the mean weight is known only once all have called
        return self.weights_of.not_normalized(labels) if self.gather_across_devices else self.weights_of(labels)

    def _scale_over_ranks(self) -> Tensor | float:
        """With a gradient that is averaged over ranks: DistributedDataParallel wraps the model and not this module."""
        scale, group = self.logit_scale, resolve_group("world")
        if not isinstance(scale, Tensor) or group is None or group.size() == 1:
            return scale
        return distributed.sum_gradients(scale, 1 / group.size(), group)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card shows: MultipleNegativesRankingLoss's options, and those of this class that are in use."""
        weights_of = self.weights_of
        function = None if weights_of is None else weights_of.function
        added = {
            "score_to_weight": getattr(function, "__name__", repr(function)) if callable(function) else function,
            "s_max": None if function in (None, "constant", "piecewise") or callable(function) else weights_of.s_max,  # pyright: ignore[reportOptionalMemberAccess]
            "score_range": weights_of and weights_of.score_range,
            "knots": weights_of and weights_of.knots,
            "normalize": weights_of and weights_of.normalize,
            "false_negative_margin": self.false_negatives.margin,
            "false_negative_ratio": self.false_negatives.ratio,
            "hide_duplicates": self.hide_duplicates or None,
            "learnable_temperature": True if self.log_scale is not None else None,
        }
        return super().get_config_dict() | {name: value for name, value in added.items() if value is not None}

    @property
    def citation(self) -> str:
        """That of Generalized Contrastive Learning, and of what MultipleNegativesRankingLoss cites with these options."""
        return CITATION + super().citation


class CachedGCLLoss(CachedMultipleNegativesRankingLoss):
    """Drop-in for `CachedMultipleNegativesRankingLoss` of sentence-transformers 6: `GCLLoss` beyond the model's memory.

    The model encodes `mini_batch_size` rows at a time, twice, as there. The loss stage is one call over the whole batch, whose
    memory grows with N and not with `mini_batch_size` N.

    Args:
        model: as in `GCLLoss`, like everything that is not explained here.
        scale: as in `GCLLoss`.
        similarity_fct: as in `GCLLoss`.
        mini_batch_size: rows that are encoded at once.
        mini_batch_num_tokens: tokens that are encoded at once, instead.
        gather_across_devices: as in `GCLLoss`.
        directions: as in `GCLLoss`.
        partition_mode: as in `GCLLoss`.
        show_progress_bar: True shows one while the model encodes.
        hardness_mode: as in `GCLLoss`.
        hardness_strength: as in `GCLLoss`.
        options: `score_to_weight` and what follows it in `GCLLoss`.
    """

    loss: GCLLoss

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
        **options: Any,
    ) -> None:
        check_arguments(
            CachedMultipleNegativesRankingLoss, CachedGCLLoss, *KNOWN, "calculate_loss", "forward_cached", exactly=True
        )
        super().__init__(
            model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.loss = GCLLoss(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            **options,
        )

    @property
    def logit_scale(self) -> Tensor | float:
        """1 / temperature as it is now."""
        return self.loss.logit_scale

    @property
    def temperature(self) -> float:
        return self.loss.temperature

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """0-d loss of `sentence_features`, one entry a column; `labels` are the scores, (N,), or None."""
        sentence_features = list(sentence_features)
        if len(sentence_features) < 2:
            raise ValueError(f"sentence_features: expected those of two columns or more, got {len(sentence_features)}")
        calculate = self.calculate_loss  # MatryoshkaLoss puts its own in the place of the method
        results: list[Tensor] = []
        # The cached loss leaves its graph behind, and with it the temperature's gradient, which is put back here.
        self.calculate_loss = lambda *args, **kwargs: results.append(calculate(*args, **kwargs)) or results[-1]
        try:
            with self.loss.knowing_texts(sentence_features):
                loss = self.forward_cached(sentence_features, labels)
        finally:
            del self.calculate_loss
            if calculate != self.calculate_loss:
                self.calculate_loss = calculate
        return loss + (results[-1] - results[-1].detach()) if self.loss.log_scale is not None else loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """0-d loss of embeddings `reps` and scores `labels`.

        `with_backward` the embeddings' gradients are computed, and its graph is the scale's.
        """
        if not with_backward:
            return self.loss.compute_loss_from_embeddings([torch.cat(r) for r in reps], labels)
        scale = self.loss.log_scale
        inputs = [x for r in reps for x in r]
        loss = self.loss.compute_loss_from_embeddings([torch.cat(r) for r in reps], labels)
        gradients = list(torch.autograd.grad(loss, inputs if scale is None else [*inputs, scale]))
        of_scale = None if scale is None else gradients.pop()
        for x, gradient in zip(inputs, gradients, strict=True):
            x.grad = gradient if x.grad is None else x.grad + gradient
        loss = loss.detach()
        return loss if scale is None or of_scale is None else loss + of_scale * (scale - scale.detach())

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card shows."""
        return self.loss.get_config_dict() | super().get_config_dict()

    @property
    def citation(self) -> str:
        """Those of `GCLLoss`, and gradient caching's."""
        return self.loss.citation + super().citation


class _Texts:
    def __init__(self, loss: GCLLoss, sentence_features: list[dict[str, Tensor]]) -> None:
        self.loss, self.sentence_features = loss, sentence_features

    def __enter__(self) -> None:
        # now: modules change features in place while they encode
        self.loss._ids = ids_of(self.sentence_features) if self.loss.hide_duplicates else None

    def __exit__(self, *_: object) -> None:
        self.loss._ids = None


def _check_similarity(similarity_fct: object) -> bool:
    """Whether rows are to be normalised."""
    if similarity_fct not in (util.cos_sim, util.dot_score):
        raise ValueError(
            f"similarity_fct: expected util.cos_sim or util.dot_score, which are products of rows, got {similarity_fct!r}"
        )
    return similarity_fct is util.cos_sim
