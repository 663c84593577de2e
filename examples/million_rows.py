"""A million pairs in one batch on one GPU: the encoder in micro-batches (gradient caching), the loss in tiles.

    python examples/million_rows.py                                  # 1,048,576 rows, for a GPU
    python examples/million_rows.py --rows 8192 --steps 20           # the same on a CPU, a minute

Two things stand between a GPU and such a batch. The encoder's activations: `grad_cache.cached` encodes the batch in micro-batches
without a graph, and each again, with one, in the backward. The N x N logits: `gcl_loss` makes them in tiles. The script
prints the memory that a dense loss would need, then the loss and the time of every step and, on a GPU, the peak memory. The
batch, made here, is the same in every step.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from gcl_kernels import gcl_loss, grad_cache
from gcl_kernels.plan import amount

WIDTH, DIM = 256, 512


def encoder():
    """Stands for a model whose activations do not fit for the whole batch."""
    return nn.Sequential(nn.Linear(WIDTH, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, DIM))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2**20, help="pairs in a batch (default 1,048,576)")
    parser.add_argument("--steps", type=int, default=5, help="batches (default 5)")
    parser.add_argument("--micro-batch", type=int, default=4096, help="rows encoded at once (default 4096)")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)

    matrix = options.rows**2 * dtype.itemsize
    print(f"N = {options.rows:,}: one N x N matrix of {dtype} takes {amount(matrix)},")
    print(f"a dense loss {amount(4 * matrix)}: open_clip.ClipLoss's peak on a CPU was measured as 4 such matrices")

    towers = nn.ModuleList([encoder(), encoder()]).to(device)
    log_scale = nn.Parameter(torch.tensor(1 / 0.07, device=device).log())
    optimizer = torch.optim.AdamW([*towers.parameters(), log_scale], lr=1e-3)

    def encode(tower):
        def run(inputs):
            with torch.autocast(device, torch.bfloat16, enabled=gpu):
                return F.normalize(tower(inputs), dim=1).to(dtype)

        return grad_cache.cached(run, options.micro_batch)

    left, right = map(encode, towers)
    views = [torch.randn(32, WIDTH, device=device) for _ in towers]
    hidden = torch.randn(options.rows, 32, device=device)
    inputs = [hidden @ view + torch.randn(options.rows, WIDTH, device=device) for view in views]

    for step in range(options.steps):
        start = time.perf_counter()
        loss = gcl_loss(left(inputs[0]), right(inputs[1]), log_scale.exp())  # all rows are each other's negatives
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()  # waits for the GPU
        memory = f", peak {amount(torch.cuda.max_memory_allocated())}" if gpu else ""
        print(f"step {step}: loss {value:.4f}, {time.perf_counter() - start:.2f} s{memory}", flush=True)


if __name__ == "__main__":
    main()
