"""The benchmark's own arithmetic: its oracle, its counts, its files. Never its times."""

import json
import time
from dataclasses import replace

import pytest
import torch

import reference
from bench import __main__ as command
from bench import cases, measure, oracle, peers, report
from bench import cells as cells_of
from gcl_kernels.losses import ROW_SHARE
from gcl_kernels.testing import relative_error


@pytest.mark.parametrize("directions", list(ROW_SHARE))
@pytest.mark.parametrize(("n", "m"), [(37, 37), (23, 40)])
def test_the_oracle_is_the_reference(n, m, directions, monkeypatch):
    monkeypatch.setattr(oracle, "CHUNK_BYTES", 8 * m * 10)  # several chunks, the last one ragged
    case = cases.Case("cpu", "fp64", n, m, 19, directions, logit_scale=17.0)
    inputs = cases.build(case)
    leaves = inputs.leaves
    exact = oracle.loss_and_gradients(*leaves, ROW_SHARE[directions])
    loss = reference.gcl_loss(*leaves, directions=directions)
    for got, want in zip(exact, (loss, *torch.autograd.grad(loss, leaves)), strict=True):
        assert relative_error(got, want.detach()) < 1e-10


@pytest.mark.parametrize(("n", "m"), [(37, 37), (23, 40)])
def test_the_sigmoid_s_oracle_is_the_reference(n, m, monkeypatch):
    monkeypatch.setattr(oracle, "CHUNK_BYTES", 8 * m * 10)
    leaves = cases.build(cases.Case("cpu", "fp64", n, m, 19, logit_scale=17.0, loss="sigmoid")).leaves
    exact = oracle.sigmoid_loss_and_gradients(*leaves, cases.LOGIT_BIAS)
    loss = reference.sigmoid_loss(*leaves, cases.LOGIT_BIAS)
    for got, want in zip(exact, (loss, *torch.autograd.grad(loss, leaves)), strict=True):
        assert relative_error(got, want.detach()) < 1e-10


def test_peers_of_a_sigmoid_loss_agree_and_others_say_why_not():
    case = cases.Case("cpu", "fp32", 40, 40, 16, logit_scale=10.0, loss="sigmoid")
    rows = {
        row["peer"]: row for row in measure.cell_rows(case, ("ours", "open_clip", "dense", "siglip_kernel"), 1, True)
    }
    assert case.flops == 6 * 40 * 40 * 16
    for name in ("ours", "open_clip"):
        assert max(rows[name]["error"].values()) < 1e-5
    assert rows["dense"]["reason"] == "has no sigmoid loss"
    assert "cpu" in rows["siglip_kernel"]["reason"]


@pytest.mark.parametrize("draw", cases.DRAWS)
def test_inputs_are_unit_vectors_never_alike(draw):
    case = cases.Case("cpu", "fp32", 200, 230, 64, draw=draw, fields=2)
    inputs = cases.build(case)
    lhs, rhs = inputs.lhs.detach(), [y.detach() for y in inputs.rhs]
    for x in (lhs, *rhs):
        torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
        assert len(x.unique(dim=0)) == len(x)
    positives = (lhs * rhs[0][:200]).sum(dim=1)
    negatives = lhs @ lhs.T - 2 * torch.eye(200)
    if draw == "clustered":
        assert 0.299 < float(positives.min()) < 0.4 < float(positives.mean()) < 0.7 < float(positives.max()) < 0.901
        assert float((negatives > 0.3).sum(dim=1).float().mean()) > 10  # near ties
    else:
        assert float(positives.abs().mean()) < 0.2


def test_counts_of_the_least_work():
    case = cases.Case("cpu", "fp32", 3, 5, 7)
    assert case.flops == 8 * 105
    assert replace(case, directions="lhs_to_rhs").flops == 6 * 105
    assert replace(case, passes="forward").flops == 2 * 105
    assert replace(case, passes="backward").flops == 6 * 105


@pytest.fixture
def quick(monkeypatch):
    """One turn, no fresh process, a matrix product in no time."""
    monkeypatch.setattr(measure, "GEMM_SECONDS", 1e-4)
    monkeypatch.setattr(measure, "cpu_extra_mib", lambda case, peer: 1.5)
    monkeypatch.setattr(measure, "gemm", lambda case: lambda: 1e-9)


