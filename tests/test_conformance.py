"""check_loss passes our losses, and fails broken ones in the row that names what is broken."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from gcl_kernels import SigLipLoss, backends, gcl_loss, testing
from gcl_kernels.testing import __main__ as command
from gcl_kernels.testing import cost, dense
from gcl_kernels.testing.conformance import drawn

QUICK = {"memory_sizes": None, "compiler": None}


@pytest.fixture(autouse=True)
def small_tiles():
    """So that memory of small batches shows how it grows."""
    with backends.settings(tile=(64, 64), workspace_mib=0.1):
        yield


def failed(function, **options):
    report = testing.check_loss(function, **{**QUICK, "draws": 4, **options})
    assert [row.name for row in report.rows if row.result == "fail"] == list(report.failed)
    return set(report.failed)


def sigmoid_loss(lhs, rhs, scale, bias):
    return SigLipLoss()(lhs, rhs, scale, bias)


def test_our_loss_passes_every_row():
    report = testing.check_loss(gcl_loss, memory_sizes=(256, 512))
    assert {row.result for row in report.rows} == {"pass"}, str(report)
    assert {row.name: row.detail for row in report.rows}["torch.compile"] == "one graph"


def test_our_sigmoid_loss_passes():
    report = testing.check_loss(sigmoid_loss, "siglip", memory_sizes=(256, 512), compiler=None)
    results = {row.name: row.result for row in report.rows}
    assert report.passed, str(report)
    assert results["gradient of logit_bias"] == "pass"
    assert results["weights"] == results["labels"] == results["false-negative ids"] == "not offered"


# Broken losses. What is right in them is ours, which stores no N x N.


def wrong_scale_gradient(lhs, rhs, scale):
    return gcl_loss(lhs, rhs, scale.detach() if isinstance(scale, torch.Tensor) else scale)


def forgotten_ids(lhs, rhs, scale, *, lhs_ids=None, rhs_ids=None):
    return gcl_loss(lhs, rhs, scale)


def forgotten_weights(lhs, rhs, scale, *, weights=None):
    return gcl_loss(lhs, rhs, scale)


def forgotten_labels(lhs, rhs, scale, *, labels=None):
    return gcl_loss(lhs, rhs, scale)


class HalfSum(torch.autograd.Function):
    """A running sum in the dtype of what is added."""

    @staticmethod
    def forward(ctx, terms):
        ctx.shape = terms.shape
        total = terms.new_zeros(terms.shape[:1])
        for column in terms.unbind(1):
            total = total + column
        return total

    @staticmethod
    def backward(ctx, g):
        return g[:, None].expand(ctx.shape)


def half_accumulation(lhs, rhs, scale):
    if lhs.dtype != torch.bfloat16:
        return gcl_loss(lhs, rhs, scale)

    def one(logits):
        top = logits.amax(1, keepdim=True).detach()
        return (HalfSum.apply((logits - top).exp()).log() + top[:, 0] - logits.diagonal()).mean()

    logits = scale * lhs @ rhs.T
    return (one(logits) + one(logits.T)) / 2


def all_pairs_in_memory(lhs, rhs, scale):
    return dense.clip(lhs, rhs, scale)


def nondeterministic(lhs, rhs, scale):
    value = gcl_loss(lhs, rhs, scale)
    return value + value.detach() * torch.finfo(value.dtype).eps * torch.randint(0, 4, ())


def mutates(lhs, rhs, scale):
    value = gcl_loss(lhs.clone(), rhs.clone(), scale)
    lhs.data.zero_()
    return value


def ignores_strides(lhs, rhs, scale):
    lhs = torch.as_strided(lhs, lhs.shape, (lhs.shape[1], 1), lhs.storage_offset())
    return gcl_loss(lhs, rhs, scale)


def reads_beyond(lhs, rhs, scale):
    """Rows in multiples of 4, as a kernel without a bound on its rows reads them; what is beyond counts 0 times."""
    value = gcl_loss(lhs, rhs, scale)
    start, size = lhs.storage_offset() + lhs.numel(), 4 * lhs.shape[1]
    if lhs.is_contiguous() and lhs.untyped_storage().nbytes() >= (start + size) * lhs.element_size():
        value = value + 0 * torch.as_strided(lhs.detach(), (size,), (1,), start).sum()
    return value


def columns_only(lhs, rhs, scale):
    """Where it is held against one direction, which is no symmetric loss, it is right."""
    return gcl_loss(lhs, rhs, scale, directions="lhs_to_rhs")


def used_up(lhs, rhs, scale):
    return UsedUp.apply(lhs, rhs, torch.as_tensor(scale, dtype=lhs.dtype))


class UsedUp(torch.autograd.Function):
    """Hands out the gradient it has stored, then what the buffer holds."""

    @staticmethod
    def forward(ctx, lhs, rhs, scale):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (lhs, rhs, scale)]
            value = gcl_loss(*inputs)
        ctx.stored = torch.autograd.grad(value, inputs)
        return value.detach()

    @staticmethod
    def backward(ctx, g):
        results = tuple(g * x for x in ctx.stored)
        for x in ctx.stored:
            x.zero_()
        return results


def overflows(lhs, rhs, scale):
    """As where no maximum is taken off the logits: at a scale of 100 the exponential overflows."""
    value = gcl_loss(lhs, rhs, scale)
    return value + 0 * torch.as_tensor(scale, dtype=torch.float32).detach().exp()


def unit_vectors_only(lhs, rhs, scale):
    """A fixed reference of the scale, which bounds the logits of unit vectors only."""
    value = gcl_loss(lhs, rhs, scale)
    return value + 0 * (scale * ((lhs * lhs).detach().float().sum(1).max() - 1)).exp()


def no_ragged(lhs, rhs, scale):
    if len(lhs) > 64 and len(lhs) % 64:
        raise ValueError("expected rows in multiples of 64")
    return gcl_loss(lhs, rhs, scale)


def by_order(lhs, rhs, scale):
    """Other numbers for other orders of the batch."""
    return gcl_loss(lhs, rhs, scale) * (1.0 if lhs[0, 0] >= lhs[-1, 0] else 1 + 1e-3)


def nan_on_duplicates(lhs, rhs, scale):
    return gcl_loss(lhs, rhs, scale) * (float("nan") if len(lhs.detach().unique(dim=0)) < len(lhs) else 1.0)


def tensor_scale_only(lhs, rhs, scale):
    return gcl_loss(lhs, rhs, scale.clone())


@pytest.mark.parametrize("name", ["no_module:f", "gcl_kernels", "gcl_kernels:nothing"])
def test_a_name_that_leads_nowhere(name, capsys):
    assert command.main([name]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("loss", "row"),
    [
        (wrong_scale_gradient, "gradient of logit_scale"),
        (forgotten_ids, "false-negative ids"),
        (forgotten_weights, "weights"),
        (forgotten_labels, "labels"),
        (half_accumulation, "accuracy, bfloat16"),
        (all_pairs_in_memory, "memory linear in N"),
        (nondeterministic, "determinism"),
        (mutates, "inputs unmodified"),
        (ignores_strides, "strided inputs"),
        (reads_beyond, "NaN beside the inputs"),
        (used_up, "backward twice"),
        (overflows, "scale 100"),
        (unit_vectors_only, "features of any length"),
        (no_ragged, "ragged sizes"),
        (nan_on_duplicates, "duplicated rows"),
        (tensor_scale_only, "scale as a float"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_fault_fails_the_row_that_names_it(loss, row):
    draws = {half_accumulation: 8, no_ragged: 0}.get(loss, 3)
    sizes = (256, 512) if row.startswith("memory") or loss is mutates else None
    assert failed(loss, draws=draws, memory_sizes=sizes) == {row}


def another_loss(lhs, rhs, scale, *, weights=None):
    return 2 * gcl_loss(lhs, rhs, scale)


def test_what_nothing_right_is_left_for_is_not_judged():
    report = testing.check_loss(another_loss, **QUICK, draws=0)
    assert len(report.failed) == 4
    results = {row.name: row.result for row in report.rows}
    for name in ("accuracy, bfloat16", "scale 100", "duplicated rows", "weights", "gradcheck"):
        assert results[name] == "not judged"


def test_faults_that_show_in_several_rows():
    assert "permutation equivariance" in failed(by_order)
    assert {"value", "swap symmetry"} <= failed(columns_only)
    assert failed(columns_only, against="rows") == set()


def off_by_a_rank(lhs, rhs, scale, *, process_group=None):
    """Averaged over ranks it is the loss of the rank's own pairs."""
    return gcl_loss(lhs, rhs, scale)


