import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from gcl_kernels import score_to_weight


@pytest.mark.parametrize("name", ["constant", "linear", "inverse", "inverse_sqrt", "log"])
@given(scores=st.lists(st.floats(1, 100), min_size=1, max_size=20), two=st.booleans())
def test_named_functions_are_the_reference_s(name, scores, two):
    s = torch.tensor(scores, dtype=torch.float64)
    s = torch.stack([s, s]) if two else s
    torch.testing.assert_close(score_to_weight(name)(s), reference.score_to_weight(name, s))
    normalized = score_to_weight(name, normalize="mean")(s)
    torch.testing.assert_close(normalized.mean(), torch.ones((), dtype=torch.float64))


def test_the_papers_best_function_runs_from_10_to_100():
    w = score_to_weight("inverse_sqrt")(torch.tensor([1.0, 100.0]))
    torch.testing.assert_close(w, torch.tensor([10.0, 100.0]))


@pytest.mark.parametrize("name", ["constant", "linear", "inverse", "inverse_sqrt", "log"])
def test_a_higher_score_never_weighs_less(name):
    w = score_to_weight(name, s_max=4)(torch.linspace(1, 4, 50))
    assert bool((w[1:] >= w[:-1]).all())
    assert w.dtype == torch.float32


def test_piecewise_interpolates_its_knots():
    weigh = score_to_weight("piecewise", knots=[(1, 0.0), (50, 1.0), (100, 11.0)])
    expected = torch.tensor([0.0, 0.5, 1.0, 6.0, 11.0])
    torch.testing.assert_close(weigh(torch.tensor([1.0, 25.5, 50.0, 75.0, 100.0])), expected)


def test_scores_beside_no_label_are_not_looked_at():
    scores = torch.tensor([[2.0, math.nan], [4.0, -7.0]])
    labelled = torch.tensor([[True, False], [True, False]])
    weights = score_to_weight("linear", normalize="mean")(scores, labelled)
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 0.0], [4 / 3, 0.0]]))


@pytest.mark.parametrize("bad", [math.nan, 0.0, 101.0, math.inf])
@pytest.mark.parametrize("name", ["linear", "inverse", "inverse_sqrt", "log"])
def test_scores_out_of_range_are_errors(name, bad):
    with pytest.raises(ValueError, match=rf"scores: expected numbers in \[1, 100\] for '{name}', got .* \(1 such\)"):
        score_to_weight(name)(torch.tensor([3.0, bad]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "square"}, "score_to_weight: expected one of 'constant', .*, got 'square'"),
        ({"function": "log", "s_max": math.inf}, "s_max: expected a finite number >= 1, got inf"),
        ({"function": "log", "normalize": "sum"}, "normalize: expected None or 'mean', got 'sum'"),
        ({"function": "log", "knots": [(1, 1), (100, 2)]}, "knots: expected with 'piecewise' and only there"),
        ({"function": "piecewise"}, "knots: expected with 'piecewise' and only there"),
        ({"function": "piecewise", "knots": [(1, 1), (1, 2), (100, 1)]}, "knots: expected two or more"),
        ({"function": "piecewise", "knots": [(1, 1), (99, 2)]}, "knots: expected two or more"),
        ({"function": "piecewise", "knots": [(1, -1), (100, 2)]}, "knots: expected two or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_to_weight(**arguments)


def test_scores_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"scores: expected a torch.Tensor, got list"):
        score_to_weight("linear")([1.0])
