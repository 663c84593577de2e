"""Options that are spelled out, shown, checked when a module is made, and that survive copying."""

import copy
import inspect
import io
import multiprocessing
import pickle
import typing

import pytest
import torch

from gcl_kernels import (
    ClipLoss,
    GCLLoss,
    MemoryBank,
    SigLipLoss,
    aggregate_fields,
    gcl_loss,
    multi_part_loss,
    nt_xent_loss,
    pairwise_logsumexp,
    pairwise_softplus,
    positives_of,
    score_to_weight,
    sigmoid_loss,
    supcon_loss,
    types,
)

KNOTS = [(1, 0.0), (50, 1.0), (100, 11.0)]
X, Y = (torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
SCORES = torch.tensor([1.0, 20.0, 60.0, 100.0])
FIELDS = {"title": Y, "image": Y.flip(0)}


def tenth(scores):
    return scores / 10


LOSSES = [
    GCLLoss(),
    GCLLoss("piecewise", knots=KNOTS, normalize="mean", reduction="sum"),
    GCLLoss(tenth, directions="lhs_to_rhs", label_smoothing=0.1, process_group="world"),
    GCLLoss("inverse", s_max=200, rhs_field_weights={"title": 0.1, "image": 0.9}, field_mode="pairwise", z_loss=0.1),
]
FUNCTIONS = [
    *(score_to_weight(name) for name in types.SCORE_TO_WEIGHT_NAMES if name != "piecewise"),
    score_to_weight("log", s_max=200, normalize="mean"),
    score_to_weight("piecewise", knots=KNOTS),
    score_to_weight(tenth),
]


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
}


def results(losses, functions):
    sides = [Y if loss.lhs_field_weights is loss.rhs_field_weights is None else FIELDS for loss in losses]
    losses = [loss(X, rhs, SCORES, 2.0) for loss, rhs in zip(losses, sides, strict=True)]
    return [*losses, *(weights_of(SCORES) for weights_of in functions)]


@pytest.mark.parametrize("name", COPIES)
def test_losses_and_score_functions_are_copied(name):
    copies = [[COPIES[name](x) for x in xs] for xs in (LOSSES, FUNCTIONS)]
    assert all(torch.equal(a, b) for a, b in zip(results(*copies), results(LOSSES, FUNCTIONS), strict=True))
    assert list(map(repr, copies[0])) == list(map(repr, LOSSES))
    assert copies[1] == FUNCTIONS


def send_results(pipe, losses, functions):
    torch.set_num_threads(1)
    pipe.send([x.tolist() for x in results(losses, functions)])


def test_losses_and_score_functions_go_to_a_spawned_process():
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=send_results, args=(theirs, LOSSES, FUNCTIONS))
    process.start()
    assert mine.poll(60), "no answer from the process"
    got = mine.recv()
    process.join()
    assert got == [x.tolist() for x in results(LOSSES, FUNCTIONS)]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (GCLLoss(), "GCLLoss('log')"),
        (GCLLoss("inverse", s_max=5, backend="torch"), "GCLLoss('inverse', s_max=5, backend='torch')"),
        (
            GCLLoss(rhs_field_weights={"title": 0.1, "image": 0.9}, reduction="sum", process_group="world"),
            "GCLLoss('log', rhs_field_weights={'title': 0.1, 'image': 0.9}, reduction='sum', process_group='world')",
        ),
        (ClipLoss(), "ClipLoss()"),
        (ClipLoss(local_loss=True, rank=1, world_size=2), "ClipLoss(local_loss=True, rank=1, world_size=2)"),
        (SigLipLoss(), "SigLipLoss()"),
        (SigLipLoss(rank=1, world_size=2, dist_impl="gather"), "SigLipLoss(rank=1, world_size=2, dist_impl='gather')"),
        (score_to_weight("log"), "score_to_weight('log')"),
        (score_to_weight("log", s_max=5, normalize="mean"), "score_to_weight('log', s_max=5, normalize='mean')"),
        (score_to_weight("piecewise", knots=[(1, 0), (100, 2)]), "score_to_weight('piecewise', knots=((1, 0), (100, 2)))"),
    ],
)  # fmt: skip
def test_repr_is_the_call(shown, expected):
    assert repr(shown) == expected
    again = eval(expected)
    assert repr(again) == expected


