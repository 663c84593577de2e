"""The model of memory and time against what is measured, what the launch code does, and what can be counted by hand."""

import dataclasses
import importlib.util
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import memory
from gcl_kernels import backends, plan
from gcl_kernels.backends import Lines, Need, Want
from gcl_kernels.backends.triton import launch, run
from gcl_kernels.chips import CHIPS, DTYPES, Reach
from gcl_kernels.pairs import Pairs
from gcl_kernels.plan import Sizes, gpu
from gcl_kernels.plan.trace import WithoutMemory
from tests.counting import Operators, Products

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
        (65_536, 65_536, 760, "fp16"),
        (8192, 65_536, 512, "bf16"),
        (16_384, 16_384, 256, "fp32"),
    ],
)
def test_phases_are_those_of_the_launch_code(n, m, d, dtype):
    """Chunks, kernels and products of the launch code itself, run on tensors without memory."""
    p = plan.Sizes(n, m, d, dtype)
    kernels, tile_logits, chunks = Counter(), Counter(), []

    def note(kernel, programs, **arguments):
        kernels[kernel] += 1
        if kernel.endswith("_tile"):
            tile_logits[kernel] += arguments["n"] * arguments["m"]
        if kernel == "backward_tile":
            chunks.append((arguments["n"], arguments["m"]))

    lhs, rhs = (torch.empty(k, d, dtype=p.torch_dtype, device="meta") for k in (n, m))
    pairs = Pairs(lhs, rhs, torch.empty((), device="meta"))
    with (
        backends.settings(config=plan.launch_config(p, H200)),
        run.replaced_by(note),
        WithoutMemory(),
        Products() as products,
        Operators() as made,
    ):
        statistics = launch.forward(pairs, Want(True, True))
        launch.backward(pairs, statistics, Lines(*map(torch.empty_like, statistics)), Need(True, True, True))
    prediction, padded_d = plan.ours(p, H200), -(-d // 16) * 16
    assert set(tile_logits.values()) == {n * m}
    assert products.flops == 4 * n * m * padded_d
    assert prediction.flops == 8 * n * m * d
    assert f"G in {len(chunks):,} of {' x '.join(f'{k:,}' for k in max(chunks))}" in prediction.remark
    down_strips = kernels["forward_strips"] > 0
    assert f"forward in {kernels['forward_strips' if down_strips else 'forward_tile']:,} of" in prediction.remark
    assert (
        ("forward strips" in {phase.name for phase in prediction.phases})
        == down_strips
        == (dtype != "fp32" and n > 4096)
    )
    # the loss's own operators and autograd's are not among these
    operators = gpu.operators(p, -(-n // max(chunks)[0]), len(chunks)) + gpu.OPERATORS_A_TILE * len(chunks)
    assert operators == pytest.approx(made.count, rel=0.15)


def test_the_peak_of_few_chunks_is_that_of_all(monkeypatch):
    """`plan` runs the first two chunks and the last of each loop."""
    from gcl_kernels.plan import trace

    p = plan.Sizes(8192, 8192, 256, "bf16")
    peaks = {}
    for few in (True, False):
        monkeypatch.setattr(
            trace, "settings", lambda few=few, **given: backends.settings(**{**given, "few_chunks": few})
        )
        trace._peaks.cache_clear()
        monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "2")
        peaks[few] = trace.peak_memory(p, plan.launch_config(p, H200), False)
    trace._peaks.cache_clear()
    assert peaks[True] == peaks[False]


def test_one_direction_in_one_pass_holds_whole_lines():
    both, one = (plan.Sizes(65_536, 65_536, 768, "bf16", directions=k) for k in (2, 1))
    assert plan.ours(one, H200).flops == 6 * 65_536**2 * 768
    accumulators = 4 * 2 * 65_536 * 768
    budget = backends.workspace_bytes()
    assert plan.ours(one, H200).extra_memory == pytest.approx(budget + accumulators, rel=0.25)
    assert plan.ours(both, H200).extra_memory < budget + 2 * accumulators


@pytest.mark.parametrize("directions", [1, 2])
def test_memory_at_a_million_rows_is_the_budget_and_what_is_linear(directions):
    n, d = 2**20, 64
    extra = plan.ours(Sizes(n, n, d, "bf16", directions=directions), H200).extra_memory
    assert extra < 1.1 * backends.workspace_bytes() + 2 * n * (5 * d + 200)  # accumulators in float32, vectors


def test_a_gpu_is_planned_without_triton():
    code = "import sys; sys.modules['triton'] = None; from gcl_kernels import plan; plan.main()"
    options = ["--batch", "65536", "--dim", "768", "--device", "h200"]
    result = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "ours, triton" in result.stdout


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


def test_stored_tiles_follow_the_budget(monkeypatch):
    p = Sizes.of_batch(8192, 64, "fp32")
    stored = {}
    for budget in (1, 16, 64, 256, 1024):
        monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", str(budget))
        stored[budget] = plan.stored_tiles(p)
    assert stored == {1: 0, 16: 0, 64: 14, 256: 62, 1024: 64}
    assert plan.on_cpu(p, CPU).flops == 6 * 8192**2 * 64
    monkeypatch.setenv("GCL_KERNELS_WORKSPACE_MIB", "1")
    assert plan.on_cpu(p, CPU).flops == 8 * 8192**2 * 64


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
    assert "tiles of 1,024 x 1,024, 2 of 2 stored" in out
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
