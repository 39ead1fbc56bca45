"""Noise schedules: plain float64 arrays, and one `Step` of Python floats per reverse step.

A schedule with fewer steps is a new schedule, not a new sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

TRAIN_STEPS = 1000  # every published checkpoint was trained on this many steps


@dataclass(frozen=True)
class Step:
    """What one reverse step needs, as Python floats: nothing is copied to a device inside the loop."""

    index: int  # position in the schedule; 0 is the last step executed
    t: float  # time step of the 1000-step process, what the network is told
    alpha_bar: float  # cumulative product at t
    alpha_bar_prev: float  # at the step after this one; 1 at the end
    beta: float
    posterior_variance: float  # sigma_tilde^2, the fixed-small variance
    mean_x0: float  # weight of x0_hat in the posterior mean
    mean_xt: float  # weight of x_t in the posterior mean

    @property
    def sigma_t(self) -> float:
        """Noise std relative to the image in [-1, 1]: x_t / sqrt(alpha_bar) = x_0 + sigma_t * noise."""
        return math.sqrt((1 - self.alpha_bar) / self.alpha_bar)


@dataclass(frozen=True)
class Schedule:
    """Kept time steps, ascending, and their cumulative products; everything else follows. All float64.

    Source: Ho et al. 2020 (linear betas), Nichol and Dhariwal 2021 (respacing), Karras et al. 2022 Eq. (5).
    """

    timesteps: np.ndarray  # (S,) on the 0..999 scale of the network
    betas: np.ndarray  # (S,)

    @classmethod
    def linear(cls, num_steps: int = TRAIN_STEPS) -> Schedule:
        """`beta` from 1e-4 to 0.02, scaled so that any number of steps ends equally noisy."""
        if num_steps < 1:
            raise ValueError(f"a schedule needs at least 1 step, got {num_steps}")
        scale = TRAIN_STEPS / num_steps
        return cls(np.arange(num_steps, dtype=np.float64), np.linspace(scale * 1e-4, scale * 0.02, num_steps))

    def respace(self, num_steps: int) -> Schedule:
        """Keeps `num_steps` evenly spread steps, the first and the last among them."""
        size = len(self.timesteps)
        if not 1 <= num_steps <= size:
            raise ValueError(f"steps must be 1..{size}, got {num_steps}: this schedule has {size} steps to choose from")
        stride = (size - 1) / (num_steps - 1) if num_steps > 1 else 1.0
        kept, position = [], 0.0
        for _ in range(num_steps):  # accumulated, not multiplied: the published checkpoints' spacing
            kept.append(round(position))
            position += stride
        alphas_cumprod = self.alphas_cumprod[kept]
        betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
        return Schedule(self.timesteps[kept], betas)

    @classmethod
    def karras(cls, num_steps: int, sigma_max: float, sigma_min: float = 0.02, rho: float = 7.0) -> Schedule:
        """Few steps between two noise levels (relative to [-1, 1]), dense where they are small.

        The time steps are fractional: where the linear schedule has the same signal-to-noise ratio.
        """
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max is needed, got {sigma_min} and {sigma_max}")
        ramp = np.linspace(0, 1, num_steps) if num_steps > 1 else np.ones(1)  # a single step starts at the noise
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        sigmas = (low + ramp * (high - low)) ** rho  # EDM Eq. (5), ascending
        alphas_cumprod = 1 / (1 + sigmas**2)
        betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
        return cls(np.array([time_of_sigma(s) for s in sigmas]), betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.concatenate([[1.0], self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """sigma_tilde^2 = (1 - abar_{t-1}) / (1 - abar_t) beta_t; 0 at the last step."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x0_hat in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, index: int) -> Step:
        return Step(
            index,
            float(self.timesteps[index]),
            float(self.alphas_cumprod[index]),
            float(self.alphas_cumprod_prev[index]),
            float(self.betas[index]),
            float(self.posterior_variance[index]),
            float(self.posterior_mean_coef1[index]),
            float(self.posterior_mean_coef2[index]),
        )

    def reverse(self) -> Iterator[Step]:
        """The steps in the order they are executed: from noise to image."""
        return (self.step(i) for i in reversed(range(len(self))))


def time_of_sigma(sigma: float) -> float:
    """The (fractional) step of the linear 1000-step schedule whose noise level is `sigma`, clamped to its ends."""
    alphas_cumprod = Schedule.linear().alphas_cumprod
    return float(np.interp(math.log(sigma), 0.5 * np.log(1 / alphas_cumprod - 1), np.arange(TRAIN_STEPS)))
