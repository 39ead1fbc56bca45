"""Training of the kernel denoiser: `fastem train kernel-denoiser`.

The network sees synthetic kernels under white noise, under the coloured noise of least-squares estimates, and under
the errors of single solves made with wrong images; some with their negative values cut off, as the M-step loop does.
The division by the sum that follows there needs no example: without biases the network is homogeneous. On
request some kernels are what whole M-steps with the network itself make of them, and some are clean, whatever the level
the network is told. Clean kernels without M-steps make a network that also leaves alone what a wrong image has added to
a kernel, and Fast EM restores less: see the model card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastem.models.kernel_denoiser import (
    KernelDenoiser,
    KernelDenoiserConfig,
    load_kernel_denoiser,
    save_kernel_denoiser,
)
from fastem.ops import reference as spec
from fastem.synth import motion_kernel
from fastem.training.core import BandBalance, TrainConfig, Trainer, tell

LOWEST, HIGHEST = 3e-5, 3e-2  # noise std in training; 3.16e-3 and 1.4e-3 are those of the published M-steps
FIRST_SEED = 2**32  # of the training kernels: smaller seeds are never trained on
FAMILIES = {"shake": 0.6, "boracchi": 0.1, "gp": 0.15, "line": 0.05, "gaussian": 0.05, "defocus": 0.03, "delta": 0.02}
SIZES = {17: 0.06, 25: 0.1, 33: 0.6, 41: 0.08, 49: 0.08, 65: 0.08}
HIGHEST_TOLD = 5e-3  # level that goes with clean kernels at most: above it, wide ones drown
TOLERANCE = 0.005  # relative change of a clean kernel that counts as much as the noise counts elsewhere
MEASURED = [(17, 3.16e-3), (25, 3.16e-3), (33, 1e-3), (33, 3.16e-3), (33, 1e-2)]  # size and level, for the model card
MEASURED += [(49, 3.16e-3), (64, 1.41e-3), (65, 3.16e-3)]

DEFAULTS = TrainConfig(minutes=12.0, cooldown=5.0, batch_size=32, patch=33, lr=2e-3, warmup=200, ema_halflife=500.0)


class KernelPool:
    """Kernels of several sizes, drawn at random, mirrored and turned."""

    def __init__(
        self,
        count: int,
        device: str | torch.device = "cpu",
        sizes: dict[int, float] = SIZES,
        families: dict[str, float] = FAMILIES,
    ) -> None:
        names, shares = list(families), np.array(list(families.values()))
        self.sizes, self.shares = list(sizes), torch.tensor(list(sizes.values()), device=device)
        rng = np.random.Generator(np.random.PCG64(FIRST_SEED))
        self.kernels: dict[int, Tensor] = {}
        seed = FIRST_SEED
        for size, share in sizes.items():
            wanted = max(1, round(count * share))
            drawn = rng.choice(names, size=wanted, p=shares / shares.sum())
            made = [motion_kernel(size, seed + i, str(family)) for i, family in enumerate(drawn)]
            self.kernels[size] = torch.from_numpy(np.stack(made)).to(device)
            seed += wanted

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`(m, 1, size, size)` of one random size, with m such that the pixels amount to `count` kernels of 33."""
        size = self.sizes[int(torch.multinomial(self.shares, 1, generator=generator))]
        return self.draw(size, max(1, round(count * (33 / size) ** 2)), generator)

    def draw(self, size: int, count: int, generator: torch.Generator) -> Tensor:
        """`(count, 1, size, size)`."""
        kernels = self.kernels[size]
        which = torch.randint(len(kernels), (count,), generator=generator, device=kernels.device)
        k = kernels[which][:, None]
        flip, turn, transpose = (
            torch.rand(count, 1, 1, 1, generator=generator, device=kernels.device) < 0.5 for _ in range(3)
        )
        k = torch.where(flip, k.flip(-1), k)
        k = torch.where(turn, k.flip(-2), k)
        return torch.where(transpose, k.transpose(-1, -2), k)


