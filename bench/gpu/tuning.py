"""The fastest tile of each kernel: the search space, compiled, timed, and written as the configuration table writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from bench.gpu.context import Context, Result, median, timed

# What is tuned. The sigmoid's tiles are the forward kernel with another epilogue: the table gives them the forward's tile.
KERNELS = ("forward_tile", "backward_tile", "sigmoid_tile")

# The search space: (rows, columns, warps), pipeline stages, and for the backward its epilogue whole or in halves. Tiles of which
# two blocks fit with 128 registers a thread are also held to these. Bands of the finalists are then tried in two other heights.
SHAPES = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
STAGES = (3, 4)
GROUPS = (4, 16)
TOY_SHAPES, TOY_STAGES = ((128, 128, 8),), (3,)


def candidates(context: Context) -> list[tuple[str, Any]]:
    """(kernel, tile) of the search space."""
    from gcl_kernels.backends.triton.config import TileShape

    shapes, stages = (TOY_SHAPES, TOY_STAGES) if context.dry_run else (SHAPES, STAGES)
    halves_or_whole = (True,) if context.dry_run else (False, True)
    can_limit = family(context).target[0] == "cuda" and not context.dry_run
    found = []
    for rows, cols, warps in shapes:
        two_fit = can_limit and (rows, cols, warps) == (128, 128, 8)
        for n_stages, maxnreg in product(stages, (None, 128) if two_fit else (None,)):
            plain = TileShape(rows, cols, 64, warps, n_stages, maxnreg=maxnreg)
            found += [("forward_tile", plain), ("sigmoid_tile", plain)]
            found += [("backward_tile", replace(plain, halves=halves)) for halves in halves_or_whole]
    return found


def family(context: Context):
    import torch

    from gcl_kernels import backends
    from gcl_kernels.backends.triton.config import FAMILIES, family_of

    return FAMILIES["sm_90" if context.dry_run else family_of(backends.architecture(torch.device("cuda")))]


def screen(context: Context) -> None:
    """Compiles the whole space ahead of time, on every core."""
    from concurrent.futures import ProcessPoolExecutor

    space, chip = candidates(context), family(context)
    result: Result = {"family": chip.name, "candidates": []}
    jobs = [(chip.name, kernel, tile, context.sizes.screened_d) for kernel, tile in space]
    with ProcessPoolExecutor(2 if context.dry_run else os.cpu_count()) as pool:
        for (kernel, tile), report in zip(space, pool.map(compiled, jobs), strict=True):
            result["candidates"].append({"kernel": kernel, "tile": asdict(tile), **report})
            print(kernel, literal(tile), report, flush=True)
            context.save(result)


def compiled(job: tuple[str, str, Any, int]) -> Result:
    """What a candidate compiles to; `complaints` is why it is out."""
    import torch

    from bench import aot
    from gcl_kernels.backends.triton.config import FAMILIES, everywhere

    family_name, kernel, tile, d = job
    chip = FAMILIES[family_name]
    descriptors = chip.config(torch.bfloat16, d, "ieee").descriptors
    kernel, variant = ("forward_tile", "sigmoid stored") if kernel == "sigmoid_tile" else (kernel, "")
    case = aot.Case(replace(chip, half=everywhere(tile, descriptors)), kernel, torch.bfloat16, d, variant)
    try:
        report = aot.inspect(case)
    except Exception as error:  # a candidate that the compiler refuses is out, and says why
        return {"complaints": [f"{type(error).__name__}: {str(error)[-300:]}"]}
    usage = {name: getattr(report, name) for name in ("registers", "stack", "spills", "shared")}
    return {**usage, "instructions": dict(report.instructions), "complaints": report.complaints()}


def tune(context: Context) -> None:
    """The fastest tile of each kernel at each D: all at one N; the best, in bands of other heights too, at a larger one."""
    import torch

    from gcl_kernels.backends.triton.config import TileShape

    chip, sizes = family(context), context.sizes
    screened = context.result_of("screen").get("candidates", [])
    fitting = [c for c in screened if not c["complaints"]]
    result: Result = {"times": [], "chosen": {}}
    for d in sizes.dimensions:
        default = chip.config(torch.bfloat16, d, "ieee")
        chosen = {}
        for kernel in KERNELS:
            space = [TileShape(**c["tile"]) for c in fitting if c["kernel"] == kernel]
            space = list(dict.fromkeys([default.tile(kernel == "backward_tile", masked=False), *space]))

            def times(
                tiles: Iterable[TileShape], n: int, d=d, kernel=kernel, default=default
            ) -> list[tuple[float, TileShape]]:
                problem, rows = TileProblem.of(n, d, context.device, default), []
                for tile in tiles:
                    row = {
                        "kernel": kernel,
                        "n": n,
                        "d": d,
                        "tile": asdict(tile),
                        **problem.try_tile(kernel, tile, context),
                    }
                    result["times"].append(row)
                    context.save(result)
                    seconds = row.get("median_seconds")
                    print(kernel, n, d, literal(tile), row.get("reason", f"{1e3 * (seconds or 0):.3f} ms"), flush=True)
                    if seconds is not None:
                        rows.append((seconds, tile))
                return sorted(rows, key=lambda row: row[0])

            best = [tile for _, tile in times(space, sizes.first_n)[: sizes.finalists]]
            best += [replace(tile, group=group) for tile in best[:1] for group in GROUPS]
            ranked = times(best, sizes.last_n)
            if ranked:
                chosen[kernel] = asdict(ranked[0][1])
        result["chosen"][str(d)] = chosen
        context.save(result)
        (context.out / "tuning.txt").write_text(table(chip, result["chosen"]) + remarks(result))
    result["whole_step"] = whole_step(context, chip, result["chosen"])
    context.save(result)


@dataclass
class TileProblem:
    """Inputs, and the default configuration's results, which every other forward must repeat. Times are of CUDA graph replays:
    a host takes longer than the tile kernels of a small problem."""

    inputs: tuple[Any, Any, Any]
    default: Any
    statistics: Any

    @classmethod
    def of(cls, n: int, d: int, device: str, default) -> TileProblem:
        import torch

        from bench import passes
        from gcl_kernels.backends import settings

        unit = torch.nn.functional.normalize
        x, y = (unit(torch.randn(n, d, device=device)).to(torch.bfloat16) for _ in range(2))
        inputs = x, y, torch.tensor(100 / 7, device=device)
        with settings(config=default):
            return cls(inputs, default, passes.forward("triton", inputs))

    def try_tile(self, kernel: str, tile, context: Context) -> Result:
        """Times, or the reason that there are none. The backward is asked for no product: what is left is its tile kernel."""
        from bench import passes
        from gcl_kernels.backends import settings
        from gcl_kernels.backends.triton.config import Config

        config = Config(tile, tile, tile, tile, self.default.descriptors)
        forward = lambda: passes.forward("triton", self.inputs)  # noqa: E731
        work = {
            "forward_tile": forward,
            "backward_tile": lambda: passes.backward_tiles("triton", self.inputs, self.statistics),
            "sigmoid_tile": lambda: passes.sigmoid_tiles(self.inputs),
        }[kernel]
        try:
            with settings(config=config):
                if kernel == "forward_tile":
                    off = max(float((a - b).abs().max()) for a, b in zip(forward(), self.statistics, strict=True))
                    if not off < 1e-3:
                        return {"reason": f"its results are off by {off:.3g}"}
                seconds = timed(work, context, 20, graph=True)
        except Exception as error:  # out of resources, most likely: the next candidate may fit
            return {"reason": f"{type(error).__name__}: {str(error)[-300:]}"}
        return {"seconds": seconds, "median_seconds": median(seconds)}


def whole_step(context: Context, chip, chosen: Result) -> Result:
    """ClipLoss, forward and backward, with the table's configuration and with the tuned one."""
    import torch

    from bench import passes
    from gcl_kernels import ClipLoss

    d = 768 if 768 in context.sizes.dimensions else context.sizes.dimensions[0]
    n = context.sizes.last_n
    default = chip.config(torch.bfloat16, d, "ieee")
    tuned = with_chosen(default, chosen[str(d)])
    x, y, scale = TileProblem.of(n, d, context.device, default).inputs
    inputs = [v.requires_grad_() for v in (x, y, scale)]
    result: Result = {"n": n, "d": d}
    for name, config in (("table", default), ("tuned", tuned)):
        with passes.triton_configured(config):
            result[name] = timed(
                lambda: torch.autograd.grad(ClipLoss()(inputs[0], inputs[1], inputs[2]), inputs), context
            )
    print(f"whole step, N = {n:,}, D = {d}:", {k: f"{1e3 * median(result[k]):.2f} ms" for k in ("table", "tuned")})
    return result


