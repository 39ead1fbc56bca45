"""The one sampling loop. Blindness is a `KernelEstimator`, guidance a direction, the rule three numbers per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastem import ops, ranges
from fastem.guidance import ErrorLaw, Guidance, Number, Variance, default_r2
from fastem.models import ErrorSpectrum
from fastem.operators import Observation
from fastem.schedules import Schedule, Step


class KernelEstimator(Protocol):
    """What the loop asks for the kernel of each step. `state.k` is `(B, 1, h, w)`; the loop keeps the state.

    A state is a dataclass of tensors. `update` may be recorded once and replayed: it takes no host decision that
    depends on values, and it reads what differs between two runs from its arguments, not from the estimator.
    """

    def start(self, observation: Observation): ...

    def rests(self, step: Step) -> bool:
        """Whether the kernel stays as it is at this step; `update` is then not called."""
        ...

    def update(self, state, X: Tensor, observation: Observation, r2: Number): ...

    def program(self) -> Hashable:
        """Equal for estimators whose `update` runs the same operations with the same constants."""
        ...


class Noise(Protocol):
    """Standard normal noise by name, not by order of drawing."""

    def start(self) -> Tensor: ...

    def step(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class PhiloxDraw:
    """The noise of one step by its counter: called it is a tensor, but the update can draw it on the way.

    In a recorded step index and stream are 0-dim int64 tensors, which are read on their device.
    """

    seeds: Tensor
    particles: int
    shape: tuple[int, ...]
    index: int | Tensor
    stream: int | Tensor

    def __call__(self) -> Tensor:
        return ops.philox_normal(self.seeds, self.particles, self.shape, step=self.index, stream=self.stream)


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
        return self.draw(index)()

    def draw(self, index: int) -> PhiloxDraw:
        return PhiloxDraw(self.seeds, self.particles, self.shape, index, 2 * self.run + 1)


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
    """Zhu et al. 2023 (DiffPIR), Eq. (13): a part `zeta` of the noise is fresh, the rest is the estimated noise.

    All of it fresh is best by far where guidance replaces x0_hat: what the network takes for noise in a guided x_t is
    partly the error of the guidance, and noise that carries it along brings it back at the next step.
    """

    zeta: float = 1.0

    def coefficients(self, step: Step) -> tuple[float, float, float]:
        level = 1 - step.alpha_bar_prev
        mean_xt = math.sqrt((1 - self.zeta) * level / (1 - step.alpha_bar))
        mean_x0 = math.sqrt(step.alpha_bar_prev) - mean_xt * math.sqrt(step.alpha_bar)
        return mean_x0, mean_xt, math.sqrt(self.zeta * level)


@dataclass(frozen=True)
class PlugAndPlay:
    """Zhang et al. 2021 (DPIR): no noise is drawn, the network is only told a falling level of it.

    Half-quadratic splitting with the network as the proximal map: one image near the mode, and the best PSNR.
    """

    def coefficients(self, step: Step) -> tuple[float, float, float]:
        return math.sqrt(step.alpha_bar_prev), 0.0, 0.0


Rule = DDPM | DDIM | Renoise | PlugAndPlay


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


class StepConstants(NamedTuple):
    """Every number that one step reads: Python floats, or 0-dim float64 tensors, a row of a table on the device."""

    t: Number  # what the network is told
    alpha_bar: Number
    r2: Number  # r_t^2 of the guidance, in [0, 1] units, at low frequencies
    log_cutoff: Number  # from where on it falls, and how fast: `ErrorSpectrum`
    power: Number
    r2_kernel: Number  # mean squared error of x0_hat that the estimator is told, in [0, 1] units
    gain: Number  # weight of the pulled-back direction
    c0: Number  # weights of x0_hat, x_t and the noise in x_{t-1}
    ct: Number
    std: Number
    index: Number  # of the step in the schedule: a word of the counter of its noise

    @classmethod
    def of(
        cls, step: Step, guidance: Guidance, rule: Rule, r2: ErrorLaw, error: Variance | None = None
    ) -> StepConstants:
        """`r2` and `error` as in `sample`."""
        gain = guidance.gain(step, r2) if guidance.jacobian else 0.0
        told = error(step.sigma_t) if error else r2(step.sigma_t)
        r2_kernel = (told.peak if isinstance(told, ErrorSpectrum) else told) / 4
        pulls = guidance.r2(step, r2)
        peak, cutoff, power = pulls if isinstance(pulls, ErrorSpectrum) else ErrorSpectrum(pulls)
        numbers = peak, math.log(cutoff), power, r2_kernel, gain, *rule.coefficients(step)
        return cls(step.t, step.alpha_bar, *numbers, step.index)

    def r2_map(self, observation: Observation) -> Tensor:
        """r_t^2 of the guidance at each frequency, `(H, W')`: `ErrorSpectrum`, with `f^p = e^(p log f)`."""
        return self.r2 * torch.sigmoid(self.power * (self.log_cutoff - observation.log_frequency))


Draw = Callable[[], Tensor]  # of the noise of one step, (B, n, C, H, W)


class Phase(NamedTuple):
    """What a step does besides its numbers: each phase is a program of its own."""

    learns: bool  # the estimator updates the kernel
    pulls: bool  # the direction goes back through the network
    coloured: bool = False  # r_t^2 falls with the frequency


@dataclass(frozen=True)
class StepBody:
    """One reverse step as a function of tensors: what `Eager` calls, and what a CUDA graph records."""

    model: nn.Module
    estimator: KernelEstimator
    guidance: Guidance

    def __call__(
        self, x_t: Tensor, state, noise: Draw | None, observation: Observation, c: StepConstants, phase: Phase
    ) -> tuple[Tensor, object, Tensor]:
        """x_{t-1}, the next state of the estimator, and x0_hat in [0, 1]; `noise` is None only where c.std is 0."""
        guidance = self.guidance
        with ranges.stage("unet_fwd"):
            eps, pull = evaluate(self.model, x_t, c, with_vjp=phase.pulls)
        with torch.no_grad():
            with ranges.stage("x0"):
                x0_hat, mask = ops.predict_x0(x_t, eps, c.alpha_bar)  # Eq. (12)
                X = torch.fft.rfft2(guidance.seen(x0_hat))
            with ranges.stage("mstep"):
                if phase.learns:
                    state = self.estimator.update(state, X, observation, c.r2_kernel)
            x0, g = x0_hat, None
            with ranges.stage("guidance"):
                K = ops.psf_to_otf(state.k, observation.size)
                r2 = c.r2_map(observation) if phase.coloured else c.r2
                if guidance.jacobian:
                    g = guidance.direction(X, K, observation, r2) * mask
                else:
                    x0 = torch.fft.irfft2(guidance.mean(X, K, observation, r2), s=observation.size)
            if g is not None:
                with ranges.stage("unet_vjp") if phase.pulls else nullcontext():
                    g = pull(g)
            with ranges.stage("update"):
                if isinstance(noise, PhiloxDraw):  # drawn in the kernel
                    x_t = ops.step_update_philox(
                        x_t, x0, g, noise.seeds, c.c0, c.ct, c.std, c.gain, noise.index, noise.stream
                    )
                else:
                    xi = None if noise is None else noise()
                    x_t = ops.step_update(x_t, x0, xi, g, c.c0, c.ct, c.std, c.gain)  # Eq. (15)
        return x_t, state, x0_hat


class Execution(Protocol):
    """How the steps of one run are carried out; its tensors may be overwritten by the next step."""

    x_t: Tensor
    x0_hat: Tensor
    state: object
    kernel: Tensor  # that of the state

    def advance(self, row: int, noise: Draw | None, phase: Phase) -> None:
        """The step of row `row` of the table of constants; rows come in order, from 0."""
        ...


class Eager:
    """Each step as it comes."""

    def __init__(
        self, body: StepBody, observation: Observation, state, x_t: Tensor, table: Sequence[StepConstants]
    ) -> None:
        self.body, self.observation, self.table = body, observation, table
        self.x_t, self.x0_hat, self.state = x_t, x_t, state

    @property
    def kernel(self) -> Tensor:
        return self.state.k

    def advance(self, row: int, noise: Draw | None, phase: Phase) -> None:
        self.x_t, self.state, self.x0_hat = self.body(
            self.x_t, self.state, noise, self.observation, self.table[row], phase
        )


Execute = Callable[[StepBody, Observation, object, Tensor, Sequence[StepConstants]], Execution]


def sample(
    model: nn.Module, observation: Observation, estimator: KernelEstimator, guidance: Guidance, schedule: Schedule,
    *, noise: Noise | None, rule: Rule = DDPM(), r2: ErrorLaw = default_r2, error: Variance | None = None,
    x_start: Tensor | None = None, vjp_down_to: float = 0.0, execute: Execute = Eager,
    on_step: Callable[[Step, Tensor, Tensor], None] | None = None,
) -> Sample:  # fmt: skip
    """Draws particles from the posterior of the sharp images, asking the estimator for the kernel at every step.

    Args:
        model: `eps = model(x_t, t)` on `(B * n, C, H, W)` in network range.
        observation: the blurry images and their noise level.
        estimator: what knows or finds the kernel; see `fastem.em`.
        guidance: `PiGDM`, `DPS` (one vector-Jacobian product a step) or `PosteriorMean` (none).
        schedule: the steps, from `Schedule`.
        noise: x_T and the noise of each step, `(B, n, C, H, W)`; None where neither is drawn.
        rule: `DDPM`, `DDIM`, `Renoise` or `PlugAndPlay`.
        r2: r_t^2 of the guidance as a function of the noise level, in [-1, 1] units: a number, or `ErrorSpectrum`, such
            as `fastem.models.EpsModel.error_spectrum`, that measured for the weights. Of a spectrum the peak counts for
            all frequencies where the observation is not diagonal in Fourier.
        error: mean squared error of x0_hat that the estimator is told (Appendix D), likewise;
            `fastem.models.EpsModel.r2` is that measured for the weights. None: r2 (the peak of a spectrum).
        x_start: particles at the first step in network range, instead of `noise.start()`.
        vjp_down_to: at lower noise levels (sigma_t) the Jacobian of x0_hat counts as sqrt(alpha_bar), its limit at no
            noise, and the backward pass is saved.
        execute: how the steps run: `Eager`, or CUDA graphs (`fastem.runtime.StepGraphs`).
        on_step: called after each step with (step, x0_hat in [0, 1], kernel); the tensors are valid until the next.

    Source: Algorithm 1 (known kernel) and Algorithm 2 (Fast EM), Laroche et al. 2024.
    """
    steps = list(schedule.reverse())
    table = [StepConstants.of(step, guidance, rule, r2, error) for step in steps]
    x_t = noise.start() if x_start is None else x_start
    run = execute(StepBody(model, estimator, guidance), observation, estimator.start(observation), x_t, table)
    for row, step in ranges.each(ranges.STEP, enumerate(steps)):
        c = table[row]
        pulls = guidance.jacobian and c.gain != 0 and step.sigma_t >= vjp_down_to
        # Where pixels were not measured, the edge of what was is seen at high frequencies: three imputations per step
        # do not make up for it, and a small r^2 there makes much of it.
        coloured = observation.diagonal and c.log_cutoff < math.inf
        phase = Phase(learns=not estimator.rests(step), pulls=pulls, coloured=coloured)
        draw = None
        if c.std:
            draw = noise.draw(step.index) if isinstance(noise, PhiloxNoise) else partial(noise.step, step.index)
        run.advance(row, draw, phase)
        if on_step is not None:
            on_step(step, run.x0_hat, run.kernel)
    return Sample(run.x_t, run.state.k)


def evaluate(
    model: nn.Module, x_t: Tensor, step: Step | StepConstants, *, with_vjp: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """eps at x_t, and the map `v -> (d x0_hat / d x_t)^T v` for directions v already masked by the clamp.

    Without the VJP the Jacobian counts as a = sqrt(abar).

    The network is the only thing autograd records: `g = v / a + vjp_eps(-s v / a)`, a = sqrt(abar), s = sqrt(1 - abar).
    """
    flat = x_t.flatten(0, 1).detach()
    a, s = root(step.alpha_bar), root(1 - step.alpha_bar)
    if not with_vjp:
        with torch.no_grad():
            return model(flat, step.t).view_as(x_t), lambda v: a * v
    flat.requires_grad_()
    with torch.enable_grad():
        eps = model(flat, step.t)

    def pull(v: Tensor) -> Tensor:
        v = v / a
        (through_net,) = torch.autograd.grad(eps, flat, grad_outputs=(-s * v).flatten(0, 1))
        return v + through_net.view_as(v)

    return eps.detach().view_as(x_t), pull


def root(value: Number) -> Number:
    """Square root of a number on the host or on a device; the same bits."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)
