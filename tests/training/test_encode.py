"""The encoder: each distinct value once, the mask of what is there, and nothing lost on the way."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from gcl_kernels.training import encode
from gcl_kernels.training.encode import FieldEncoder


class Model(torch.nn.Module):
    """Embeds a text by its two tokens and an image by its mean colour; counts what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.visual = torch.nn.Module()
        self.visual.image_size = (2, 3)
        self.seen = []

    def encode_text(self, tokens):
        self.seen.append(len(tokens))
        return tokens.float() * self.weight

    def encode_image(self, images):
        self.seen.append(len(images))
        return images.mean(dim=(2, 3))[:, :2] * self.weight


@pytest.fixture
def encoder():
    def tokenizer(texts):
        return torch.tensor([[len(text), text.count("a")] for text in texts])

    def preprocess(image):
        channels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
        return channels.permute(2, 0, 1).float()

    return FieldEncoder(Model(), tokenizer, preprocess, workers=2)


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (3, 2), (255, 10, 0)).save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_rows_keep_their_order_and_each_value_is_encoded_once(encoder, red):
    fields = {"title": ["aa", "b", "aa", "", "b"], "image": ["", red, red, red, ""]}
    embeddings, mask = encoder(fields, {"title": "txt", "image": "img"})
    assert embeddings["title"][[0, 1, 2, 4]].tolist() == [[2, 2], [1, 0], [2, 2], [1, 0]]
    assert embeddings["image"][[1, 2, 3]].tolist() == [[255, 10]] * 3
    assert mask.tolist() == [[True, False], [True, True], [True, True], [False, True], [True, False]]
    assert encoder.model.seen == [3, 2]


def test_gradients_add_up_over_rows_with_the_same_value(encoder):
    embeddings, _ = encoder({"title": ["aa", "b", "aa"]}, {"title": "txt"})
    embeddings["title"].sum().backward()
    assert encoder.model.weight.grad.item() == 2 * 4 + 1


def test_images_are_read_once_as_long_as_they_fit(encoder, red, monkeypatch):
    loaded = []
    original = encode.load_image
    monkeypatch.setattr(encode, "load_image", lambda path: loaded.append(path) or original(path))
    for _ in range(3):
        encoder({"image": [red]}, {"image": "img"})
    assert len(loaded) == 1
    monkeypatch.setattr(encode, "CACHE_BYTES", 0)
    other = red.replace("red", "other")
    Image.new("RGB", (3, 2)).save(other)
    for _ in range(3):
        encoder({"image": [other]}, {"image": "img"})
    assert loaded == [red, other, other, other]
