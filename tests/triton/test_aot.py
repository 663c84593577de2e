"""What the default configurations compile to, on chips that are not here: `bench.aot` prints the whole grid."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import aot
from bench.aot import table
from gcl_kernels.backends.triton.config import FAMILIES

# Kernels of which several blocks share a multiprocessor, and a few registers more would make them fewer; all have 8 warps.
SHARED = {
    aot.Case(FAMILIES["sm_80"], "backward_tile", torch.bfloat16, 768): 2,
    aot.Case(FAMILIES["sm_80"], "backward_tile", torch.bfloat16, 768, "D tail"): 2,
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.bfloat16, 768, "ids"): 2,
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.float32, 768, "ids+labels", "tf32"): 3,
    aot.Case(FAMILIES["sm_100"], "aggregate_forward", torch.float16, 1280, "8 fields"): 4,
}

# The widest bands of every family in plain training, and on Hopper what the library is tuned for: bands, ids, one direction.
# The kernels' code does not depend on D but by its band and its remainder.
CASES = [
    *(
        aot.Case(FAMILIES[family], kernel, torch.bfloat16, 768)
        for family in ("sm_80", "sm_90", "sm_100", "gfx942")
        for kernel in ("forward_tile", "forward_strips", "backward_tile")
    ),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.float16, 256),
    aot.Case(FAMILIES["sm_90"], "forward_strips", torch.float16, 256),
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.float16, 256),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.bfloat16, 768, "strips"),
    *(aot.Case(FAMILIES["sm_90"], kernel, torch.bfloat16, 64, "strips") for kernel in aot.grid.STRIP_KERNELS),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.bfloat16, 768, "ids"),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.bfloat16, 768, "rows stored"),
    aot.Case(FAMILIES["sm_100"], "forward_tile", torch.bfloat16, 768, "columns stored"),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.bfloat16, 768, "sigmoid stored"),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.bfloat16, 256, "sigmoid stored"),
    aot.Case(FAMILIES["sm_100"], "backward_tile", torch.float32, 768, "columns only", "tf32"),
    aot.Case(FAMILIES["sm_80"], "forward_tile", torch.bfloat16, 768, "sigmoid ids stored"),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.float32, 768),
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.float32, 768, "", "tf32"),
    *(aot.Case(FAMILIES["sm_90"], kernel, torch.float32, 768) for kernel in aot.grid.LINE_KERNELS),
    aot.Case(FAMILIES["sm_90"], "mark_ids", torch.float32, 768, "ids"),
    aot.Case(FAMILIES["sm_90"], "aggregate_forward", torch.bfloat16, 768, "mask"),
    aot.Case(FAMILIES["sm_90"], "aggregate_backward", torch.bfloat16, 768),
    aot.Case(FAMILIES["sm_90"], "aggregate_backward", torch.float32, 1280, "8 fields"),
    aot.Case(FAMILIES["gfx942"], "aggregate_backward", torch.bfloat16, 1280),
    *SHARED,
]


@pytest.fixture(scope="module")
def reports():
    with ProcessPoolExecutor(2) as pool:
        yield dict(zip(map(str, CASES), pool.map(aot.inspect, CASES), strict=True))


@pytest.mark.parametrize("case", [str(case) for case in CASES])
def test_no_spill_no_frame_and_the_chips_own_engines(reports, case):
    assert not reports[case].complaints(), aot.line(reports[case])


def test_hopper_reads_with_tma_and_multiplies_with_wgmma(reports):
    for kernel in ("forward_tile", "forward_strips", "backward_tile"):
        report = reports[f"sm_90 {kernel} bf16 D=768"]
        tile = report.case.tile
        assert report.instructions["wgmma"] > 0
        assert report.instructions["tma load"] > 0
        assert report.instructions["mma"] == 0
        assert tile.rows * tile.cols >= 128 * 256
    assert reports["sm_90 backward_tile bf16 D=768"].instructions["tma store"] > 0


@pytest.mark.parametrize(("family", "products"), [("sm_80", 32), ("sm_90", 4), ("sm_100", 8), ("gfx942", 48)])
def test_the_backward_multiplies_in_one_place_and_reduces_nothing(reports, family, products):
    """Its form is chosen after the products, from numbers that are there already. A thread's products of one step, and on AMD
    those of the last."""
    report = reports[f"{family} backward_tile bf16 D=768"]
    assert report.instructions[report.matrix] == products
    assert report.instructions["shuffle"] == 0
    # one exponential a logit where the form is exact, two where it is not
    tile = report.case.tile
    assert report.instructions["ex2"] == 3 * tile.rows * tile.cols / (tile.warps * report.case.family.target[2])


def test_two_small_blocks_share_a_hopper_multiprocessor(reports):
    for kernel in ("forward_tile", "forward_strips", "backward_tile"):
        report = reports[f"sm_90 {kernel} fp16 D=256"]
        assert fit(report, 2, report.case.tile.warps)


@pytest.mark.parametrize(("case", "blocks"), SHARED.items(), ids=str)
def test_registers_let_as_many_blocks_share_a_multiprocessor(reports, case, blocks):
    assert fit(reports[str(case)], blocks, 8), aot.line(reports[str(case)])


def fit(report, blocks, warps):
    """On NVIDIA chips. Registers are given to a warp in units of 8 a thread."""
    registers = -(-report.registers // 8) * 8
    shared = report.case.family.shared_memory + 1024  # a block's limit and what the system takes of it
    return blocks * registers * 32 * warps <= 65_536 and blocks * (report.shared + 1024) <= shared


def test_every_input_of_the_field_kernels_is_read_once_and_sixteen_bytes_at_a_time(reports):
    """Two fields of 768 bfloat16 by 4 warps: 8 numbers a thread, one load for each field and one for the output's gradient."""
    for kernel, variant, loads, stores in (("forward", " mask", 2, 1), ("backward", "", 3, 2)):
        counts = reports[f"sm_90 aggregate_{kernel} bf16 D=768{variant}"].instructions
        assert counts["load16"] == loads
        assert counts["store16"] == stores
        assert counts["load8"] == 0