def sample_noise_std(count: int, generator: torch.Generator) -> Tensor:
    """`(count,)`: log-uniform, mostly where M-steps are, some down to where the network must be the identity."""

    def log_uniform(low: float, high: float) -> Tensor:
        u = torch.rand(count, generator=generator, device=generator.device)
        return torch.exp(math.log(low) + math.log(high / low) * u)

    pick = torch.rand(count, generator=generator, device=generator.device)
    centre, wide = log_uniform(1e-3, 1e-2), log_uniform(LOWEST, HIGHEST)
    return torch.where(pick < 0.5, centre, wide)


def perturb(k: Tensor, noise_std: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy kernels `(B, 1, h, w)` and the actual std of their error `(B,)`.

    Four in ten errors are white, two are the noise of a least-squares estimate, four the whole error of an M-step.
    Half the kernels lose their negative values.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(k), *shape, generator=generator, device=k.device)

    white = torch.randn(k.shape, generator=generator, device=k.device)
    noise, error = estimation_errors(k, generator)
    pick = uniform(1, 1, 1)
    e = torch.where(pick < 0.4, white, torch.where(pick < 0.6, _unit_rms(noise), _unit_rms(error)))
    noisy = k + noise_std.view(-1, 1, 1, 1) * e
    noisy = torch.where(uniform(1, 1, 1) < 0.5, noisy.clamp(min=0), noisy)
    return noisy, (noisy - k).square().mean(dim=(1, 2, 3)).sqrt()


