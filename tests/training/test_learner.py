"""What of a model trains."""

from __future__ import annotations

import torch

from gcl_kernels.training.openclip import freeze_unused, import_open_clip


def test_what_the_embeddings_do_not_use_is_found_by_use():
    """Models for a sigmoid loss have a bias, those that caption have a decoder; no gradient reaches them, and processes wait."""
    model = import_open_clip().CLIP(
        8,
        {"image_size": 16, "patch_size": 16, "layers": 1, "width": 8, "head_width": 8},
        {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
        init_logit_bias=-10.0,
    )
    model.extra = torch.nn.BatchNorm1d(8)
    model.train()
    model.visual.eval()
    before = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    images, tokens = torch.zeros(2, 3, 16, 16), torch.ones(2, 4, dtype=torch.int64)

    def embed():
        torch.rand(3)
        return {"a": model.encode_image(images)}, [model.extra(model.encode_text(tokens)), model.logit_scale.exp()]

    assert freeze_unused(model, embed) == ["logit_bias"]
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["logit_bias"]
    assert torch.get_rng_state().equal(before)
    assert [module.training for module in model.modules()] == modes
    assert model.extra.num_batches_tracked == 0
    assert all(weight.grad is None for weight in model.parameters())
    unused = freeze_unused(model, lambda: model.encode_text(tokens))
    assert {name.partition(".")[0] for name in unused} == {"visual", "logit_scale", "extra"}
