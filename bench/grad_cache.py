"""Peak memory of a training step with and without gradient caching: `python -m bench.grad_cache` (five minutes).

The demo's model (`ViT-Tiny-8-32px`, 7.6 M parameters) encodes a query, a title and an image a row; GCL's loss over the batch,
AdamW. Each figure comes from a fresh process, the peak over two steps of all that is resident, libraries and inputs included.
Writes `bench/results/grad_cache.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch

from bench.measure import in_fresh_process, machine
from gcl_kernels import __version__, gcl_loss, grad_cache
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.memory import peak_resident_memory, reset_peak_resident_memory, resident_memory
from gcl_kernels.training.openclip import create_model

RESULTS = Path(__file__).parent / "results"
CASES = ((512, 0), (1024, 0), (512, 256), (2048, 256), (8192, 256))  # rows, micro-batch; 0: no caching


def measure_here(n: int, micro_batch: int) -> dict:
    torch.manual_seed(0)
    model, _, _ = create_model()
    encode = [model.encode_text, model.encode_text, model.encode_image]
    if micro_batch:
        encode = [grad_cache.cached(encoder, micro_batch) for encoder in encode]
    optimizer = torch.optim.AdamW(model.parameters())
    query, title, image = torch.randint(1, 49408, (n, 16)), torch.randint(1, 49408, (n, 16)), torch.randn(n, 3, 32, 32)
    weights = torch.rand(n)
    before = resident_memory()
    reset_peak_resident_memory()
    for _ in range(2):
        optimizer.zero_grad()
        fields = [encoder(x) for encoder, x in zip(encode, (query, title, image), strict=True)]
        rhs = {"title": fields[1], "image": fields[2]}
        gcl_loss({"query": fields[0]}, rhs, model.logit_scale.exp(), weights=weights).backward()
        optimizer.step()
    return {
        "rows": n,
        "micro_batch": micro_batch,
        "peak_mib": peak_resident_memory() / 2**20,
        "before_mib": before / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def table(measured: list[dict]) -> str:
    lines = ["| batch | micro-batch | peak, MiB | of it before the steps |", "|---|---|---|---|"]
    for r in measured:
        size = r["micro_batch"] or "no caching"
        lines.append(f"| {r['rows']:,} | {size} | {r['peak_mib']:,.0f} | {r['before_mib']:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs=2, type=int, metavar=("ROWS", "MICRO_BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        print(json.dumps(measure_here(*options.of)))
        return
    measured = [json.loads(in_fresh_process("bench.grad_cache", "--of", *map(str, case))) for case in CASES]
    result = {
        "date": datetime.date.today().isoformat(),
        "gcl_kernels": __version__,
        "machine": machine(),
        "measured": measured,
    }
    write_json_atomically(RESULTS / "grad_cache.json", result, indent=1)
    print(table(measured))


if __name__ == "__main__":
    main()
