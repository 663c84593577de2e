"""Several processes, each with its own rows: DistributedDataParallel and the loss over a ring that never gathers a side.

    torchrun --nproc-per-node 2 examples/torchrun_ring.py                  # 2 processes on a CPU (gloo), 20 seconds
    torchrun --nproc-per-node 8 examples/torchrun_ring.py --rows 16384     # 8 GPUs (nccl), 131,072 rows a batch

It prints the first step's loss beside that of one process which was given the rows of all, then the loss every tenth of the run.
With the ring no rank holds the whole batch; with `transport="all_gather"`, the default, each holds one side of it.
"""

import argparse
import os

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gcl_kernels import gcl_loss


class TwoTowers(nn.Module):
    def __init__(self, left: int, right: int, dim: int = 64):
        super().__init__()
        self.left, self.right = nn.Linear(left, dim), nn.Linear(right, dim)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, left, right):
        # The scale comes out of `forward`, so that DistributedDataParallel averages its gradient too.
        return F.normalize(self.left(left), dim=1), F.normalize(self.right(right), dim=1), self.log_scale.exp()


def joined(tensor):
    """The rows of all ranks. Only this example's check needs them; ranks hold equally many here."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="pairs a rank in a batch (default 1024)")
    parser.add_argument("--steps", type=int, default=100, help="batches (default 100)")
    options = parser.parse_args()

    # torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()

    torch.manual_seed(0)  # the same towers and the same two views on every rank
    model = DistributedDataParallel(TwoTowers(48, 32).to(device), device_ids=[device.index] if gpu else None)
    views = [torch.randn(16, width).to(device) for width in (48, 32)]
    torch.manual_seed(1 + rank)  # and rows of its own
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    for step in range(options.steps):
        hidden = torch.randn(options.rows, 16, device=device)
        inputs = [hidden @ view + 0.5 * torch.randn(options.rows, view.shape[1], device=device) for view in views]
        left, right, scale = model(*inputs)
        # A rank's loss is its rows' share; the mean over ranks is the loss of the joined batch, and so with gradients.
        loss = gcl_loss(left, right, scale, process_group="world", transport="ring")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        mean /= world
        if step == 0:
            alone = gcl_loss(joined(left), joined(right), scale.detach())
            if rank == 0:
                print(f"first batch: {world} ranks on a ring {mean.item():.6f}, one process {alone.item():.6f}")
        if rank == 0 and (step % max(1, options.steps // 10) == 0 or step == options.steps - 1):
            print(f"step {step}: loss {mean.item():.4f}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
