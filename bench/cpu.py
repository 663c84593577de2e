"""Speed and memory of ClipLoss on the CPU beside ``open_clip.ClipLoss``: float32, forward and backward, 2 threads.

``python -m bench.cpu`` measures, writes ``bench/results/cpu.json``, draws ``bench/results/cpu.png`` from it and puts its table
into the README; ``python -m bench.cpu --figure`` does all but measure. Speeds are ratios within one run: both losses take
turns in one process, and the matrix-product rate is measured around them. Peak memory is read in fresh processes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from bench.measure import (
    burst,
    embeddings,
    gemm,
    in_fresh_process,
    interleaved,
    machine,
    median_ratio,
    memory_mib,
    reset_peak,
    step,
)
from gcl_kernels import ClipLoss, __version__
from gcl_kernels.backends import gradient_in_one_pass

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: bench.cpu -->", "<!-- end figures -->"
D = 512
SMALL = (256, 512, 1024, 2048, 4096)
LARGE = (8192, 16384)
ALONE = (32768, 65536)  # dense logits take 4 to 17 GB a copy there, several copies
DENSE_MEMORY = (1024, 4096, 8192, 16384)


def open_clip_loss():
    from gcl_kernels.training.openclip import import_open_clip

    return import_open_clip().ClipLoss()


LOSSES = {"ours": ClipLoss, "open_clip": open_clip_loss}


def time_row(n: int, peers: bool) -> dict:
    """Ratios are medians over turns: in each turn ours, the peer and a matrix product run one after the other."""
    inputs = embeddings(n, D)
    flops = 8 * n * n * D
    tasks = {"gemm": gemm(max(2e9, min(flops / 4, 1e12)), D)}
    for name, make in LOSSES.items():
        if peers or name == "ours":
            loss = make()
            tasks[name] = (
                (lambda loss=loss: step(loss, inputs)) if n >= 4096 else lambda loss=loss: burst(loss, inputs, 5)
            )
    turns = 1 if not peers else 5 if n >= 4096 else 31
    times = interleaved(tasks, turns) if peers else {name: [task()] for name, task in tasks.items()}
    per_flop = times.pop("gemm")
    row = {"n": n, "d": D, "turns": turns, "gemm_gflops": 1e-9 / statistics.median(per_flop), "seconds": times}
    row["fraction_of_gemm"] = median_ratio([flops * t for t in per_flop], times["ours"])
    if peers:
        row["speedup"] = median_ratio(times["open_clip"], times["ours"])
    return row


def memory_row(name: str, n: int) -> dict:
    extra, peak = json.loads(in_fresh_process("bench.cpu", "--memory-of", name, str(n)))
    return {"n": n, "d": D, "loss": name, "extra_mib": extra, "peak_mib": peak}


def memory_of(name: str, n: int) -> None:
    """Prints [peak MiB over what inputs and gradients need, peak resident MiB] of a step in this process."""
    loss = LOSSES[name]()
    step(loss, embeddings(64, D))  # libraries and threads are there
    before = memory_mib("VmRSS")
    inputs = embeddings(n, D)
    inputs_and_gradients = 4 * 4 * n * D / 2**20
    reset_peak()
    loss(*inputs).backward()
    peak = memory_mib("VmHWM")
    print(json.dumps([peak - before - inputs_and_gradients, peak]))


def measure() -> dict:
    result = {
        "date": datetime.date.today().isoformat(),
        "gcl_kernels": __version__,
        "machine": machine(),
        "dtype": "float32",
        "pass": "forward + backward",
        "time": [],
        "memory": [],
    }
    work = [("time", lambda n=n: time_row(n, n not in ALONE)) for n in (*SMALL, *LARGE, *ALONE)]
    work += [("memory", lambda n=n: memory_row("ours", n)) for n in (1024, 4096, *LARGE, *ALONE)]
    work += [("memory", lambda n=n: memory_row("open_clip", n)) for n in DENSE_MEMORY]
    for kind, figure in tqdm(work, unit="figure"):
        row = figure()
        result[kind].append(row)
        tqdm.write(json.dumps({k: v for k, v in row.items() if k != "seconds"}))
    return result


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"ours": "gcl_kernels.ClipLoss", "open_clip": "open_clip.ClipLoss"}
    colours = {"ours": "#0b6e4f", "open_clip": "#b23a48"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name in names:
        rows = [r for r in result["memory"] if r["loss"] == name]
        left.plot([r["n"] for r in rows], [r["extra_mib"] for r in rows], "o-", color=colours[name], label=names[name])
        timed = [r for r in result["time"] if name in r["seconds"]]
        right.plot(
            [r["n"] for r in timed],
            [statistics.median(r["seconds"][name]) for r in timed],
            "o-",
            color=colours[name],
            label=names[name],
        )
    left.set(title="Extra peak memory over inputs and gradients", ylabel="MiB")
    right.set(title="Time of one forward + backward", ylabel="seconds")
    n = [r["n"] for r in result["time"]]
    floor = [8 * k * k * D / (1e9 * max(r["gemm_gflops"] for r in result["time"])) for k in n]
    right.plot(n, floor, ":", color="grey", label="8 N²D at this machine's GEMM rate (model)")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="batch size N")
        ticks = [256, 1024, 4096, 16384, 65536]
        axes.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks], minor=False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    about = result["machine"]
    figure.suptitle(
        f"Measured: D = {D}, float32, {about['threads']} threads of {about['cpu']}, torch {about['torch']}", fontsize=10
    )
    figure.savefig(path, dpi=150)


def table(result: dict) -> str:
    """The README's figures as Markdown."""
    about = result["machine"]
    lines = [
        f"Measured on {result['date']}: {about['cpu']}, {about['threads']} threads ({about['capability']}), "
        f"torch {about['torch']}; "
        f"D = {D}, float32, forward and backward, median times, and ratios as medians over turns of "
        "[cpu.json](bench/results/cpu.json): in a turn both losses and a matrix product run one after the other, in one process, "
        "below N = 4,096 each loss for five steps after one that is not counted. "
        "GEMM rate: that float32 product's, counting 8 N² D for the loss.",
        "",
        "| N | ours | `open_clip.ClipLoss` | faster | of the GEMM rate | extra memory, ours | `open_clip` |",
        "|---|---|---|---|---|---|---|",
    ]
    extra = {(r["loss"], r["n"]): f"{r['extra_mib']:,.0f} MiB" for r in result["memory"]}
    for row in result["time"]:
        n, seconds = row["n"], {name: statistics.median(t) for name, t in row["seconds"].items()}
        dense = f"{seconds['open_clip']:.3g} s" if "open_clip" in seconds else "not run"
        faster = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        memory = [extra.get((name, n), "") for name in ("ours", "open_clip")]
        keeps = gradient_in_one_pass("torch", n, n, both=True, device=torch.device("cpu"), dtype=torch.float32)
        fraction = f"({row['fraction_of_gemm']:.0%})" if keeps else f"{row['fraction_of_gemm']:.0%}"
        lines.append(
            f"| {n:,} | {seconds['ours']:.3g} s | {dense} | {faster} | {fraction} | {memory[0]} | {memory[1]} |"
        )
    lines += [
        "",
        "In brackets: the step keeps exponentials from one pass to the next, as many as the workspace budget holds, so that it "
        "does between 6 N² D (all) and 8 N² D, and 8 N² D flatters it. "
        "Extra memory is the peak over inputs and their gradients, each in a fresh process.",
    ]
    return "\n".join(lines)


def write_readme(result: dict) -> None:
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", action="store_true", help="draw the figure from the result file and stop")
    parser.add_argument("--memory-of", nargs=2, metavar=("LOSS", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory_of:
        memory_of(arguments.memory_of[0], int(arguments.memory_of[1]))
        return
    RESULTS.mkdir(exist_ok=True)
    if not arguments.figure:
        (RESULTS / "cpu.json").write_text(json.dumps(measure(), indent=1) + "\n")
    result = json.loads((RESULTS / "cpu.json").read_text())
    draw(result, RESULTS / "cpu.png")
    write_readme(result)
    print(f"{table(result)}\n\nfigures: {RESULTS / 'cpu.json'}, {RESULTS / 'cpu.png'}")


if __name__ == "__main__":
    main()
