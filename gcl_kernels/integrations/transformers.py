"""The losses of this package around dual encoders of Hugging Face's transformers, for its Trainer or a loop of your own.

from gcl_kernels.integrations.transformers import ContrastiveModel

model = ContrastiveModel(CLIPModel.from_pretrained(name), score_to_weight="log")
Trainer(model, TrainingArguments(...), train_dataset=pairs).train()
model.model.save_pretrained(folder)  # the encoder, as it was handed in
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..groups import ProcessGroupLike, check_process_group, resolve_group
from ..losses import GCLLoss
from ..score_to_weight import ScoreToWeight
from ..sigmoid import sigmoid_loss
from ..types import ScoreToWeightName
from ..validation import check_choice
from .importing import import_transformers

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPOutput  # pyright: ignore[reportMissingImports]

__all__ = ["ComputeLoss", "ContrastiveModel"]

LossName = Literal["softmax", "sigmoid"]

OF_SIGMOID = ("s_max", "score_range", "knots", "reduction", "transport", "backend")
"""The options of `GCLLoss` that the sigmoid loss has too."""


class ContrastiveModel(nn.Module):
    """A dual encoder of transformers whose forward gives the loss of this package, without N x N logits.

    It is called with the encoder's own inputs, and takes `logit_scale` and `logit_bias` from it. Its forward is what autocast,
    DistributedDataParallel and Trainer see. With the default `process_group="world"` the mean of the ranks' losses is the loss
    of the joined batch, and so are its gradients after DistributedDataParallel. Attributes that it does not have itself, such as
    `config`, `save_pretrained` and the switches of gradient checkpointing, are the encoder's.

    Trainer needs no option for it: `remove_unused_columns` keeps the columns `scores` and `ids`, evaluation computes the loss,
    and `predictions` are (text embeddings, image embeddings). Each step of gradient accumulation is a batch of its own;
    `gcl_kernels.grad_cache` joins them.

    Args:
        model: a model with `get_image_features`, `get_text_features` and `logit_scale`, which is the logarithm of the factor:
            CLIPModel, SiglipModel, VisionTextDualEncoderModel and others alike.
        loss: `"softmax"` is `gcl_loss` with images as its rows and texts as its columns. `"sigmoid"` is `sigmoid_loss`, which
            needs the encoder's `logit_bias`.
        score_to_weight: as in `GCLLoss`; forward then needs `scores`. None weighs every pair 1.
        process_group: as in `GCLLoss`.
        options: more options of `GCLLoss`, except its fields' and `reduction="none"`; with `"sigmoid"` s_max, score_range, knots,
            reduction, transport and backend.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: transformers gives features in another form than versions 4 and 5 do, or the model is a replica of
            torch.nn.DataParallel, into which Trainer puts it where one process sees several GPUs.
    """

    accepts_loss_kwargs = False
    """Trainer divides the loss by the steps of gradient accumulation itself."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: LossName = "softmax",
        score_to_weight: ScoreToWeightName | ScoreToWeight | None = None,
        process_group: ProcessGroupLike = "world",
        **options: Any,
    ) -> None:
        super().__init__()
        import_transformers()
        name = type(model).__name__
        needed = ["get_image_features", "get_text_features", "logit_scale"]
        missing = [attribute for attribute in needed if not hasattr(model, attribute)]
        if missing:
            raise TypeError(f"model: expected a dual encoder with {', '.join(needed)}, got {name} without {missing}")
        self.criterion = Criterion(loss, score_to_weight, process_group, **options)
        if loss == "sigmoid" and getattr(model, "logit_bias", None) is None:
            raise ValueError(
                f"loss: expected 'softmax' for {name}, which has no logit_bias, got 'sigmoid'; "
                "give it one first: model.logit_bias = nn.Parameter(torch.tensor(-10.0))"
            )
        self.model: Any = model
        self._takes = [_arguments_of(model.get_image_features), _arguments_of(model.get_text_features)]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("model")  # there is none yet while a copy is made
            if inner is None or name.startswith("__"):
                raise
            return getattr(inner, name)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "ContrastiveModel: expected one process for each GPU, as torchrun starts them, got torch.nn.DataParallel, whose "
            "replicas compare each only their own part of the batch"
        )

    def forward(  # a named argument for every column that `remove_unused_columns` is to keep
        self,
        *,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        scores: Tensor | None = None,
        ids: Tensor | None = None,
        return_loss: bool = True,
    ) -> CLIPOutput:
        """`loss`, 0-d, and `text_embeds` and `image_embeds`, (N, D) of unit length.

        Args:
            input_ids: of N texts, like the arguments below as in the encoder.
            pixel_values: of N images, image i belonging to text i.
            attention_mask: of the texts.
            position_ids: of the texts.
            token_type_ids: of the texts.
            pixel_attention_mask: of the images.
            spatial_shapes: of the images.
            interpolate_pos_encoding: of the images.
            scores: (N,) ranking scores, where the model has a `score_to_weight`.
            ids: (N,) int64. Pairs with an equal id >= 0 are no negatives of each other.
            return_loss: False leaves the loss out.
        """
        from transformers.models.clip.modeling_clip import CLIPOutput  # pyright: ignore[reportMissingImports]

        given = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "interpolate_pos_encoding": interpolate_pos_encoding,
        }
        given = {name: value for name, value in given.items() if value is not None}
        of_image, of_text = ({name: given[name] for name in takes if name in given} for takes in self._takes)
        group = resolve_group(self.criterion.process_group if return_loss else None)
        with distributed.shared_failure(group):
            for name in ("pixel_values", "input_ids"):
                if name not in given:
                    raise ValueError(f"{name}: expected a tensor, got None")
            unknown = given.keys() - of_image.keys() - of_text.keys()
            if unknown:
                raise TypeError(f"{sorted(unknown)[0]}: expected an argument of {type(self.model).__name__}'s features")
        image = _unit(self.model.get_image_features(**of_image), "get_image_features")
        text = _unit(self.model.get_text_features(**of_text), "get_text_features")
        loss = None
        if return_loss:
            bias = getattr(self.model, "logit_bias", None)
            loss = self.criterion(image, text, scores, ids, self.model.logit_scale.exp(), bias)
        return CLIPOutput(loss=loss, text_embeds=text, image_embeds=image)


class ComputeLoss:
    """A `compute_loss_func` for Trainer around models whose outputs have `image_embeds`, `text_embeds` and a scale.

    The outputs of CLIPModel, SiglipModel and VisionTextDualEncoderModel have no scale: around these the loss cannot be computed
    from outputs with a gradient of `logit_scale`, and calling it raises. `ContrastiveModel` can. So it serves models of your own
    that put the factor itself, not its logarithm, into their outputs as `logit_scale`, and training at a fixed scale.

    Trainer's `labels` are the scores. Trainer does not divide such a loss by the steps of gradient accumulation: it hands over as
    `num_items_in_batch` how many labels all of them have, and the loss of a step counts with its share. Without labels there is
    no such number and steps would add up, so they are needed even where no weight is made of them. Over ranks all batches must
    have the same number of rows, as Trainer's own have.

    Args:
        logit_scale: the factor where the outputs have none, a constant; a learned one would get no gradient.
        loss: as in `ContrastiveModel`, like everything below. The bias of `"sigmoid"` is the outputs' `logit_bias`.
        score_to_weight: as in `ContrastiveModel`; None counts the labels and does not read them.
        process_group: as in `ContrastiveModel`.
        options: as in `ContrastiveModel`.
    """

    def __init__(
        self,
        *,
        logit_scale: float | None = None,
        loss: LossName = "softmax",
        score_to_weight: ScoreToWeightName | ScoreToWeight | None = None,
        process_group: ProcessGroupLike = "world",
        **options: Any,
    ) -> None:
        self.logit_scale = logit_scale
        self.criterion = Criterion(loss, score_to_weight, process_group, **options)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one step, which Trainer adds up over those of gradient accumulation."""
        found = {name: _get(outputs, name) for name in ("image_embeds", "text_embeds", "logit_scale", "logit_bias")}
        scale = self.logit_scale if found["logit_scale"] is None else found["logit_scale"]
        with distributed.shared_failure(resolve_group(self.criterion.process_group)):
            missing = [name for name in ("image_embeds", "text_embeds") if found[name] is None]
            if labels is None:
                raise ValueError(
                    "labels: expected a column 'labels', scores or any number, with which Trainer counts the rows of all steps "
                    "of gradient accumulation, got None"
                )
            if scale is None:
                raise ValueError(
                    f"outputs: expected a logit_scale beside the embeddings, got {type(outputs).__name__} without one: the "
                    "model's own gets a gradient only inside its forward; train ContrastiveModel(model) instead, or give a "
                    "constant logit_scale="
                )
            if missing:
                raise ValueError(f"outputs: expected image_embeds and text_embeds, got none of {missing}")
        scores = None if self.criterion.score_to_weight is None else labels
        loss = self.criterion(
            *(F.normalize(found[name], dim=-1) for name in ("image_embeds", "text_embeds")),
            scores,
            None,
            scale,
            found["logit_bias"],
        )
        if num_items_in_batch is None or labels is None:
            return loss
        return loss * (labels.ne(-100).sum() / num_items_in_batch)  # Trainer counts no -100


class Criterion(nn.Module):
    """The loss of two sides of unit length by `loss`, and of nothing that only a library's models have."""

    def __init__(
        self,
        loss: LossName,
        score_to_weight: ScoreToWeightName | ScoreToWeight | None,
        process_group: ProcessGroupLike,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("loss", loss, get_args(LossName))
        check_process_group(process_group)
        known = [o for o in inspect.signature(GCLLoss).parameters if not o.startswith(("lhs_", "rhs_", "field_"))]
        known = OF_SIGMOID if loss == "sigmoid" else known
        unknown = [option for option in options if option not in known]
        if unknown:
            raise TypeError(f"{unknown[0]}: expected an option of loss={loss!r}, which are {', '.join(known)}")
        if options.get("reduction") == "none":
            raise ValueError("reduction: expected one that gives a single loss, got 'none'")
        self.loss = loss
        self.score_to_weight = score_to_weight
        self.process_group: ProcessGroupLike = process_group
        self.weighted = GCLLoss(
            "constant" if score_to_weight is None else score_to_weight, process_group=process_group, **options
        )

    def forward(
        self,
        lhs: Tensor,
        rhs: Tensor,
        scores: Tensor | None,
        ids: Tensor | None,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None,
    ) -> Tensor:
        gcl, group = self.weighted, resolve_group(self.process_group)
        with distributed.shared_failure(group):
            if self.score_to_weight is None:
                if scores is not None:
                    raise ValueError("scores: expected None without a score_to_weight; 'constant' takes them unread")
                scores = lhs.new_full((len(lhs),), gcl.s_max if gcl.score_range is None else gcl.score_range[1])
            elif scores is None:
                raise ValueError(f"scores: expected (N,) scores for score_to_weight={gcl.score_to_weight!r}, got None")
            weights = None if self.loss == "softmax" else gcl.weights_of(scores)
        if weights is None:
            loss = gcl(lhs, rhs, scores, logit_scale, lhs_ids=ids, rhs_ids=ids)
            # a softmax does not depend on a bias; DistributedDataParallel wants every parameter to take part
            return loss if logit_bias is None else loss + 0 * logit_bias.sum()
        return sigmoid_loss(
            lhs,
            rhs,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            weights=weights,
            lhs_ids=ids,
            rhs_ids=ids,
            reduction=gcl.reduction,
            process_group=group,
            transport=gcl.transport,
            backend=gcl.backend,
        )


def _arguments_of(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]


def _unit(features: Any, method: str) -> Tensor:
    """Rows of unit length of a tensor, as in transformers 4, or of the output that version 5 puts around it."""
    rows = getattr(features, "pooler_output", features)
    if not isinstance(rows, Tensor):
        raise RuntimeError(
            f"transformers {import_transformers().__version__}: expected {method} to give a tensor, or an output with "
            f"pooler_output, as in versions 4 and 5, got {type(features).__name__}"
        )
    return F.normalize(rows, dim=-1)


def _get(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
