"""The one place where training imports open_clip and makes its models."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import json
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from gcl_kernels.integrations import importing
from gcl_kernels.training.errors import InputError
from gcl_kernels.training.pretrained import expect_weights, faults_in_one_line

TINY_MODEL = "ViT-Tiny-8-32px"
"""The small model of the demo: 32-px images, patch 8, vision 4 x 128, text 2 x 128, context 16; 7.6 M parameters."""


@functools.cache
def import_open_clip() -> ModuleType:
    """Import open_clip, on CPU-only torch too, and register the model configuration of this package."""
    open_clip = importing.import_open_clip()
    open_clip.add_model_config(Path(__file__).with_name(f"{TINY_MODEL}.json"))
    return open_clip


def create_model(
    name: str = TINY_MODEL,
    *,
    pretrained: str | None = None,
    context_length: int | None = None,
    device: torch.device | str = "cpu",
    biased: bool = False,
) -> tuple[Any, Callable[[list[str]], torch.Tensor], Callable[[Any], torch.Tensor]]:
    """Make any open_clip model by name, with the tokenizer and the image preprocessing that belong to it.

    Args:
        name: a name from `open_clip.list_models()` (`TINY_MODEL` is among them), open_clip's `local-dir:PATH`, or the
            path of a model configuration of one's own, `NAME.json`, that may name a Hugging Face text tower.
        pretrained: open_clip's tag or a checkpoint file; None gives random weights from torch's global seed.
        context_length: number of text tokens, when it should differ from the model's own.
        device: where the model lives.
        biased: give it a `logit_bias`, of the sigmoid loss, which is 0 if the model's configuration and weights have none. A
            checkpoint file that has one is loaded with it in any case.

    Returns:
        The model in float32; a tokenizer, list of N texts -> int64 (N, context_length); the preprocessing without
        augmentation, a PIL image -> float32 (3, height, width).

    Raises:
        InputError: a name that open_clip does not know, a file that is no model configuration, no package transformers
            for a text tower or a tokenizer that needs it; weights that are not there, damaged, or of another model.
    """
    open_clip = import_open_clip()
    if name.endswith(".json"):
        name = _register(_configuration_file(Path(name), pretrained))
    if ":" not in name:
        _check_name(name)
    if pretrained is not None and ":" not in name:
        expect_weights(name, pretrained, open_clip.list_pretrained_tags_by_model(name))
    options: dict[str, Any] = {}
    with faults_in_one_line(name, pretrained):
        config = open_clip.get_model_config(name) if ":" not in name else None
        if (biased or has_logit_bias(pretrained)) and "init_logit_bias" not in (config or {}):
            options["init_logit_bias"] = 0.0
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, force_context_length=context_length, device=device, **options
        )
        tokenizer = open_clip.get_tokenizer(name, context_length=context_length)
    return model, tokenizer, preprocess


def has_logit_bias(pretrained: str | None) -> bool:
    """Whether a checkpoint file has a bias of the sigmoid loss; open_clip refuses weights that its model lacks."""
    if not pretrained or not Path(pretrained).is_file():
        return False
    try:
        content = torch.load(pretrained, map_location="cpu", weights_only=True, mmap=True)
        weights = content.get("state_dict", content)
        return any(name.removeprefix("module.") == "logit_bias" for name in weights)
    except Exception:  # no checkpoint that torch reads: open_clip says what is wrong with it, or reads it
        return False


CONFIGURATION = "model_config"
"""What a checkpoint of this harness calls the configuration of its model."""


def configuration(
    name: str, context_length: int | None = None, logit_bias: torch.Tensor | None = None
) -> dict[str, Any] | None:
    """The configuration in open_clip's JSON that makes a model which has been made before; None of one on a hub.

    With it, `open_clip.add_model_config(FILE)` and `open_clip.create_model(NAME, pretrained=CHECKPOINT)` make the same one.
    """
    if ":" in name and not name.startswith("local-dir:"):
        return None
    config = import_open_clip().get_model_config(Path(name).stem if name.endswith(".json") else name)
    if config is None:
        return None
    config = copy.deepcopy(config)
    if context_length is not None:
        config["text_cfg"]["context_length"] = context_length
    return config if logit_bias is None else config | {"init_logit_bias": logit_bias.item()}


@functools.cache
def _of_checkpoints() -> tempfile.TemporaryDirectory[str]:
    """Where configurations from checkpoints are written, for open_clip to read them, until the process ends."""
    return tempfile.TemporaryDirectory()


def _configuration_file(path: Path, pretrained: str | None) -> Path:
    """The file of a configuration, or, where there is none, that of a checkpoint that has it with it."""
    if path.exists() or not pretrained or not Path(pretrained).is_file():
        return path
    try:
        content = torch.load(pretrained, map_location="cpu", weights_only=True, mmap=True)
        config = next(
            value[CONFIGURATION] for value in content.values() if isinstance(value, dict) and CONFIGURATION in value
        )
    except Exception:  # a checkpoint of others, or none at all: what is missing is the file
        return path
    written = Path(_of_checkpoints().name, path.name)
    written.write_text(json.dumps(config), encoding="utf-8")
    return written


def hold_frozen(model: torch.nn.Module) -> None:
    """Keep the parts of a model in which no parameter trains in evaluation mode, whatever `train()` says later.

    They then do not change at all: BatchNorm's running statistics are no parameters, and in training mode every batch moves
    them. Nor does dropout make their embeddings random.
    """
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()
            module.train = types.MethodType(_stay_in_evaluation, module)


def _stay_in_evaluation(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    """In the place of a module's `train`, which would go on to the modules inside it."""
    return module


