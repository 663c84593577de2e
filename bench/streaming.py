"""`python -m bench.streaming`: time and resident memory of reading millions of rows and drawing batches from them."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gcl_kernels.training.data import Columns, PairFile
from gcl_kernels.training.memory import peak_memory, shown_peak
from gcl_kernels.training.sampler import Sampler

WORDS = (
    "red",
    "blue",
    "small",
    "large",
    "cotton",
    "leather",
    "walking",
    "shirt",
    "shoe",
    "lamp",
    "chair",
    "soft",
    "warm",
)


def write(path: Path, rows: int) -> None:
    """A hundred rows a query, titles that differ, as a shop's search log looks."""
    with path.open("w", encoding="utf-8") as file:
        file.write("query,product_id,title,score\n")
        for row in tqdm(range(rows), desc="writing", unit="row", unit_scale=True):
            a, b, c = (WORDS[(row * step // 100) % len(WORDS)] for step in (1, 7, 13))
            file.write(f'{a} {b} {row // 100},{row % 1_000_003},"{c} {a}, number {row % 1_000_003}",{row % 100 + 1}\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Write, read, draw batches for a while, print what it took."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--batches", type=int, default=1000, help="of 512 rows, drawn and read")
    args = parser.parse_args(argv)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.csv"
        write(path, args.rows)
        print(
            f"{args.rows:,} rows, {path.stat().st_size / 2**20:,.0f} MiB; before reading {shown_peak(peak_memory(cpu))}"
        )
        started = time.perf_counter()
        columns = Columns({"query": "txt"}, {"title": "txt"}, "score", document_id_key="product_id")
        pairs = PairFile(path, columns)
        print(f"read in {time.perf_counter() - started:.0f} s; {shown_peak(peak_memory(cpu))}")
        started = time.perf_counter()
        sampler = Sampler(torch.arange(len(pairs)), 512)
        for _ in range(args.batches):
            pairs.take(next(sampler).tolist())
        seconds = time.perf_counter() - started
        print(f"{args.batches} batches of 512 in {seconds:.1f} s; {shown_peak(peak_memory(cpu))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
