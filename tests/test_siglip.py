"""SigLipLoss against open_clip's."""

import importlib

import pytest
import torch
from hypothesis import given

from gcl_kernels import SigLipLoss, testing
from gcl_kernels.training.openclip import import_open_clip
from tests.sigmoid_oracle import assert_accurate, biases, run, with_bias

open_clip = import_open_clip()
open_clip_loss = importlib.import_module("open_clip.loss")


@given(
    problem=testing.problems(
        sizes=(15, 17, 64, 129), dims=(8, 33, 64), labels=False, ids=False, geometries=("random", "paired")
    ),
    bias=biases(),
)
def test_siglip_loss_is_open_clip_s(problem, bias):
    batch = problem.build(torch.float32)
    image, text = (x.detach()[: problem.n].requires_grad_() for x in (batch.lhs, batch.rhs))
    inputs = with_bias(testing.Batch(image, text, batch.logit_scale, {}), bias)
    names = ("loss", "dimage", "dtext", "dscale", "dbias")
    assert_accurate(run(SigLipLoss(), inputs), inputs, open_clip_loss.SigLipLoss(), names)


@pytest.mark.parametrize("dist_impl", [None, "bidir", "shift", "reduce", "gather"])
def test_siglip_loss_arguments_are_open_clip_s(dist_impl):
    image, text = torch.randn(6, 4), torch.randn(6, 4)
    results = []
    for kind in (open_clip_loss.SigLipLoss, SigLipLoss):
        scale, bias = torch.tensor([3.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
        result = kind(True, 0, 1, dist_impl)(image, text, logit_scale=scale, logit_bias=bias, output_dict=True)
        assert list(result) == ["contrastive_loss"]
        result["contrastive_loss"].backward()
        results.append([result["contrastive_loss"].detach(), scale.grad, bias.grad])
    torch.testing.assert_close(results[1], results[0])


def test_no_bias_is_a_bias_of_zero():
    image, text = torch.randn(6, 4), torch.randn(6, 4)
    expected = open_clip_loss.SigLipLoss()(image, text, 3.0, None)
    torch.testing.assert_close(SigLipLoss(chunk_size=2)(image, text, 3.0, None), expected)


def test_siglip_loss_inside_open_clip_s_training_step():
    """A real open_clip model with a learned bias, its own forward's dict spread into the loss, five steps each."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
        "init_logit_scale": 2.3,
        "init_logit_bias": -10,
    }
    histories = []
    for loss_module in (open_clip_loss.SigLipLoss(), SigLipLoss()):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config, output_dict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(5):
            g = torch.Generator().manual_seed(step)
            images, texts = torch.randn(12, 3, 16, 16, generator=g), torch.randint(1, 100, (12, 8), generator=g)
            total = sum(loss_module(**model(images, texts), output_dict=True).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
        histories.append(torch.stack([*losses, model.logit_bias.detach()]))
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-5, atol=1e-6)
    assert histories[0][-1] != -10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dist_impl": "ring"}, "dist_impl: expected one of 'bidir', 'shift', 'reduce', 'gather', got 'ring'")],
)
def test_wrong_options_are_refused_when_the_module_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        SigLipLoss(**options)


def test_unequal_rows_are_an_error():
    with pytest.raises(ValueError, match="text_features: expected 6 rows, as image_features has, got 5"):
        SigLipLoss()(torch.randn(6, 4), torch.randn(5, 4), 1.0, 0.0)