def _register(path: Path) -> str:
    """Make a model configuration known to open_clip, by the name of its file."""
    try:
        # open_clip passes over what is no configuration without a word, and stumbles ever after over what is no JSON.
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected a model configuration of open_clip in JSON, got '{error}'") from None
    if not isinstance(config, dict) or not config.keys() >= {"embed_dim", "vision_cfg", "text_cfg"}:
        raise InputError(
            f"{path}: expected a model configuration of open_clip, with embed_dim, vision_cfg and text_cfg, got another "
            f"structure"
        )
    import_open_clip().add_model_config(path)
    return path.stem


def _check_name(name: str) -> None:
    """Raise InputError for a model that open_clip cannot make."""
    open_clip = import_open_clip()
    config = open_clip.get_model_config(name)
    if config is None:
        close = difflib.get_close_matches(name, open_clip.list_models())
        raise InputError(
            f"expected a model name of open_clip, got '{name}'" + (f"; close to it: {close}" if close else "")
        )
    text_tower = config["text_cfg"].get("hf_model_name") or config["text_cfg"].get("hf_tokenizer_name")
    if text_tower and importlib.util.find_spec("transformers") is None:
        raise InputError(f"expected the package transformers for '{text_tower}', got none: pip install transformers")


def freeze_unused(model: torch.nn.Module, embed: Callable[[], Any]) -> list[str]:
    """Freeze every parameter that `embed()` does not use, and return their names.

    DistributedDataParallel waits for the gradient of everything that trains, so a caption decoder, a tower without a
    field or the bias of another loss stops it. What is used is found by use: one backward of what `embed` returns,
    tensors in tuples, lists and mappings. It runs in evaluation mode; modes, buffers, gradients and random numbers are
    afterwards what they were.
    """
    modes = {module: module.training for module in model.modules()}
    before = {name: weight.grad for name, weight in model.named_parameters()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            for weight in model.parameters():
                weight.grad = None
            model.eval()
            used = [tensor for tensor in _tensors(embed()) if tensor.requires_grad]
            if used:
                sum(tensor.float().sum() for tensor in used).backward()  # pyright: ignore[reportAttributeAccessIssue]
            unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    finally:
        for module, training in modes.items():
            module.training = training
        for name, weight in model.named_parameters():
            weight.grad = before[name]
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
    for name, weight in model.named_parameters():
        if name in unused:
            weight.requires_grad_(False)
    return unused


def _tensors(value: Any) -> list[torch.Tensor]:
    """All floating-point tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []
