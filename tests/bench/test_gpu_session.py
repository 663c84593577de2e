"""The GPU queue: a dry run of all of it, and its parts where they meet what a CPU lacks."""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench import cases
from bench.gpu import __main__ as command
from bench.gpu import cells, interpreter, queue, report, tuning
from bench.gpu import steps as gpu_steps
from bench.gpu.context import TOY, Context
from bench.gpu.predictions import predicted
from bench.gpu.targets import targets, targets_table
from bench.roofline import device_seconds, ours
from gcl_kernels.backends.triton.config import FAMILIES, Config, TileShape
from gcl_kernels.chips import CHIPS
from gcl_kernels.plan import Sizes as PlanSizes


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("session")
    queue.session(out, dry_run=True, limit=500)
    return out, json.loads((out / "summary.json").read_text())


def test_every_step_runs(dry):
    out, summary = dry
    steps = summary["steps"]
    log = (out / "log.txt").read_text()
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(gpu_steps.STEPS, "ok"), log[-5000:]
    assert all(f"=== {name}: ok" in log for name in steps)
    result = {name: step["result"] for name, step in steps.items()}
    assert all(p["model"].startswith("A model") for p in result["machine"]["predictions"])
    assert result["ceilings"]["gemm"]["tflops"] > 0
    assert result["ceilings"]["gemm_fp32"]["tflops"] > 0
    assert result["tests"]["passed"]
    assert "passed" in result["tests"]["last_line"]
    assert {c["kernel"] for c in result["screen"]["candidates"]} == set(tuning.KERNELS)
    assert all(c["registers"] > 0 and not c["complaints"] for c in result["screen"]["candidates"])
    assert all(c["instructions"]["ex2"] > 0 for c in result["screen"]["candidates"])
    assert all("reason" not in row for row in result["tune"]["times"])
    assert set(result["tune"]["chosen"]["32"]) == set(tuning.KERNELS)
    assert len(result["tune"]["whole_step"]["tuned"]) == 1
    assert {row["rows"] for row in result["chunks"]["products"]} >= set(TOY.chunk_rows)
    assert result["ncu"]


def test_every_loss_is_sane(dry):
    _, summary = dry
    losses = summary["steps"]["sanity"]["result"]["losses"]
    assert len(losses) == 15
    for name, row in losses.items():
        assert max(row["errors"]) < (1e-4 if name.endswith("float32") else 2e-2), name


def test_a_peer_that_does_not_run_says_why(dry):
    """On a CPU: the two that need a GPU, beside ours, of each loss."""
    out, _ = dry
    cells = {(c["loss"], c["peer"]): c for c in json.loads((out / "peers.json").read_text())["cells"]}
    assert cells["softmax", "ours"]["seconds"]
    assert cells["sigmoid", "ours"]["seconds"]
    assert cells["sigmoid", "open_clip"]["error"]["lhs"] < 1e-1
    for key in (("softmax", "memeff"), ("softmax", "liger"), ("sigmoid", "siglip_kernel")):
        assert cells[key]["reason"] == "unsupported device: cpu"
        assert cells[key]["seconds"] is None


def test_every_case_is_predicted_before_it_is_measured(dry):
    _, summary = dry
    predicted = {report.key_of(p) for p in summary["steps"]["machine"]["result"]["predictions"]}
    cases = [case for step in cells.CALLS for case in cells.cases(step)]
    assert {(c.n, c.d, c.dtype, c.loss, c.graph) for c in cases} == predicted
    assert {64, 256, 1024, 2048, 4096, 8192, 16_384, 65_536, 262_144, 2**20} == {c.n for c in cases}
    assert {c.graph for c in cases if c.n == 2048} == {True, False}
    assert {c.dtype for c in cases} == {"bf16", "fp32"}
    assert {c.loss for c in cases if (c.n, c.d) == (65_536, 768)} == {"softmax", "sigmoid"}


def test_few_small_files_come_back(dry):
    out, _ = dry
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "summary.json", "log.txt", "report.md", "tuning.txt", *(f"{step}.json" for step in cells.CALLS)
    }  # fmt: skip
    assert all(path.parent == out and path.stat().st_size < 2**24 for path in files)


def test_what_has_a_result_is_not_run_again(dry, monkeypatch):
    out, before = dry
    monkeypatch.setattr(queue, "run_step", lambda *_: pytest.fail("a step ran again"))
    assert queue.session(out, dry_run=True, limit=500) == before
    with pytest.raises(ValueError, match="--out: expected a folder of real runs"):
        queue.session(out, dry_run=False, limit=500)


