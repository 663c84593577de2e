"""What the default configurations compile to, on chips that are not here: ``bench.aot`` prints the whole grid."""

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import aot
from gcl_kernels.backends.triton.config import FAMILIES

# The widest bands of every family in plain training, and on Hopper what the library is tuned for: bands, ids, one direction.
# The kernels' code does not depend on D but by its band and its remainder.
CASES = [
    *(
        aot.Case(FAMILIES[family], kernel, torch.bfloat16, 768)
        for family in ("sm_80", "sm_90", "sm_100", "gfx942")
        for kernel in ("forward_tile", "backward_tile")
    ),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.float16, 256),
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.float16, 256),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.bfloat16, 768, "ids"),
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.bfloat16, 768, "rows only"),
    aot.Case(FAMILIES["sm_90"], "forward_tile", torch.float32, 768),
    aot.Case(FAMILIES["sm_90"], "backward_tile", torch.float32, 768, "", "tf32"),
    aot.Case(FAMILIES["sm_90"], "merge_partials", torch.float32, 768),
]


@pytest.fixture(scope="module")
def reports():
    with ProcessPoolExecutor(2) as pool:
        yield dict(zip(map(str, CASES), pool.map(aot.inspect, CASES), strict=True))


@pytest.mark.parametrize("case", [str(case) for case in CASES])
def test_no_spill_no_frame_and_the_chips_own_engines(reports, case):
    assert not reports[case].complaints(), aot.line(reports[case])


def test_hopper_reads_with_tma_and_multiplies_with_wgmma(reports):
    for kernel in ("forward_tile", "backward_tile"):
        report = reports[f"sm_90 {kernel} bf16 D=768"]
        tile = report.case.tile
        assert report.instructions["wgmma"] > 0
        assert report.instructions["tma load"] > 0
        assert report.instructions["mma"] == 0
        assert tile.rows * tile.cols >= 128 * 256
    assert reports["sm_90 backward_tile bf16 D=768"].instructions["tma store"] > 0


def test_two_small_blocks_share_a_hopper_multiprocessor(reports):
    for kernel in ("forward_tile", "backward_tile"):
        report = reports[f"sm_90 {kernel} fp16 D=256"]
        assert 2 * report.registers * 32 * report.case.tile.warps <= 65_536
        assert 2 * (report.shared + 1024) <= 228 * 1024


def test_complaints_are_made():
    report = aot.Report(CASES[2], 255, 8, 4, 10**6, aot.Counter())
    assert len(report.complaints()) == 5
