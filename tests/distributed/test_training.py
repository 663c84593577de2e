"""A DistributedDataParallel open_clip model trained on unequal ranks is the model one process trains on the joined batch."""

import pytest
import torch
import torch.distributed as dist

from gcl_kernels import GCLLoss, gcl_loss, grad_cache
from gcl_kernels.training.openclip import import_open_clip

ROWS = (3, 5, 4)
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
}


def trained(process_group, rows, transport, micro_batch_size):
    """Parameters after five steps of AdamW; float64, so that only a wrong gradient can tell two runs apart."""
    torch.manual_seed(0)
    model = import_open_clip().CLIP(**CONFIG).double()
    encode = model
    if process_group is not None:
        encode = torch.nn.parallel.DistributedDataParallel(model, process_group=process_group)
    if micro_batch_size is not None:
        encode = grad_cache.cached(encode, micro_batch_size)
    loss = GCLLoss("inverse_sqrt", normalize="mean", process_group=process_group, transport=transport)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        g, n = torch.Generator().manual_seed(step), sum(ROWS)
        images, tokens = torch.randn(n, 3, 16, 16, generator=g).double(), torch.randint(1, 100, (n, 8), generator=g)
        scores, ids = torch.randint(1, 101, (n,), generator=g).double(), torch.randint(0, 9, (n,), generator=g)
        images, texts, scale = encode(images[rows], tokens[rows])
        optimizer.zero_grad()
        loss(images, texts, scores[rows], scale, lhs_ids=ids[rows], rhs_ids=ids[rows]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def trained_on_rank(group, transport, micro_batch_size):
    rank = dist.get_rank(group)
    rows = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    return trained(group, rows, transport, micro_batch_size)


@pytest.fixture(scope="module")
def of_one_process():
    return trained(None, slice(None), "all_gather", None)


@pytest.mark.parametrize(("transport", "micro_batch_size"), [("all_gather", None), ("ring", 2)])
def test_five_steps_on_three_ranks(pool, of_one_process, transport, micro_batch_size):
    for parameters in pool.run(3, trained_on_rank, transport, micro_batch_size):
        assert parameters.keys() == of_one_process.keys()
        for name, p in parameters.items():
            # A key's bias has no gradient but rounding, of 1e-17, which AdamW lifts to some 1e-10 of a step of 1e-3.
            torch.testing.assert_close(p, of_one_process[name], rtol=1e-9, atol=1e-9, msg=lambda m, k=name: f"{k}: {m}")


class TwoResults(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x), self.unused(x)


def two_steps_on_rank(group):
    module = TwoResults()
    encode = grad_cache.cached(torch.nn.parallel.DistributedDataParallel(module, process_group=group), 2)
    for _ in range(2):
        y, _ = encode(torch.randn(5, 6))
        gcl_loss(y, torch.randn(5, 4), 1.0, process_group=group).backward()
    return module.used.weight.grad, module.unused.weight.grad


def test_a_result_that_the_loss_does_not_use(pool):
    """DistributedDataParallel refuses the second step where a parameter has had no gradient in the first."""
    for used, unused in pool.run(2, two_steps_on_rank):
        assert used.any()
        assert not unused.any()
