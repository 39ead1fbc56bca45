"""Who knows the kernel: `Known`; `EdgeEM` and `HQS` (Fast EM, Algorithm 2); and the outer loop of Diffusion EM."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastem import ops
from fastem.guidance import ErrorLaw, Guidance, Number, default_r2
from fastem.initial import FAINT, difference_spectra, drop_faint, fit_on_simplex
from fastem.mstep import KernelPrior, mstep, mstep_from_sums
from fastem.operators import Observation
from fastem.samplers import DDPM, Eager, Execute, Noise, Rule, Sample, sample
from fastem.schedules import Schedule, Step, time_of_sigma

ROUNDS = 10  # of Diffusion EM
PROBE_STEP = 0.1  # of sigma: how far `stein_risk` moves y
LOW = 0.02  # cycles per pixel; at lower frequencies an image is its subject, not a power law


@dataclass(frozen=True)
class KernelState:
    """The kernel in use, `(B, 1, h, w)`; the next M-step starts from it."""

    k: Tensor


@dataclass(frozen=True)
class Known:
    """The kernel is given: non-blind restoration."""

    k: Tensor

    def start(self, observation: Observation) -> KernelState:
        return KernelState(self.k.to(observation.y).expand(observation.y.shape[0], -1, -1, -1))

    def rests(self, step: Step) -> bool:
        return True

    def update(self, state: KernelState, X: Tensor, observation: Observation, r2: Number) -> KernelState:
        return state

    def program(self) -> Hashable:
        return Known


@dataclass(frozen=True)
class HQS:
    """The M-step of Fast EM at every step, warm-started from the last kernel, then recentred (Algorithm 2).

    `r2_ridge` adds Appendix D's r_t^2 term. `compat="released"` as in `mstep`.
    """

    prior: KernelPrior
    kernel_size: tuple[int, int]
    beta: float = 1e5
    num_iters: int = 10
    compat: str = "paper"
    r2_ridge: bool = False

    def start(self, observation: Observation) -> KernelState:
        return KernelState(delta_kernel(observation.y.shape[0], self.kernel_size).to(observation.y))

    def rests(self, step: Step) -> bool:
        return False

    def program(self) -> Hashable:
        return self

    def update(self, state: KernelState, X: Tensor, observation: Observation, r2: Number) -> KernelState:
        released = self.compat == "released"
        sums = ops.spectral_sums(X, observation.Y, per_channel=released)
        k = mstep_from_sums(
            *sums, state.k, size=observation.size, count=X.shape[1] * (1 if released else X.shape[2]),
            particles=X.shape[1], sigma=observation.sigma, prior=self.prior, beta=self.beta,
            num_iters=self.num_iters, compat=self.compat,
            r2=r2 if self.r2_ridge else 0.0, recentred=True,
        )  # fmt: skip
        if not released:  # a map without mass, or an M-step that overflowed, keeps the kernel it had
            k = torch.where(
                torch.isfinite(k).all(-1).all(-1)[..., None, None] & (k.sum((-2, -1), keepdim=True) > 0), k, state.k
            )
        return KernelState(k)


@dataclass(frozen=True)
class EdgeState(KernelState):
    """With the sums of `gradient_sums` over the steps so far."""

    cross: Tensor  # (B, 1, H, W') complex
    energy: Tensor  # (B, 1, H, W')


@dataclass(frozen=True)
class EdgeEM:
    """Fast EM from a coarse-to-fine start: the default.

    Starting at a delta, x0_hat is as blurry as y and the M-step returns the delta; `k_start` comes from
    `fastem.initial`. While the noise is high x0_hat has no edges to learn from and the kernel rests. Below `sigma_on`
    each step adds its sums to those of the steps before, which count less with every step (online EM), and the M-step
    is the least squares on the simplex in the gradient domain, which is whiter: Eq. (24) with the projection inside the
    solve instead of after it. Only the strongest edges of x0_hat teach: the fainter gradients hold most of what the
    present kernel left wrong in x0_hat, which would confirm that kernel. Values below `threshold` of the peak are
    dropped: they are what the noise leaves of an empty background, and a hundred of them haze the image.
    """

    k_start: Tensor  # (B, 1, h, w)
    sigma_on: float = 0.8  # of sigma_t, relative to [-1, 1]
    edges: float = 0.15  # part of the pixels that teaches
    ridge: float = 0.4
    num_iters: int = 30
    memory: float = 0.9  # weight of the sums of the step before
    threshold: float = FAINT

    def start(self, observation: Observation) -> EdgeState:
        k, Y = self.k_start.to(observation.y), observation.Y
        cross = torch.zeros_like(Y[:, :1])
        return EdgeState(k, cross, torch.zeros_like(cross.real))

    def rests(self, step: Step) -> bool:
        return step.sigma_t > self.sigma_on

    def program(self) -> Hashable:
        return EdgeEM, tuple(self.k_start.shape), self.edges, self.ridge, self.num_iters, self.memory, self.threshold

    def update(self, state: EdgeState, X: Tensor, observation: Observation, r2: Number) -> EdgeState:
        D = difference_spectra(observation.size, X)  # gradients are whiter: images have a power spectrum like 1 / f^2
        border = tuple(m // 4 for m in state.k.shape[-2:])
        K = ops.psf_to_otf(state.k, observation.size)
        X, linear = observation.for_kernel(X, K)
        cross, energy = gradient_sums(X, linear, K, D, border, self.edges)
        cross, energy = self.memory * state.cross + cross, self.memory * state.energy + energy
        k = fit_on_simplex(cross, energy, state.k, observation.size, self.ridge, self.num_iters)
        k = drop_faint(k, self.threshold)
        good = torch.isfinite(k).all(-1).all(-1)[..., None, None]
        return EdgeState(
            torch.where(good, k, state.k),
            torch.where(good, cross, state.cross),
            torch.where(good, energy, state.energy),
        )


def gradient_sums(
    X: Tensor, observation: Observation, K: Tensor, D: tuple[Tensor, Tensor], border: tuple[int, int],
    edges: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ops.spectral_sums` of the gradients of the luminance of x and y.

    Only the largest gradients of each x teach, `edges` of their number: 1 is all of them. On a canvas they lie at least
    `border` inside the image; the present kernel, K `(B, 1, H, W')`, explains the others, and y where it was not
    measured.
    """
    canvas = observation.canvas
    X, Y = X.mean(dim=2, keepdim=True), observation.Y.mean(dim=1, keepdim=True)
    gradients = [torch.fft.irfft2(difference * X, s=observation.size) for difference in D]
    strength = sum(g.square() for g in gradients)  # (B, n, 1, H, W)
    teaches, (height, width) = torch.ones_like(strength), observation.size
    if canvas is not None:
        inside = canvas.inside(border, observation.y)
        teaches, strength = teaches * inside, strength * inside
        height, width = (max(n - 2 * b, 0) for n, b in zip(canvas.image, border, strict=True))
        y, predicted = (torch.fft.irfft2(F, s=observation.size) for F in (Y, K * X.mean(dim=1)))
        Y = torch.fft.rfft2(torch.where(canvas.inside((0, 0), y) > 0, y, predicted))
    if edges < 1:
        ranked, count = strength.flatten(2), max(round(edges * height * width), 1)
        least = ranked.kthvalue(ranked.shape[-1] - count + 1, dim=-1).values
        teaches = teaches * (strength >= least[..., None, None, None])
    cross = energy = 0
    for difference, g in zip(D, gradients, strict=True):
        R = difference * Y
        if canvas is not None:
            R = R - K * torch.fft.rfft2((g * (1 - inside)).mean(dim=1))
        sums = ops.spectral_sums(torch.fft.rfft2(g * teaches), R)
        cross, energy = cross + sums[0], energy + sums[1]
    return cross, energy