def test_the_tuned_table_can_be_pasted(dry):
    out, summary = dry
    pasted = eval(
        f"dict({(out / 'tuning.txt').read_text().split(chr(10), 1)[1]})",
        {"Config": Config, "TileShape": TileShape, "math": math},
    )
    ((largest, config),) = pasted["half"]
    assert largest == math.inf
    chosen = summary["steps"]["tune"]["result"]["chosen"]["32"]
    assert config.forward == TileShape(**chosen["forward_tile"])
    assert config.backward == TileShape(**chosen["backward_tile"])
    default = FAMILIES["sm_90"].half[0][1]
    assert (config.masked_forward, config.masked_backward) == (default.masked_forward, default.masked_backward)


def test_a_limit_of_registers_is_tried_and_can_be_pasted():
    context = SimpleNamespace(dry_run=False, device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "family", lambda _: FAMILIES["sm_90"])
        limited = {(kernel, tile) for kernel, tile in tuning.candidates(context) if tile.maxnreg is not None}
        patch.setattr(tuning, "family", lambda _: FAMILIES["gfx942"])
        assert all(tile.maxnreg is None for _, tile in tuning.candidates(context))
    assert {kernel for kernel, _ in limited} == set(tuning.KERNELS)
    assert all((tile.rows, tile.cols, tile.warps, tile.maxnreg) == (128, 128, 8, 128) for _, tile in limited)
    tile = TileShape(128, 128, 64, 8, 3, maxnreg=128)
    assert eval(tuning.literal(tile), {"TileShape": TileShape}) == tile


def test_bands_with_the_same_choice_are_one():
    tile = {"rows": 128, "cols": 128, "d": 64, "warps": 4, "stages": 4, "group": 16, "halves": True}
    chosen = {d: {"forward_tile": tile, "backward_tile": tile} for d in ("512", "768", "1024")}
    text = tuning.table(FAMILIES["sm_90"], chosen)
    assert text.count("Config(") == 1
    assert "(math.inf, Config(TileShape(128, 128, 64, 4, 4, group=16, halves=True), " in text
    chosen["512"] = {}
    assert "    (512, Config(TileShape(128, 256, 64, 8, 4, halves=True), " in tuning.table(FAMILIES["sm_90"], chosen)


def test_a_step_over_its_limit_is_stopped_and_the_next_run_repeats_it(tmp_path, monkeypatch):
    entry = queue.run_step("machine", 0.2, tmp_path, dry_run=True)
    assert entry["status"].startswith("stopped after")
    assert entry["result"] == {}
    (tmp_path / "summary.json").write_text(json.dumps({"dry_run": True, "steps": {"machine": entry}}))
    ran = []
    monkeypatch.setattr(
        queue, "run_step", lambda name, *_: ran.append(name) or {"status": "ok", "seconds": 0, "result": {"a": 1}}
    )
    queue.session(tmp_path, dry_run=True, limit=500)
    assert ran[0] == "machine"
    queue.session(tmp_path, dry_run=True, limit=500)
    assert len(ran) == len(set(ran))


def test_no_step_starts_without_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue, "run_step", lambda *_: pytest.fail("a step was started"))
    queue.session(tmp_path, dry_run=True, limit=1)
    assert "machine: no time left" in capsys.readouterr().out


def tool(folder, name, script, monkeypatch):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


NCU_OUTPUT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_tile","gpu__time_duration.sum","us","512.5"
"0","7","forward_tile","dram__bytes.sum","Mbyte","1,024"
"1","7","backward_tile","gpu__time_duration.sum","us","600"
"2","7","forward_tile","gpu__time_duration.sum","us","700"
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            f"print({NCU_OUTPUT!r})",
            {"metrics": {
                "forward_tile": {"gpu__time_duration.sum": "512.5 us", "dram__bytes.sum": "1,024 Mbyte"},
                "backward_tile": {"gpu__time_duration.sum": "600 us"},
                "forward_tile, sigmoid": {"gpu__time_duration.sum": "700 us"},
            }},
        ),
        ("print('==ERROR== ERR_NVGPUCTRPERM'); raise SystemExit(9)", {"reason": "exit 9: ==ERROR== ERR_NVGPUCTRPERM"}),
    ],
    ids=["metrics", "not permitted"],
)  # fmt: skip
def test_ncu_or_why_not(script, expected, tmp_path, monkeypatch):
    tool(tmp_path, "ncu", script, monkeypatch)
    context = Context(tmp_path / "result.json", tmp_path, dry_run=True)
    gpu_steps.ncu(context)
    assert json.loads(context.result_path.read_text()) == expected


