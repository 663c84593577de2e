"""The search page's server under load: `python -m bench.serving`.

A server of its own process answers searches over random documents; clients on loopback each send their next query when the
last is answered. A query's vector is that of one document and a tenth of another, so that the best document of every answer is
known: an answer lost, refused or mixed up with another ends the run with status 1. The query's tower is left out: its vector
is looked up. Pin both processes to the cores in question: `taskset -c 0,1`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from torch import Tensor
from torch.nn.functional import normalize

from gcl_kernels.training.search_model import SearchModel
from gcl_kernels.training.searching import Searcher
from gcl_kernels.training.serve import bound
from gcl_kernels.training.serving.app import create_app
from gcl_kernels.training.serving.state import Opened, State


class Lookup(SearchModel):
    """A model of queries "document N"."""

    vectors: Tensor

    def embed_query(self, values: Any, weights: Mapping[str, float] | None = None) -> Tensor:
        number = int(values["query"].split()[1])
        return normalize(self.vectors[number] + 0.1 * self.vectors[number - 1], dim=0)


def serve(listening: socket.socket, documents: int, dimension: int) -> None:
    """Answer until ended."""
    draw = torch.Generator().manual_seed(0)
    vectors = normalize(torch.randn(documents, dimension, generator=draw), dim=1)
    none: Any = None
    side = ({"title": "txt"}, {"title": 1.0})
    model = Lookup("lookup", None, none, none, none, ({"query": "txt"}, {"query": 1.0}), side)
    model.vectors = vectors
    ids = [f"{number:08}" for number in reversed(range(documents))]
    searcher = Searcher(model, {key: {"title": f"the document {key}"} for key in ids}, ids, {"title": vectors})
    app = create_app(State("random", [Opened("lookup", searcher)]))
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, query: str) -> dict[str, Any]:
    writer.write(f"GET /api/search?q={query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = re.search(r"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1])) if length else b""
    if " 200 " not in head.partition("\r\n")[0]:
        raise RuntimeError(f"expected status 200, got {head} {body[:200]}")
    return json.loads(body)


async def load(port: int, clients: int, requests: int, documents: int) -> tuple[list[float], float, int]:
    """Seconds of each answer, seconds in all, and how many answers were lost or wrong."""
    numbers = iter(np.random.default_rng(clients).integers(1, documents, requests).tolist())
    seconds: list[float] = []
    wrong = 0

    async def client() -> None:
        nonlocal wrong
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            started = time.perf_counter()
            try:
                answer = await ask(reader, writer, f"document+{number}")
                wrong += answer["results"][0]["id"] != f"{documents - 1 - number:08}" or len(answer["results"]) != 10
            except (RuntimeError, OSError, asyncio.IncompleteReadError) as error:
                wrong += 1
                print(error, file=sys.stderr)
                break
            seconds.append(time.perf_counter() - started)
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds, time.perf_counter() - started, wrong + requests - len(seconds)


def memory(process: int) -> tuple[float, float]:
    """MiB of a process now, and at most so far."""
    text = Path(f"/proc/{process}/status").read_text()
    now, most = (int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) for name in ("VmRSS", "VmHWM"))  # type: ignore[index]
    return now / 1024, most / 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description="The search page's server under load")
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--clients", default="1,4,16,300", help="at a time; a list (default 1,4,16,300)")
    parser.add_argument("--requests", type=int, default=600, help="of each number of clients, at least two each")
    args = parser.parse_args()
    with bound("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        server = multiprocessing.get_context("fork").Process(
            target=serve, args=(listening, args.documents, args.dimension), daemon=True
        )
        server.start()
        lost = 0
        try:
            asyncio.run(load(port, 1, 20, args.documents))  # warm
            print(f"{args.documents:,} documents, D = {args.dimension}, {len(os.sched_getaffinity(0))} cores, "
                  f"{memory(server.pid or 0)[0]:,.0f} MiB before the load")  # fmt: skip
            print("clients  requests  lost  requests/s   p50 ms   p99 ms  most MiB")
            for clients in map(int, args.clients.split(",")):
                requests = max(args.requests, 2 * clients)
                seconds, total, wrong = asyncio.run(load(port, clients, requests, args.documents))
                lost += wrong
                p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
                print(f"{clients:7} {requests:9} {wrong:5} {len(seconds) / total:11.1f} {p50:8.1f} {p99:8.1f} "
                      f"{memory(server.pid or 0)[1]:9,.0f}", flush=True)  # fmt: skip
        finally:
            server.terminate()
            server.join()
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