def noise_level(observation: Observation, X: Tensor, K: Tensor, num_iters: int = 3) -> Tensor:
    """The M-step of sigma, `(B,)`: the residual where the image and its kernel explain nothing.

    X `(B, n, C, H, W')`, K `(B, 1, H, W')`. Over all frequencies the residual is the noise, less what x has learnt of
    it, plus what a wrong kernel leaves. Where K has removed the image it is the noise alone: a frequency counts by how
    far the noise is above the blurred image, taken to have the power of x and a 1 / f^2 spectrum. At most a factor of 2
    from `observation.sigma`.
    """
    E, f = observation.residual(X, K), observation.log_frequency.exp().clamp(min=1 / max(observation.size))
    batch, _, chan, *_ = E.shape
    measured = observation.measured.expand(batch, 1, chan, *observation.size).mean(dim=(1, 2, 3, 4))
    pixels = observation.size[0] * observation.size[1]
    left = (E.real**2 + E.imag**2).mean(dim=(1, 2)) / (pixels * measured.view(-1, 1, 1))
    whitened = (X.real**2 + X.imag**2).mean(dim=(1, 2)) / pixels * f**2
    strength = torch.where(f > LOW, whitened, 0).sum(dim=(1, 2), keepdim=True) / (f > LOW).sum()
    blurred = (K.real**2 + K.imag**2)[:, 0] * strength / f**2
    given = variance = observation.sigma.view(-1, 1, 1) ** 2
    for _ in range(num_iters):
        weight = (variance / (variance + blurred)) ** 4
        variance = (weight * left).sum(dim=(1, 2), keepdim=True) / weight.sum(dim=(1, 2), keepdim=True)
        variance = variance.clamp(given / 4, given * 4)
    return variance.sqrt().flatten()


