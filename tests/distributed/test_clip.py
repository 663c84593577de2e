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


ROWS = (16, 10, 3, 7)


def features_of(rank):
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(ROWS[rank], 3, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def unequal_rows_on_rank(group):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    results = []
    for flags in FLAGS:
        features, scale = features_of(rank), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        loss = ClipLoss(*flags, rank=rank, world_size=world)(*features, scale)
        results.append([loss.detach(), *torch.autograd.grad(loss, (*features, scale))])
    return results


def dense_with_unequal_rows(rank, local_loss, gather_with_grad):
    """From one process's logits of all rows: L_r is the rank's rows' share of the loss L of all, L the mean of the L_r."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    features = [features_of(r) for r in range(len(ROWS))]
    mine = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    images, texts = (torch.cat(side) for side in zip(*features, strict=True))

    def rows_losses(images, texts):
        logits, labels = scale * images @ texts.T, torch.arange(sum(ROWS))
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, labels, reduction="none") + cross_entropy(logits.T, labels, reduction="none")) / 2

    whole = rows_losses(images, texts).mean()
    own = rows_losses(images, texts)[mine].sum() * len(ROWS) / sum(ROWS)
    inputs = *features[rank], scale
    if not local_loss:
        *gradients, dscale = torch.autograd.grad(whole, inputs)
        return [whole.detach(), *(g * (len(ROWS) if gather_with_grad else 1) for g in gradients), dscale]
    (dscale,) = torch.autograd.grad(own, scale, retain_graph=True)
    if gather_with_grad:
        return [own.detach(), *torch.autograd.grad(len(ROWS) * whole, inputs[:2]), dscale]
    logits_of = [scale * features[rank][0] @ texts.detach().T, scale * features[rank][1] @ images.detach().T]
    labels = torch.arange(mine.start, mine.stop)
    own = sum(torch.nn.functional.cross_entropy(v, labels, reduction="sum") for v in logits_of) / 2
    own = own * len(ROWS) / sum(ROWS)
    return [own.detach(), *torch.autograd.grad(own, inputs[:2]), dscale]


def test_ranks_with_unequal_rows_share_the_loss_of_all_rows(pool):
    for rank, results in enumerate(pool.run(WORLDS[-1], unequal_rows_on_rank)):
        for flags, actual in zip(FLAGS, results, strict=True):
            for a, e in zip(actual, dense_with_unequal_rows(rank, *flags), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14, msg=lambda m: f"{flags} on rank {rank}: {m}")  # noqa: B023


def faults_on_rank(group):
    """The error of each call, in which rank 2 differs from the others."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    odd = rank == 2
    x, y = features_of(rank)
    calls = {
        "rows": lambda flags: ClipLoss(*flags, rank=rank, world_size=world)(x, y[:-1] if odd else y, 2.0),
        "rank": lambda flags: ClipLoss(*flags, rank=0 if odd else rank, world_size=world)(x, y, 2.0),
        "world_size": lambda flags: ClipLoss(*flags, rank=rank, world_size=5 if odd else world)(x, y, 2.0),
        "logit_bias": lambda flags: ClipLoss(*flags, rank=rank, world_size=world)(x, y, 2.0, "0" if odd else -10.0),
        "logit_scale": lambda flags: ClipLoss(*flags, rank=rank, world_size=world)(x, y, 3.0 if odd else 2.0),
        "dimension": lambda flags: ClipLoss(*flags, rank=rank, world_size=world)(*(v[:, :2] if odd else v for v in (x, y)), 2.0),
        "local_loss": lambda flags: ClipLoss(flags[0] != odd, flags[1], rank=rank, world_size=world)(x, y, 2.0),
    }  # fmt: skip
    return {(name, flags): error_of(call, flags) for name, call in calls.items() for flags in FLAGS}


def error_of(call, *arguments):
    try:
        call(*arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return "none"


def test_a_rank_that_differs_is_an_error_on_every_rank(pool):
    own = {
        "rows": "text_features: expected 3 rows, as image_features has, got 2",
        "rank": "rank: expected 2, as in the default process group, got 0",
        "world_size": "world_size: expected 4, as in the default process group, got 5",
        "logit_bias": "logit_bias: expected a float or a tensor of one element, got str",
        "logit_scale": "logit_scale: expected the same on every rank",
        "dimension": "lhs and rhs: expected the same on every rank",
        "local_loss": "expected the same on every rank",
    }
    for rank, errors in enumerate(pool.run(WORLDS[-1], faults_on_rank)):
        for (name, flags), message in errors.items():
            assert own[name] in message, (rank, name, flags, message)


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
