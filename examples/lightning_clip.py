"""Lightning: two encoders in a LightningModule, and a loss that compares the rows of all devices.

    python examples/lightning_clip.py                          # a CPU or a GPU, 20 seconds
    python examples/lightning_clip.py --rows 16 --steps 10
    python examples/lightning_clip.py --devices 2              # --rows pairs on each of 2 devices, or of 2 processes on a CPU

It prints the first batch's loss without scores beside the dense formula, then the loss of training.
There is no class for Lightning in gcl_kernels, because none is needed: `process_group="world"` is looked up when the loss is
called, and Lightning has made the group by then.
"""

import argparse

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gcl_kernels import GCLLoss, gcl_loss


class TwoTowers(lightning.LightningModule):
    """Pictures as vectors of 48 numbers, texts as 6 tokens."""

    def __init__(self, steps: int):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(48, 128), nn.ReLU(), nn.Linear(128, 64))
        self.text = nn.EmbeddingBag(100, 64)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # On several devices the mean of the losses, which DistributedDataParallel's gradients are of, is the joined batch's.
        self.loss = GCLLoss("linear", score_range=(0, 1), normalize="mean", process_group="world")
        self.steps = steps

    def forward(self, image, tokens):
        return F.normalize(self.image(image), dim=1), F.normalize(self.text(tokens), dim=1), self.log_scale.exp()

    def training_step(self, batch, index):
        image, tokens, scores = batch
        *sides, scale = self(image, tokens)
        loss = self.loss(*sides, scores, scale)
        self.log("loss", loss, sync_dist=True)  # the mean over devices
        mean = self.all_gather(loss.detach()).mean()
        if self.trainer.is_global_zero:
            step = self.global_step
            if step == 0 and self.trainer.world_size == 1:
                ours, logits = gcl_loss(*sides, scale), scale * sides[0] @ sides[1].T
                rows = torch.arange(len(logits), device=self.device)
                dense = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
                print(f"first batch: gcl_loss without scores {ours.item():.6f}, dense formula {dense.item():.6f}")
            if step % max(1, self.steps // 10) == 0 or step == self.steps - 1:
                print(f"step {step}: loss {mean.item():.4f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def pairs(count):
    """Texts of random tokens, pictures that are made of the tokens and noise, and scores: less noise is a better match."""
    tokens, scores = torch.randint(0, 100, (count, 6)), torch.rand(count)
    pictures = torch.randn(100, 48)[tokens].mean(dim=1) + 0.5 * (1 - scores[:, None]) * torch.randn(count, 48)
    return TensorDataset(pictures, tokens, scores)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="pairs a device in a batch (default 256)")
    parser.add_argument("--steps", type=int, default=100, help="batches (default 100)")
    parser.add_argument("--devices", default="auto", help="how many GPUs, or processes on a CPU (default auto)")
    options = parser.parse_args()
    torch.manual_seed(0)

    loader = DataLoader(pairs(16 * options.rows), batch_size=options.rows, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        devices=options.devices, max_steps=options.steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(TwoTowers(options.steps), loader)


if __name__ == "__main__":
    main()
