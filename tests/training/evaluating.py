"""A small set of judged pairs with everything in it that can be wrong, and the command that evaluates on it."""

from __future__ import annotations

from gcl_kernels.training.evaluate import main
from gcl_kernels.training.openclip import TINY_MODEL


def evaluate(folder, *more, out="out"):
    return main(
        [f"--test_csv={folder / 'test.csv'}", f"--doc-meta={folder / 'corpus.json'}", f"--model_name={TINY_MODEL}",
         "--weight_key=score_linear", "--left-key", "['query']", "--right-key", "['image_local', 'title']",
         "--img-or-txt", "[['txt'], ['img', 'txt']]", "--left-weight", "[1]", "--right-weight", "[0.9, 0.1]",
         "--context-length", "[[8], [0, 8]]", f"--output-dir={folder / out}", *more]
    )  # fmt: skip


def rewrite(path, old, new):
    path.write_text(path.read_text().replace(old, new))
