"""Guidance: how the observation pulls the particles.

Every guidance says what it wants in x0_hat space. `PiGDM` and `DPS` give a direction that the sampler takes back
through the network (one vector-Jacobian product); `PosteriorMean` replaces x0_hat itself and needs no backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastem import ops
from fastem.models import ErrorSpectrum
from fastem.operators import Observation
from fastem.schedules import Step

Number = float | Tensor  # on the host, or 0-dim on a device
IMPUTATIONS = 3  # rounds of EM over pixels that were not measured, per step

Variance = Callable[[float], float]  # sigma_t -> r^2, the mean squared error of x0_hat; both in [-1, 1] units
ErrorLaw = Callable[[float], float | ErrorSpectrum]  # the same of each frequency; a number is that of all


def default_r2(sigma_t: float) -> float:
    """Mean squared error of x0_hat in [-1, 1] units if x0 had std 0.5 at every frequency.

    More than the mean error of a good network, whose error is not white: at low frequencies, where the observation is
    good, the network leaves the noise as it is. With the mean error the data is trusted too little there: 1.5 dB less
    with the true kernel on six test images.
    """
    return sigma_t**2 / (1 + (sigma_t / 0.5) ** 2)


def still_r2(sigma_t: float) -> float:
    """2.5 times `default_r2`: for `fastem.samplers.PlugAndPlay`, whose x_t holds less noise than the network is told.

    With the true kernel 2 loses 0.2 dB at noise of 7.65 grey levels, 3.5 loses 0.4 dB at 2.55, 1 up to 0.8, 5 several.
    A spectrum in its place, the error of x0_hat measured by frequency, loses more than 1 dB: what is left of the blur
    is no error that the network knows.
    """
    return 2.5 * default_r2(sigma_t)


def in_unit_range(r2: float | ErrorSpectrum) -> float | ErrorSpectrum:
    """A variance in [-1, 1] units as one in [0, 1] units."""
    return r2._replace(peak=r2.peak / 4) if isinstance(r2, ErrorSpectrum) else r2 / 4


def pseudo_inverse(X: Tensor, K: Tensor, observation: Observation, sigma: Tensor, r2: Number) -> Tensor:
    """The spectrum of `v = H^T (r^2 H H^T + sigma^2)^-1 (y - H x0_hat)`, Eq. (17), like X.

    X `(B, n, C, H, W')`, K `(B, 1, H, W')`, sigma `(B,)` and r2 in [0, 1] units: a number, or `(H, W')` where the
    observation is diagonal.
    """
    if isinstance(r2, Tensor) and r2.dim() == 2:
        return ops.wiener_guidance(X, observation.Y, K, sigma**2, r2)  # Eq. (17)
    r2_t = torch.zeros_like(sigma) + r2  # full_like would fetch a number that is on the device
    if observation.diagonal:
        return ops.wiener_guidance(X, observation.Y, K, sigma**2, r2_t)  # Eq. (17)
    E, n = observation.residual(X, K), X.shape[1]  # particles differ where y was not measured: each is an image here
    rows = [v.repeat_interleave(n, dim=0) for v in (K, sigma**2, r2_t)]

    def inverse(E: Tensor) -> Tensor:
        V = ops.wiener_guidance(torch.zeros_like(E).flatten(0, 1)[:, None], E.flatten(0, 1), *rows)
        return V.view_as(X)

    V = inverse(E)
    if observation.gamma == 1:
        hidden = 1 - observation.measured
        for _ in range(IMPUTATIONS):  # what was not measured is what the present mean predicts there
            predicted = torch.fft.irfft2(r2 * K[:, None] * V, s=observation.size)
            V = inverse(E + torch.fft.rfft2(predicted * hidden))
    return V


@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance, Eq. (17): `v = H^T (r^2 H H^T + sigma^2)^-1 (y - H x0_hat)`.

    `compat="released"` weights it as the released program: r^2 = v / (1 + v) with v the posterior variance of the
    respaced chain, gain `sqrt(abar) r^2 sqrt(1 / (1 + v))`, and no pull in the last step. `"paper"` takes r^2 from the
    caller, `EpsModel.error_spectrum`, and the gain of Eq. (15), `beta / sqrt(alpha)`, on the score of y given x_t.
    """

    compat: str = "paper"
    jacobian = True

    def seen(self, x0_hat: Tensor) -> Tensor:
        return x0_hat

    def r2(self, step: Step, r2: ErrorLaw) -> float | ErrorSpectrum:
        """r_t^2 in [0, 1] units."""
        if self.compat == "released":
            return step.posterior_variance / (1 + step.posterior_variance)
        return in_unit_range(r2(step.sigma_t))

    def gain(self, step: Step, r2: ErrorLaw) -> float:
        """Weight of the pulled-back direction, a gradient with respect to x_t of `<v, x0_hat>` in [0, 1]."""
        if self.compat == "released":
            return math.sqrt(step.alpha_bar) * self.r2(step, r2) * math.sqrt(1 / (1 + step.posterior_variance)) * 0.5
        return step.beta / math.sqrt(1 - step.beta) * 0.5  # Eq. (15): beta_t / sqrt(alpha_t) times the score

    def direction(self, X: Tensor, K: Tensor, observation: Observation, r2: Number) -> Tensor:
        """v like x0_hat; r2 of this step in [0, 1] units, a number or `(H, W')`."""
        V = pseudo_inverse(X, K, observation, observation.sigma, r2)
        return torch.fft.irfft2(V, s=observation.size)