# Name of an option, and a value other than the default.
OPTIONS = {
    "score_to_weight": "inverse", "s_max": 5.0, "score_range": (0.0, 5.0), "knots": None, "normalize": "mean",
    "lhs_field_weights": [1.0],
    "rhs_field_weights": {"title": 1.0}, "field_mode": "pairwise", "directions": "rhs_to_lhs", "reduction": "none",
    "label_smoothing": 0.5, "z_loss": 0.25, "false_negative_margin": 0.1,
    "false_negative_ratio": 0.9, "process_group": "world", "transport": "ring", "backend": "torch",
}  # fmt: skip


def test_every_option_is_a_parameter_and_an_attribute():
    parameters = inspect.signature(GCLLoss).parameters
    assert list(parameters) == list(OPTIONS)
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[1:])
    module = GCLLoss(**OPTIONS)
    assert {name: getattr(module, name) for name in OPTIONS} == OPTIONS
    assert {name: getattr(GCLLoss(), name) for name in OPTIONS} == {n: p.default for n, p in parameters.items()}
    assert GCLLoss("piecewise", knots=KNOTS).knots == tuple(KNOTS)


def test_the_loss_is_the_functions_with_the_same_options():
    of_function = set(inspect.signature(gcl_loss).parameters) & set(OPTIONS)
    options = {name: OPTIONS[name] for name in of_function}
    actual = GCLLoss(**OPTIONS)({"a": X}, {"title": Y}, SCORES.clamp(max=5), 2.0)
    weights = score_to_weight("inverse", s_max=5.0, normalize="mean", score_range=(0, 5))(SCORES.clamp(max=5))
    torch.testing.assert_close(actual, gcl_loss({"a": X}, {"title": Y}, 2.0, weights=weights, **options))
    assert of_function == set(OPTIONS) - {"score_to_weight", "s_max", "score_range", "knots", "normalize"}


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"score_to_weight: expected one of 'constant', .*, got 'lgo'", {"score_to_weight": "lgo"}),
        (ValueError, r"s_max: expected a finite number >= 1, got 0", {"s_max": 0}),
        (ValueError, r"score_range: expected two finite numbers, .*, got \(1, 0\)", {"score_range": (1, 0)}),
        (ValueError, r"directions: expected one of 'both', .*, got 'bth'", {"directions": "bth"}),
        (ValueError, r"reduction: expected one of 'mean', .*, got 'max'", {"reduction": "max"}),
        (ValueError, r"field_mode: expected one of 'aggregate', .*, got 'all'", {"field_mode": "all"}),
        (ValueError, r"transport: expected one of 'all_gather', .*, got 'tcp'", {"transport": "tcp"}),
        (ValueError, r"backend: expected one of 'torch', 'triton', got 'cuda'", {"backend": "cuda"}),
        (ValueError, r"label_smoothing: expected a number in \[0, 1\], got 2", {"label_smoothing": 2}),
        (TypeError, r"z_loss: expected a number, got str", {"z_loss": "0"}),
        (ValueError, r"rhs_field_weights: expected finite weights >= 0, .*, got \[-1.0\]", {"rhs_field_weights": {"a": -1}}),
        (ValueError, r"lhs_field_weights: expected finite weights >= 0, .*, got \[0.0\]", {"lhs_field_weights": [0]}),
        (ValueError, r"process_group: expected 'world' as the only name, got 'wrld'", {"process_group": "wrld"}),
        (TypeError, r"process_group: expected None, 'world', .*, got int 0", {"process_group": 0}),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_when_the_module_is_made(error, message, options):
    with pytest.raises(error, match=message):
        GCLLoss(**options)


def test_an_option_that_decides_the_weights_cannot_be_changed_without_them():
    module = GCLLoss(s_max=5)
    with pytest.raises(AttributeError, match="s_max"):
        module.s_max = 100.0
    module.reduction = "sum"  # the others are read at each call
    assert module(X, Y, torch.ones(4), 1.0) > GCLLoss(s_max=5)(X, Y, torch.ones(4), 1.0)


@pytest.mark.parametrize(
    "function",
    [
        gcl_loss,
        pairwise_logsumexp,
        multi_part_loss,
        nt_xent_loss,
        supcon_loss,
        positives_of,
        MemoryBank.__init__,
        MemoryBank.push,
        MemoryBank.logsumexp,
        GCLLoss.__init__,
        GCLLoss.forward,
        ClipLoss.forward,
        SigLipLoss.__init__,
        SigLipLoss.forward,
        sigmoid_loss,
        pairwise_softplus,
        aggregate_fields,
        score_to_weight,
    ],
)
def test_annotations_are_there_and_can_be_read(function):
    hints = typing.get_type_hints(function)
    assert set(inspect.signature(function).parameters) - {"self"} <= set(hints)
    assert "return" in hints
