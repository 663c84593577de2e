"""A plain PyTorch loop: two encoders, `ClipLoss` in the place of open_clip's, AdamW.

    python examples/plain_loop.py                      # 20 seconds on a CPU
    python examples/plain_loop.py --rows 256 --steps 20

It prints the loss of the first batch beside the same formula written densely, then the loss every tenth of the run, and at
the end how many new pairs find each other first. The data are made here: two noisy views of the same hidden vector.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from gcl_kernels import ClipLoss


class TwoTowers(nn.Module):
    """What CLIP is to the loss: two encoders into one space, and a learned scale."""

    def __init__(self, left: int, right: int, dim: int = 64):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(left, 128), nn.GELU(), nn.Linear(128, dim))
        self.right = nn.Sequential(nn.Linear(right, 128), nn.GELU(), nn.Linear(128, dim))
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, left, right):
        # The loss takes embeddings as they are, so they are normalised here, as in CLIP.
        return F.normalize(self.left(left), dim=1), F.normalize(self.right(right), dim=1), self.log_scale.exp()


def dense_loss(left, right, scale):
    """CLIP's loss as it is usually written. `logits` has N x N numbers, and autograd keeps more of that size."""
    logits = scale * left @ right.T
    target = torch.arange(len(left), device=left.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="pairs in a batch (default 2048)")
    parser.add_argument("--steps", type=int, default=100, help="batches (default 100)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    views = [torch.randn(16, width, device=device) for width in (48, 32)]

    def batch(rows):
        hidden = torch.randn(rows, 16, device=device)
        return [hidden @ view + 0.5 * torch.randn(rows, view.shape[1], device=device) for view in views]

    model = TwoTowers(48, 32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    criterion = ClipLoss()

    for step in range(options.steps):
        features = model(*batch(options.rows))
        loss = criterion(*features)
        if step == 0:
            print(f"first batch: ClipLoss {loss.item():.6f}, dense formula {dense_loss(*features).item():.6f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, options.steps // 10) == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")

    with torch.no_grad():
        left, right, _ = model(*batch(256))
    found = (left @ right.T).argmax(dim=1) == torch.arange(256, device=device)
    print(f"of 256 new pairs, {found.sum().item()} find each other first")


if __name__ == "__main__":
    main()
