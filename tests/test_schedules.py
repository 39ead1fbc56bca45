"""Schedules against their definitions, computed the long way round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastem.models.eps import alpha_bar
from fastem.schedules import Schedule, time_of_sigma


def test_linear():
    schedule = Schedule.linear()
    assert len(schedule) == 1000 and schedule.betas.dtype == np.float64
    assert schedule.betas[0] == 1e-4 and schedule.betas[-1] == 0.02
    product, expected = 1.0, []
    for beta in schedule.betas:
        product *= 1 - beta
        expected.append(product)
    np.testing.assert_allclose(schedule.alphas_cumprod, expected, rtol=1e-13)
    assert Schedule.linear(500).alphas_cumprod[-1] == pytest.approx(schedule.alphas_cumprod[-1], rel=0.2)


@given(st.integers(1, 1000))
def test_respaced_steps_are_steps_of_the_long_schedule(num_steps):
    full, short = Schedule.linear(), Schedule.linear().respace(num_steps)
    assert len(short) == num_steps and (np.diff(short.timesteps) > 0).all() and short.timesteps[0] == 0
    if num_steps > 1:
        assert short.timesteps[-1] == 999
    kept = short.timesteps.astype(int)
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[kept], rtol=1e-12)
    spread = np.diff(short.timesteps)
    assert num_steps < 3 or spread.max() - spread.min() <= 1


def test_respacing_to_every_step_changes_nothing():
    full = Schedule.linear()
    np.testing.assert_allclose(full.respace(1000).betas, full.betas, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 100, 1000])
def test_posterior_of_the_previous_step(num_steps):
    """q(x_{t-1} | x_t, x_0) by conditioning two Gaussians: precision and mean of a product of normals."""
    for step in Schedule.linear().respace(num_steps).reverse():
        if step.index == 0:  # x_0 itself
            assert (step.alpha_bar_prev, step.posterior_variance) == (1, 0)
            assert step.mean_x0 == pytest.approx(1) and step.mean_xt == pytest.approx(0)
            continue
        alpha, prior = 1 - step.beta, 1 - step.alpha_bar_prev
        precision = alpha / step.beta + 1 / prior
        assert step.posterior_variance == pytest.approx(1 / precision, rel=1e-9)
        assert step.mean_xt == pytest.approx(math.sqrt(alpha) / step.beta / precision, rel=1e-9)
        assert step.mean_x0 == pytest.approx(math.sqrt(step.alpha_bar_prev) / prior / precision, rel=1e-9)


def test_steps_are_plain_floats_in_reverse_order():
    schedule = Schedule.linear().respace(7)
    steps = list(schedule.reverse())
    assert [s.index for s in steps] == [6, 5, 4, 3, 2, 1, 0]
    for step in steps:
        assert all(type(value) in (int, float) for value in vars(step).values())
        assert step.sigma_t == pytest.approx(math.sqrt(1 / step.alpha_bar - 1))
    assert all(a.alpha_bar_prev == b.alpha_bar for a, b in zip(steps, steps[1:], strict=False))


@given(st.integers(2, 60), st.floats(0.02, 0.3), st.floats(0.5, 20.0))
def test_karras(num_steps, sigma_min, sigma_max):
    steps = list(Schedule.karras(num_steps, sigma_max, sigma_min).reverse())
    sigmas = [s.sigma_t for s in steps]
    assert sigmas[0] == pytest.approx(sigma_max) and sigmas[-1] == pytest.approx(sigma_min)
    np.testing.assert_allclose(np.diff(np.array(sigmas) ** (1 / 7), n=2), 0, atol=1e-9)  # EDM Eq. (5)
    for step in steps:  # the network is told the time of the same signal-to-noise ratio
        assert float(alpha_bar(step.t)) == pytest.approx(step.alpha_bar, rel=1e-9)


@given(st.floats(0, 999))
def test_time_of_sigma_inverts_the_schedule(t):
    ab = float(alpha_bar(t))
    assert time_of_sigma(math.sqrt((1 - ab) / ab)) == pytest.approx(t, abs=1e-6)


def test_time_of_sigma_stops_at_the_ends():
    assert time_of_sigma(1e-9) == 0 and time_of_sigma(1e9) == 999


def test_errors():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        Schedule.linear(0)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"steps must be 1\.\.1000, got {steps}"):
            Schedule.linear().respace(steps)
    for low, high in ((0, 1), (1, 1), (2, 1), (-1, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            Schedule.karras(5, high, low)
