"""Real files, where they are at hand: `GCL_KERNELS_DATA` names their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gcl_kernels.training import emoji
from gcl_kernels.training.data import load_image, read_documents, read_pairs
from gcl_kernels.training.evaluate import main as evaluate
from gcl_kernels.training.openclip import TINY_MODEL
from gcl_kernels.training.options import parse_args
from gcl_kernels.training.run import train

DATA = Path(os.environ.get("GCL_KERNELS_DATA", Path(__file__).parents[3] / "shared" / "data"))
CHORUS = DATA / "chorus-icecat" / "gcl"
EMOJI = DATA / "noto-emoji" / "png32"
FIELDS = {"title": "txt", "description": "txt"}


@pytest.mark.skipif(not CHORUS.is_dir(), reason=f"the Chorus ratings are not in {CHORUS}")
def test_chorus_ratings_are_read_whole():
    rows = {}
    for query in (0, 1):
        for document in (0, 1):
            path = CHORUS / f"query_{query}_product_id_{document}.csv"
            pairs = read_pairs(path, {"query": "txt"}, FIELDS, "rating", document_id_key="product_id")
            rows[query, document] = len(pairs)
            assert set(pairs.document_ids) <= read_documents(CHORUS / f"corpus_{document + 1}.json", FIELDS).keys()
            assert (min(pairs.scores), max(pairs.scores)) == (0, 3)
    assert rows == {(0, 0): 1560, (0, 1): 1424, (1, 0): 342, (1, 1): 342}


@pytest.mark.skipif(not CHORUS.is_dir(), reason=f"the Chorus ratings are not in {CHORUS}")
def test_chorus_ratings_are_trained_on(tmp_path):
    result = train(
        parse_args(
            [f"--train-data={CHORUS / 'query_0_product_id_0.csv'}", f"--val-data={CHORUS / 'query_1_product_id_1.csv'}",
             "--left-keys=['query']", "--right-keys=['title','description']", "--weight-key=rating",
             "--doc-id-key=product_id", "--batch-size=64", "--steps=3", f"--logs={tmp_path}"]
        )
    )  # fmt: skip
    (evaluation,) = result.evaluations.values()
    assert len(evaluation.query_ids) == 27
    assert 0 < evaluation.means["NDCG@10"] < 1


@pytest.mark.skipif(not EMOJI.is_dir(), reason=f"the emoji images are not in {EMOJI}")
def test_emoji_images_are_on_white():
    paths = sorted(EMOJI.glob("*.png"))[::100]
    assert len(paths) > 30
    corners = [load_image(path).getpixel((0, 0)) for path in paths]
    assert corners.count((255, 255, 255)) > len(paths) / 2


@pytest.mark.skipif(not CHORUS.is_dir(), reason=f"the Chorus ratings are not in {CHORUS}")
def test_chorus_ratings_are_evaluated_by_the_command_line(tmp_path):
    argv = [f"--test_csv={CHORUS / 'query_1_product_id_1.csv'}", f"--doc-meta={CHORUS / 'corpus_2.json'}"]
    argv += [f"--model_name={TINY_MODEL}", "--weight_key=rating", "--left-keys=query", "--right-keys=title"]
    argv += ["--right-weights=1", "--img-or-txt=txt;txt", f"--output-dir={tmp_path}"]
    assert evaluate(argv) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["queries"] == 27


@pytest.mark.skipif(not EMOJI.is_dir(), reason=f"the emoji images are not in {EMOJI}")
def test_the_emoji_set_is_the_same_for_the_same_seed(tmp_path):
    sources = EMOJI, EMOJI.parent / "emoji-en-US.json", EMOJI.parent / "data-by-emoji.json"
    first, second = (emoji.write(*sources, tmp_path / name) for name in ("a", "b"))
    fields = {"title": "txt", "image": "img"}
    for split, (pairs, corpus) in first.items():
        assert pairs.read_bytes() == second[split][0].read_bytes()
        read = read_pairs(pairs, {"query": "txt"}, fields, "score", document_id_key="document", check_images="exists")
        assert set(read.document_ids) <= read_documents(corpus, fields, check_images="exists").keys()
        assert max(read.scores) == 100
        assert len(read) > 400
