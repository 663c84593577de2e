"""The drop-ins for open_clip's compound losses over ranks, for each pair of ClipLoss's flags."""

import pytest
import torch
import torch.distributed as dist

from gcl_kernels.integrations.open_clip import CoCaLoss, DistillClipLoss
from gcl_kernels.training.openclip import import_open_clip
from tests.distributed.pool import WORLDS
from tests.distributed.test_clip import FLAGS

open_clip = import_open_clip()


def gradients(loss, *inputs):
    first, second = loss
    return [x.detach() for x in (first, second, *torch.autograd.grad(first + 2 * second, inputs))]


def of_distillation(kind, flags, rank, world):
    g = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    teacher = [torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    module = kind(*flags, rank=rank, world_size=world)
    return gradients(module(image, text, scale, *teacher, torch.tensor(1.5)), image, text, scale)


def of_captions(kind, flags, rank, world):
    g = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    logits = torch.randn(5, 4, 7, generator=g, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 7, (5, 4), generator=g)
    module = kind(2.0, 0.5, local_loss=flags[0], gather_with_grad=flags[1], rank=rank, world_size=world)
    return gradients(module(image, text, logits, tokens, torch.tensor(2.0)), image, text, logits)


def on_rank(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    results = []
    for flags in FLAGS:
        for of, theirs, ours in (
            (of_distillation, open_clip.DistillClipLoss, DistillClipLoss),
            (of_captions, open_clip.CoCaLoss, CoCaLoss),
        ):
            results.append((of(ours, flags, rank, world), of(theirs, flags, rank, world)))
    return results


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_losses_on_all_ranks_are_open_clip_s(pool):
    for results in pool.run(WORLDS[-1], on_rank):
        for ours, theirs in results:
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def teacher_of_another_width(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    x, teacher = torch.ones(2, 3), torch.ones(2, 4 + (rank == 1))
    with pytest.raises(ValueError, match="teacher's width"):
        DistillClipLoss(rank=rank, world_size=world)(x, x, 1.0, teacher, teacher, 1.0)


def test_teachers_that_differ_are_an_error_on_every_rank(pool):
    pool.run(WORLDS[-1], teacher_of_another_width)
