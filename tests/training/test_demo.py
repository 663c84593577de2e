"""The demo from end to end, at a size for tests."""

from __future__ import annotations

import json
import shlex

from PIL import Image

from gcl_kernels.training.demo import RUNS, main
from gcl_kernels.training.serve import parser, state_of
from gcl_kernels.training.serving.state import Asked
from gcl_kernels.training.splits import SPLITS


def test_the_demo_trains_twice_and_leaves_a_table_and_a_picture(tmp_path, capsys):
    assert main(["--smoke", f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    table = out[out.index("test set") : out.index("score-to-weight")]
    assert "derived relevance" in out
    for split in SPLITS:
        assert split in table
    for name in ("random", *RUNS):
        assert sum(name in line.split()[:4] for line in table.splitlines()) >= len(SPLITS)
    with Image.open(tmp_path / "rankings.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    options = [json.loads((tmp_path / "logs" / name / "results.json").read_text())["options"] for name in RUNS]
    different = {key for key in options[0] if options[0][key] != options[1][key]}
    assert different == {"name", "score_to_weight"}
    assert [of_run["score_to_weight"] for of_run in options] == list(RUNS.values())
    # The last line opens the search page on both models.
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "gcl_kernels.training.serve"]
    state = state_of(parser().parse_args([*command[3:], f"--folder={tmp_path / 'vectors'}"]))
    about = state.about()
    assert [model["name"] for model in about["models"]] == list(RUNS)
    found = state.search([Asked("b", about["queries"][0], k=100)])[0]
    assert max(of["grade"] for of in found["results"]) > 0