def stein_risk(
    explain: Callable[[Tensor], Tensor], y: Tensor, sigma: Tensor, probe: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How far `explain(y)` is from y without its noise: mean squared error over sigma^2, `(B,)`, without the truth.

    Stein 1981, Eq. (1.4), its divergence along one random direction (Ramani, Blu and Unser 2008, Eq. (13)). An
    explanation that fits the noise has a small residual and pays for it here.

    Args:
        explain: an estimate of the image without noise, of y and deterministic.
        y: `(B, C, H, W)`, sigma `(B,)`.
        probe: like y, independent values of mean 0 and variance 1.

    Returns:
        The risk and `explain(y)`.
    """
    std = sigma.view(-1, 1, 1, 1)
    found = explain(y)
    moved = explain(y + PROBE_STEP * std * probe) - found
    divergence = (probe * moved / (PROBE_STEP * std)).mean(dim=(1, 2, 3))
    return ((found - y) / std).square().mean(dim=(1, 2, 3)) - 1 + 2 * divergence, found


def place_between(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], y: Tensor, sigma: Tensor, probe: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where y without its noise lies on the line from `first(y)` to `second(y)`: 0 and 1, `(B,)`, without the truth.

    Below 1/2 the first is nearer to it: the difference of their risks, in units of their distance from each other. So
    it does not depend on how much of the image is smooth, where both are alike, as the risks themselves do. Arguments
    as for `stein_risk`.

    Returns:
        The place, and the standard deviation that the noise of y gives it.
    """
    (risk, a), (other, b) = (stein_risk(explain, y, sigma, probe) for explain in (first, second))
    apart = ((a - b) / sigma.view(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3)).clamp(min=1e-12)
    return 0.5 + (risk - other) / (2 * apart), (apart * y[0].numel()).rsqrt()


def denoise_observation(model: nn.Module, observation: Observation) -> Tensor:
    """The blurry images without their noise, `(B, C, H, W)` in [0, 1]: the prior's estimate at the level of the noise.

    Images of one batch may differ in sigma; each is denoised at its own.
    """
    sigma_t = 2 * observation.sigma.double()  # relative to [-1, 1]
    alpha_bar = 1 / (1 + sigma_t**2)
    t = torch.tensor([time_of_sigma(s) for s in sigma_t.tolist()], device=observation.y.device)
    a, s = (v.to(observation.y.dtype).view(-1, 1, 1, 1) for v in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    x_t = a * (2 * observation.y - 1)
    with torch.no_grad():
        x0_hat = (x_t - s * model(x_t, t)) / a  # Eq. (12)
    return ((x0_hat + 1) / 2).clamp(0, 1)


def delta_kernel(batch: int, size: tuple[int, int]) -> Tensor:
    """`(B, 1, h, w)`: no blur."""
    k = torch.zeros(batch, 1, *size)
    k[:, :, size[0] // 2, size[1] // 2] = 1
    return k


def diffusion_em(
    model: nn.Module, observation: Observation, guidance: Guidance, schedule: Schedule, *, prior: KernelPrior,
    kernel_size: tuple[int, int], noise: Callable[[int], Noise], num_rounds: int = ROUNDS, beta: float = 1e5,
    num_iters: int = 10, compat: str = "paper", rule: Rule = DDPM(), r2: ErrorLaw = default_r2,  # noqa: B008  (frozen)
    execute: Execute = Eager, on_round: Callable[[int, Sample, Tensor], None] | None = None,
    on_step: Callable[[Step, Tensor, Tensor], None] | None = None,
) -> Sample:  # fmt: skip
    """Diffusion EM, Algorithm A.1: posterior samples with the current kernel, then one M-step on them, L times.

    `noise(l)` is the noise of round l. As in the algorithm, the images returned were drawn with the kernel of the
    round before and the kernel is that of the last M-step; unless `compat="released"`, one more sampling run with the
    last kernel brings the two together. Known to stay at "no blur" on some images: it starts from a delta.
    """

    def draw(k: Tensor, round_: int) -> Sample:
        return sample(
            model, observation, Known(k), guidance, schedule, noise=noise(round_), rule=rule, r2=r2, execute=execute,
            on_step=on_step,
        )  # fmt: skip

    k = delta_kernel(observation.y.shape[0], kernel_size).to(observation.y)
    for round_ in range(num_rounds):
        drawn = draw(k, round_)
        k = mstep(
            observation.y, drawn.images, k, sigma=observation.sigma, prior=prior, beta=beta, num_iters=num_iters,
            compat=compat,
        )  # fmt: skip
        if on_round is not None:
            on_round(round_, drawn, k)
    if compat != "released":
        drawn = draw(k, num_rounds)
    return Sample(drawn.x, k)