@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling as its authors run it: the gradient of `||y - H x0_hat||`, not squared.

    Eq. (16) divides by sigma^2 instead; the norm makes the step independent of the noise level, which is what works
    in practice (Chung et al. 2023, section 3). The norm is per particle. `compat="released"` compares x0_hat in
    [-1, 1] with y in the range it comes in, as the released program does.
    """

    compat: str = "paper"
    jacobian = True

    def seen(self, x0_hat: Tensor) -> Tensor:
        """What is compared with y, and what the M-step gets."""
        return 2 * x0_hat - 1 if self.compat == "released" else x0_hat

    def r2(self, step: Step, r2: ErrorLaw) -> float:
        """DPS takes x0_hat for exact."""
        return 0.0

    def gain(self, step: Step, r2: ErrorLaw) -> float:
        return math.sqrt(step.alpha_bar)  # zeta

    def direction(self, X: Tensor, K: Tensor, observation: Observation, r2: Number) -> Tensor:
        E = observation.residual(X, K)
        e, v = (torch.fft.irfft2(F, s=observation.size) for F in (E, K.conj()[:, None] * E))
        norm = e.square().sum(dim=(2, 3, 4), keepdim=True).sqrt()
        return v / norm.clamp(min=torch.finfo(v.dtype).tiny)  # gradient of -||y - H x0_hat||


@dataclass(frozen=True)
class PosteriorMean:
    """Jacobian-free guidance: x0_hat is replaced by the mean of x_0 given x_t and y under N(x0_hat, r^2 I).

    `mu = x0_hat + r^2 H^T (r^2 H H^T + sigma^2)^-1 (y - H x0_hat)`: Eq. (17) with the network's Jacobian taken from
    Tweedie's covariance, `d x0_hat / d x_t = sqrt(abar) / (1 - abar) Cov[x_0 | x_t]`. One forward pass per step.
    `inflation` multiplies sigma: where the kernel is an estimate, its error counts as noise.
    """

    inflation: float = 1.0
    jacobian = False

    def seen(self, x0_hat: Tensor) -> Tensor:
        return x0_hat

    def r2(self, step: Step, r2: ErrorLaw) -> float | ErrorSpectrum:
        """r_t^2 in [0, 1] units."""
        return in_unit_range(r2(step.sigma_t))

    def mean(self, X: Tensor, K: Tensor, observation: Observation, r2: Number) -> Tensor:
        """The spectrum of mu, like X; r2 of this step in [0, 1] units, a number or `(H, W')`."""
        return X + r2 * pseudo_inverse(X, K, observation, self.inflation * observation.sigma, r2)


Guidance = PiGDM | DPS | PosteriorMean
