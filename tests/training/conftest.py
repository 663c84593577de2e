from __future__ import annotations

import json

import pytest
from PIL import Image


@pytest.fixture
def files(tmp_path):
    for name in ("red", "blue", "green"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "test.csv").write_text(
        "query,product_id,score_linear\nred thing,1,100\nred thing,2,50\nblue thing,2,80\nblue thing,9,90\n"
        "green,3,x\ngreen,3,10\n"
    )
    corpus = {
        "1": {"image_local": "red.png", "title": "a red square"},
        "2": {"image_local": "blue.png", "title": "a blue square"},
        "3": {"image_local": "green.png"},
        "4": {"image_local": "broken.png"},
    }
    (tmp_path / "corpus.json").write_text(json.dumps(corpus))
    return tmp_path
