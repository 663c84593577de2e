"""What the tests of the search page are answered from."""

from __future__ import annotations

import json

import torch
from PIL import Image

from gcl_kernels.training.checkpoint import OURS
from gcl_kernels.training.openclip import TINY_MODEL, create_model

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SLASHED = "a/../b ?#<b> 100%"
OPTIONS = {
    "model": TINY_MODEL, "left_keys": ["query"], "right_keys": ["title", "image"], "left_weights": [1.0],
    "right_weights": [0.3, 0.7], "img_or_txt": [["txt"], ["txt", "img"]], "context_length": None,
    "weight_key": "score", "doc_id_key": "id",
}  # fmt: skip


def write(folder):
    """A corpus of six documents, grades, and the checkpoints one.pt and two.pt of random weights."""
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"{name}.png")
    Image.new("RGB", (900, 300), "green").save(folder / "large.jpg")
    (folder / "page.png").write_text("<html><script>document.title='owned'</script>")
    (folder / "secret.png").write_bytes((folder / "red.png").read_bytes())
    documents = {
        "1": {"title": "a red shoe", "image": "red.png", "brand": "acme"},
        "2": {"title": "a blue shoe", "image": "blue.png", "brand": "other"},
        "3": {"title": HOSTILE, "brand": "acme"},
        "4": {"title": "a page", "image": "page.png", "brand": HOSTILE},
        "5": {"title": "a green hat", "image": "large.jpg", "brand": "acme"},
        SLASHED: {"title": "a strange name", "image": "red.png"},
    }
    (folder / "corpus.json").write_text(json.dumps(documents))
    (folder / "judged.json").write_text(
        json.dumps({"Red  shoe_{!@#~}_": {"1": 100, "2": 30}, "elsewhere": {"9": 1}, HOSTILE: {"3": 7}})
    )
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        state = create_model(TINY_MODEL)[0].state_dict()
        torch.save({"state_dict": state, OURS: {"options": OPTIONS, "step": 7}}, folder / f"{name}.pt")
    return folder
