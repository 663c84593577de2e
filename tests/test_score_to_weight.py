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


@pytest.mark.parametrize("name", ["constant", "linear", "inverse", "inverse_sqrt", "log"])
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.sampled_from([(0, 1), (-1, 1), (0.0, 3.5)]))
def test_scores_of_another_range_are_scaled_to_the_ranks(name, shares, ends):
    low, high = ends
    share = torch.tensor(shares, dtype=torch.float64)
    scores = low + (high - low) * share
    expected = reference.score_to_weight(name, 1 + 99 * (scores - low) / (high - low))
    torch.testing.assert_close(score_to_weight(name, score_range=ends)(scores), expected)


def test_the_ends_of_a_range_weigh_as_the_first_and_the_last_rank():
    ends = torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(score_to_weight("inverse_sqrt", score_range=(-1, 1))(ends), torch.tensor([10.0, 100.0]))
    torch.testing.assert_close(score_to_weight("linear", s_max=5, score_range=(-1, 1))(ends), torch.tensor([1.0, 5.0]))


def test_knots_are_in_the_unit_of_the_scores():
    weigh = score_to_weight("piecewise", knots=[(0, 0.0), (1, 2.0)], score_range=(0, 1))
    torch.testing.assert_close(weigh(torch.tensor([0.25, 1.0])), torch.tensor([0.5, 2.0]))


def test_a_callable_sees_the_scores_as_they_are():
    scores = torch.tensor([0.0, 0.7, 2.0])
    torch.testing.assert_close(score_to_weight(lambda s: s, score_range=(0, 1))(scores), scores)


def test_scores_outside_their_range_are_errors_and_the_first_one_names_the_option():
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\] for 'log', got 1.5 \(1 such\)$"):
        score_to_weight("log", score_range=(0, 1))(torch.tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match=r"Scores in another unit need score_range=\(lowest, highest\)"):
        score_to_weight("log")(torch.tensor([0.0, 1.5]))


@pytest.mark.parametrize("given", [(1, 0), (0, 0), (0, math.nan), (0, math.inf), (0,), 5, "ab", (0, 1, 2)])
def test_what_is_no_range_is_refused(given):
    with pytest.raises(ValueError, match=r"score_range: expected two finite numbers"):
        score_to_weight("log", score_range=given)


def test_scores_beside_no_label_are_not_looked_at_in_any_range():
    weights = score_to_weight("linear", score_range=(5, 9))(torch.tensor([5.0, math.nan]), torch.tensor([True, False]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0]))
