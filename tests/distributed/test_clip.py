"""ClipLoss over ranks against open_clip's, for each pair of its flags."""

import itertools

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import ClipLoss, backends
from gcl_kernels.training.openclip import import_open_clip
from tests.conftest import expect_no_gloo_threads
from tests.counting import LargestTensor
from tests.distributed.pool import CONTEXT, WORLDS

open_clip = import_open_clip()

FLAGS = list(itertools.product((False, True), repeat=2))  # local_loss, gather_with_grad


def losses_on_rank(group):
    """For each flag combination: (loss, gradients) of open_clip's and of ours on this rank."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    results = []
    for local_loss, gather_with_grad in FLAGS:
        for kind in (open_clip.ClipLoss, ClipLoss):
            g = torch.Generator().manual_seed(rank)
            image, text = (torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
            scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            module = kind(local_loss, gather_with_grad, rank=rank, world_size=world)
            loss = module(image, text, scale)
            loss.backward()
            results.append([x.detach() for x in (loss, image.grad, text.grad, scale.grad)])
    return results


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_loss_on_all_ranks_is_open_clip_s(pool):
    """open_clip's loss knows the default group only, which all ranks of the pool are in."""
    for results in pool.run(WORLDS[-1], losses_on_rank):
        for theirs, ours in zip(results[::2], results[1::2], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b)


def use_a_group_and_leave(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    losses_on_rank(dist.group.WORLD)
    dist.destroy_process_group()
    expect_no_gloo_threads()


def test_a_group_s_threads_end_with_it(tmp_path):
    arguments = (str(tmp_path / "rendezvous"),)
    processes = [CONTEXT.Process(target=use_a_group_and_leave, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def largest_tensors_on_rank(group):
    """Entries of the largest tensor that ClipLoss makes, for each pair of flags."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = []
    with backends.settings(tile=(16, 8)):
        for flags in FLAGS:
            image, text = torch.randn(2, 60, 3, requires_grad=True).unbind()
            with LargestTensor() as largest:
                ClipLoss(*flags, rank=rank, world_size=world)(image, text, 2.0).backward()
            sizes.append(largest.numel)
    return sizes


def test_clip_loss_makes_no_rank_hold_its_rows_by_all_columns(pool):
    for sizes in pool.run(WORLDS[-1], largest_tensors_on_rank):
        assert max(sizes) < 60 * 240 / 2