def graph_of(lhs, rhs, scale):
    """Under torch.compile it is another loss."""
    return gcl_loss(lhs, rhs, scale) * (2.0 if torch.compiler.is_compiling() else 1.0)


def test_compile_and_ranks_can_fail():
    assert failed(graph_of, compiler="aot_eager", draws=0) == {"torch.compile"}
    report = testing.check_loss(off_by_a_rank, **QUICK, draws=0)
    assert report.failed == ("gradient over two ranks",)
    assert "value is" in report.rows[-1].detail


def test_a_loss_that_other_processes_cannot_import_is_not_judged_over_ranks():
    def local(lhs, rhs, scale, *, process_group=None):
        return gcl_loss(lhs, rhs, scale, process_group=process_group)

    row = testing.check_loss(local, **QUICK, draws=0).rows[-1]
    assert (row.name, row.result) == ("gradient over two ranks", "not judged")
    assert "cannot be pickled" in row.detail


def test_what_is_not_offered():
    results = {row.name: row.result for row in testing.check_loss(columns_only, "rows", **QUICK, draws=0).rows}
    assert results["swap symmetry"] == "not offered"
    report = testing.check_loss(wrong_scale_gradient, constant=["logit_scale"], **QUICK, draws=0)
    assert report.passed
    assert {row.name: row.result for row in report.rows}["gradient of logit_scale"] == "not offered"


