"""ClipLoss against open_clip's."""

import torch
from hypothesis import given

from gcl_kernels import ClipLoss, gcl_loss, testing
from gcl_kernels.training.openclip import import_open_clip
from tests.oracle import assert_accurate, run

open_clip = import_open_clip()


@given(
    problem=testing.problems(
        sizes=(15, 17, 64, 129), dims=(8, 33, 64), labels=False, ids=False, geometries=("random", "paired")
    )
)
def test_clip_loss_is_open_clip_s(problem):
    batch = problem.build(torch.float32)
    image, text = (x.detach()[: problem.n].requires_grad_() for x in (batch.lhs, batch.rhs))
    batch = testing.Batch(image, text, batch.logit_scale, {})
    ours = run(ClipLoss(), batch)
    assert_accurate(ours, batch, open_clip.ClipLoss(), names=("loss", "dimage", "dtext", "dscale"))


def test_clip_loss_arguments_are_open_clip_s():
    open_clip_loss = open_clip.ClipLoss
    image, text = torch.randn(6, 4), torch.randn(6, 4)
    bias = torch.zeros(1, requires_grad=True)
    for module in (open_clip_loss(False, True, True, 0, 1), ClipLoss(False, True, True, 0, 1)):
        result = module(image, text, torch.tensor([3.0]), logit_bias=bias, output_dict=True)
        assert list(result) == ["contrastive_loss"]
        torch.testing.assert_close(result["contrastive_loss"], gcl_loss(image, text, 3.0))
    result["contrastive_loss"].backward()
    assert bias.grad is not None
    assert not bias.grad.any()


def test_clip_loss_inside_open_clip_s_training_step():
    """A real open_clip model, its own forward's dict spread into the loss as open_clip_train does, five steps each."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
    }
    histories = []
    for loss_module in (open_clip.ClipLoss(), ClipLoss()):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config, output_dict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for step in range(5):
            g = torch.Generator().manual_seed(step)
            images, texts = torch.randn(12, 3, 16, 16, generator=g), torch.randint(1, 100, (12, 8), generator=g)
            output = model(images, texts)
            total = sum(loss_module(**output, output_dict=True).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.detach())
        histories.append(torch.stack(losses))
    torch.testing.assert_close(histories[1], histories[0], rtol=1e-5, atol=1e-6)
    assert histories[0][-1] != histories[0][0]
