"""What a contrastive loss over many ranks costs each of them: FLOPs, bytes sent, memory.

`python -m bench.distributed` counts on gloo groups of 2 to 4 processes here, models up to 1,024 GPUs (`distributed_model`),
writes `bench/results/distributed.json` and `.txt` and draws `distributed.png`; `--figure` does all but measure.

Counted, not timed: matrix products by a dispatch mode; bytes at the calls of torch.distributed (a gathering sends each rank's
part world - 1 times, as its ring algorithm does); messages, likewise; peak resident memory over the inputs, each rank a fresh
process.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from bench.cases import Case, build
from bench.distributed_model import (
    MODEL_D,
    MODEL_N,
    MODEL_WORLDS,
    MODELLED,
    PUBLISHED,
    RATES,
    RING,
    SIGMOID_GATHER,
    SIGMOID_RING,
    beside_published,
    model,
)
from bench.measure import FREED_IS_FREED, machine
from gcl_kernels import ClipLoss, SigLipLoss, __version__, gcl_loss
from gcl_kernels.training.files import write_json_atomically
from gcl_kernels.training.memory import peak_resident_memory, reset_peak_resident_memory, resident_memory
from gcl_kernels.training.openclip import import_open_clip
from gcl_kernels.types import Transport

RESULTS = Path(__file__).parent / "results"
N, D = 3072, 256
WORLDS = (2, 3, 4)


def ours(transport: Transport) -> Callable[..., Any]:
    return lambda rank, world: (
        lambda x, y, scale: gcl_loss(x, y, scale, process_group=dist.group.WORLD, transport=transport)
    )


def sigmoid(rank: int, world: int, dist_impl: str) -> Callable[..., Any]:
    loss = SigLipLoss(rank=rank, world_size=world, dist_impl=dist_impl)
    return lambda x, y, scale: loss(x, y, scale, -10.0)


def open_clip(**flags: bool) -> Callable[..., Any]:
    return lambda rank, world: import_open_clip().ClipLoss(rank=rank, world_size=world, **flags)


METHODS: dict[str, Callable[..., Any]] = {
    "process_group, all_gather": ours("all_gather"),
    RING: ours("ring"),
    SIGMOID_GATHER: lambda rank, world: sigmoid(rank, world, "gather"),
    SIGMOID_RING: lambda rank, world: sigmoid(rank, world, "bidir"),
    "our ClipLoss, default": lambda rank, world: ClipLoss(rank=rank, world_size=world),
    "open_clip, default": open_clip(),
    "open_clip, local_loss + gather_with_grad": open_clip(local_loss=True, gather_with_grad=True),
}


# ---- counting


class Products(TorchDispatchMode):
    """FLOPs of matrix products, those inside our own operators too."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gcl_kernels":  # a mode is off within its own call
            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.mkldnn._linear_pointwise:
            x, weight = args[:2]
            self.flops += 2 * x.shape[0] * x.shape[1] * weight.shape[0]
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_sends(group: Any = None) -> Iterator[dict[str, dict[str, int]]]:
    """While inside, {call of torch.distributed: {bytes, messages} this rank sends}, filled as the calls are made.

    A gathering is W - 1 messages of the rank's part, an exchange one to each other rank, a send one.
    """
    sent: dict[str, dict[str, int]] = {}
    others, rank = dist.get_world_size(group) - 1, dist.get_rank(group)

    def gathered(got: Any, x: Tensor, *_: Any, **__: Any) -> tuple[int, int]:
        return others * x.nbytes, others

    def exchanged(got: Tensor, x: Tensor, to: Any, splits: list[int], **_: Any) -> tuple[int, int]:
        return (sum(splits) - splits[rank]) * x.element_size(), others

    def passed(ops: Any) -> tuple[int, int]:
        sends = [op.tensor.nbytes for op in ops if op.op is dist.isend]
        return sum(sends), len(sends)

    def scattered(x: Tensor, parts: Any = None, src: int = 0, **_: Any) -> tuple[int, int]:
        return (others * x.nbytes, others) if src == rank else (0, 0)

    sizes = {
        "all_gather_single": gathered,
        "all_gather_into_tensor": gathered,
        "all_gather": gathered,
        "all_to_all_single": exchanged,
        "batch_isend_irecv": passed,
        "scatter": scattered,
    }

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            size, messages = sizes[name](*args, **kwargs)
            of_call = sent.setdefault(name, {"bytes": 0, "messages": 0})
            of_call["bytes"] += size
            of_call["messages"] += messages
            return call(*args, **kwargs)

        return run

    calls = {name: getattr(dist, name) for name in sizes if hasattr(dist, name)}
    for name, call in calls.items():
        setattr(dist, name, counting(name, call))
    try:
        yield sent
    finally:
        for name, call in calls.items():
            setattr(dist, name, call)


