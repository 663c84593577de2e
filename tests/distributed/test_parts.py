"""`multi_part_loss` over ranks: the loss and gradients of the joined batch, and what travels once, counted."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from gcl_kernels import Part, multi_part_loss, testing
from gcl_kernels.distributed import agreement, pointwise, primitive
from gcl_kernels.types import TRANSPORTS
from tests.distributed.pool import WORLDS

OF_COLUMNS = {"rhs_ids"}


@dataclasses.dataclass(frozen=True)
class Cut:
    """A problem, and how many rows of each part and columns each rank holds."""

    problem: testing.PartsProblem
    rows: tuple[tuple[int, ...], ...]
    cols: tuple[int, ...]

    def joined(self):
        """The batch of one process, labels made explicit."""
        parts, rhs, more = self.problem.build(torch.float64)
        for (name, part), rows in zip(parts.items(), self.rows, strict=True):
            if part.labels is None:
                own = [sum(self.cols[:r]) + torch.arange(n) for r, n in enumerate(rows)]
                parts[name] = dataclasses.replace(part, labels=torch.cat(own))
        return parts, rhs, more

    def of(self, rank):
        """(parts, rhs, options) of a rank, of leaf tensors."""
        parts, rhs, more = self.problem.build(torch.float64)
        cols = piece(self.cols, rank)
        for (name, part), counts in zip(parts.items(), self.rows, strict=True):
            rows = piece(counts, rank)
            cut = {"lhs": leaf(part.lhs, rows)}
            for field in dataclasses.fields(part):
                x = getattr(part, field.name)
                if isinstance(x, torch.Tensor) and field.name != "lhs":
                    cut[field.name] = x[cols if field.name in OF_COLUMNS else rows]
            parts[name] = dataclasses.replace(part, **cut)
        more = {name: x[cols] if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        return parts, leaf(rhs, cols), more


def piece(counts, rank):
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def leaf(side, rows):
    if isinstance(side, Mapping):
        return {name: leaf(x, rows) for name, x in side.items()}
    return side.detach()[rows].clone().requires_grad_()


def leaves(parts, rhs):
    given = [part.lhs for part in parts.values()] + [rhs]
    return [x for side in given for x in (side.values() if isinstance(side, Mapping) else [side])]


@st.composite
def cuts(draw):
    world = draw(st.sampled_from(WORLDS))
    problem = draw(testing.parts_problems(sizes=(1,), dims=(2, 7)))
    sizes = st.sampled_from((1, 2, 5, 9))
    rows = tuple(tuple(draw(sizes) for _ in range(world)) for _ in problem.rows)
    cols = tuple(max(n) + draw(st.sampled_from((0, 3))) for n in zip(*rows, strict=True))
    problem = dataclasses.replace(problem, rows=tuple(sum(n) for n in rows), m=sum(cols))
    return Cut(problem, rows, cols)


def on_rank(group, cut, transport, options):
    """(loss, gradients of this rank's embeddings, gradient of the scale, of the bias)."""
    parts, rhs, more = cut.of(dist.get_rank(group))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    bias = options.pop("logit_bias", None)
    bias = None if bias is None else torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    loss = multi_part_loss(
        parts, rhs, scale, logit_bias=bias, **more, **options, process_group=group, transport=transport
    )
    loss.backward()
    ends = [scale.grad] if bias is None else [scale.grad, bias.grad]
    return [loss.detach(), *(x.grad for x in leaves(parts, rhs)), *ends]


reductions = st.sampled_from(("mean", "weighted_mean", "sum"))
softmax = st.fixed_dictionaries(
    {
        "directions": st.sampled_from(("both", "lhs_to_rhs", "rhs_to_lhs")),
        "label_smoothing": st.sampled_from((0.0, 0.1)),
        "z_loss": st.sampled_from((0.0, 1e-3)),
        "false_negative_margin": st.sampled_from((None, 0.07)),
        "reduction": reductions,
    }
)
sigmoid = st.fixed_dictionaries({"logit_bias": st.just(-2.0), "reduction": reductions})


@settings(max_examples=settings.default.max_examples // 2)
@given(cut=cuts(), transport=st.sampled_from(TRANSPORTS), options=softmax | sigmoid)
def test_is_the_loss_of_the_joined_batch(pool, cut, transport, options):
    world = len(cut.cols)
    ends = 2 if "logit_bias" in options else 1
    losses, *gradients = zip(*pool.run(world, on_rank, cut, transport, options), strict=True)
    parts, rhs, more = cut.joined()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    options = dict(options)
    bias = options.pop("logit_bias", None)
    bias = None if bias is None else torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    inputs = [*leaves(parts, rhs), scale, *([] if bias is None else [bias])]
    loss = reference.multi_part_loss(parts, rhs, scale, logit_bias=bias, **more, **options)
    oracle = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach(), rtol=1e-12, atol=1e-12)
    for g, o in zip(gradients[:-ends], oracle[:-ends], strict=True):
        torch.testing.assert_close(torch.cat(g) / world, torch.nan_to_num(o), rtol=1e-12, atol=1e-12)
    for g, o in zip(gradients[-ends:], oracle[-ends:], strict=True):
        torch.testing.assert_close(torch.stack(g).mean(), o, rtol=1e-12, atol=1e-12)


def counted_on_rank(group, count, transport, options):
    """How often each thing travels in a forward and backward of so many parts."""
    seen = Counter()

    def counting(module, name, at):
        function = getattr(module, name)

        def call(*arguments):
            seen[arguments[at] if at is not None else "agreement"] += 1
            return function(*arguments)

        return mock.patch.object(module, name, call)

    rhs = torch.randn(4, 3, requires_grad=True)
    parts = {str(k): Part(torch.randn(4, 3, requires_grad=True)) for k in range(count)}
    modules = [(primitive, "gather", 3), (primitive, "bring_home", 4), (pointwise, "bring_home", 4), (primitive, "Shift", 3),
               (pointwise, "Shift", 3), (pointwise, "gather", 3), (agreement, "_exchange", None)]  # fmt: skip
    patches = [counting(*of) for of in modules]
    for patch in patches:
        patch.start()
    try:
        multi_part_loss(parts, rhs, 2.0, process_group=group, transport=transport, **options).backward()
    finally:
        for patch in patches:
            patch.stop()
    return dict(seen)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("options", [{}, {"logit_bias": -2.0}], ids=["softmax", "sigmoid"])
def test_documents_and_their_gradients_travel_once_however_many_parts(pool, transport, options):
    one, seven = (pool.run(2, counted_on_rank, count, transport, options)[0] for count in (1, 7))
    assert one == seven
    assert one["agreement"] == 1
    assert any("of rhs" in what for what in one)


def parts_that_differ_on_rank(group):
    rank = dist.get_rank(group)
    x, y = torch.randn(3, 2), torch.randn(3, 2)
    messages = []
    for parts in (
        {"title": Part(x), ("colour", "color")[rank]: Part(x)},
        {"title": Part(x), "colour": Part(x, labels=torch.arange(3)) if rank else Part(x)},
        {"title": Part(x, share=1.0 + rank)},
        {"title": Part(x), "colour": Part(x, labels=torch.arange(3) + 4 * rank)},
        {"title": Part(x, labels=torch.arange(3 + rank))},
    ):
        try:
            multi_part_loss(parts, y, 1.0, process_group=group)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_parts_that_differ_are_an_error_on_every_rank(pool):
    for messages in pool.run(2, parts_that_differ_on_rank):
        expected = ("parts[colo", "parts[colour]: expected the same", "parts: expected the same", "labels: expected columns 0..5",
                    "labels: expected (3,)")  # fmt: skip
        assert len(messages) == len(expected)
        assert all(part in message for part, message in zip(expected, messages, strict=True)), messages
