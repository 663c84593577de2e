"""`check_loss`: a battery of properties of a contrastive loss `function(lhs, rhs, logit_scale[, logit_bias])`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import accuracy

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (2, 3), (7, 5), (33, 17))  # smallest first: the first to fail is the smallest
Loss = Callable[..., Any]


def clip(lhs: Tensor, rhs: Tensor, scale: Any) -> Tensor:
    """The mean over rows and columns of cross entropies with the diagonal as labels, halved."""
    logits, labels = scale * lhs @ rhs.T, torch.arange(len(lhs), device=lhs.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def siglip(lhs: Tensor, rhs: Tensor, scale: Any, bias: Any) -> Tensor:
    """-sum logsigmoid(z (scale lhs @ rhs.T + bias)) / N, z = 1 on the diagonal and -1 elsewhere."""
    signs = 2 * torch.eye(len(lhs), dtype=lhs.dtype, device=lhs.device) - 1
    return -F.logsigmoid(signs * (scale * lhs @ rhs.T + bias)).sum() / len(lhs)


@dataclass(frozen=True)
class Row:
    """A property, whether it holds, and the smallest problem where it does not."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """The `rows` of `check_loss`. `passed` where every row is."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        lines = ["| property | result | smallest failing case |", "|---|---|---|"]
        for row in self.rows:
            detail = " ".join(row.detail.split()).replace("|", "/")
            lines.append(f"| {row.name} | {'pass' if row.passed else 'fail'} | {detail} |")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Battery:
    function: Loss
    dense: Loss
    biased: bool
    device: str

    def draw(self, n: int, d: int, dtype: torch.dtype, scale: float = 14.3) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(n)
        sides = [F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]
        scalars = [torch.tensor(v, dtype=torch.promote_types(dtype, torch.float32)) for v in (scale, -10.0)]
        scalars = [s.to(dtype) for s in scalars]
        return tuple(x.to(self.device).requires_grad_() for x in (*sides, *scalars[: 1 + self.biased]))

    def run(self, inputs: tuple[Tensor, ...], function: Loss | None = None) -> list[Tensor]:
        return accuracy.value_and_gradients(lambda: (function or self.function)(*inputs), inputs)

    def accurate(self, inputs: tuple[Tensor, ...]) -> None:
        def forms() -> Iterator[list[Tensor]]:
            yield self.run(inputs, self.dense)
            for seed in range(1, accuracy.FORMS):
                yield accuracy.value_and_gradients(
                    lambda s=seed: self.dense(*accuracy.equivalent(*inputs[:3], seed=s), *inputs[3:]), inputs
                )

        names = ("loss", "dlhs", "drhs", "dscale", "dbias")[: 1 + len(inputs)]
        floor = accuracy.floor(*inputs[:3]) + (_floor_of_bias(*inputs) if self.biased else 0.0)
        accuracy.assert_as_accurate(self.run(inputs), forms(), accuracy.in_float64(self.dense, inputs), names, floor)

    def duplicates(self, inputs: tuple[Tensor, ...]) -> None:
        """Two equal pairs. Where there are no others the gradient is 0, of which there is no relative error."""
        order = [0, 0, *range(2, len(inputs[0]))][: len(inputs[0])]
        sides = (x.detach()[order].requires_grad_() for x in inputs[:2])
        same = (*sides, *inputs[2:])
        if len(order) > 2:
            self.accurate(same)
        assert all(bool(x.isfinite().all()) for x in self.run(same)), "a result is not finite"

    def swap(self, inputs: tuple[Tensor, ...]) -> None:
        value = self.function(*inputs)
        _close(self.function(inputs[1], inputs[0], *inputs[2:]), value)

    def permutation(self, inputs: tuple[Tensor, ...]) -> None:
        order = torch.arange(len(inputs[0]) - 1, -1, -1, device=inputs[0].device)
        value, dlhs, *_ = self.run(inputs)
        moved = tuple(x.detach()[order].requires_grad_() for x in inputs[:2])
        permuted, dmoved, *_ = self.run((*moved, *inputs[2:]))
        _close(permuted, value)
        _close(dmoved, dlhs[order])

    def surrounded(self, inputs: tuple[Tensor, ...]) -> None:
        """Non-contiguous views into storage that is NaN elsewhere."""
        sides = []
        for x in inputs[:2]:
            storage = x.new_full((len(x) + 2, 2 * x.shape[1] + 2), float("nan")).detach()
            storage[1:-1, 1:-1:2] = x.detach()
            sides.append(storage[1:-1, 1:-1:2].requires_grad_())
        for a, b in zip(self.run((*sides, *inputs[2:])), self.run(inputs), strict=True):
            _close(a, b)

    def deterministic(self, inputs: tuple[Tensor, ...]) -> None:
        pairs = zip(self.run(inputs), self.run(inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "two runs differ"

    def retained(self, inputs: tuple[Tensor, ...]) -> None:
        value = self.function(*inputs)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        first, second = (torch.autograd.grad(value, inputs, **options) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            _close(a, b)

    def unmodified(self, inputs: tuple[Tensor, ...]) -> None:
        before = [x.detach().clone() for x in inputs]
        self.run(inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), "an input was modified"

    def float_scale(self, inputs: tuple[Tensor, ...]) -> None:
        _close(self.function(*inputs[:2], *(float(x.detach()) for x in inputs[2:])), self.function(*inputs))


def _floor_of_bias(lhs: Tensor, rhs: Tensor, scale: Tensor, bias: Tensor) -> float:
    """A bias is rounded once, by what all logits have in common; in half precision so are pairs of a line that are alike."""
    wide = torch.promote_types(lhs.dtype, torch.float32)
    floor = torch.finfo(wide).eps * abs(float(bias.detach()))
    return floor if wide == lhs.dtype else floor + torch.finfo(lhs.dtype).eps / 2 / min(len(lhs), len(rhs)) ** 0.5


def _close(actual: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 5e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _row(name: str, check: Callable[..., None], cases: Iterable[tuple[str, tuple[Tensor, ...]]]) -> Row:
    for case, inputs in cases:
        try:
            check(inputs)
        except Exception as fault:  # any fault of the loss under test is its result
            return Row(name, False, f"{case}: {type(fault).__name__}: {fault}"[:200])
    return Row(name, True)


def check_loss(
    function: Loss, against: str | Loss = "clip", *, dtypes: Iterable[torch.dtype] = DTYPES, device: str = "cpu"
) -> Report:
    """Holds `function(lhs, rhs, logit_scale[, logit_bias])`, a scalar loss of two (N, D) tensors, against a dense one.

    Args:
        function: the loss under test.
        against: "clip", "siglip" (which passes a logit_bias) or a dense function of three tensors.
        dtypes: where the accuracy rule is applied.
        device: of the inputs.

    Raises:
        ValueError: `against` is another string.
    """
    if isinstance(against, str) and against not in ("clip", "siglip"):
        raise ValueError(f'against: expected "clip", "siglip" or a callable, got {against!r}')
    dense = {"clip": clip, "siglip": siglip}[against] if isinstance(against, str) else against
    battery = _Battery(function, dense, against == "siglip", device)

    def cases(dtype: torch.dtype = torch.float32, scale: float = 14.3) -> list[tuple[str, tuple[Tensor, ...]]]:
        return [(f"N = {n}, D = {d}", battery.draw(n, d, dtype, scale)) for n, d in SHAPES]

    rows = [_row(f"accuracy, {str(t).removeprefix('torch.')}", battery.accurate, cases(t)) for t in dtypes]
    rows += [_row(f"accuracy, scale {s:g}", battery.accurate, cases(scale=s)) for s in (0.0, 100.0)]
    checks = {
        "duplicated rows": battery.duplicates,
        "swap symmetry": battery.swap,
        "permutation equivariance": battery.permutation,
        "strided views beside NaN": battery.surrounded,
        "determinism": battery.deterministic,
        "backward twice": battery.retained,
        "inputs unmodified": battery.unmodified,
        "scale as a float": battery.float_scale,
    }
    rows += [_row(name, check, cases()) for name, check in checks.items()]
    return Report(tuple(rows))
