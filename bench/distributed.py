"""What a contrastive loss over many ranks costs each of them: FLOPs, bytes sent, memory.

`python -m bench.distributed` counts on gloo groups of 2 to 4 processes here, models up to 1,024 GPUs at a batch of 4M, writes
`bench/results/distributed.json` and `.txt` and draws `distributed.png`; `--figure` does all but measure.

Counted, not timed: matrix products by a dispatch mode; bytes at the calls of torch.distributed (a gathering sends each rank's
part world - 1 times, as its ring algorithm does); peak resident memory over the inputs, each rank a fresh process. The model's
rates are assumptions, printed with it: no GPU has run this. inf-cl runs on CUDA only: its rows are modelled, by the source of
version 1.2.1 (`ring.py`, `flash.py`), not measured.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from bench.cases import Case, build
from bench.measure import FREED_IS_FREED, machine
from gcl_kernels import ClipLoss, __version__, gcl_loss
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.memory import peak_resident_memory, reset_peak_resident_memory, resident_memory
from gcl_kernels.training.openclip import import_open_clip
from gcl_kernels.types import Transport

RESULTS = Path(__file__).parent / "results"
N, D = 3072, 256
WORLDS = (2, 3, 4)

# The model: bfloat16 embeddings, batch 4M.
MODEL_N, MODEL_D = 4 * 2**20, 768
# A second and GPU: 40% of an H100's dense bfloat16 peak, to hold for the loss's products; TF32 half of it.
MODEL_FLOPS = 400e12
MODEL_BANDWIDTH = 50e9  # bytes a second sent by each GPU: a 400 Gb/s link each
ROWS_THAT_HIDE = MODEL_FLOPS / MODEL_BANDWIDTH  # 2 r² D FLOPs of a step take as long as sending r D numbers of 2 bytes
MODEL_WORLDS = tuple(2**k for k in range(3, 11))
RING, INF_CL = "process_group, ring", "inf-cl, ring (from its source)"


def ours(transport: Transport) -> Callable[..., Any]:
    return lambda rank, world: (
        lambda x, y, scale: gcl_loss(x, y, scale, process_group=dist.group.WORLD, transport=transport)
    )


def open_clip(**flags: bool) -> Callable[..., Any]:
    return lambda rank, world: import_open_clip().ClipLoss(rank=rank, world_size=world, **flags)


METHODS: dict[str, Callable[..., Any]] = {
    "process_group, all_gather": ours("all_gather"),
    RING: ours("ring"),
    "our ClipLoss, default": lambda rank, world: ClipLoss(rank=rank, world_size=world),
    "open_clip, default": open_clip(),
    "open_clip, local_loss + gather_with_grad": open_clip(local_loss=True, gather_with_grad=True),
}


# ---- counting


class Products(TorchDispatchMode):
    """FLOPs of matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def count_bytes() -> dict[str, int]:
    """Replaces the calls of torch.distributed that send; the result fills as they are made."""
    sent: dict[str, int] = {}

    def counted(name: str, size: Callable[..., int]) -> None:
        call = getattr(dist, name, None)
        if call is None:
            return

        @functools.wraps(call)
        def run(*args, **kwargs):
            sent[name] = sent.get(name, 0) + size(*args, **kwargs)
            return call(*args, **kwargs)

        setattr(dist, name, run)

    others = dist.get_world_size() - 1
    for name in ("all_gather_single", "all_gather_into_tensor"):
        counted(name, lambda got, x, **_: others * x.nbytes)
    counted("all_gather", lambda got, x, *_, **__: others * x.nbytes)
    counted(
        "all_to_all_single",
        lambda got, x, to, splits, **_: (sum(splits) - splits[dist.get_rank()]) * x.element_size(),
    )
    counted("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend))
    counted("scatter", lambda x, parts=None, src=0, **_: others * x.nbytes if src == dist.get_rank() else 0)
    return sent


def measured_on_rank(rank: int, world: int, path: str, method: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    loss = METHODS[method](rank, world)

    def part(n: int) -> list[Tensor]:
        rows = slice(rank * n // world, (rank + 1) * n // world)
        x, y, scale = build(Case("cpu", "fp32", n, n, D, logit_scale=100 / 7)).leaves
        return [x.detach()[rows].clone().requires_grad_(), y.detach()[rows].clone().requires_grad_(), scale]

    loss(*part(24 * world)).backward()  # libraries and connections are there
    inputs, sent = part(N), count_bytes()
    dist.barrier()
    before = resident_memory()
    reset_peak_resident_memory()
    with Products() as products:
        loss(*inputs).backward()
    extra = (peak_resident_memory() - before) / 2**20
    results.put({"flops": products.flops, "sent_bytes": sum(sent.values()), "calls": sent, "extra_mib": extra})
    dist.barrier()
    dist.destroy_process_group()


def measure(method: str, world: int) -> dict:
    """The largest over ranks of each figure."""
    os.environ.update(FREED_IS_FREED)
    # forked from one process that has imported what they need
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.distributed", "gcl_kernels.training.openclip"])
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/rendezvous", method, results)
        ranks = [context.Process(target=measured_on_rank, args=(rank, *arguments)) for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"{method}: expected exit 0 of every rank, got {process.exitcode}")
        got = [results.get() for _ in ranks]
    largest: dict[str, Any] = {key: max(r[key] for r in got) for key in ("flops", "sent_bytes", "extra_mib")}
    return {"method": method, "world": world, "n": N, "d": D, **largest, "calls": got[0]["calls"]}


# ---- the model


def model(method: str, world: int) -> dict:
    """FLOPs and bytes of one rank by formula, and seconds at the assumed rates."""
    n, d = MODEL_N, MODEL_D
    plane, side = n * n * d, n * d * (world - 1) / world
    own = n * d / world  # numbers a rank holds of a side; what goes round the ring home again is sent once more
    # (FLOPs forward, backward), (bytes forward, backward), overlapped, bytes of memory
    forms = {
        # rhs in 2 bytes, its gradient's parts in 4; memory: rhs, its gradient, and the others' parts of one's own
        "process_group, all_gather": ((2 * plane / world, 6 * plane / world), (2 * side, 4 * side), False, 10 * n * d),
        # rhs twice, its gradient once more round; memory: two blocks of rhs, four of gradients
        RING: ((2 * plane / world, 6 * plane / world), (2 * side, 6 * side + 4 * own), True, 20 * own),
        # logits, their softmax and its gradient, twice
        "open_clip, default": ((2 * plane, 4 * plane), (4 * side, 0), False, 6 * 2 * n * n),
        "open_clip, local_loss + gather_with_grad": (
            (4 * plane / world, 8 * plane / world),
            (4 * side, 4 * side),
            False,
            6 * 2 * n * n / world,
        ),
        # each direction: a pass of 2, gradients of 4 and 4; everything is cast to float32 first, so that 4 bytes travel: keys
        # twice, their gradient once more round. Memory: both directions' two sides, four blocks of keys, eight of gradients
        INF_CL: (
            (4 * plane / world, 16 * plane / world),
            (8 * side, 16 * side + 8 * own),
            True,
            64 * own,
        ),
    }
    flops, sent, overlapped, memory = forms[method]
    rate = MODEL_FLOPS / 2 if method == INF_CL else MODEL_FLOPS  # its products are TF32
    compute, travel = [f / rate for f in flops], [b / MODEL_BANDWIDTH for b in sent]
    join = max if overlapped else sum
    return {
        "method": method,
        "world": world,
        "flops": sum(flops),
        "sent_bytes": sum(sent),
        "memory_bytes": memory,
        "compute_s": sum(compute),
        "communication_s": sum(travel),
        "seconds": sum(join(pair) for pair in zip(compute, travel, strict=True)),
    }


MODELLED = (
    "process_group, all_gather",
    RING,
    "open_clip, default",
    "open_clip, local_loss + gather_with_grad",
    INF_CL,
)


def table(result: dict) -> str:
    lines = [
        f"Counted, largest over ranks: N = {N:,}, D = {D}, float32, forward and backward, gloo",
        "",
        "| per rank | world | FLOPs, x N²D/world | sent, MB | extra memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for r in result["measured"]:
        units, mb = r["flops"] * r["world"] / (N * N * D), r["sent_bytes"] / 1e6
        lines.append(f"| {r['method']} | {r['world']} | {units:.1f} | {mb:.1f} | {r['extra_mib']:.0f} |")
    lines += [
        "",
        f"Model, not measured: N = 4M, D = {MODEL_D}, bfloat16, {MODEL_FLOPS / 1e12:.0f} TFLOP/s and "
        f"{MODEL_BANDWIDTH / 1e9:.0f} GB/s a GPU; seconds = compute + communication, for a ring the larger of both in each pass; "
        "inf-cl, which casts to float32, at half the rate (TF32)",
        "",
        "| per GPU | GPUs | FLOPs, x N²D/GPUs | sent, GB | memory, GB | compute, s | communication, s | a step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["model"]:
        if r["world"] in (64, 256, 1024):
            lines.append(
                f"| {r['method']} | {r['world']:,} | {r['flops'] * r['world'] / (MODEL_N**2 * MODEL_D):.0f} | "
                f"{r['sent_bytes'] / 1e9:.3g} | {r['memory_bytes'] / 1e9:.3g} | {r['compute_s']:.3g} | "
                f"{r['communication_s']:.3g} | {r['seconds']:.3g} |"
            )
    lines += [
        "",
        f"A ring's sends hide behind products while a GPU holds more than rate / bandwidth = {ROWS_THAT_HIDE:,.0f} rows, here up "
        f"to {MODEL_N / ROWS_THAT_HIDE:.0f} GPUs.",
        "It sends 8 bytes a number of a side; all_gather sends 6 and hides none. So the ring is faster, and smaller, down to a",
        f"quarter of those rows ({4 * MODEL_N / ROWS_THAT_HIDE:,.0f} GPUs); all_gather where a GPU holds fewer, or where latency",
        "counts, which the model does not know: a ring waits for it at each step.",
    ]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#0b6e4f", "#3fa34d", "#b23a48", "#e07a5f", "#5b6c8f"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 4.6), layout="constrained")
    shown = [r for r in result["measured"] if r["world"] == WORLDS[-1]]
    places = range(len(shown))
    left.barh(places, [r["flops"] / 1e9 for r in shown], color="#0b6e4f")
    for place, r in zip(places, shown, strict=True):
        note = f" {r['flops'] / 1e9:.0f} GFLOP, {r['sent_bytes'] / 1e6:.0f} MB sent, {r['extra_mib']:.0f} MiB"
        left.annotate(note, (r["flops"] / 1e9, place), va="center", fontsize=8)
    left.set_yticks(places, [r["method"].replace(", local", ",\nlocal") for r in shown], fontsize=8)
    left.invert_yaxis()
    left.set(
        title=f"Counted on each of {WORLDS[-1]} gloo ranks, N = {N:,}, D = {D}",
        xlabel="GFLOP of matrix products, forward + backward",
        xlim=(0, 1.75 * max(r["flops"] for r in shown) / 1e9),
    )
    for method, colour in zip(MODELLED, colours, strict=True):
        rows = [r for r in result["model"] if r["method"] == method]
        right.plot([r["world"] for r in rows], [r["seconds"] for r in rows], "o-", ms=3, color=colour, label=method)
    rows = [r for r in result["model"] if r["method"] == RING]
    right.plot(
        [r["world"] for r in rows],
        [r["communication_s"] for r in rows],
        ":",
        color="grey",
        label="the ring's communication",
    )
    right.axvline(MODEL_N / ROWS_THAT_HIDE, color="grey", lw=0.8, ls="--")
    right.annotate(
        f"{ROWS_THAT_HIDE:,.0f} rows a GPU\n(rate / bandwidth): \ncommunication \novertakes compute ",
        (MODEL_N / ROWS_THAT_HIDE, 25),
        fontsize=8,
        ha="right",
    )
    right.set(
        xscale="log",
        yscale="log",
        title=f"Model, not measured: N = 4M, D = {MODEL_D}, bfloat16,\n"
        f"{MODEL_FLOPS / 1e12:.0f} TFLOP/s and {MODEL_BANDWIDTH / 1e9:.0f} GB/s a GPU",
        xlabel="GPUs",
        ylabel="seconds a step (loss alone)",
    )
    right.set_xticks(MODEL_WORLDS, [str(w) for w in MODEL_WORLDS])
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--figure", action="store_true", help="model and draw with the measured figures of the result file"
    )
    arguments = parser.parse_args()
    path = RESULTS / "distributed.json"
    if arguments.figure:
        result = json.loads(path.read_text())
    else:
        work = [(method, world) for world in WORLDS for method in METHODS]
        result = {
            "date": datetime.date.today().isoformat(),
            "gcl_kernels": __version__,
            "machine": machine(),
            "measured": [measure(method, world) for method, world in tqdm(work, unit="figure")],
        }
    result["assumed"] = {"n": MODEL_N, "d": MODEL_D, "flops_a_second": MODEL_FLOPS, "bytes_a_second": MODEL_BANDWIDTH}
    result["model"] = [model(method, world) for method in MODELLED for world in MODEL_WORLDS]
    write_json_atomically(path, result, indent=1)
    draw(result, RESULTS / "distributed.png")
    (RESULTS / "distributed.txt").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
