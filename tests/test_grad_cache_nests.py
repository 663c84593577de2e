"""Gradient caching of encoders with arguments and results of every kind: all rows and gradients, or an error by name."""

import collections
import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from gcl_kernels import grad_cache


@dataclasses.dataclass
class Data:
    features: Any
    extra: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenData:
    features: Any
    extra: Any = None


class Named(NamedTuple):
    features: Any
    extra: Any = None


class ModelOutput(collections.OrderedDict):
    """As in Hugging Face's transformers: items are attributes too, and some methods of a dict are refused."""

    def __init__(self, features, extra=None):
        super().__init__()
        self.features, self.extra = features, extra
        for name in ("features", "extra"):
            if getattr(self, name) is not None:
                super().__setitem__(name, getattr(self, name))

    def update(self, *args, **kwargs):
        raise TypeError("no update")

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        return type(self), (self.features, self.extra)


class ItsOwnDict(dict):
    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class BatchEncoding(collections.UserDict):
    """As in Hugging Face's transformers: the items in `data`, more about each row in an attribute."""

    def __init__(self, data, encodings=None):
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError from None


class Own:
    def __init__(self, x):
        self.x = x


KINDS = [Data, FrozenData, Named, ModelOutput, ItsOwnDict, types.SimpleNamespace]


class Immutable(Mapping):
    def __init__(self, items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


def layer():
    torch.manual_seed(0)
    return nn.Linear(8, 5, dtype=torch.float64)


X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
G = torch.randn(24, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradient(model, features):
    model.zero_grad()
    (features * G).sum().backward()
    return model.weight.grad.clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner", [lambda x: x, lambda x: [(x, None)], lambda x: Data({"x": x})])
def test_results_of_every_kind_keep_their_rows_and_gradients(kind, inner):
    model = layer()
    result = grad_cache.cached(lambda x: kind(features=model(x), extra=inner(2 * model(x))), 5)(X)
    assert type(result) is kind
    features, extra = result.features, result.extra
    assert type(extra) is type(inner(X))
    while not isinstance(extra, torch.Tensor):
        extra = extra.features["x"] if isinstance(extra, Data) else extra[0][0]
    torch.testing.assert_close(features, model(X))
    torch.testing.assert_close(extra, 2 * model(X))
    if isinstance(result, dict):
        assert result["features"] is features
    expected = gradient(model, model(X) + 4 * model(X))
    torch.testing.assert_close(gradient(model, features + 2 * extra), expected)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda y: {y}, "set"),
        (lambda y: (v for v in [y]), "generator"),
        (lambda y: iter([y]), "list_iterator"),
        (lambda y: Own(y), "Own"),
        (lambda y: functools.partial(len, y), "partial"),
        (lambda y: lambda: y, "function"),
        (lambda y: collections.deque([y]), "deque"),
        (lambda y: np.array([y, None], dtype=object)[:1], "array"),
    ],
)
def test_results_that_may_hide_tensors_are_refused_with_their_place(wrap, name):
    model = layer()
    with pytest.raises(TypeError, match=rf"^result\['a'\]\[1\]\.features: expected .* {name}|other objects"):
        grad_cache.cached(lambda x: {"a": [1, Data(wrap(model(x).sum()))]}, 1)(X)


def test_lists_and_arrays_of_rows_are_joined():
    texts = [f"text {k}" for k in range(24)]

    def encoder(x, texts, numbers):
        return X.new_zeros(len(x)), [t.upper() for t in texts], tuple(texts), numbers + 1, [["a", 1]] * len(x)

    zeros, upper, same, numbers, nested = grad_cache.cached(encoder, 5)(X, texts, np.arange(24.0))
    assert len(zeros) == len(nested) == 24
    assert upper == [t.upper() for t in texts]
    assert same == tuple(texts)
    np.testing.assert_array_equal(numbers, np.arange(24.0) + 1)


def test_what_is_the_same_for_every_micro_batch_stays():
    values = [
        None,
        "mean",
        3,
        2.5,
        float("nan"),
        True,
        torch.float32,
        np.float32(1),
        {"a"},
        ["x", "y"],
        (),
        np.array(3),
    ]
    result = grad_cache.cached(lambda x: [x, *values], 5)(X)[1:]
    assert str(result) == str(values)


@pytest.mark.parametrize(
    "of",
    [
        lambda x: str(float(x.sum())), lambda x: float(x.sum()), lambda x: x.sum(), lambda x: list(x.shape), lambda x: x.shape,
        lambda x: [float(x.sum())], lambda x: np.array(float(x.sum())), lambda x: {float(x.sum())},
    ],
)  # fmt: skip
def test_a_value_that_differs_between_micro_batches_is_refused(of):
    with pytest.raises(ValueError, match=r"^result\['of'\]: expected .* the same"):
        grad_cache.cached(lambda x: {"x": x, "of": of(x)}, 5)(X)


def test_results_that_change_their_form_are_refused():
    with pytest.raises(TypeError, match=r"^result\[1\]: expected one type .* NoneType, float"):
        grad_cache.cached(lambda x: (x, None if len(x) == 5 else 1.0), 5)(X)
    with pytest.raises(ValueError, match=r"^result: expected the same entries"):
        grad_cache.cached(lambda x: {f"of {len(x)}": x}, 5)(X)
    with pytest.raises(TypeError, match=r"^result: expected a dense tensor"):
        grad_cache.cached(lambda x: x.to_sparse(), 5)(X)


@pytest.mark.parametrize("of", [lambda x: x @ x.T, lambda x: x[:, : len(x)].numpy()])
def test_rows_whose_shape_depends_on_the_micro_batch_are_refused(of):
    with pytest.raises(ValueError, match=r"^result\[1\]: expected rows of one shape .*, got \(5, 5\), \(4, 4\)"):
        grad_cache.cached(lambda x: (x, of(x)), 5)(X)


