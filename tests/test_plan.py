"""The model of memory and time against what is measured, what the launch code does, and what can be counted by hand."""

import dataclasses
import importlib.util
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import memory
from gcl_kernels import backends, plan
from gcl_kernels.backends.chunks import rows_of_partials
from gcl_kernels.chips import CHIPS, DTYPES, Reach
from gcl_kernels.plan import Sizes
from gcl_kernels.plan import gpu as gpu_model
from tests.tracing import trace_step

H200 = CHIPS["h200"]
CPU = dataclasses.replace(H200, family=None)  # memory does not ask for a rate
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", [memory.Case("ours", 2048, 512, "fp32", 24), memory.Case("dense", 2048, 128)], ids=str)
def test_memory_on_a_cpu_as_measured(case, monkeypatch):
    if case.loss == "dense" and importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", str(case.budget_mib))
    assert memory.predicted(case, CPU) == pytest.approx(memory.measured(case), rel=0.15)


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype"),
    [
        (4096, 4096, 768, "bf16"),
        (65_536, 65_536, 768, "bf16"),
        (65_536, 65_536, 760, "fp16"),
        (8192, 65_536, 512, "bf16"),
        (16_384, 16_384, 256, "fp32"),
    ],
)
def test_triton_as_its_launch_code_does(n, m, d, dtype):
    """Chunks, products and memory of the launch code itself, run on tensors without memory."""
    p = Sizes(n, m, d, dtype)
    config = plan.launch_config(p, H200)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    forward, backward = trace_step(n, m, d, torch_dtype, config)
    prediction = plan.ours(p, H200)
    padded_d = -(-d // 16) * 16
    assert forward.tile_logits == backward.tile_logits == n * m
    assert backward.product_flops == 4 * n * m * padded_d
    assert prediction.flops == 8 * n * m * d
    assert prediction.remark == (
        f"G in {backward.kernels['backward_tile']:,} of {' x '.join(f'{k:,}' for k in backward.largest_gradient)}, "
        f"forward in {forward.kernels['forward_tile']:,} of {rows_of_partials(n, m, config.forward.sides, True, True):,} rows"
    )
    extra = max(forward.peak, backward.peak - p.gradients)
    assert prediction.extra_memory == pytest.approx(extra, rel=0.1)
    # the loss's own operators and autograd's are not in the trace
    chunks = backward.kernels["backward_tile"]
    operators = gpu_model.FORWARD_OPERATORS + gpu_model.BACKWARD_OPERATORS + gpu_model.OPERATORS_A_TILE * chunks
    operators += gpu_model.OPERATORS_A_CHUNK * -(-n // backward.largest_gradient[0])
    assert operators == pytest.approx(forward.operators + backward.operators, rel=0.15)


def test_ranks_share_the_work_and_hold_all_columns(monkeypatch):
    one, eight = (Sizes.of_batch(65_536, 768, "bf16", world_size) for world_size in (1, 8))
    assert plan.ours(eight, H200).flops == plan.ours(one, H200).flops / 8 == 65_536**2 * 768
    assert plan.dense(eight, H200).flops == 12 * 65_536**2 * 768 / 8
    assert eight.gathered == 7 / 8 * 65_536 * 768 * 2
    link = plan.ours(eight, H200).totals(H200)["link"]
    assert link == pytest.approx((7 / 8 * 65_536 * 768 * (2 + 4) + 16 * 65_536) / (450e9 * 0.8))
    assert plan.ours(one, H200).totals(H200)["link"] == 0
    dense_link = plan.dense(eight, H200).totals(H200)["link"]  # both sides are gathered, their gradients in bfloat16
    assert dense_link == pytest.approx((2 * 7 / 8 * 65_536 * 768 * (2 + 2) + 16 * 65_536) / (450e9 * 0.8))
    # where tiles take next to nothing: the columns of others, and, beside the gradients that are a result, dlhs, drhs and the
    # others' parts of it in float32
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "16")
    held = (7 / 8 * 2 + (4 - 2) / 8 + 4 + 4 - 2 / 8) * 65_536 * 768
    assert plan.ours(eight, H200).extra_memory == pytest.approx(held, rel=0.03)


@given(
    st.sampled_from((plan.ours, plan.dense)),
    st.sampled_from((*CHIPS.values(), CPU)),
    st.sampled_from(DTYPES),
    st.integers(1, 20),
    st.sampled_from((64, 256, 768, 1280)),
    st.sampled_from((1, 8)),
)
@settings(max_examples=60)
def test_more_work_is_never_predicted_to_be_less(predict, chip, dtype, log2_n, d, world_size):
    p = Sizes.of_batch(2**log2_n, d, dtype, world_size)
    small, large = predict(p, chip), predict(dataclasses.replace(p, n=2 * p.n, m=2 * p.m), chip)
    wide = predict(dataclasses.replace(p, d=2 * d), chip)
    assert small.extra_memory >= 0
    for more in (large, wide):
        assert more.flops > small.flops
        assert more.serial(chip) >= small.serial(chip) >= small.overlapped(chip) > 0
    if chip is not CPU or predict is plan.dense:  # a larger plane may be one of which nothing is stored
        assert large.extra_memory >= 0.9 * small.extra_memory
    slower = dataclasses.replace(chip, half=chip.half / 2, tf32=chip.tf32 / 2, fp32=chip.fp32 / 2)
    assert predict(p, slower).serial(slower) > small.serial(chip)


def test_the_largest_batch_fits_and_the_next_does_not():
    p = Sizes.of_batch(1, 768, "bf16", 2)
    for predict in (plan.ours, plan.dense):
        largest = plan.largest_batch(predict, p, H200, 20e9)

        def needed(batch, predict=predict):
            q = Sizes.of_batch(batch, 768, "bf16", 2)
            return q.inputs_and_gradients + predict(q, H200).extra_memory

        assert largest % 512 == 0
        assert needed(largest) <= 20e9 < needed(largest + 512)
    assert plan.largest_batch(plan.dense, p, H200, 1e3) == 0


def test_stored_tiles_follow_the_budget():
    p = Sizes.of_batch(8192, 64, "fp32")
    stored = {}
    for budget in (1, 16, 64, 256, 1024):
        with backends.settings(workspace_mib=budget):
            stored[budget] = plan.stored_tiles(p)
    assert stored == {1: 0, 16: 0, 64: 14, 256: 62, 1024: 64}
    for budget, units in ((1024, 6), (1, 8)):
        with backends.settings(workspace_mib=budget):
            assert plan.on_cpu(p, CPU).flops == units * 8192**2 * 64


def test_rates_of_a_chip_follow_from_its_clock():
    flops_a_clock = {"a100": 2048, "h100": 4096, "h200": 4096, "b200": 8192, "mi300x": 2048}
    for name, chip in CHIPS.items():
        assert chip.half == pytest.approx(flops_a_clock[name] * chip.units * chip.clock, rel=0.01), name
        assert chip.half > chip.tf32 > chip.fp32
        assert chip.rate("bf16") == chip.rate("fp16") == chip.half


def test_command():
    command = [sys.executable, "-m", "gcl_kernels.plan", "--batch", "4096", "--dim", "64", "--dtype", "bf16"]
    result = subprocess.run([*command, "--device", "h200"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(plan.LABEL)
    assert "ours, triton" in result.stdout
    assert "dense" in result.stdout


def test_this_cpu(capsys):
    plan.main(["--batch", "2048", "--dim", "64", "--device", "cpu", "--world-size", "2"])
    out = capsys.readouterr().out
    assert out.startswith(plan.LABEL)
    assert "measured just now" in out
    assert "tiles of 1,024 x 1,024, 2 of 2 stored for the backward" in out
    assert "exchange between ranks is not" in out


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--device", "h300"], ["--dtype", "fp8"]])
def test_bad_arguments_are_refused(arguments, capsys):
    whole = ["--batch", "8", "--dim", "64", "--device", "h200"]
    with pytest.raises(SystemExit):
        plan.main([*whole, *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_what_is_expected_of_a_chip_is_a_parameter(capsys):
    whole = ["--batch", "65536", "--dim", "768", "--device", "h200"]
    plan.main(whole)
    plan.main([*whole, "--gemm-fraction", "0.4", "--memory", "20"])
    usual, slow = capsys.readouterr().out.split(plan.LABEL)[1:]
    assert "80% in products" in usual
    assert "40% in products" in slow
    assert "does not fit" in slow  # dense, in 20 GiB
    assert Reach().gemm == 0.8
