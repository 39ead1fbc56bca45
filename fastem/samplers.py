"""The one sampling loop. Blindness is a `KernelEstimator`, guidance a direction, the rule three numbers per step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fastem import ops, ranges
from fastem.guidance import Guidance, Variance, default_r2
from fastem.operators import Observation
from fastem.schedules import Schedule, Step


class KernelEstimator(Protocol):
    """What the loop asks for the kernel of each step. `state.k` is `(B, 1, h, w)`; the loop keeps the state."""

    def start(self, observation: Observation): ...

    def update(self, state, X: Tensor, observation: Observation, step: Step, r2: float): ...


class Noise(Protocol):
    """Standard normal noise by name, not by order of drawing."""

    def start(self) -> Tensor: ...

    def step(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class PhiloxNoise:
    """Noise of an image from its own seed: the same whatever the batch, the order or the machine."""

    seeds: Tensor  # (B,) int64
    particles: int
    shape: tuple[int, int, int]  # (C, H, W)
    run: int = 0  # outer iteration (Diffusion EM): its own stream

    def start(self) -> Tensor:
        return ops.philox_normal(self.seeds, self.particles, self.shape, step=0, stream=2 * self.run)

    def step(self, index: int) -> Tensor:
        return ops.philox_normal(self.seeds, self.particles, self.shape, step=index, stream=2 * self.run + 1)


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, Eq. (12): `eta` of the noise of DDPM; `eta = 1` is DDPM, 0 is deterministic."""

    eta: float = 0.0

    def coefficients(self, step: Step) -> tuple[float, float, float]:
        std = self.eta * math.sqrt(step.posterior_variance)
        mean_xt = math.sqrt(max(1 - step.alpha_bar_prev - std**2, 0.0) / (1 - step.alpha_bar))
        return math.sqrt(step.alpha_bar_prev) - mean_xt * math.sqrt(step.alpha_bar), mean_xt, std


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling, Eq. (14) with the fixed-small variance; no noise at the last step."""

    def coefficients(self, step: Step) -> tuple[float, float, float]:
        return step.mean_x0, step.mean_xt, math.sqrt(step.posterior_variance) if step.index else 0.0


@dataclass(frozen=True)
class Renoise:
    """Zhu et al. 2023 (DiffPIR), Eq. (13): a part `zeta` of the noise is fresh, the rest is the estimated noise."""

    zeta: float = 0.5

    def coefficients(self, step: Step) -> tuple[float, float, float]:
        level = 1 - step.alpha_bar_prev
        mean_xt = math.sqrt((1 - self.zeta) * level / (1 - step.alpha_bar))
        mean_x0 = math.sqrt(step.alpha_bar_prev) - mean_xt * math.sqrt(step.alpha_bar)
        return mean_x0, mean_xt, math.sqrt(self.zeta * level)


Rule = DDPM | DDIM | Renoise


@dataclass
class Sample:
    """Result of `sample`: particles in network range, the kernel of the last step, one record per step."""

    x: Tensor  # (B, n, C, H, W), not clipped
    kernel: Tensor  # (B, 1, h, w)
    trace: list[dict] = field(default_factory=list)

    @property
    def images(self) -> Tensor:
        """The particles as images in [0, 1]."""
        return ((self.x + 1) / 2).clamp(0, 1)


def sample(
    model: nn.Module, observation: Observation, estimator: KernelEstimator, guidance: Guidance, schedule: Schedule,
    *, noise: Noise, rule: Rule = DDPM(), r2: Variance = default_r2, x_start: Tensor | None = None,
    on_step: Callable[[Step, Tensor, Tensor], None] | None = None,
) -> Sample:  # fmt: skip
    """Draws particles from the posterior of the sharp images, asking the estimator for the kernel at every step.

    Args:
        model: `eps = model(x_t, t)` on `(B * n, C, H, W)` in network range.
        observation: the blurry images and their noise level.
        estimator: what knows or finds the kernel; see `fastem.em`.
        guidance: `PiGDM`, `DPS` (one vector-Jacobian product a step) or `PosteriorMean` (none).
        schedule: the steps, from `Schedule`.
        noise: x_T and the noise of each step, `(B, n, C, H, W)`.
        rule: `DDPM`, `DDIM` or `Renoise`.
        r2: mean squared error of x0_hat as a function of the noise level, in [-1, 1] units.
        x_start: particles at the first step in network range, instead of `noise.start()`.
        on_step: called after each step with (step, x0_hat in [0, 1], kernel).

    Source: Algorithm 1 (known kernel) and Algorithm 2 (Fast EM), Laroche et al. 2024.
    """
    x_t = noise.start() if x_start is None else x_start
    state = estimator.start(observation)
    for step in ranges.each(ranges.STEP, schedule.reverse()):
        with ranges.stage("unet_fwd"):
            eps, pull = evaluate(model, x_t, step, with_vjp=guidance.jacobian)
        with torch.no_grad():
            with ranges.stage("x0"):
                x0_hat, mask = ops.predict_x0(x_t, eps, step.alpha_bar)  # Eq. (12)
                X = torch.fft.rfft2(guidance.seen(x0_hat))
            with ranges.stage("mstep"):
                state = estimator.update(state, X, observation, step, r2(step.sigma_t) / 4)
            c0, ct, std = rule.coefficients(step)
            x0, g, gain = x0_hat, None, 0.0
            with ranges.stage("guidance"):
                K = ops.psf_to_otf(state.k, observation.size)
                if guidance.jacobian:
                    v = guidance.direction(X, K, observation, step, r2) * mask
                    gain = guidance.gain(step, r2)
                else:
                    x0 = torch.fft.irfft2(guidance.mean(X, K, observation, step, r2), s=observation.size)
            if gain:
                with ranges.stage("unet_vjp"):
                    g = pull(v)
            with ranges.stage("update"):
                xi = noise.step(step.index) if std else x_t
                x_t = ops.step_update(x_t, x0, xi, g, c0, ct, std, gain)  # Eq. (15)
        if on_step is not None:
            on_step(step, x0_hat, state.k)
    return Sample(x_t, state.k)


def evaluate(model: nn.Module, x_t: Tensor, step: Step, *, with_vjp: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """eps at x_t, and the map `v -> (d x0_hat / d x_t)^T v` for directions v already masked by the clamp.

    The network is the only thing autograd records: `g = v / a + vjp_eps(-s v / a)`, a = sqrt(abar), s = sqrt(1 - abar).
    """
    flat = x_t.flatten(0, 1).detach()
    if not with_vjp:
        with torch.no_grad():
            return model(flat, step.t).view_as(x_t), lambda v: v
    flat.requires_grad_()
    with torch.enable_grad():
        eps = model(flat, step.t)
    a, s = math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)

    def pull(v: Tensor) -> Tensor:
        v = v / a
        (through_net,) = torch.autograd.grad(eps, flat, grad_outputs=(-s * v).flatten(0, 1))
        return v + through_net.view_as(v)

    return eps.detach().view_as(x_t), pull