def measured_on_rank(rank: int, world: int, path: str, method: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    loss = METHODS[method](rank, world)

    def part(n: int) -> list[Tensor]:
        rows = slice(rank * n // world, (rank + 1) * n // world)
        x, y, scale = build(Case("cpu", "fp32", n, n, D, logit_scale=100 / 7)).leaves
        return [x.detach()[rows].clone().requires_grad_(), y.detach()[rows].clone().requires_grad_(), scale]

    loss(*part(24 * world)).backward()  # libraries and connections are there
    inputs = part(N)
    dist.barrier()
    before = resident_memory()
    reset_peak_resident_memory()
    with Products() as products, counted_sends() as sent:
        loss(*inputs).backward()
    extra = (peak_resident_memory() - before) / 2**20
    totals = {f"sent_{what}": sum(call[what] for call in sent.values()) for what in ("bytes", "messages")}
    results.put({"flops": products.flops, **totals, "calls": sent, "extra_mib": extra})
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
    figures = ("flops", "sent_bytes", "sent_messages", "extra_mib")
    largest: dict[str, Any] = {key: max(r[key] for r in got) for key in figures}
    return {"method": method, "world": world, "n": N, "d": D, **largest, "calls": got[0]["calls"]}


# ---- what is written


def table(result: dict) -> str:
    lines = [
        f"Counted, largest over ranks: N = {N:,}, D = {D}, float32, forward and backward, gloo",
        "",
        "| per rank | world | FLOPs, x N²D/world | sent, MB | messages | extra memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["measured"]:
        units, mb = r["flops"] * r["world"] / (N * N * D), r["sent_bytes"] / 1e6
        lines.append(
            f"| {r['method']} | {r['world']} | {units:.1f} | {mb:.1f} | {r['sent_messages']} | {r['extra_mib']:.0f} |"
        )
    lines += [
        "",
        f"Model, not measured: N = 4M, D = {MODEL_D}, bfloat16, {RATES.text()}. No GPU has run this. Compute and communication "
        "add up, except that a ring's sends hide behind the products of the same step; its last block of gradients hides behind "
        "nothing. inf-cl casts to float32 and computes at half the rate (TF32).",
        "",
        "| per GPU | GPUs | FLOPs, x N²D/GPUs | sent, GB | messages | memory, GB | compute, s | communication, s | a step, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["model"]:
        if r["world"] in (64, 256, 1024):
            lines.append(
                f"| {r['method']} | {r['world']:,} | {r['flops'] * r['world'] / (MODEL_N**2 * MODEL_D):.0f} | "
                f"{r['sent_bytes'] / 1e9:.3g} | {r['messages']:,} | {r['memory_bytes'] / 1e9:.3g} | {r['compute_s']:.3g} | "
                f"{r['communication_s']:.3g} | {r['seconds']:.3g} |"
            )
    rows = RATES.rows_that_hide
    lines += [
        "",
        f"A step of a softmax's ring is hidden while a GPU holds more than flops / bandwidth = {rows:,.0f} rows, here up to "
        f"{MODEL_N / rows:.0f} GPUs.",
        "The softmax's ring sends 8 bytes a number of a side, the sigmoid's 6, as all_gather does for both. A ring waits for the",
        "latency of each of its messages, which the model does not know: it counts them.",
        "",
        f"Published by others beside the model: {PUBLISHED['from']}.",
        "",
        "| GPUs | siglip-kernel, published, ms | our sigmoid's ring, model, ms | all_gather, model, ms | link assumed |",
        "|---|---|---|---|---|",
    ]
    for r in result["beside_published"]:
        lines.append(
            f"| {r['world']} | {r['published_ms']} | {r['ring_ms']:.1f} | {r['all_gather_ms']:.1f} | {r['link'] or 'none'} |"
        )
    lines += ["", PUBLISHED["caution"], "", PUBLISHED["inf-cl"]]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#0b6e4f", "#3fa34d", "#1f78b4", "#7fb7de", "#b23a48", "#e07a5f", "#5b6c8f"]
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
        label="the softmax ring's communication",
    )
    right.axvline(MODEL_N / RATES.rows_that_hide, color="grey", lw=0.8, ls="--")
    right.annotate(
        f"{RATES.rows_that_hide:,.0f} rows a GPU\n(rate / bandwidth): \ncommunication \novertakes compute ",
        (MODEL_N / RATES.rows_that_hide, 25),
        fontsize=8,
        ha="right",
    )
    right.set(
        xscale="log",
        yscale="log",
        title=f"Model, not measured: N = 4M, D = {MODEL_D}, bfloat16,\n"
        f"{RATES.flops / 1e12:.0f} TFLOP/s and {RATES.bandwidth / 1e9:.0f} GB/s ({RATES.link}) a GPU",
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
    result["assumed"] = {"n": MODEL_N, "d": MODEL_D, **RATES._asdict()}
    result["model"] = [model(method, world) for method in MODELLED for world in MODEL_WORLDS]
    result["beside_published"] = beside_published()
    write_json_atomically(path, result, indent=1)
    draw(result, RESULTS / "distributed.png")
    (RESULTS / "distributed.txt").write_text(table(result) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
