"""Gradient caching encodes twice: buffers end as after one encoding, and a second encoding that differs is an error."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

from gcl_kernels import grad_cache, module_state

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
G = torch.randn(24, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Average(nn.Module):
    """A moving average that is part of the result, changed in place or replaced, and a count that is no tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.calls = in_place, 0
        self.register_buffer("mean", torch.zeros(1, 5, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        if self.training:
            self.steps += 1
            mean = x.detach().mean(dim=0, keepdim=True)
            if self.in_place:
                self.mean.mul_(0.9).add_(mean, alpha=0.1)
            else:
                self.mean = 0.9 * self.mean + 0.1 * mean
        return (x - self.mean) * self.calls


class UncountedNorm(nn.Module):
    """Running statistics without the count that nn.BatchNorm1d keeps beside them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))
        self.register_buffer("var", torch.ones(5, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


LAYERS = {
    "BatchNorm": lambda: nn.BatchNorm1d(5, dtype=torch.float64),
    "BatchNorm with a cumulative average": lambda: nn.BatchNorm1d(5, momentum=None, dtype=torch.float64),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5, dtype=torch.float64)),
    "its older form": lambda: nn.utils.spectral_norm(nn.Linear(5, 5, dtype=torch.float64)),
    "average in place": lambda: Average(in_place=True),
    "average replaced": lambda: Average(in_place=False),
    "running statistics without a count": UncountedNorm,
}


def model_with(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5, dtype=torch.float64), LAYERS[layer](), nn.Dropout(0.5))


def encode_in_pieces(model, size):
    return lambda x: torch.cat([model(part) for part in x.split(size)])


class Trainer:
    def __init__(self, model):
        self.models = {"image": model}

    def encode(self, x):
        return self.models["image"](x)


def through_a_closure(model):
    return lambda x: 1.0 * model(x)


def through_a_global(model):
    namespace = {"model": model}
    exec("def helper(x): return model(x)\ndef encode(x): return [helper(y) for y in [x]][0]", namespace)
    return namespace["encode"]


WAYS = {
    "module": lambda model: model,
    "bound method of a module": lambda model: model.forward,
    "closure": through_a_closure,
    "closure in a closure": lambda model: through_a_closure(through_a_closure(model)),
    "global": through_a_global,
    "partial": lambda model: functools.partial(through_a_closure(model)),
    "partial of a module as an option": lambda model: functools.partial(lambda x, net: net(x), net=model),
    "method of another object": lambda model: Trainer(model).encode,
    "wrapped": lambda model: functools.wraps(model.forward)(through_a_closure(model)),
    "torch.no_grad's own decorator": lambda model: torch.enable_grad()(through_a_closure(model)),
}


def trained(layer, wrap, steps=2):
    """Buffers, attributes and gradients after two forwards, and after their backwards."""
    torch.manual_seed(7)
    model = model_with(layer)
    encode = wrap(model)
    states = []
    for _ in range(steps):
        y = encode(X)
        states.append(copy.deepcopy(state(model)))
        (y * G).sum().backward()
        states.append(copy.deepcopy(state(model)))
    return states, [p.grad for p in model.parameters()]


def state(model):
    return {**dict(model.named_buffers()), "calls": torch.tensor(getattr(model[1], "calls", 0))}


def assert_alike(actual, expected):
    (states, gradients), (expected_states, expected_gradients) = actual, expected
    for a, e in zip(states, expected_states, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_buffers_end_as_after_one_encoding_of_each_micro_batch(layer):
    expected = trained(layer, lambda model: encode_in_pieces(model, 8))
    assert_alike(trained(layer, lambda model: grad_cache.cached(model, 8)), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", ["BatchNorm", "average replaced"])
def test_modules_are_found_however_the_encoder_holds_them(way, layer):
    expected = trained(layer, lambda model: encode_in_pieces(model, 8))
    assert_alike(trained(layer, lambda model: grad_cache.cached(WAYS[way](model), 8)), expected)


def test_a_module_among_the_arguments_is_found():
    expected = trained("BatchNorm", lambda model: encode_in_pieces(model, 8))
    encode = grad_cache.cached(lambda net, x: net(x), 8)
    assert_alike(trained("BatchNorm", lambda model: lambda x: encode(model, x)), expected)


def test_running_statistics_of_three_micro_batches():
    norm = nn.BatchNorm1d(8, dtype=torch.float64)
    grad_cache.cached(norm, 8)(X).square().sum().backward()
    assert norm.num_batches_tracked == 3
    mean = torch.zeros(8, dtype=torch.float64)
    for part in X.split(8):
        mean = 0.9 * mean + 0.1 * part.mean(dim=0)
    torch.testing.assert_close(norm.running_mean, mean)


def test_two_encoders_of_one_module_and_buffers_of_others_are_left_as_they_are():
    model = nn.BatchNorm1d(8, dtype=torch.float64)
    encode = grad_cache.cached(model, 8)
    a, b = encode(X), encode(2 * X)
    after = copy.deepcopy(model.state_dict())
    (a * b).sum().backward()
    torch.testing.assert_close(model.state_dict(), after)
    assert model.num_batches_tracked == 6


def test_buffers_are_put_back_when_the_second_encoding_fails():
    model = nn.BatchNorm1d(8, dtype=torch.float64)

    def encoder(x):
        y = model(x)
        if torch.is_grad_enabled():
            raise KeyError("of the encoder")
        return y

    y = grad_cache.cached(encoder, 8)(X)
    after = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError, match="of the encoder"):
        y.sum().backward()
    torch.testing.assert_close(model.state_dict(), after)


def test_buffers_that_do_not_change_are_not_kept():
    model = nn.Sequential(nn.Linear(8, 5, dtype=torch.float64), nn.BatchNorm1d(5, dtype=torch.float64))
    model.register_buffer("table", torch.zeros(100, 100))
    modules = module_state.modules_of(model)
    before = module_state.state_of(modules)
    model(X)
    after = module_state.state_of(modules, before)
    names = {after[key].name for key in module_state.changed(before, after)}
    assert names == {"running_mean", "running_var", "num_batches_tracked"}


NOISE = {
    "numpy": np.random.default_rng(0).uniform,
    "random": random.Random(0).random,
    "a generator of its own": lambda generator=torch.Generator(): float(torch.rand((), generator=generator)),  # noqa: B008
}


@pytest.mark.parametrize("kind", NOISE)
def test_random_numbers_that_are_not_torch_s_are_an_error(kind):
    model, noise = nn.Linear(8, 5), NOISE[kind]
    y = grad_cache.cached(lambda x: model(x) * (1 + noise()), 8)(X.float())
    with pytest.raises(RuntimeError, match=r"got result of rows 0 to 7 .* not torch"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_arguments_and_modes_that_change_in_between_are_an_error(dtype):
    def weights(model, x):
        torch.optim.SGD(model.parameters(), lr=0.3).step()

    def arguments(model, x):
        x[20] += 3

    def mode(model, x):
        model.eval()

    for change in (weights, arguments, mode):
        model, x = nn.Sequential(nn.Linear(8, 5), nn.Dropout(0.1)).to(dtype), X.to(dtype, copy=True)
        model(x).sum().backward()
        y = grad_cache.cached(model, 8)(x)
        change(model, x)
        with pytest.raises(RuntimeError, match="expected the second encoding, in the backward, to equal the first"):
            y.sum().backward()


def test_a_second_encoding_of_another_shape_is_an_error():
    model = nn.Linear(8, 5, dtype=torch.float64)
    y = grad_cache.cached(lambda x: [model(x), x][: 1 if torch.is_grad_enabled() else 2], 8)(X)[0]
    with pytest.raises(
        RuntimeError, match=r"expected \[\('result\[0\]', .* from the second encoding as from the first"
    ):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rounding_and_overflow_are_no_difference(dtype):
    """As kernels that add up in another order."""
    model, calls = nn.Linear(8, 5).to(dtype), []

    def encoder(x):
        calls.append(1)
        y = model(x)
        y = y * (1 + 2 * torch.finfo(dtype).eps * (len(calls) % 2))
        return torch.where(x[:, :1] > 1, torch.tensor(float("inf"), dtype=dtype), y)

    y = grad_cache.cached(encoder, 8)(X.to(dtype))
    assert y.isinf().any()
    y.sum().backward()
    assert model.weight.grad.any()