def estimation_errors(k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Errors of Eq. (24) on random images twice the size of the kernel, up to scale: its noise alone, and all of it.

    The images have spectra `1 / f^p` with Rayleigh amplitudes; the estimate x0_hat has lost detail beyond a random
    frequency and gained some of its own.
    """
    count, _, h, w = k.shape
    size = (2 * h, 2 * w)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator, device=k.device)

    def spectrum() -> Tensor:
        return torch.fft.rfft2(torch.randn(count, 1, *size, generator=generator, device=k.device))

    f = torch.hypot(
        torch.fft.fftfreq(size[0], device=k.device)[:, None], torch.fft.rfftfreq(size[1], device=k.device)
    ).clamp(min=0.5 / max(size))  # fmt: skip
    amplitude = f ** -uniform(0.8, 1.4)
    X = spectrum() * amplitude
    weight = torch.exp(uniform(math.log(0.02), math.log(1.0))) ** (-2 * uniform(0.8, 1.4))  # n beta sigma^2
    N = spectrum() * weight.sqrt()
    noise = spec.crop_support(torch.fft.irfft2(X.conj() * N / (X.abs() ** 2 + weight), s=size), h, w)

    seen = 1 / (1 + (f / uniform(0.1, 0.7)) ** 4)  # share of the detail that x0_hat has
    X_hat = seen * X + 0.3 * uniform(0, 1) * (1 - seen) * spectrum() * amplitude
    K = spec.psf_to_otf(k, size)
    start = spec.psf_to_otf(nn.functional.avg_pool2d(k, 3, stride=1, padding=1), size)  # a blurred kernel to start from
    Z = (X_hat.conj() * (K * X + uniform(0, 1) * N) + weight * start) / (X_hat.abs() ** 2 + weight)  # Eq. (24)
    return noise, spec.crop_support(torch.fft.irfft2(Z, s=size), h, w) - k


@torch.no_grad()
def mstep_outputs(k: Tensor, told: Tensor, model: nn.Module, generator: torch.Generator) -> Tensor:
    """What an M-step gives to its denoiser: Eq. (24), projected, after up to four iterations with the denoiser itself.

    Args:
        k: `(B, 1, h, w)`, the true kernels.
        told: `(B,)`, the level `sqrt(lam / beta)` of Eq. (25) with lam = 1, so that the noise of Eq. (24) fits it.

    Returns:
        `(B, 1, h, w)`, non-negative, sums to 1.
    """
    problem = _Problem(k, told, generator)
    delta = torch.zeros_like(k)
    delta[..., k.shape[-2] // 2, k.shape[-1] // 2] = 1
    pick = torch.rand(len(k), 1, 1, 1, generator=generator, device=k.device)
    k_now = torch.where(pick < 0.5, delta, _softened(k))
    z = spec.project_kernel(problem.solve(k_now))
    for _ in range(int(torch.randint(5, (1,), generator=generator, device=k.device))):
        k_now = spec.project_kernel(model(z, told).clamp(min=0) + 1e-6 * delta)  # it may leave nothing
        z = spec.project_kernel(problem.solve(k_now))
    return z


class _Problem:
    """Eq. (24) on random images twice the size of the kernels.

    The images have spectra `1 / f^p` with Rayleigh amplitudes; the estimate x0_hat has lost detail beyond a random
    frequency and gained some of its own. `weight` is n beta sigma^2; with the noise level `told`, `1 / sqrt(beta)`, the
    noise of y is `told sqrt(weight)`.
    """

    def __init__(self, k: Tensor, told: Tensor, generator: torch.Generator) -> None:
        count, _, h, w = k.shape
        self.size, self.ksize = (2 * h, 2 * w), (h, w)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator, device=k.device)

        def spectrum() -> Tensor:
            return torch.fft.rfft2(torch.randn(count, 1, *self.size, generator=generator, device=k.device))

        f = torch.hypot(
            torch.fft.fftfreq(self.size[0], device=k.device)[:, None], torch.fft.rfftfreq(self.size[1], device=k.device)
        ).clamp(min=0.5 / max(self.size))
        power = uniform(0.8, 1.4)
        amplitude = f**-power
        even = uniform(0.3, 1.0)  # frequency where the image is as strong as the weight
        self.weight = self.size[0] * self.size[1] * even ** (-2 * power)
        self.X, self.N = spectrum() * amplitude, told.view(-1, 1, 1, 1) * self.weight.sqrt() * spectrum()
        seen = 1 / (1 + (f / uniform(0.2, 1.0)) ** 4)  # share of the detail that x0_hat has
        self.X_hat = seen * self.X + 0.15 * uniform(0, 1) * (1 - seen) * spectrum() * amplitude
        self.Y = spec.psf_to_otf(k, self.size) * self.X + uniform(0.3, 1) * self.N

    def solve(self, k: Tensor) -> Tensor:
        """Eq. (24) on the support, from the kernels `(B, 1, h, w)`."""
        K = spec.psf_to_otf(k, self.size)
        Z = (self.X_hat.conj() * self.Y + self.weight * K) / (self.X_hat.abs() ** 2 + self.weight)
        return spec.crop_support(torch.fft.irfft2(Z, s=self.size), *self.ksize)


def _softened(k: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(k, 3, stride=1, padding=1)


def _unit_rms(e: Tensor) -> Tensor:
    return e / e.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)


def train_kernel_denoiser(
    out: Path,
    config: TrainConfig = DEFAULTS,
    network: KernelDenoiserConfig = KernelDenoiserConfig(),  # noqa: B008  (frozen)
    device: str = "cpu",
    num_kernels: int = 20_000,
    init: str | Path | None = None,
    clean_share: float = 0.0,
    mstep_share: float = 0.0,
    report: Callable[[dict], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
) -> KernelDenoiser:
    """Trains (or resumes) a kernel denoiser on synthetic kernels; `config.patch` is not used.

    Writes `out/training.pt` (resume state), `out/log.jsonl` and `out/kernel.safetensors`, and returns the model with
    averaged weights; also where `stop()`, asked before each step, ends it early. A fresh run starts from the weights
    `init` (a bundled name or a file) where they are given; their network takes the place of `network`.

    Args:
        clean_share: share of kernels without noise, whatever the level the network is told.
        mstep_share: share of kernels that are what M-steps with the network itself have found so far.

    Raises:
        ValueError: if the shares are negative or more than 0.8 together, or `init` has biases.
    """
    if not (0 <= clean_share and 0 <= mstep_share and clean_share + mstep_share <= 0.8):
        raise ValueError(f"shares are >= 0 and at most 0.8 together, got clean {clean_share}, M-step {mstep_share}")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = KernelDenoiser(network) if init is None else _initial(init)
    # M-steps and clean kernels have noise bands of their own: a third of the scale each
    scale = HIGHEST / LOWEST if clean_share or mstep_share else 1.0
    balance = BandBalance(device, LOWEST, HIGHEST * scale**2)
    model = model.to(memory_format=torch.channels_last)
    trainer = Trainer(model, config, out / "training.pt", device, balance=balance)
    pool = KernelPool(num_kernels, device)

    def loss_of(model: nn.Module, generator: torch.Generator, balance: BandBalance) -> Tensor:
        clean = pool.sample(config.batch_size, generator)
        level = sample_noise_std(len(clean), generator)
        num_steps, num_clean = int(mstep_share * len(clean)), int(clean_share * len(clean))
        ends = [num_steps, num_steps + num_clean]
        in_steps, alone, others = clean.tensor_split(ends)
        told_steps, told_alone, level_others = level.tensor_split(ends)
        found = mstep_outputs(in_steps, told_steps, model, generator) if num_steps else in_steps
        noisy, told_others = perturb(others, level_others, generator)
        told_alone = told_alone.clamp(max=HIGHEST_TOLD)
        denoised = model(torch.cat([found, alone, noisy]), torch.cat([told_steps, told_alone, told_others]))
        error = (denoised - clean).square().mean(dim=(1, 2, 3))

        error_steps = (found - in_steps).square().mean(dim=(1, 2, 3)).sqrt().clamp(LOWEST, HIGHEST)
        allowed = torch.cat([error_steps, TOLERANCE * alone.square().mean(dim=(1, 2, 3)).sqrt(), told_others])
        band = torch.cat([error_steps * scale, told_alone * scale**2, told_others])
        return balance(error / allowed**2, band)

    tell(trainer.run(loss_of, stop), out / "log.jsonl", report)
    trainer.ema.copy_to(model)
    model.eval()
    card = model_card(trainer, model)
    save_kernel_denoiser(out / "kernel.safetensors", model, card)
    return model


def _initial(source: str | Path) -> KernelDenoiser:
    """The network to start from, free to learn."""
    model = load_kernel_denoiser(source)
    if not isinstance(model, KernelDenoiser):
        raise ValueError(f"{source} has biases: training starts from a bias-free KernelDenoiser only")
    return model.train().requires_grad_(True)


def model_card(trainer: Trainer, model: KernelDenoiser) -> dict:
    """Data, licence, recipe and measured quality, as stored with the weights."""
    gains, changes = {}, {}
    for size, noise_std in MEASURED:
        held_out, name = _held_out(size).to(trainer.device), f"{size}x{size} at {noise_std:g}"
        gain, change = denoising_gain(model, held_out, noise_std), clean_change(model, held_out, noise_std)
        gains[name] = {"mean": round(gain.mean().item(), 2), "min": round(gain.min().item(), 2)}
        changes[name] = {"mean": round(change.mean().item(), 4), "max": round(change.max().item(), 4)}
    return {
        "what": "denoiser of blur kernels that sum to 1, any size; bias-free",
        "data": "synthetic kernels of fastem.synth, families and shares " + json.dumps(FAMILIES) + "; no photographs",
        "licence": "MIT",
        "recipe": {
            **asdict(trainer.config),
            "num_steps": trainer.step,
            "total_minutes": round(trainer.seconds / 60, 1),
            "noise_std": [LOWEST, HIGHEST],
        },
        "gain_db_over_white_noise": gains,  # held-out kernels of the family "shake"
        "change_of_clean_kernels": changes,  # ||D(k, level) - k|| / ||k||, of the same kernels
    }


@cache
def _held_out(size: int, count: int = 50) -> Tensor:
    return torch.from_numpy(np.stack([motion_kernel(size, seed) for seed in range(count)]))[:, None]


@torch.no_grad()
def denoising_gain(model: nn.Module, kernels: Tensor, noise_std: float, seed: int = 0) -> Tensor:
    """`(B,)`: PSNR gain in dB over the noisy kernels `(B, 1, h, w)` at white noise of this std."""
    generator = torch.Generator().manual_seed(seed)
    noise = noise_std * torch.randn(kernels.shape, generator=generator).to(kernels.device)
    error = (model(kernels + noise, noise_std) - kernels).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(noise.square().mean(dim=(1, 2, 3)) / error)


@torch.no_grad()
def clean_change(model: nn.Module, kernels: Tensor, noise_std: float) -> Tensor:
    """`(B,)`: what the network does to clean kernels `(B, 1, h, w)` told this level, `||D(k) - k|| / ||k||`."""
    difference = model(kernels, noise_std) - kernels
    return difference.flatten(1).norm(dim=1) / kernels.flatten(1).norm(dim=1)
