import pytest
import torch

from stillroom.metrics.exits import gain_at_equal_cost, mean_of_upper_half, shares


def test_a_gain_is_over_what_the_rival_attains_at_the_same_cost():
    rival = [(0.2, 0.4), (0.6, 0.8), (1.0, 0.9)]
    assert gain_at_equal_cost([(0.4, 0.7)], rival) == pytest.approx(0.1)  # half-way it mixes both
    assert gain_at_equal_cost([(0.4, 0.7), (0.8, 0.75)], rival) == pytest.approx(0.0)
    assert gain_at_equal_cost(rival, rival) == 0


def test_the_upper_half_of_a_curve_is_averaged_over_cost_not_over_points():
    assert mean_of_upper_half([(0.0, 0.0), (1.0, 1.0)]) == pytest.approx(0.75)
    flat = [(0.1, 0.0), (0.5, 0.8), (0.75, 1.0), (1.0, 1.0)]
    assert mean_of_upper_half(flat) == pytest.approx(0.95, abs=2e-3)


def test_shares_of_exits_that_nobody_takes_are_zero():
    assert shares(torch.tensor([2, 0, 2, 2]), 4) == [0.25, 0, 0.75, 0]