def test_clocks_as_found(tmp_path, monkeypatch):
    tool(tmp_path, "nvidia-smi", "print('name, clocks.current.sm [MHz]\\nNVIDIA H200, 345 MHz')", monkeypatch)
    assert gpu_steps.nvidia_smi() == {"name": "NVIDIA H200", "clocks.current.sm [MHz]": "345 MHz"}
    tool(tmp_path, "nvidia-smi", "print('No devices were found'); raise SystemExit(6)", monkeypatch)
    assert gpu_steps.nvidia_smi() == {"reason": "No devices were found"}


def cell(peer, n, d, milliseconds, over=None, **changes):
    case = cases.Case("cuda", "bf16", n, n, d, **changes)
    seconds = None if milliseconds is None else [milliseconds / 1e3] * 3
    reason = "out of memory" if seconds is None else None
    return {**case.as_dict(), "peer": peer, "seconds": seconds, "reason": reason, "over": over, "extra_mib": 470.0}


def write_cells(path, *found):
    path.write_text(json.dumps({"cells": found}))


def test_targets_by_hand(tmp_path):
    write_cells(
        tmp_path / "gates.json",
        cell("ours", 2048, 512, 0.2, {"open_clip": 1.5, "open_clip_compiled": 0.9}),
        cell("open_clip", 2048, 512, 0.3),
        cell("ours", 2048, 512, 0.05, {"open_clip": 2.0}, graph=True),
        cell("open_clip", 2048, 512, 0.1, graph=True),
        cell("open_clip_compiled", 2048, 512, None, graph=True),
        cell("ours", 65_536, 768, 48.0, {"open_clip": 2.0}),
        cell("open_clip", 65_536, 768, 96.0),
        cell("ours", 65_536, 768, 30.0, loss="sigmoid"),
    )
    write_cells(
        tmp_path / "peers.json",
        cell("ours", 65_536, 768, 50.0, {"liger": 1.25, "inf_cl": 10.0}),
        cell("liger", 65_536, 768, 60.0),
        cell("cut_cross_entropy", 65_536, 768, None),
    )
    steps = {"ceilings": {"result": {"gemm": {"tflops": 788.0}, "aggregate_fields": {"forward_of_copy": 0.85}}}}
    found = {row["target"]: (row["measured"], row["met"]) for row in targets(steps, tmp_path)}
    assert found["gate: N=65,536, D=768: ms"] == (pytest.approx(48.0), False)  # as first measured
    assert found["gate: sigmoid, N=65,536, D=768: ms"] == (pytest.approx(30.0), True)
    assert found["gate: N=2,048, D=512: over open_clip"] == (1.5, True)
    assert found["gate: N=2,048, D=512: over open_clip_compiled"] == (0.9, False)
    assert found["gate: N=2,048, D=512, CUDA graph: over open_clip"] == (2.0, True)
    assert found["gate: N=2,048, D=512, CUDA graph: over open_clip_compiled"] == (None, None)
    part, met = found["N=65,536: part of cuBLAS bf16"]
    assert part == pytest.approx(33.49 / 48, rel=1e-3)
    assert met is False
    assert found["N=65,536: over the fastest peer"] == (1.25, False)
    assert found["N=65,536: over inf-cl"] == (10.0, True)
    assert found["N=65,536: extra memory, MiB"] == (470.0, True)
    assert found["N=4,096: over the fastest peer"] == (None, None)
    assert found["N=1,048,576, D=512 runs: seconds"] == (None, None)
    assert found["aggregate_fields, forward: part of copy"] == (0.85, True)
    text = targets_table(targets(steps, tmp_path))
    assert "not measured" in text
    assert "MISSED" in text


