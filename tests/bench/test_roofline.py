"""The model of time against cases worked by hand and against the products that the code really makes."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import roofline
from gcl_kernels import gcl_loss, plan
from gcl_kernels.backends import torch as backend
from gcl_kernels.chips import CHIPS, Reach
from gcl_kernels.plan import Phase, Prediction, Sizes
from tests.counting import Products

H200 = CHIPS["h200"]
AS_MEASURED = dataclasses.replace(H200, reach=Reach(gemm=788 / 989.4))  # bf16 8192^3 on an H200
CPU = dataclasses.replace(H200, family=None)


@pytest.mark.parametrize(
    ("n", "d", "seconds"),
    [(8192, 512, 0.35e-3), (32_768, 512, 5.6e-3), (65_536, 768, 33.5e-3), (262_144, 768, 0.54), (1_048_576, 512, 5.7)],
)
def test_floor_as_worked_by_hand(n, d, seconds):
    p = Sizes(n, n, d, "bf16")
    assert roofline.floor(p, AS_MEASURED) == pytest.approx(seconds, rel=0.01)
    assert roofline.floor(dataclasses.replace(p, directions=1), AS_MEASURED) == pytest.approx(0.75 * seconds, rel=0.01)
    assert roofline.ours(p, AS_MEASURED).overlapped(AS_MEASURED) >= roofline.floor(p, AS_MEASURED)


def test_a_phase_by_hand():
    phase = Phase("by hand", "tf32", flops=494.7e12 * 0.4, exponentials=132 * 1.83e9 * 16 * 0.3, bytes=4.8e12, host=0.2)
    parts = {"GEMM": 0.5, "exp": 0.3, "epilogue": 0.0, "HBM": 1 / 0.9, "link": 0.0, "host": 0.2}
    assert phase.parts(H200) == pytest.approx(parts)
    alone = dataclasses.replace(phase, exposed=0.7)  # 0.4 beside its exponentials, and 0.5 of products
    assert alone.parts(H200) == pytest.approx({**parts, "epilogue": 0.4})
    assert alone.on_device(H200) == pytest.approx(0.5 + 0.3 + 0.4)
    both = Prediction("two", (phase, Phase("host alone", host=2.0)), 0)
    assert both.overlapped(H200) == pytest.approx(2.2)  # the host's work, 2.2, is more than the device's, 1.11
    assert Prediction("one", (phase,), 0).overlapped(H200) == pytest.approx(1 / 0.9)
    assert both.serial(H200) == pytest.approx(0.5 + 0.3 + 1 / 0.9 + 2.2)


def test_exponentials_and_gradient_traffic_by_hand():
    """N = 65,536: 2 exponentials a logit at 16 a clock on 132 multiprocessors; G is written once and read twice, 26 GB."""
    totals = {phase.name: phase for phase in roofline.ours(Sizes(65_536, 65_536, 768, "bf16"), H200).phases}
    assert sum(phase.exponentials for phase in totals.values()) == 2 * 65_536**2
    assert roofline.ours(Sizes(65_536, 65_536, 768, "bf16"), H200).totals(H200)["exp"] == pytest.approx(
        2.22e-3, rel=0.01
    )
    g = 2 * 65_536**2
    # six by six chunks: float32 accumulators, 4 + 4 bytes a number, once a chunk and line; the other operand likewise
    accumulators, operand = 6 * 65_536 * 768 * 8, 6 * 65_536 * 768 * 2
    assert totals["G @ rhs"].bytes == totals["G^T @ lhs"].bytes == g + accumulators + operand
    parts = totals["backward tiles"].bytes, totals["G @ rhs"].bytes, totals["G^T @ lhs"].bytes
    assert all(g < bytes_moved < 2 * g for bytes_moved in parts)


def test_strips_by_hand():
    """N = 8,192, D = 512: 2,048 tiles of 128 x 256 on 132 multiprocessors are 16 for the busiest."""
    phases = {phase.name: phase for phase in roofline.ours(Sizes(8192, 8192, 512, "bf16"), H200).phases}
    assert "forward tiles" not in phases
    strips = phases["forward strips"]
    assert strips.flops == 2 * 8192**2 * 512
    assert strips.exposed == pytest.approx(16 * 2300 / H200.clock)
    # four segments of a strip and its diagonal; every tile has a sum of each of its rows
    sums = 4 * 8192 * (32 + 5)
    assert phases["merges"].bytes == sums
    assert strips.bytes == sums + (4 + 1) * 8192 * 512 * 2  # four bands of eight strips
    for p in (Sizes(4096, 4096, 512, "bf16"), Sizes(8192, 8192, 512, "fp32"), Sizes(8192, 65_536, 512, "bf16", 8)):
        assert "forward strips" not in {phase.name for phase in roofline.ours(p, H200).phases}


def test_float32_tiles_take_two_exponentials():
    phases = roofline.ours(Sizes(4096, 4096, 512, "fp32"), H200).phases
    assert sum(phase.exponentials for phase in phases) == 4 * 4096**2


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("ours", 8),
        ("open_clip", 12),
        ("open_clip_compiled", 12),
        ("linear_cross_entropy", 12),
        ("cut_cross_entropy", 16),
        ("liger", 12),
        ("inf_cl", 20),
        ("memeff", 10),
    ],
)
@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_operations_of_every_plan(name, multiple, chip):
    p = Sizes(65_536, 32_768, 768, "bf16")
    prediction = roofline.PLANS[name](p, chip)
    assert prediction.flops == multiple * p.n * p.m * p.d
    assert prediction.overlapped(chip) < prediction.serial(chip)
    # never faster than its own products
    assert prediction.overlapped(chip) >= multiple / 8 * roofline.floor(p, chip) * (1 - 1e-9)


def test_counts_that_peers_sources_give():
    p = Sizes(65_536, 65_536, 768, "bf16")
    backward = [phase for phase in roofline.inf_cl(p, H200).phases if phase.name == "backward"]
    assert len(backward) == 2
    assert backward[0].bytes == pytest.approx(0.82e12, rel=0.01)  # a direction
    assert backward[0].dtype == "tf32"
    assert "1,024 rows" in roofline.liger(p, H200).remark  # 65,536 / ceil(65,536 / 768), to a power of two
    assert "512 rows" in roofline.liger(Sizes(2**20, 2**20, 512, "bf16"), H200).remark
    assert roofline.dense(p, H200).extra_memory == 4 * 2 * 65_536**2


@pytest.mark.parametrize(
    ("directions", "budget", "multiple"), [("both", "1", 8), ("both", "256", 6), ("lhs_to_rhs", "1", 6)]
)
def test_ours_on_a_cpu_as_the_code_does(directions, budget, multiple, monkeypatch):
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", budget)
    made = 0

    def counted(function):
        def run(*arguments, **options):
            nonlocal made
            with Products() as products:
                result = function(*arguments, **options)
            made += products.flops
            return result

        return run

    for name in ("forward", "backward", "forward_with_gradient"):
        monkeypatch.setattr(backend, name, counted(getattr(backend, name)))
    g = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(2048, 16, generator=g)).requires_grad_() for _ in range(2))
    gcl_loss(x, y, 2.0, directions=directions).backward()
    p = Sizes(2048, 2048, 16, "fp32", directions=2 if directions == "both" else 1)
    assert plan.ours(p, CPU).flops == made == multiple * 2048**2 * 16


@pytest.mark.parametrize(
    ("n", "dtype", "multiple"),
    [
        (8192, "bf16", 6),
        (8192, "fp16", 8),
        (262_144, "bf16", 8),
    ],  # float16 lacks the range, the budget too few whole lines
)
def test_one_direction_costs_what_its_backend_can(n, dtype, multiple):
    p = Sizes(n, n, 512, dtype, directions=1)
    prediction = roofline.ours(p, H200)
    assert prediction.flops == multiple * n * n * 512
    assert sum(phase.exponentials for phase in prediction.phases) == (1 if multiple == 6 else 2) * n * n


def test_report_is_labelled_and_shows_both_bounds(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["roofline", "--n", "4096", "--chip", "mi300x", "--gemm-fraction", "0.5"])
    roofline.main()
    out = capsys.readouterr().out
    assert out.startswith(plan.LABEL)
    assert out.rstrip().splitlines()[-1].startswith(f"({plan.LABEL.lower()}")
    assert "50% of its products" in out
    for word in ("overlapped", "serial", "GEMM", "exp", "HBM", "host", "inf-cl"):
        assert word in out


def test_predictions_for_a_file_are_labelled():
    result = roofline.predictions(Sizes(65_536, 65_536, 768, "bf16"), AS_MEASURED)
    assert result["model"] == plan.LABEL
    assert result["floor_ms"] == pytest.approx(33.5, rel=0.01)
    assert set(result["plans"]) == set(roofline.PLANS)
