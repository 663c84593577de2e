"""Encoders of transformers, tiny and of random weights, and batches for them."""

import pytest
import torch

from gcl_kernels.integrations.importing import import_transformers

try:
    import_transformers()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 50, "max_position_embeddings": 8}
VISION = SIZES | {"image_size": 8, "patch_size": 4}


def clip():
    torch.manual_seed(0)
    text = TEXT | {"bos_token_id": 48, "eos_token_id": 49}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def siglip():
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
        model.logit_bias.fill_(-2.0)
    return model


def dual():
    torch.manual_seed(0)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        CLIPVisionConfig(**VISION),
        BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        projection_dim=8,
    )
    return VisionTextDualEncoderModel(config)


MODELS = {"CLIPModel": clip, "SiglipModel": siglip, "VisionTextDualEncoderModel": dual}


def rows(n, seed=0):
    """A data set with graded scores, and ids that two rows share."""
    g = torch.Generator().manual_seed(seed)
    tokens, pixels = torch.randint(1, 48, (n, 6), generator=g), torch.randn(n, 3, 8, 8, generator=g)
    scores, ids = torch.linspace(1, 100, n), torch.arange(n) // 2
    keys = ("input_ids", "pixel_values", "scores", "ids")
    return [dict(zip(keys, row, strict=True)) for row in zip(tokens, pixels, scores, ids, strict=True)]


def batch(n, seed=0):
    data = rows(n, seed)
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}
