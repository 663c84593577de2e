"""The model, its loss and its optimiser: one step of training, and what of them a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gcl_kernels import grad_cache
from gcl_kernels.training.checkpoint import OURS
from gcl_kernels.training.encode import FieldEncoder, TwoTower
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.feeding import Batch
from gcl_kernels.training.objective import Objective, start_logits
from gcl_kernels.training.openclip import freeze_unused, hold_frozen
from gcl_kernels.training.processes import Processes
from gcl_kernels.training.train_options import TrainOptions

OF_LOGITS = ("logit_scale", "logit_bias")
"""Parameters that belong to no tower."""

FUSED = {"cpu", "cuda"}
"""Types of devices on which AdamW updates all weights by one kernel; on a CPU that is many times faster."""


class Learner:
    """A model that `update` trains by one batch.

    Args:
        args: the options of the run.
        model: an open_clip model; what no field uses and what is locked is frozen.
        encoder: makes its inputs.

    Raises:
        InputError: the options lock all that the fields use.
    """

    def __init__(self, args: TrainOptions, group: Processes, model: Any, encoder: FieldEncoder) -> None:
        self._args, self._group, self.model, self.encoder = args, group, model, encoder
        self.micro_batch = args.mini_batch_size or (args.batch_size if args.accum_freq > 1 else None)
        start_logits(model, args)
        freeze(model, encoder, args)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()

        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = self._new_optimizer(fused=group.device.type in FUSED)
        device = group.device
        precision = args.precision or ("amp_bf16" if device.type == "cuda" else "fp32")
        dtype = torch.float16 if precision == "amp" else torch.bfloat16
        self._autocast = torch.autocast(device.type, dtype, enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "amp")  # pyright: ignore[reportPrivateImportUsage]

        self._objective = Objective(args, group.group)
        self._encode: Any = None

    def _new_optimizer(self, *, fused: bool) -> torch.optim.AdamW:
        """As in open_clip, gains and biases do not decay."""
        args = self._args
        return torch.optim.AdamW(
            [
                {"params": [weight for weight in self._trained if weight.ndim < 2], "weight_decay": 0.0},
                {"params": [weight for weight in self._trained if weight.ndim >= 2], "weight_decay": args.wd},
            ],
            lr=args.lr,
            betas=(args.beta1, args.beta2),
            eps=args.eps,
            fused=fused,
        )

    def begin(self) -> None:
        """Make ready for steps. In several processes a collective: all come to it at about the same time."""
        model, device = self.model, self._group.device
        if self._args.torchcompile:
            # The number of distinct values changes from batch to batch.
            model.encode_text, model.encode_image = (
                torch.compile(tower, dynamic=True) for tower in (model.encode_text, model.encode_image)
            )
        towers: Any = TwoTower(model, biased=self._args.loss == "sigmoid")
        if self._group.group is not None:
            towers = DistributedDataParallel(towers, device_ids=[device] if device.type == "cuda" else None)
        self._encode = grad_cache.cached(towers, self.micro_batch) if self.micro_batch else towers
        model.train()

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: the weights, and two moments of those that train."""
        weights = sum(weight.numel() for weight in self.model.parameters())
        return 4 * (weights + 2 * sum(weight.numel() for weight in self._trained))

    @property
    def trained_weights(self) -> int:
        return sum(weight.numel() for weight in self._trained)

    @property
    def logits(self) -> dict[str, float]:
        """Where the scale of the logits is, and their bias if they have one."""
        scale = {"logit_scale": self.model.logit_scale.exp().item()}
        return scale | {"logit_bias": self.model.logit_bias.item()} if self._args.loss == "sigmoid" else scale

    @property
    def lr(self) -> float:
        """Of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def update(self, batch: Batch, scores: Tensor, ids: Tensor, lr: float) -> Tensor:
        """One step at a learning rate; `scores` and `ids` are those of the batch's rows. Returns the loss."""
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        loss = self._loss(batch, scores, ids)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self._args.grad_clip_norm:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained, self._args.grad_clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(self._args.logit_scale_max))
        return loss.detach()

    def _loss(self, batch: Batch, scores: Tensor, ids: Tensor) -> Tensor:
        device = self._group.device
        left, right = self.encoder.to_device(batch.left), self.encoder.to_device(batch.right)
        with self._autocast:
            lhs, rhs, scale, *bias = self._encode(left, right)
            batch_ids = None if self._args.false_negatives == "keep" else ids.to(device)
            return self._objective(
                lhs,
                rhs,
                scores.to(device),
                scale,
                bias[0] if bias else None,
                lhs_ids=batch_ids,
                rhs_ids=batch_ids,
                lhs_field_mask=batch.left_mask.to(device),
                rhs_field_mask=batch.right_mask.to(device),
            )

    def state(self) -> dict[str, Any]:
        """What open_clip's own trainer keeps of these, too."""
        content = {"state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return content | {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else content

    def load(self, path: Path, content: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`.

        Raises:
            InputError: it is of another model or another loss.
        """
        then = content[OURS]["options"].get("loss", "softmax")
        if then != self._args.loss:
            raise InputError(
                f"{path}: expected --loss {then}, as it was trained, got {self._args.loss}; --pretrained takes its weights "
                "into a new run"
            )
        try:
            self.model.load_state_dict(content["state_dict"])
            # One kernel for all rounds otherwise than the loop over the weights that former versions ran, so a run goes on with
            # that which it was begun with. It is made anew since the loop does not take the scale of float16 gradients.
            fused = any(of_group.get("fused") for of_group in content["optimizer"]["param_groups"])
            self.optimizer = self._new_optimizer(fused=fused and self._group.device.type in FUSED)
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path}: expected a checkpoint of {self._args.model}, got other weights: {reason}"
            ) from None
        if self.scaler.is_enabled() and "scaler" in content:
            self.scaler.load_state_dict(content["scaler"])


def freeze(model: Any, encoder: FieldEncoder, args: TrainOptions) -> None:
    """Freeze the locked towers whole (open_clip's own lock leaves the projection of a Hugging Face tower), and what no
    field uses: processes would wait for its gradient.

    Raises:
        InputError: nothing but the logits' scale and bias is left to train.
    """
    locked = {kind for kind, lock in (("img", args.lock_image), ("txt", args.lock_text)) if lock}
    for name, weight in model.named_parameters():
        if name not in OF_LOGITS and ("img" if name.startswith("visual.") else "txt") in locked:
            weight.requires_grad_(False)
    kinds = {f"{kind} field": kind for kind in {*args.img_or_txt[0], *args.img_or_txt[1]}}
    example = {"txt": "a", "img": ""}
    inputs, _ = encoder.prepare({name: [example[kind]] * 2 for name, kind in kinds.items()}, kinds)
    inputs = encoder.to_device(inputs)
    towers = TwoTower(model, biased=args.loss == "sigmoid")
    freeze_unused(model, lambda: towers(inputs))
    hold_frozen(model)
    if not any(weight.requires_grad for name, weight in model.named_parameters() if name not in OF_LOGITS):
        options = " and ".join(
            option for option, lock in (("--lock-image", args.lock_image), ("--lock-text", args.lock_text)) if lock
        )
        raise InputError(f"{options}: expected a tower that trains, got none with a field: nothing would be learnt")