def test_the_report_sets_the_model_beside_the_measurement(tmp_path, capsys):
    found = [
        cell("ours", 2048, 512, 0.2, {"open_clip": 1.5}),
        cell("ours", 2048, 512, 0.05, graph=True),
        cell("memeff", 2048, 512, None),
    ]
    write_cells(tmp_path / "gates.json", *found)
    chip = CHIPS["h100"]
    summary = {"steps": {"machine": {"status": "ok", "seconds": 1, "result": {"predictions": predicted(chip)}}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    report.main([str(tmp_path), "--plot", str(tmp_path / "plot.png")])
    lines = capsys.readouterr().out.splitlines()
    eager, graph = (next(x for x in lines if f"| {how} | ours |" in x).split(" | ") for how in ("eager", "graph"))
    plan = ours(PlanSizes(2048, 2048, 512, "bf16"), chip)
    assert float(eager[7]) == pytest.approx(1e3 * plan.totals(chip)["host"], rel=1e-2)  # the host is the slower
    assert float(graph[7]) == pytest.approx(1e3 * device_seconds(plan, chip), rel=1e-2)
    assert eager[8:11] == ["0.2", "0.2", "0%"]
    assert float(graph[11]) == pytest.approx(0.05e-3 / device_seconds(plan, chip), abs=0.01)
    assert next(x for x in lines if "memeff" in x).split(" | ")[6].startswith("out of memory")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_step_of_cells_that_was_cut_off_goes_on():
    entry = {"status": "stopped after 9 s", "result": {"cells": 3}}
    assert not queue.has_result("curves", {"steps": {"curves": entry}})
    assert queue.has_result("tune", {"steps": {"tune": entry}})  # what it saved is all it can have
    assert queue.has_result("curves", {"steps": {"curves": {**entry, "status": "ok"}}})
    text = queue.plan({"steps": {"machine": {"status": "ok", "result": {"a": 1}}}}, 530)
    assert "machine" not in text
    assert f"together {sum(s for name, (_, s) in gpu_steps.STEPS.items() if name != 'machine')} s" in text


def test_a_call_of_nine_minutes_holds_the_tests_the_gates_and_the_tuning():
    limits = {name: seconds for name, (_, seconds) in gpu_steps.STEPS.items()}
    first = list(limits)[: list(limits).index("tune") + 1]
    assert {"tests", "gates", "tune"} < set(first)
    assert sum(limits[name] for name in first) <= 540
    assert sum(limits.values()) < 3 * 530


def test_a_process_that_dies_costs_only_its_own_call(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cells, "run_calls", lambda wanted, context: ran.append(len(wanted)) or len(wanted) > 1)
    write_cells(tmp_path / "peers.json", cell("ours", 40, 32, 1.0))
    context = Context(tmp_path / "result.json", tmp_path, dry_run=True)
    cells.step("peers")(context)
    assert ran == [len(cells.TOY_CALLS["peers"]), *[1] * len(cells.TOY_CALLS["peers"])]
    assert json.loads(context.result_path.read_text()) == {"file": "peers.json", "cells": 1, "measured": 1}
    monkeypatch.setattr(cells, "run_calls", lambda wanted, context: 1)
    with pytest.raises(SystemExit):  # tried again by the next call
        cells.step("peers")(context)
    monkeypatch.setattr(cells, "run_calls", lambda wanted, context: 0)
    (tmp_path / "peers.json").unlink()
    with pytest.raises(SystemExit):
        cells.step("peers")(context)


def test_the_sigmoid_s_own_tile_is_a_remark():
    wide, narrow = (TileShape(128, cols, 64, 8, 3) for cols in (256, 128))
    times = [
        {"kernel": "sigmoid_tile", "n": 64, "d": 32, "tile": asdict(tile), "median_seconds": seconds}
        for tile, seconds in ((wide, 2.0), (narrow, 1.0))
    ]
    chosen = {"32": {"forward_tile": asdict(wide), "sigmoid_tile": asdict(narrow)}}
    expected = "# sigmoid at D = 32: TileShape(128, 128, 64, 8, 3), 2.00x as fast as with the forward's\n"
    assert tuning.remarks({"chosen": chosen, "times": times}) == expected
    chosen["32"]["sigmoid_tile"] = asdict(wide)
    assert tuning.remarks({"chosen": chosen, "times": times}) == ""


def test_triton_s_interpreter_takes_arrays_of_one_number_as_indices():
    class Tensor:
        handle = SimpleNamespace(data=np.array([3], dtype=np.int32))

    from triton.runtime import interpreter as theirs

    patch, original = theirs._patch_lang_tensor, Tensor()
    try:
        theirs._patch_lang_tensor = lambda tensor, *rest: None
        interpreter.install()
        theirs._patch_lang_tensor(Tensor)
    finally:
        theirs._patch_lang_tensor = patch
    assert range(0, 6, original)[1] == 3  # pyright: ignore


def test_every_test_for_a_gpu_is_where_the_session_looks():
    root = Path(__file__).parents[2]
    marked = [path for path in (root / "tests").rglob("*.py") if "pytest.mark.gpu" in path.read_text()]
    here = Path(__file__)
    looked = [root / where for where in gpu_steps.GPU_TESTS]
    assert len(marked) > 3
    assert [p for p in marked if p != here and not any(p.is_relative_to(where) for where in looked)] == []


def test_a_real_run_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA or HIP device, got none"):
        command.main([])