def test_complaints_are_made():
    assert len(aot.Report(CASES[3], 255, 8, 4, 10**6, Counter(), Counter()).complaints()) == 6
    narrow = aot.Report(CASES[-1], 10, 0, 0, 0, Counter({"load8": 1}), Counter())
    assert narrow.complaints() == ["narrow loads"]
    copies = aot.Report(CASES[0], 10, 0, 0, 0, Counter({"mma": 1, "ex2": 1, "cp.async": 2, "load16": 1}), Counter())
    assert copies.complaints() == ["copies of less than 16 bytes"]


def test_the_loop_over_d_is_found_and_counted():
    text = """
.L_x_0:
    IADD3 R1, R1, 0x1, RZ ;
    BRA `(.L_x_0) ;
.L_x_1:
    HMMA.16816.F32 R4, R8, R12, R4 ;
    IADD3 R2, R2, 0x20, RZ ;
    @P0 BRA `(.L_x_1) ;
    HMMA.16816.F32 R4, R8, R12, R4 ;
"""
    report = aot.Report(CASES[0], 10, 0, 0, 0, aot.count(text), aot.count(aot.loop_over_d(text)))
    assert report.integer_ratio == 1.0


def test_a_part_of_the_grid_renews_its_part_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULT", tmp_path / "aot.txt")
    reports = [aot.Report(case, 10, 0, 0, 0, Counter(), Counter()) for case in (CASES[1], CASES[0])]
    for report in reports:
        aot.save({aot.title(report.case): aot.line(report)})
    renewed = replace(reports[0], registers=77)
    aot.save({aot.title(renewed.case): aot.line(renewed), "of no case": "gone"})
    rows = table.RESULT.read_text().splitlines()[-2:]
    assert rows == [aot.line(reports[1]), aot.line(renewed)]
