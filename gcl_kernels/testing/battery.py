"""The properties that `check_loss` looks at, each a function of one problem's tensors that raises where it does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import accuracy

DECIDED = 1e-3  # a loss below it
Loss = Callable[..., Any]
Inputs = tuple[Tensor, ...]
QUANTITIES = ("value", "gradient of lhs", "gradient of rhs", "gradient of logit_scale", "gradient of logit_bias")


@dataclass
class Battery:
    """A loss beside a dense one. `judged`: which of QUANTITIES the properties compare; `numbers`: which inputs the loss reads as
    Python numbers."""

    function: Loss
    dense: Loss
    judged: list[int]
    numbers: tuple[int, ...] = ()

    def fresh(self, inputs: Inputs) -> Inputs:
        """Copies of the inputs in their layout, so that one run cannot change what the next one sees."""
        return tuple(x.detach().clone().requires_grad_() for x in inputs)

    def call(self, inputs: Inputs, **options: Any) -> Tensor:
        value = self.function(*inputs, **options)
        if not isinstance(value, Tensor) or value.shape != ():
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"expected a 0-d tensor, got {got}")
        return value

    def run(self, inputs: Inputs, **options: Any) -> list[Tensor]:
        """The value and the gradients of fresh inputs."""
        inputs = self.fresh(inputs)
        return accuracy.value_and_gradients(lambda: self.call(inputs, **options), inputs)

    def accurate(self, inputs: Inputs, **options: Any) -> None:
        def dense(*tensors: Tensor) -> Any:
            return self.dense(*tensors, **options)

        change = change_without_effect(dense, inputs)
        actual, oracle = self.run(inputs, **options), accuracy.in_float64(dense, inputs)
        # Where every row is decided, or terms cancel, results are noise in float64 too. What another form of them does not
        # confirm has no relative error.
        again = accuracy.in_float64(dense, (*change(*(x.detach().double() for x in inputs[:3]), seed=1), *inputs[3:]))
        decided = float(oracle[0].abs()) < DECIDED
        certain = [k for k in self.judged if not decided and agree(again[k], oracle[k])]

        def forms(kept: Callable[[list[Tensor]], list[Tensor]]) -> Iterator[list[Tensor]]:
            yield kept(accuracy.value_and_gradients(lambda: dense(*inputs), inputs))
            for seed in range(1, accuracy.FORMS):
                first = change(*inputs[:3], seed=seed)
                yield kept(accuracy.value_and_gradients(lambda first=first: dense(*first, *inputs[3:]), inputs))

        floor = accuracy.floor(*inputs[:3]) + (floor_of_bias(*inputs) if len(inputs) > 3 else 0.0)
        dtype = next(iter(inputs)).dtype
        if dtype in (torch.float16, torch.bfloat16):
            floor += torch.finfo(dtype).eps  # results may be in half precision, after a rounding or two
        # A value is a difference of logits, whose roundings are not relative to it.
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        of_value = eps * largest_logit(inputs) / max(float(oracle[0].abs()), DECIDED)
        for chosen, limit in (([0], floor + of_value), ([1, 2, 3, 4], floor)):
            found = [k for k in chosen if k in certain]

            def kept(results: list[Tensor], found: list[int] = found) -> list[Tensor]:
                return [results[k] for k in found]

            names = [QUANTITIES[k] for k in found]
            accuracy.assert_as_accurate(kept(actual), forms(kept), kept(oracle), names, limit)
        assert_next_to(actual, oracle, [k for k in self.judged if k not in certain], inputs)

    def duplicates(self, inputs: Inputs) -> None:
        """Two equal pairs. Where there are no others the gradient is 0, of which there is no relative error."""
        order = [0, 0, *range(2, len(inputs[0]))][: len(inputs[0])]
        same = (*(x.detach()[order].requires_grad_() for x in inputs[:2]), *inputs[2:])
        if len(order) > 2:
            self.accurate(same)
        assert all(bool(x.isfinite().all()) for x in self.run(same)), "a result is not finite"

    def swap(self, inputs: Inputs) -> None:
        close(self.call(self.fresh((inputs[1], inputs[0], *inputs[2:]))), self.call(self.fresh(inputs)))

    def permutation(self, inputs: Inputs) -> None:
        order = torch.arange(len(inputs[0]) - 1, -1, -1, device=inputs[0].device)
        value, dlhs, drhs, *_ = self.run(inputs)
        permuted, *moved = self.run((*(x.detach()[order] for x in inputs[:2]), *inputs[2:]))
        close(permuted, value)
        close(moved[0], dlhs[order])
        close(moved[1], drhs[order])

    def strided(self, inputs: Inputs) -> None:
        """Every other column, a transposed matrix, and rows apart."""
        for lay_out in (every_other_column, transposed, rows_apart):
            self.same_in_views(inputs, [lay_out(x.detach()) for x in inputs[:2]])

    def surrounded(self, inputs: Inputs) -> None:
        """Rows that follow one another, in storage that is NaN before and after them."""
        self.same_in_views(inputs, [between_nan(x.detach()) for x in inputs[:2]])

    def same_in_views(self, inputs: Inputs, sides: list[Tensor]) -> None:
        views = (*(x.detach().requires_grad_() for x in sides), *self.fresh(inputs[2:]))
        actual = accuracy.value_and_gradients(lambda: self.call(views), views)
        for a, b in zip(actual, self.run(inputs), strict=True):
            close(a, b)

    def deterministic(self, inputs: Inputs) -> None:
        first = self.run(inputs)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, self.run(inputs), strict=True)), "two runs differ"

    def retained(self, inputs: Inputs) -> None:
        inputs = self.fresh(inputs)
        value = self.call(inputs)
        first, second = (torch.autograd.grad(value, inputs, retain_graph=True, **UNUSED) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            close(b, a)

    def gradcheck(self, inputs: Inputs) -> None:
        """Of small float64 inputs, against differences of the values."""
        chosen = [x.detach().double().requires_grad_(k + 1 in self.judged) for k, x in enumerate(inputs)]
        torch.autograd.gradcheck(
            lambda *tensors: self.call(tuple(x.clone() for x in tensors)), chosen, fast_mode=True, nondet_tol=1e-9
        )

    def unmodified(self, inputs: Inputs) -> None:
        given = self.fresh(inputs)
        accuracy.value_and_gradients(lambda: self.call(given), given)
        assert all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)), "an input was modified"

    def float_scale(self, inputs: Inputs) -> None:
        """The same value where the scale (and bias) are Python numbers."""
        given = self.fresh(inputs)
        value = self.function(*given[:2], *(float(x.detach()) for x in given[2:]))
        close(value, self.call(self.fresh(inputs)))


def agree(a: Tensor, b: Tensor) -> bool:
    return accuracy.relative_error(a, b) < 1e-6


def largest_logit(inputs: Inputs) -> float:
    with torch.no_grad():
        return float((inputs[2] * inputs[0] @ inputs[1].T).abs().max())


def assert_next_to(actual: list[Tensor], oracle: list[Tensor], chosen: list[int], inputs: Inputs) -> None:
    """The absolute errors of some quantities, against roundings of the largest logit."""
    limit = 8 * torch.finfo(inputs[0].dtype).eps * max(1.0, largest_logit(inputs))
    for k in chosen:
        error = float((actual[k].double() - oracle[k].double()).abs().max())
        assert error <= limit, f"{QUANTITIES[k]}: absolute error {error:.3g} is over {limit:.3g}"


UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def reordered(lhs: Tensor, rhs: Tensor, logit_scale: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The features in another order: equal in exact arithmetic for any loss of inner products."""
    order = torch.randperm(lhs.shape[1], generator=torch.Generator().manual_seed(seed)).to(lhs.device)
    return lhs[:, order], rhs[:, order], logit_scale