def remarks(result: Result) -> str:
    """What the table cannot say, as comments: the sigmoid's fastest tile where it is not the forward's."""
    lines = []
    for d, chosen in result["chosen"].items():
        best, forward = chosen.get("sigmoid_tile"), chosen.get("forward_tile")
        if best is None or best == forward:
            continue
        n = max(row["n"] for row in result["times"])
        times = {
            literal(row["tile"]): row["median_seconds"]
            for row in result["times"]
            if (row["kernel"], row["n"], row["d"]) == ("sigmoid_tile", n, int(d)) and "median_seconds" in row
        }
        beside = times.get(literal(forward)) if forward else None
        gain = f", {beside / times[literal(best)]:.2f}x as fast as with the forward's" if beside else ""
        lines.append(f"# sigmoid at D = {d}: {literal(best)}{gain}")
    return "".join(f"{line}\n" for line in lines)


def with_chosen(default, chosen: Result):
    from gcl_kernels.backends.triton.config import TileShape

    named = {"forward": chosen.get("forward_tile"), "backward": chosen.get("backward_tile")}
    return replace(default, **{name: TileShape(**tile) for name, tile in named.items() if tile})


def table(chip, chosen: Result) -> str:
    """Text for `FAMILIES` in gcl_kernels/backends/triton/config.py: bands that got the same choice are one."""
    import torch

    bands: list[tuple[int, Any]] = []
    for d in sorted(map(int, chosen)):
        config = with_chosen(chip.config(torch.bfloat16, d, "ieee"), chosen[str(d)])
        if bands and bands[-1][1] == config:
            bands.pop()
        bands.append((d, config))
    lines = [f"# {chip.name}: measured by bench.gpu; every time is in its summary.json", "half=("]
    for position, (d, config) in enumerate(bands):
        largest = "math.inf" if position == len(bands) - 1 else str(d)
        tiles = ", ".join(
            literal(t) for t in (config.forward, config.backward, config.masked_forward, config.masked_backward)
        )
        storing = f", {literal(config.storing)}" if config.storing else ""
        lines.append(f"    ({largest}, Config({tiles}, {config.descriptors}{storing})),")
    return "\n".join([*lines, "),", ""])


def literal(tile) -> str:
    """The tile, or its fields, as it is written in the configuration table."""
    if isinstance(tile, dict):
        from gcl_kernels.backends.triton.config import TileShape

        tile = TileShape(**tile)
    optional = [f"group={tile.group}"] * (tile.group != 8) + ["halves=True"] * tile.halves
    optional += ["one_exponential=False"] * (not tile.one_exponential)
    optional += [f"maxnreg={tile.maxnreg}"] * (tile.maxnreg is not None)
    return f"TileShape({', '.join([*map(str, (tile.rows, tile.cols, tile.d, tile.warps, tile.stages)), *optional])})"