def test_complex_results_have_gradients():
    model = layer()
    g = torch.fft.fft(G.to(torch.complex128))

    def gradient_of(y):
        model.zero_grad()
        (torch.fft.fft(y) * g).sum().abs().backward()
        return model.weight.grad.clone()

    actual = grad_cache.cached(lambda x: torch.fft.fft(model(x)), 5)(X)
    expected = gradient_of(model(X))
    model.zero_grad()
    (actual * g).sum().abs().backward()
    torch.testing.assert_close(model.weight.grad, expected)


def rows_met(argument, take=lambda argument: argument, **options):
    """What reaches the encoder of `argument` in micro-batches of 5, beside X (24, 8)."""
    met = []

    def encoder(x, argument):
        met.append(take(argument))
        return x

    with torch.no_grad():
        grad_cache.cached(encoder, 5)(X, argument, **options)
    return met


TEXTS = [f"text {k}" for k in range(24)]
STARTS = range(0, 24, 5)


@pytest.mark.parametrize(
    "argument",
    [
        TEXTS, tuple(TEXTS), [Data(k) for k in range(24)], [None, *TEXTS[1:]], [[k] * k for k in range(24)], np.array(TEXTS),
        [torch.tensor(k) for k in range(24)], [object() for k in range(24)], np.arange(24),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda a: a, lambda a: a),
        (lambda a: {"a": {"b": a, "c": None}}, lambda a: a["a"]["b"]),
        (lambda a: Data([a, "x"]), lambda a: a.features[0]),
        (lambda a: BatchEncoding({"a": X}, a), lambda a: a._encodings),
        (lambda a: BatchEncoding({"a": a}), lambda a: a.a),
        (lambda a: Immutable({"a": a}), lambda a: a["a"]),
    ],
)
def test_arguments_as_long_as_the_batch_are_cut(argument, wrap, unwrap):
    met = rows_met(wrap(argument), unwrap)
    assert [type(part) for part in met] == [type(argument)] * 5
    assert [list(part) for part in met] == [list(argument[k : k + 5]) for k in STARTS]


@pytest.mark.parametrize(
    "argument",
    [
        None, "x" * 24, b"x" * 24, 24, 0.5, torch.tensor(3.0), np.array(3), np.float32(2), torch.Size([3]), nn.Linear(2, 2), len,
        torch.float32, ["query", "title"], (224, 224), {"a", "b"}, torch.Generator(), Data("x"), {"a": [1, 2]},
        types.SimpleNamespace(size=3), functools.partial(len), object(),
    ],
)  # fmt: skip
def test_arguments_that_have_no_rows_pass_whole(argument):
    assert all(part is argument for part in rows_met(argument))


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (
            list(range(24)),
            ValueError,
            r"args\[1\]: expected a tensor where numbers belong to the 24 rows, .* list of 24 numbers",
        ),
        ({"a": (0.5,) * 24}, ValueError, r"args\[1\]\['a'\]: expected a tensor .* got a tuple of 24 numbers"),
        (
            iter(TEXTS),
            TypeError,
            r"args\[1\]: expected an argument that can be read twice, got the iterator list_iterator",
        ),
        (range(24), TypeError, r"args\[1\]: expected rows in tensors, .*, got range with 24 rows"),
        (collections.deque(TEXTS), TypeError, r"args\[1\]: expected rows in .*, got deque with 24 rows"),
        ([Own(X)], TypeError, r"args\[1\]\[0\]: expected rows in .*, got Own with 24 rows"),
        ([X[0], X[1]], ValueError, r"one batch size >= 1, got {'args\[0\]': 24, 'args\[1\]\[0\]': 8"),
        (np.zeros(23), ValueError, r"one batch size >= 1, got {'args\[0\]': 24, 'args\[1\]': 23"),
        ({X}, TypeError, r"args\[1\]: expected rows in .*, got set with 24 rows"),
        (X.to_sparse(), TypeError, r"args\[1\]: expected a dense tensor, got one of layout torch.sparse_coo"),
    ],
)
def test_arguments_that_cannot_be_cut_are_refused_by_name(argument, error, message):
    with pytest.raises(error, match=message):
        rows_met(argument)


def test_arguments_by_name_are_cut_too():
    met = []
    with torch.no_grad():
        grad_cache.cached(lambda *, x, texts: met.append(texts) or x, 5)(x=X, texts=TEXTS)
    assert met == [TEXTS[k : k + 5] for k in STARTS]


def test_results_that_are_attrs_objects():
    attrs = pytest.importorskip("attrs")
    kind, model = attrs.make_class("Result", ["features"], frozen=True, slots=True), layer()
    result = grad_cache.cached(lambda x: kind(kind(model(x))), 5)(X)
    assert type(result) is type(result.features) is kind
    torch.testing.assert_close(gradient(model, result.features.features), gradient(model, model(X)))


def test_a_batch_encoding_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": torch.arange(24), "attention_mask": torch.ones(24, 3)})
    met = rows_met(encoding, lambda part: (type(part), part.input_ids.tolist()))
    assert met == [(type(encoding), list(range(k, min(k + 5, 24)))) for k in STARTS]


def test_a_model_output_of_hugging_face():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = layer()
    output = grad_cache.cached(
        lambda x: outputs.BaseModelOutputWithPooling(x[:, None], model(x), hidden_states=(x, 2 * x)), 5
    )(X)
    assert type(output) is outputs.BaseModelOutputWithPooling
    assert output["pooler_output"] is output.pooler_output
    torch.testing.assert_close(output.hidden_states[1], 2 * X)
    torch.testing.assert_close(gradient(model, output.pooler_output), gradient(model, model(X)))