def stretched(lhs: Tensor, rhs: Tensor, logit_scale: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features in another order and of other lengths: equal for a loss that normalises."""
    return *accuracy.equivalent(lhs, rhs, logit_scale, seed=seed)[:2], logit_scale


def change_without_effect(dense: Loss, inputs: Inputs) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What changes the roundings of a dense loss and nothing else: most where it depends on its logits alone, or normalises."""
    exact = [x.detach().double() for x in inputs]
    with torch.no_grad():
        value = dense(*exact)
        for change in (accuracy.equivalent, stretched):
            changed = dense(*change(exact[0], exact[1], exact[2], seed=1), *exact[3:])
            if accuracy.relative_error(changed, value) < 1e-9:
                return change
    return reordered


def floor_of_bias(lhs: Tensor, rhs: Tensor, scale: Tensor, bias: Tensor) -> float:
    """A bias is rounded once, by what all logits have in common; in half precision so are pairs of a line that are alike."""
    wide = torch.promote_types(lhs.dtype, torch.float32)
    floor = torch.finfo(wide).eps * abs(float(bias.detach()))
    return floor if wide == lhs.dtype else floor + torch.finfo(lhs.dtype).eps / 2 / min(len(lhs), len(rhs)) ** 0.5


def every_other_column(x: Tensor) -> Tensor:
    view = x.new_zeros(len(x), 2 * x.shape[1] + 1)[:, 1::2]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def rows_apart(x: Tensor) -> Tensor:
    view = x.new_zeros(2 * len(x), x.shape[1] + 3)[::2, : x.shape[1]]
    return view.copy_(x)


def between_nan(x: Tensor) -> Tensor:
    view = x.new_full((len(x) + 2 * 64, x.shape[1]), float("nan"))[64:-64]
    return view.copy_(x)


def close(actual: Any, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 5e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_compiled(battery: Battery, inputs: Inputs, backend: str) -> str:
    """Value and gradients under torch.compile as they are eagerly; tells of how many graphs."""
    graphs = 0
    compiler = torch._dynamo.lookup_backend(backend)

    def counted(module: Any, examples: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return compiler(module, examples)

    numbers = {k: float(inputs[k].detach()) for k in battery.numbers}

    def called(*given: Any) -> Any:
        return battery.function(*(numbers.get(k, x) for k, x in enumerate(given)))

    torch._dynamo.reset()
    try:
        compiled = Battery(torch.compile(called, backend=counted, dynamic=False), battery.dense, battery.judged)
        for a, b in zip(compiled.run(inputs), battery.run(inputs), strict=True):
            close(a, b)
    finally:
        torch._dynamo.reset()
    return "one graph" if graphs == 1 else f"{graphs} graphs"


def check_memory(battery: Battery, inputs_of: Callable[[int], Inputs], sizes: tuple[int, int], device: str) -> str:
    """That peak memory of a step grows like N, not N^2, from one size to the next."""
    from .cost import peak_bytes

    peaks = []
    for n in sizes:
        inputs = inputs_of(n)
        battery.run(inputs)  # what is allocated once is no growth
        peaks.append(
            peak_bytes(lambda inputs=inputs: torch.autograd.grad(battery.call(inputs), inputs, **UNUSED), device)
        )
    growth = peaks[1] / peaks[0]
    figures = ", ".join(f"N = {n}: {peak / 2**20:.2f} MiB" for n, peak in zip(sizes, peaks, strict=True))
    ratio = sizes[1] / sizes[0]
    assert growth < ratio**1.5, f"{growth:.1f} times as much for {ratio:g} times the rows: {figures}"
    return f"{growth:.1f} times as much for {ratio:g} times the rows: {figures}"