def test_a_run_measures_every_peer_or_says_why_not(quick, tmp_path, capsys):
    path = tmp_path / "run.json"
    names = "open_clip,linear_cross_entropy,liger,inf_cl,siglip_kernel"
    arguments = ["--device", "cpu", "--n", "48", "--d", "16", "--peers", names, "--turns", "2", "--json", str(path)]
    arguments += ["--logit-scale", "14,100"]
    command.main(arguments)
    result = json.loads(path.read_text())
    cells = {(c["peer"], c["logit_scale"]): c for c in result["cells"]}
    assert len(cells) == 12
    for peer in ("ours", "open_clip"):
        cell = cells[peer, 100.0]
        assert len(cell["seconds"]) == 2
        assert cell["extra_mib"] == 1.5
        assert cell["tflops"] > 0
        assert all(0 <= cell["error"][k] < 1e-4 for k in ("loss", "lhs", "rhs", "logit_scale"))
    assert set(cells["ours", 100.0]["over"]) >= {"open_clip"}
    for peer in ("liger", "inf_cl"):
        assert cells[peer, 100.0]["reason"] == "unsupported device: cpu"
    assert "sigmoid" in cells["siglip_kernel", 100.0]["reason"]
    assert "unsupported device: cpu" in report.table(result["cells"], "title")

    command.main([*arguments, "--resume"])
    assert json.loads(path.read_text())["cells"] == result["cells"]  # nothing was measured again

    more = [*arguments, "--resume", "--peers", f"{names},tests.bench.test_bench:somebodys_loss"]
    command.main(more)
    after = json.loads(path.read_text())["cells"]
    assert [c["peer"] for c in after].count("ours") == 2  # one a case, however often it was measured
    theirs = [c for c in after if c["peer"] == "tests.bench.test_bench:somebodys_loss"]
    assert all(c["error"]["lhs"] < 1e-4 for c in theirs)
    assert len(theirs) == 2

    path.write_text(json.dumps(result | {"machine": {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="expected the machine"):
        command.main(more)


def somebodys_loss(lhs, rhs, logit_scale):
    return reference.gcl_loss(lhs, rhs, logit_scale)


def test_a_lost_device_costs_its_case_alone(quick, tmp_path, monkeypatch):
    def lost(case):
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(peers.PEERS, "dense", lost)
    monkeypatch.setattr(measure, "release", lost)
    path = tmp_path / "run.json"
    arguments = ["--device", "cpu", "--n", "16,24", "--d", "8", "--turns", "1", "--json", str(path), "--resume"]
    arguments += ["--peers", "dense"]
    with pytest.raises(RuntimeError, match="dense: RuntimeError: illegal memory access; the device no longer answers"):
        command.main(arguments)
    rows = json.loads(path.read_text())["cells"]
    assert [(row["n"], row["peer"], row["seconds"]) for row in rows] == [(16, "ours", None), (16, "dense", None)]
    assert all("dense: RuntimeError: illegal memory access" in row["reason"] for row in rows)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "gemm", lambda case: lambda: 1e-9)
        patch.setattr(measure, "cpu_extra_mib", lambda case, peer: 1.5)
        command.main(arguments)  # goes on with the next case
    assert [row["n"] for row in json.loads(path.read_text())["cells"] if row["seconds"]] == [24, 24]


def test_a_graph_needs_a_gpu(quick):
    with pytest.raises(SystemExit, match="--graph: expected --device cuda, got cpu"):
        command.main(["--device", "cpu", "--graph", "both"])
    graphs = command.plan(command.parse(["--device", "cuda", "--n", "64", "--graph", "both"]))
    assert [case.graph for case, _ in graphs] == [False, True]
    assert graphs[1][0].title.endswith("CUDA graph")


def test_sampled_lines_are_those_of_the_oracle():
    leaves = cases.build(cases.Case("cpu", "fp64", 37, 37, 19, logit_scale=17.0)).leaves
    lhs, rhs, scale = leaves
    picked = torch.tensor([0, 5, 36])
    logits = (scale * lhs @ rhs.T).detach()
    row, col = logits.logsumexp(dim=1), logits.logsumexp(dim=0)
    for a in (0.5, 0.2):
        found = oracle.sampled_gradients(*leaves, picked, a, row, col)
        _, dlhs, drhs, _ = oracle.loss_and_gradients(*leaves, a)
        for got, want in zip(found, (row, col, dlhs, drhs), strict=True):
            assert relative_error(got.detach(), want[picked].detach()) < 1e-12
    found = oracle.sampled_sigmoid_gradients(*leaves, picked, cases.LOGIT_BIAS)
    _, dlhs, drhs, _ = oracle.sigmoid_loss_and_gradients(*leaves, cases.LOGIT_BIAS)
    for got, want in zip(found, (dlhs, drhs), strict=True):
        assert relative_error(got, want[picked]) < 1e-12


def test_a_wrong_line_shows_in_the_sample(quick):
    case = cases.Case("cpu", "fp32", 48, 48, 16)
    right, inputs = peers.PEERS["ours"](case), cases.build(case)
    picked = torch.arange(0, 48, 3)
    exact = [g[picked] for g in oracle.loss_and_gradients(*inputs.leaves, 0.5)[1:3]]
    found = measure.sampled_errors(right, inputs, (picked, exact, {"row statistics": 0.0}))
    assert max(found["lhs"], found["rhs"]) < 1e-5
    assert (found["row statistics"], found["sampled lines"]) == (0.0, 16)
    wrong = measure.sampled_errors(lambda x: right(x) + 1e-2 * x.rhs[0][3].sum(), inputs, (picked, exact, {}))
    assert wrong["rhs"] > 1e-3 > 1e-5 > wrong["lhs"]


@pytest.mark.parametrize("loss", cases.LOSSES)
def test_open_clip_s_losses_need_no_more_than_torch(quick, loss, monkeypatch):
    """Beside a torch without torchvision, its file of losses is all that is needed; without the package its cell says so."""

    def fails():
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(peers, "import_open_clip", fails)
    case = cases.Case("cpu", "fp32", 40, 40, 16, logit_scale=10.0, loss=loss)
    names = ["open_clip", *["open_clip_compiled"] * (loss == "softmax")]
    for row in measure.cell_rows(case, names, 1, error=True):
        assert max(row["error"].values()) < 1e-5, row
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    (row,) = measure.cell_rows(case, ["open_clip"], 1, error=True)
    assert row["reason"] == "cannot be imported: open_clip is not installed"


def test_memeff_s_cell_says_why_it_is_empty(quick):
    softmax, sigmoid = (
        measure.cell_rows(cases.Case("cpu", "fp32", 16, 16, 8, loss=loss), ["memeff"], 1, error=False)
        for loss in cases.LOSSES
    )
    assert softmax[0]["reason"] == "unsupported device: cpu"
    assert sigmoid[0]["reason"] == "has no sigmoid loss"


def test_errors_show_a_wrong_gradient(quick, monkeypatch):
    case = cases.Case("cpu", "fp32", 48, 48, 16)
    right = peers.PEERS["ours"](case)
    monkeypatch.setitem(peers.PEERS, "ours", lambda case: lambda x: right(x) + 1e-3 * x.lhs.sum())
    (row,) = measure.cell_rows(case, ["ours"], 1, error=True)
    assert row["error"]["lhs"] > 1e-3 > 1e-5 > row["error"]["rhs"]


def test_failures_are_results(quick, monkeypatch):
    def fails(error):
        def make(case):
            def loss(inputs):
                raise error

            return loss

        return make

    def fails_later(case):
        right, calls = peers.PEERS["dense"](case), iter(range(8))
        return lambda inputs: (
            right(inputs) if next(calls, None) is not None else fails(MemoryError("late"))(case)(inputs)
        )

    class Killed(Exception):  # as a compiler's own, no RuntimeError
        pass

    case = cases.Case("cpu", "fp32", 16, 16, 8)
    monkeypatch.setitem(peers.PEERS, "cut_cross_entropy", fails_later)
    monkeypatch.setitem(peers.PEERS, "linear_cross_entropy", fails(Killed("out of registers")))
    monkeypatch.setitem(peers.PEERS, "liger", fails(torch.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setitem(peers.PEERS, "inf_cl", fails(RuntimeError("no kernel\nfor this")))
    monkeypatch.setattr(measure, "available_gib", lambda: 1e-9)
    rows = {
        row["peer"]: row for row in measure.cell_rows(case, ["ours", "liger", "inf_cl", "open_clip"], 1, error=True)
    }
    assert rows["liger"]["reason"] == "out of memory"
    assert rows["inf_cl"]["reason"] == "RuntimeError: no kernel"
    assert rows["open_clip"]["reason"].startswith("out of memory: its logits need")
    assert rows["ours"]["seconds"]


def test_a_long_step_is_measured_once_and_has_no_rate(quick, monkeypatch):
    monkeypatch.setattr(measure, "LONG_SECONDS", 0.0)
    (row,) = measure.cell_rows(cases.Case("cpu", "fp32", 48, 48, 16), ["ours"], 3, error=False)
    assert len(row["seconds"]) == 1
    assert row["tflops"] > 0
    assert "of_gemm" not in row


def test_a_figure_and_tables_come_from_a_result_file(tmp_path):
    def cell(peer, seconds, **changes):
        case = replace(cases.Case("cpu", "fp32", 256, 256, 512), **changes)
        over = {"open_clip": 2.0} if peer == "ours" else None
        return {**case.as_dict(), "peer": peer, "version": "1", "seconds": [seconds] * 3, "reason": None, "over": over,
                "tflops": 1.0, "of_gemm": 0.9, "gemm_tflops": 0.2, "extra_mib": 10.0, "error": {"loss": 1e-7}}  # fmt: skip

    cells = [cell(p, 0.1 * n, n=n, m=n) for n in (256, 512) for p in ("ours", "open_clip")]
    cells += [
        cell("ours", 0.1, d=64),
        cell("ours", 0.1, fields=4),
        cell("ours", 0.1, ids=True),
        cell("ours", 0.1, logit_scale=1.0),
    ]
    once = cell("ours", 0.1, n=1024, m=1024) | {"seconds": [200.0], "over": {}}
    del once["of_gemm"]
    cells.append(once)
    machine = {"threads": 2, "cpu": "a CPU", "capability": "AVX2", "torch": "2", "gpu": None}
    result = {"cells": cells, "date": "2026-01-01", "machine": machine, "versions": {"ours": "1", "liger": None}}
    report.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "| ClipLoss, fp32 | 512 | 51.2 s | 51.2 s | 2.00x | 6.0 N²D | 90% | 10 MiB | 10 MiB |" in report.curve_table(
        result
    )
    one = tmp_path / "one.png"
    report.draw(result | {"cells": cells[:1]}, one)
    assert not one.exists()  # one case has no curve; its table is all there is
    text = report.bench_readme({"run.json": result})
    assert "## run" in text
    assert "N = 256, D = 64" in text
    assert "| gcl_kernels | 51.2 s | 51.2 s | 3 | +0% +0% | 1 | 90% |  | 10 MiB | 1.0e-07 |  |  |  |" in text
    # A step that was measured once has neither a spread nor a rate.
    assert "| gcl_kernels | 200 s | 200 s | 1 |  | 1 |  |  | 10 MiB | 1.0e-07 |  |  |  |" in text
    assert "| ClipLoss, fp32 | 1,024 | 200 s | not run |  | 6.0 N²D |  | 10 MiB |  |" in report.curve_table(result)
    assert report.read(tmp_path / "absent.json") == {"cells": []}


def test_the_curves_have_rows_of_every_loss_dtype_and_option(tmp_path):
    cells = []
    for case, names in cases.curves("cpu"):
        for peer in names:
            over = {"open_clip": 0.5 if case.n == 64 else 2.0} if peer == "ours" and "open_clip" in names else None
            mib = 5.0 if case.n > 16_384 else case.n / 64
            cells.append({**case.as_dict(), "peer": peer, "version": "1", "seconds": [1e-4 * case.n, 2e-4 * case.n], "over": over,
                          "reason": None, "tflops": 1.0, "of_gemm": 0.9, "gemm_tflops": 0.2, "extra_mib": mib})  # fmt: skip
    machine = {"threads": 1, "cpu": "a CPU", "capability": "AVX512", "torch": "2", "gpu": None}
    result = {"cells": cells, "date": "2026-01-01", "machine": machine, "versions": {"ours": "1"}}
    curves = cells_of.series(cells)
    assert list(curves) == [("softmax", "fp32"), ("softmax", "bf16"), ("sigmoid", "fp32"), ("sigmoid", "bf16")]
    assert [len({c["n"] for c in of_curve}) for of_curve in curves.values()] == [11, 4, 4, 4]
    assert {c["option"] for c in cells} == set(cases.OPTIONS)
    table = report.curve_table(result)
    assert "| SigLipLoss, bf16 | 1,024 | 154 ms | 154 ms | 2.00x (noisy) | 6.0 N²D |" in table
    assert "Our extra memory falls above N = 16,384: the workspace budget" in table
    assert "open_clip is faster for ClipLoss in fp32 at N = 64, ClipLoss in bf16 at N = 64" in table
    short = report.short_table(result).splitlines()  # at N = 16,384 both have run, at 65,536 ours alone
    assert short[2:5] == [
        "| extra memory at N = 16,384 | 256 MiB | 256 MiB |",
        "| time at N = 16,384 | 2.46 s | 2.46 s |",
        "| extra memory at N = 65,536 | 5 MiB | 64.0 GiB, calculated |",
    ]
    assert "Up to N = 16,384 ours keeps intermediate results" in short[-1]
    assert "open_clip is faster up to N = 64 (ClipLoss in fp32, ClipLoss in bf16, SigLipLoss in fp32, " in short[-1]
    report.draw_summary(result, tmp_path / "short.png")
    assert (tmp_path / "short.png").stat().st_size > 10_000
    assert "| open_clip.SigLipLoss | 6.4 ms | 9.6 ms | 2 | -33% +33% (noisy) |" in report.bench_readme(
        {"run.json": result}
    )
    report.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert max(case.n for case, _ in cases.curves("cpu", 128)) == 128


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_the_peers_of_an_option_agree_and_others_say_why_not(option):
    case = cases.Case("cpu", "fp64", 24, 24, 8, option=option)
    if option == "pairwise_softplus":
        case = replace(case, loss="sigmoid")
    inputs = cases.build(case)
    ours, dense = (peers.peer(name)(case)(inputs) for name in ("ours", "dense"))
    torch.testing.assert_close(ours, dense)
    if option:
        with pytest.raises(peers.Unsupported, match=f"has no {option}"):
            peers.peer("linear_cross_entropy" if option != "pairwise_softplus" else "open_clip")(case)


def test_one_thread_of_a_cpu_is_timed_by_itself(monkeypatch):
    for threads, expected in ((1, time.thread_time), (2, time.perf_counter)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert measure.clock("cpu") is expected
    assert measure.clock("cuda") is time.perf_counter


def test_the_pages_are_what_the_report_writes():
    results = report.measured()
    assert report.BENCH_README.read_text() == report.bench_readme(results)
    readme = report.README.read_text()
    assert report.BEGIN in readme
    assert readme == report.with_figures(readme, results[report.CURVES])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "many"], "expected numbers separated by commas, got 'many'"),
        (["--dtype", "fp8"], "expected among fp64"),
        (["--n", "-1"], "expected numbers >= 0"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def test_the_microbenchmarks_run(monkeypatch):
    """Each once, at a size that takes no time; a name that the backends no longer have fails here."""
    from bench import test_torch_backend as suite

    monkeypatch.setattr(suite, "N", 96)
    inputs = cases.build(cases.Case("cpu", "fp32", 96, 96, 32))
    problem = inputs.lhs.detach(), inputs.rhs[0].detach(), inputs.logit_scale.detach()
    run = lambda function, *args, **kwargs: function(*args, **kwargs)  # noqa: E731
    for step in ("forward", "backward"):
        suite.test_tile(run, problem, step, (64, 32))
    suite.test_workspace_budget(run, problem, 8, monkeypatch)
    suite.test_aggregation(run, 2)
