"""sentence-transformers' `gather_across_devices`: over ranks the losses and gradients are theirs."""

import pytest
import torch
import torch.distributed as dist

from gcl_kernels.integrations.importing import import_torchvision

pytest.importorskip("torchvision")
import_torchvision()  # beside a CPU-only torch sentence-transformers cannot be imported otherwise
pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed", exc_type=ImportError)

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss  # noqa: E402

from gcl_kernels.integrations.sentence_transformers import GCLLoss  # noqa: E402
from tests.distributed.pool import WORLDS  # noqa: E402
from tests.integrations.test_sentence_transformers import CASES, OPTIONS, Nothing, expected  # noqa: E402

N, D, WORLD = 5, 4, WORLDS[-1]
RULES = {"false_negative_margin": 0.1}


def columns_of(rank):
    g = torch.Generator().manual_seed(rank)
    q, d, *mined = (torch.randn(N, D, generator=g, dtype=torch.float64) for _ in range(4))
    return [x.requires_grad_() for x in (q, q + 0.8 * d, *mined)]


def results_of(loss, columns, *labels):
    value = loss.compute_loss_from_embeddings(columns, *(labels or (None,)))
    inputs = [*columns, *(x for x in loss.parameters())]
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def of_options(group):
    columns = columns_of(dist.get_rank(group))
    results = []
    for options in OPTIONS:
        kinds = GCLLoss, MultipleNegativesRankingLoss
        results.append([results_of(k(Nothing(), gather_across_devices=True, **options), columns) for k in kinds])
    return results


def of_rules(group):
    rank, results = dist.get_rank(group), []
    columns = columns_of(rank)
    scores = torch.linspace(0, 1, WORLD * N, dtype=torch.float64)[rank * N : rank * N + N]
    weighed = {"score_to_weight": "linear", "score_range": (0, 1), "normalize": "mean", "learnable_temperature": True}
    for options in CASES:
        loss = GCLLoss(Nothing(), 20.0, gather_across_devices=True, **options, **RULES, **weighed).double()
        results.append(results_of(loss, columns, scores))
    return results


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_option_set_is_theirs_over_ranks(pool):
    for results in pool.run(WORLD, of_options):
        for ours, theirs in results:
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_over_ranks_it_is_the_loss_of_the_joined_batch(pool):
    """What DistributedDataParallel averages; the temperature's gradient is averaged already."""
    columns = [torch.cat(pair).detach().requires_grad_() for pair in zip(*map(columns_of, range(WORLD)), strict=True)]
    log_scale = torch.tensor(20.0, dtype=torch.float64).log().requires_grad_()
    weights = 1 + 99 * torch.linspace(0, 1, WORLD * N, dtype=torch.float64)
    exact = []
    for options in CASES:
        scale = log_scale.exp()
        value = expected(columns, options, scale, weights / weights.mean(), limit=lambda positive: positive + 0.1)
        exact.append([value, *torch.autograd.grad(value, [*columns, log_scale])])
    for joined, *ranks in zip(exact, *pool.run(WORLD, of_rules), strict=True):
        values, *gradients, of_scale = zip(*ranks, strict=True)
        torch.testing.assert_close(sum(values) / WORLD, joined[0].detach())
        for of_ranks, whole in zip(gradients, joined[1:-1], strict=True):
            torch.testing.assert_close(torch.cat(of_ranks) / WORLD, whole)
        for alone in of_scale:
            torch.testing.assert_close(alone, joined[-1], rtol=1e-5, atol=1e-6)
