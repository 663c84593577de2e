"""accelerate: a loop of your own, and a loss that compares the rows of all processes.

    python examples/accelerate_clip.py                         # a CPU or a GPU, 10 seconds
    python examples/accelerate_clip.py --rows 16 --steps 10
    torchrun --nproc-per-node 2 examples/accelerate_clip.py    # --rows pairs on each of 2 processes

It prints the first batch's loss without scores beside the dense formula, then the loss of training.
There is no function for accelerate in gcl_kernels, because none is needed: a loss with `process_group="world"` finds the
processes that `torchrun` or `accelerate launch` has started, and needs no `accelerator.gather`.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gcl_kernels import GCLLoss, gcl_loss


class TwoTowers(nn.Module):
    """Pictures as vectors of 48 numbers, texts as 6 tokens."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(48, 128), nn.ReLU(), nn.Linear(128, 64))
        self.text = nn.EmbeddingBag(100, 64)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, image, tokens):
        # The scale comes out of `forward`, so that DistributedDataParallel averages its gradient too.
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(tokens), dim=1), self.log_scale.exp()


def pairs(count):
    """Texts of random tokens, pictures that are made of the tokens and noise, and scores: less noise is a better match."""
    tokens, scores = torch.randint(0, 100, (count, 6)), torch.rand(count)
    pictures = torch.randn(100, 48)[tokens].mean(dim=1) + 0.5 * (1 - scores[:, None]) * torch.randn(count, 48)
    return TensorDataset(pictures, tokens, scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="pairs a process in a batch (default 256)")
    parser.add_argument("--steps", type=int, default=100, help="batches (default 100)")
    options = parser.parse_args()
    torch.manual_seed(0)

    # Several processes on a CPU are joined only where `cpu=True` says that it is meant.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    model = TwoTowers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    data = pairs(16 * options.rows * accelerator.num_processes)
    loader = DataLoader(data, batch_size=options.rows, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # On several processes the mean of the losses, which DistributedDataParallel's gradients are of, is the joined batch's.
    criterion = GCLLoss("linear", score_range=(0, 1), normalize="mean", process_group="world")

    batches = iter(loader)
    for step in range(options.steps):
        batch = next(batches, None)
        if batch is None:  # the next epoch
            batches = iter(loader)
            batch = next(batches)
        image, tokens, scores = batch
        *sides, scale = model(image, tokens)
        loss = criterion(*sides, scores, scale)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

        mean = accelerator.reduce(loss.detach(), "mean")
        if step == 0 and accelerator.num_processes == 1:
            ours, logits = gcl_loss(*sides, scale), scale * sides[0] @ sides[1].T
            rows = torch.arange(len(logits), device=accelerator.device)
            dense = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
            accelerator.print(
                f"first batch: gcl_loss without scores {ours.item():.6f}, dense formula {dense.item():.6f}"
            )
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            accelerator.print(f"step {step}: loss {mean.item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
