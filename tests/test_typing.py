"""What a type checker says of a user's file: the wrong lines are flagged, and no others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import gcl_kernels

USER = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import gcl_kernels
from gcl_kernels import ClipLoss, GCLLoss, PairwiseLSE, aggregate_fields, gcl_loss, pairwise_logsumexp, score_to_weight
from gcl_kernels import PairwiseSoftplus, SigLipLoss, pairwise_softplus, sigmoid_loss
from gcl_kernels.types import Directions

x, y, scores = torch.randn(4, 3), torch.randn(5, 3), torch.ones(4)
way: Directions = "both"
yes = bool(x.any())
piecewise = GCLLoss("piecewise", knots=[(1, 0.0), (100, 1.0)], process_group="world", rhs_field_weights={"title": 0.1})

assert_type(gcl_loss(x, y, 1.0, directions=way, reduction="none"), Tensor)
assert_type(piecewise(x, {"title": y}, scores, torch.tensor(1.0)), Tensor)
assert_type(GCLLoss(lambda s: s / 10)(x, y, scores, 1.0), Tensor)
assert_type(ClipLoss()(x, y, 1.0), Tensor)
assert_type(ClipLoss()(x, y, 1.0, output_dict=True), dict[str, Tensor])
assert_type(ClipLoss()(x, y, 1.0, output_dict=yes), Tensor | dict[str, Tensor])
assert_type(score_to_weight("log", s_max=5)(scores, scores > 1), Tensor)
assert_type(aggregate_fields({"a": x, "b": x}, {"a": 0.5, "b": 0.5}, backend="torch"), Tensor)
assert_type(pairwise_logsumexp(x, y, 1.0, transport="ring"), PairwiseLSE)
assert_type(gcl_kernels.nt_xent_loss(x, x, 1.0, reduction="none"), Tensor)
assert_type(gcl_kernels.supcon_loss(x, gcl_kernels.positives_of(torch.arange(4))[:, 0], 1.0), Tensor)
assert_type(gcl_kernels.MemoryBank(8, 3, device="cpu").logsumexp(x, 1.0), Tensor)
assert_type(pairwise_softplus(x, y, 1.0, -10.0), PairwiseSoftplus)
assert_type(sigmoid_loss(x, {"title": y}, 1.0, torch.tensor(-10.0)), Tensor)
assert_type(SigLipLoss()(x, y, 1.0, None), Tensor)
assert_type(SigLipLoss()(x, y, 1.0, None, output_dict=True), dict[str, Tensor])
assert_type(gcl_kernels.multi_part_loss({"a": gcl_kernels.Part(x, 0.5), "b": gcl_kernels.Part({"t": x})}, y, 1.0), Tensor)
assert_type(gcl_kernels.multi_part_loss({"a": gcl_kernels.Part(x, weights=scores)}, y, 1.0, logit_bias=-10.0), Tensor)
assert_type(gcl_kernels.__version__, str)

gcl_loss(x, y, 1.0, redction="mean")  # wrong
gcl_loss(x, y, 1.0, directions="bth")  # wrong
gcl_loss(x, y, 1.0, field_mode="all")  # wrong
gcl_loss(x, y, 1.0, transport="tcp")  # wrong
GCLLoss("lgo")  # wrong
GCLLoss(reduction="max")  # wrong
GCLLoss(process_group="wrld")  # wrong
GCLLoss(normalize="sum")  # wrong
GCLLoss()(x, y, 1.0)  # wrong
ClipLoss(worldsize=2)  # wrong
ClipLoss()(x, y, 1.0, outptu_dict=True)  # wrong
gcl_kernels.nt_xent_loss(x, 1.0)  # wrong
gcl_kernels.supcon_loss(x, y, 1.0, reduction="max")  # wrong
SigLipLoss(worldsize=2)  # wrong
sigmoid_loss(x, y, 1.0)  # wrong
gcl_kernels.multi_part_loss({"a": x}, y, 1.0)  # wrong
gcl_kernels.Part(x, wieghts=scores)  # wrong
score_to_weight("lgo")  # wrong
aggregate_fields([x], normalise=True)  # wrong
pairwise_logsumexp(x, y, 1.0, backend="cuda")  # wrong
"""


def test_wrong_lines_of_a_users_file_are_flagged(tmp_path):
    pytest.importorskip("pyright")
    file = tmp_path / "user.py"
    file.write_text(USER)
    installed = Path(gcl_kernels.__file__).parents[1]
    configuration = {"typeCheckingMode": "strict", "pythonVersion": "3.10", "extraPaths": [str(installed)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(configuration))
    result = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    found = json.loads(result.stdout)["generalDiagnostics"]
    flagged = {d["range"]["start"]["line"]: d["message"] for d in found if d["severity"] == "error"}
    wrong = {k for k, line in enumerate(USER.splitlines()) if line.endswith("# wrong")}
    assert set(flagged) == wrong, {k: flagged.get(k, "not flagged") for k in set(flagged) ^ wrong}