def fails_from(n):
    def loss(lhs, rhs, scale):
        return gcl_loss(lhs, rhs, scale) * (1.1 if len(lhs) >= n else 1.0)

    return loss


@pytest.mark.parametrize("n", [3, 16, 100])
def test_the_smallest_drawn_problem_that_fails_is_told(n):
    row = testing.check_loss(fails_from(n), **QUICK, draws=30).rows[0]
    smallest = min((p.n * p.n * p.d, p.n) for p in drawn(30, 0) if p.n >= n)[1]
    assert row.detail.startswith(f"N = {smallest}, "), row.detail


def test_peak_bytes_counts_exactly():
    x = torch.ones(256, 256)
    assert cost.peak_bytes(lambda: x + x) == x.nbytes
    assert cost.peak_bytes(lambda: (x + x) * (x * 2)) == 3 * x.nbytes


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="against: expected one of clip"):
        testing.check_loss(dense.clip, "other")
    with pytest.raises(ValueError, match="constant: expected names among lhs"):
        testing.check_loss(dense.clip, constant=["temperature"])


def test_the_dense_losses_are_those_of_open_formulas():
    g = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(5, 3, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    s, labels = 7 * x @ y.T, torch.arange(5)
    torch.testing.assert_close(dense.clip(x, y, 7.0), (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2)
    signs = 2 * torch.eye(5) - 1
    expected = torch.log1p((-signs * (s - 2)).exp()).sum() / 5
    torch.testing.assert_close(dense.siglip(x, y, 7.0, -2.0), expected)
    views = torch.cat((x, y))
    e = (7 * views @ views.T).exp()
    expected = -(e[range(10), [*range(5, 10), *range(5)]] / (e.sum(1) - e.diagonal())).log().mean()
    torch.testing.assert_close(dense.nt_xent(2 * x, 3 * y, 7.0), expected)


def test_command_writes_what_it_finds(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{command.BEGIN}\nreplaced\n{command.END}\n\nMore.\n")
    names = ["tests.test_conformance:columns_only", "tests.test_conformance:wrong_scale_gradient"]
    quick = ["--draws", "0", "--memory-n", "256", "512", "--compiler", "eager"]
    files = ["--json", str(tmp_path / "rows.json"), "--markdown", str(page)]
    assert command.main([*names, *quick, *files]) == 1
    result = json.loads((tmp_path / "rows.json").read_text())
    assert [loss["title"] for loss in result["losses"]] == names
    rows = {row["name"]: row["result"] for row in result["losses"][1]["rows"]}
    assert (rows["value"], rows["gradient of logit_scale"]) == ("pass", "fail")
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("\n\nMore.\n")
    assert "replaced" not in text
    assert f"torch {torch.__version__}" in text
    assert "| swap symmetry | **no** | yes |" in text
    assert "| swap symmetry | fail |" in capsys.readouterr().out
    page.write_text("no marks")
    assert command.main([names[0], *quick, "--markdown", str(page)]) == 2
    assert "expected a page with the marks" in capsys.readouterr().err


def test_testing_needs_no_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from gcl_kernels import testing\n"
        "assert testing.EDGE_SIZES and testing.check_loss\n"
        "try: testing.problems\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "gcl_kernels[test]"' in done.stdout, done.stderr
