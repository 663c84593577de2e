"""The GPU queue: a dry run of all of it, and its parts where they meet what a CPU lacks."""

import json
import math
import os
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from bench.gpu import __main__ as command
from bench.gpu import queue, tuning
from bench.gpu import steps as gpu_steps
from bench.gpu.context import REAL, TOY, Context
from bench.gpu.targets import bench_rows, targets, targets_table
from gcl_kernels.backends.triton.config import FAMILIES, Config, TileShape


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("session")
    queue.session(out, dry_run=True, limit=500)
    return out, json.loads((out / "summary.json").read_text())


def test_every_step_runs(dry):
    out, summary = dry
    steps = summary["steps"]
    log = (out / "log.txt").read_text()
    assert {name: step["status"] for name, step in steps.items()} == dict.fromkeys(steps, "ok"), log[-5000:]
    assert set(gpu_steps.STEPS) - set(steps) == {"bench_4096", "bench_1048576"}  # the same code at other sizes
    assert all(f"=== {name}: ok" in log for name in steps)
    result = {name: step["result"] for name, step in steps.items()}
    assert [p["n"] for p in result["machine"]["predictions"]] == [65_536, 4096, 2**20]
    assert all(p["model"].startswith("A model") for p in result["machine"]["predictions"])
    assert result["ceilings"]["gemm"]["tflops"] > 0
    assert result["tests"]["passed"]
    assert "passed" in result["tests"]["last_line"]
    assert {c["kernel"] for c in result["screen"]["candidates"]} == {"forward_tile", "backward_tile"}
    assert all(c["registers"] > 0 and not c["complaints"] for c in result["screen"]["candidates"])
    assert all("reason" not in row for row in result["tune"]["times"])
    assert set(result["tune"]["chosen"]["32"]) == {"forward_tile", "backward_tile"}
    assert len(result["tune"]["whole_step"]["tuned"]) == 1
    assert result["ncu"]
    peers = bench_rows(out / "bench_65536.json")
    assert peers["ours"]["seconds"] > 0
    assert len(summary["targets"]) == 8


def test_few_small_files_come_back(dry):
    out, _ = dry
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) + len(REAL.bench) - len(TOY.bench) <= 8
    assert all(path.parent == out and path.stat().st_size < 2**24 for path in files)
    assert not (out / "summary.json.tmp").exists()


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
"""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            f"print({NCU_OUTPUT!r})",
            {"metrics": {
                "forward_tile": {"gpu__time_duration.sum": "512.5 us", "dram__bytes.sum": "1,024 Mbyte"},
                "backward_tile": {"gpu__time_duration.sum": "600 us"},
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


def write_cells(path, **milliseconds):
    cells = [
        {"peer": peer, "passes": "both", "seconds": None if ms is None else [ms / 1e3] * 3, "extra_mib": 470.0}
        for peer, ms in milliseconds.items()
    ]
    path.write_text(json.dumps({"cells": cells}))


def test_targets_by_hand(tmp_path):
    write_cells(
        tmp_path / "bench_65536.json", ours=48.0, open_clip=96.0, liger=60.0, inf_cl=480.0, cut_cross_entropy=None
    )
    write_cells(tmp_path / "bench_4096.json", ours=0.5, open_clip=0.4)
    steps = {"ceilings": {"result": {"gemm": {"tflops": 788.0}, "aggregate_fields": {"forward_of_copy": 0.85}}}}
    found = {row["target"]: (row["measured"], row["met"]) for row in targets(steps, tmp_path)}
    part, met = found["N=65,536: part of cuBLAS bf16"]
    assert part == pytest.approx(33.49 / 48, rel=1e-3)
    assert met is False
    assert found["N=65,536: over the fastest peer"] == (pytest.approx(1.25), False)
    assert found["N=65,536: over inf-cl"] == (pytest.approx(10), True)
    assert found["N=65,536: extra memory, MiB"] == (470.0, True)
    assert found["N=4,096: over the fastest peer"] == (pytest.approx(0.8), False)
    assert found["N=1,048,576, D=512 runs: seconds"] == (None, None)
    assert found["aggregate_fields, forward: part of copy"] == (0.85, True)
    text = targets_table(targets(steps, tmp_path))
    assert "not measured" in text
    assert "MISSED" in text


def test_a_real_run_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA or HIP device, got none"):
        command.main([])
