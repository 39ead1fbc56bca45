"""What fastem is compared with: classical restorations, a deep prior without training, and estimators of the kernel
that are given the sharp image. A few lines each, written from the papers they name.

A baseline takes a `Problem` and its own constants, and returns an `Estimate`. Those that run on the engine (PiGDM and
DPS with the true kernel, Diffusion EM, the released program's Fast EM) need no code here: they are its options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastem import ops
from fastem.em import delta_kernel
from fastem.initial import CoarseToFine, difference_spectra, fit_on_simplex
from fastem.models import load_kernel_denoiser
from fastem.mstep import L1, L2, PnP, mstep
from fastem.operators import Canvas


@dataclass(frozen=True)
class Problem:
    """One blurry image, and what is known of it.

    Attributes:
        y: `(H, W, 3)` float32, the observation, nominally in [0, 1].
        kernel_size: (h, w) of the support in which the kernel is looked for.
        sigma: std of the noise in image units; None where it must be estimated.
        circular: whether the blur is periodic; otherwise as in a camera.
        kernel: `(h, w)`, the true blur, or None. Only oracles look at it.
        x: `(H, W, 3)`, the sharp image at the pixels of y, or None. Only estimators of the kernel look at it.
        seed: of whatever is drawn.
        lossy: whether y went through JPEG or the like; None: not known.
        quantization: `(8, 8)`, the steps of the luminance of a JPEG whose blocks start at the first pixel of y.
        border: pixels at each side that depend on what lies outside the sharp image: not scored.
    """

    y: np.ndarray
    kernel_size: tuple[int, int]
    sigma: float | None = None
    circular: bool = False
    kernel: np.ndarray | None = None
    x: np.ndarray | None = None
    seed: int = 0
    lossy: bool | None = None
    quantization: np.ndarray | None = None
    border: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a method makes of a `Problem`."""

    image: np.ndarray | None = None  # (H, W, 3) in [0, 1]; None for an estimator of the kernel
    kernel: np.ndarray | None = None  # (h, w), sums to 1; None where no kernel is estimated
    mean: np.ndarray | None = None  # (H, W, 3), mean of the particles where there are several
    warnings: tuple[str, ...] = ()  # codes, such as W_VARYING


def wiener(problem: Problem) -> Estimate:
    """The linear estimate with the true kernel for images whose power falls as 1 / f^2, its scale matched to y."""
    y, canvas = _on_canvas(problem)
    K = _otf(_true_kernel(problem), canvas)
    Y, size = torch.fft.rfft2(y), (canvas.height, canvas.width)
    fy, fx = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])[None]
    falling = 1 / (fy**2 + fx**2).clamp(min=1e-12)
    falling[0, 0] = 0  # the mean is taken as it is
    noise = y[0, 0].numel() * problem.sigma**2  # power per coefficient of the unnormalised transform
    above = (Y.abs() ** 2 - noise) * (falling > 0)
    scale = above.sum((-2, -1), keepdim=True).clamp(min=noise) / (K.abs() ** 2 * falling).sum()
    weight = noise / (scale * falling).clamp(min=1e-30)
    weight[..., 0, 0] = 0
    x = torch.fft.irfft2(K.conj() * Y / (K.abs() ** 2 + weight), s=size)
    return Estimate(_image(canvas.crop(x)), problem.kernel)


def l0_map(problem: Problem) -> Estimate:
    """Blind deconvolution without a learned prior: an image of few gradients finds the kernel, coarse to fine, on the
    observation itself (Xu et al. 2011; Pan et al. 2014; Anger et al. 2019); then `hyper_laplacian`."""
    y, canvas = _on_canvas(problem)
    k = CoarseToFine()(y, problem.kernel_size, None if canvas.periodic else canvas)
    return Estimate(_image(canvas.crop(hyper_laplacian(y, k, problem.sigma))), k[0, 0].numpy())


def known_hyper_laplacian(problem: Problem) -> Estimate:
    """`hyper_laplacian` with the true kernel."""
    y, canvas = _on_canvas(problem)
    k = torch.from_numpy(_true_kernel(problem))[None, None]
    return Estimate(_image(canvas.crop(hyper_laplacian(y, k, problem.sigma))), problem.kernel)


def hyper_laplacian(y: Tensor, k: Tensor, sigma: float, exponent: float = 2 / 3, weight: float = 0.2) -> Tensor:
    """`argmin lam / 2 ||k * x - y||^2 + sum |grad x|^exponent`, lam = weight / sigma^2, by half-quadratic splitting.

    y `(1, C, H, W)`, periodic; k `(1, 1, h, w)`. Source: Krishnan and Fergus 2009, who take lam = 2000 at 1 % noise.
    """
    size = (y.shape[-2], y.shape[-1])
    K, lam = ops.psf_to_otf(k, size), weight / sigma**2
    Dy, Dx = difference_spectra(size, K)
    data, K2, D2 = K.conj() * torch.fft.rfft2(y), K.abs() ** 2, Dy.abs() ** 2 + Dx.abs() ** 2
    X, coupling = torch.fft.rfft2(y), 1.0
    while coupling <= 256:
        G = [torch.fft.rfft2(_shrink(torch.fft.irfft2(D * X, s=size), exponent, coupling)) for D in (Dy, Dx)]
        ratio = coupling / lam
        X = (data + ratio * (Dy.conj() * G[0] + Dx.conj() * G[1])) / (K2 + ratio * D2)
        coupling *= 2 * math.sqrt(2)
    return torch.fft.irfft2(X, s=size)


def _shrink(v: Tensor, exponent: float, coupling: float) -> Tensor:
    """`argmin |w|^exponent + coupling / 2 (w - v)^2` for each value: Newton's steps from v, or 0 where that is less."""
    w = a = v.abs().clamp(min=1e-9)
    for _ in range(4):
        slope = exponent * w ** (exponent - 1) + coupling * (w - a)
        curvature = exponent * (exponent - 1) * w ** (exponent - 2) + coupling
        w = torch.where(curvature > 0, w - slope / curvature, torch.zeros_like(w)).clamp(min=1e-9)
    better = w**exponent + coupling / 2 * (w - a) ** 2 < coupling / 2 * a**2
    return torch.where(better, w * v.sign(), torch.zeros_like(v))


def richardson_lucy(problem: Problem, num_rounds: int = 5, num_iters: int = 2) -> Estimate:
    """Blind Richardson-Lucy: multiplicative steps on the kernel, then on the image, in turns (Fish et al. 1995)."""
    y, canvas = _on_canvas(problem)
    y, size = y.clamp(min=1e-4), (canvas.height, canvas.width)
    h, w = problem.kernel_size
    rows, cols = torch.arange(h)[:, None] - h // 2, torch.arange(w)[None] - w // 2
    k = torch.exp(-(rows**2 + cols**2) / (2 * (max(h, w) / 8) ** 2))[None, None]
    k, x = k / k.sum(), y
    for _ in range(num_rounds):
        for _ in range(num_iters):
            X = torch.fft.rfft2(x)
            again = torch.fft.irfft2(_otf(k, canvas) * X, s=size).clamp(min=1e-4)
            pull = torch.fft.irfft2((X.conj() * torch.fft.rfft2(y / again)).sum(1, keepdim=True), s=size) / x.sum()
            k = ops.project_kernel(k * ops.crop_support(pull, h, w))
        K = _otf(k, canvas)
        for _ in range(num_iters):
            again = torch.fft.irfft2(K * torch.fft.rfft2(x), s=size).clamp(min=1e-4)
            x = (x * torch.fft.irfft2(K.conj() * torch.fft.rfft2(y / again), s=size)).clamp(0, 4)
    return Estimate(_image(canvas.crop(x)), k[0, 0].numpy())


def deep_prior(problem: Problem, num_iters: int = 400, width: int = 24, rate: float = 1e-2) -> Estimate:
    """Two untrained networks, one that puts out the image and one the kernel, fitted to the observation alone.

    After SelfDeblur (Ren et al., CVPR 2020), much smaller: three levels, squared error only.
    """
    y, canvas = _on_canvas(problem)
    size, (h, w) = (canvas.height, canvas.width), problem.kernel_size
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(problem.seed)
        draw, drawn = _Hourglass(width), torch.rand(1, 8, size[0] + -size[0] % 8, size[1] + -size[1] % 8) / 10
        kernel = nn.Sequential(nn.Linear(200, 500), nn.ReLU(), nn.Linear(500, h * w), nn.Softmax(dim=-1))
        code = torch.rand(1, 200) / 10
        optimiser = torch.optim.Adam(
            [{"params": draw.parameters(), "lr": rate}, {"params": kernel.parameters(), "lr": 1e-4}]
        )
        inside = canvas.inside((0, 0), y)
        for i in range(num_iters):
            noisy = drawn + 0.001 * torch.randn_like(drawn)
            x, k = draw(noisy)[..., : size[0], : size[1]], kernel(code).view(1, 1, h, w)
            padded = F.pad(k, (0, size[1] - w, 0, size[0] - h)).roll((-(h // 2), -(w // 2)), (-2, -1))
            again = torch.fft.irfft2(torch.fft.rfft2(padded) * torch.fft.rfft2(x), s=size)
            loss = ((again - y).square() * inside).sum() / (inside.sum() * y.shape[1])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if i in (num_iters * 2 // 3, num_iters * 5 // 6):
                for group in optimiser.param_groups:
                    group["lr"] /= 2
    return Estimate(_image(canvas.crop(x.detach())), k[0, 0].detach().numpy())


class _Hourglass(nn.Module):
    """Down three times and up again with skips; `(1, 8, H, W)` -> `(1, 3, H, W)` in [0, 1], H and W multiples of 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(_block(8 if i == 0 else width, width, 2) for i in range(3))
        self.skip = nn.ModuleList(_block(8 if i == 0 else width, 4, 1) for i in range(3))
        self.up = nn.ModuleList(_block(width + 4, width, 1) for _ in range(3))
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, h: Tensor) -> Tensor:
        kept = []
        for down, skip in zip(self.down, self.skip, strict=True):
            kept.append(skip(h))
            h = down(h)
        for up, skipped in zip(self.up, reversed(kept), strict=True):
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
            h = up(torch.cat([h, skipped], dim=1))
        return self.out(h).sigmoid()


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="reflect")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


# ------------------------------------------------------------------------- the kernel, given the sharp image


def kernel_simplex(problem: Problem, power: float = 1.0, ridge: float = 0.02, num_iters: int = 80) -> Estimate:
    """`fastem.initial.fit_on_simplex` on x and y filtered by the gradient's modulus to the `power`."""
    x, y = _pair(problem)
    X, Y = torch.fft.rfft2(x), torch.fft.rfft2(y)
    size = (x.shape[-2], x.shape[-1])
    Dy, Dx = difference_spectra(size, X)
    whiten = (Dy.abs() ** 2 + Dx.abs() ** 2) ** power
    cross, energy = ops.spectral_sums(X[:, None], Y)
    k = _flat(problem.kernel_size)
    return Estimate(kernel=fit_on_simplex(cross * whiten, energy * whiten, k, size, ridge, num_iters)[0, 0].numpy())


def kernel_hqs(
    problem: Problem, prior: str = "pnp", lam: float = 1.0, beta: float = 1e5, num_iters: int = 10,
    compat: str = "paper", denoiser: str = "kernel",
) -> Estimate:  # fmt: skip
    """The M-step of Eq. (22)-(25) with one of the paper's kernel priors, from a delta; sigma is the true one."""
    priors: dict[str, Callable] = {
        "pnp": lambda: PnP(load_kernel_denoiser(denoiser), lam), "l1": lambda: L1(lam), "l2": lambda: L2(lam),
    }  # fmt: skip
    if prior not in priors:
        raise ValueError(f"unknown prior {prior!r}; allowed are {', '.join(priors)}")
    x, y = _pair(problem)
    with torch.no_grad():
        k = mstep(
            y, x[:, None], delta_kernel(1, problem.kernel_size), sigma=max(problem.sigma, 1e-4), prior=priors[prior](),
            beta=beta, num_iters=num_iters, compat=compat,
        )  # fmt: skip
    return Estimate(kernel=ops.project_kernel(ops.recentre(k))[0, 0].numpy())


BASELINES: dict[str, Callable[..., Estimate]] = {
    "wiener": wiener,
    "hyper-laplacian": known_hyper_laplacian,
    "l0-map": l0_map,
    "richardson-lucy": richardson_lucy,
    "deep-prior": deep_prior,
    "kernel-simplex": kernel_simplex,
    "kernel-hqs": kernel_hqs,
}


def _on_canvas(problem: Problem) -> tuple[Tensor, Canvas]:
    """y as a periodic `(1, 3, height, width)`."""
    y = torch.from_numpy(np.ascontiguousarray(problem.y, np.float32)).permute(2, 0, 1)[None]
    size = (y.shape[-2], y.shape[-1])
    canvas = Canvas(*size, size) if problem.circular else Canvas.around(size, problem.kernel_size)
    return canvas.extend(y), canvas


def _pair(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.x is None:
        raise ValueError("this method is given the sharp image, and there is none")
    if not problem.circular:
        raise ValueError("kernel estimators that are given the sharp image take circular blur only")
    x, y = (np.ascontiguousarray(a, np.float32) for a in (problem.x, problem.y))
    return torch.from_numpy(x).permute(2, 0, 1)[None], torch.from_numpy(y).permute(2, 0, 1)[None]


def _true_kernel(problem: Problem) -> np.ndarray:
    if problem.kernel is None:
        raise ValueError("this method is given the true kernel, and there is none")
    return np.ascontiguousarray(problem.kernel, np.float32)


def _otf(k: np.ndarray | Tensor, canvas: Canvas) -> Tensor:
    k = k if isinstance(k, Tensor) else torch.from_numpy(k)[None, None]
    return ops.psf_to_otf(k, (canvas.height, canvas.width))


def _flat(size: tuple[int, int]) -> Tensor:
    return torch.full((1, 1, *size), 1 / (size[0] * size[1]))


def _image(x: Tensor) -> np.ndarray:
    return x[0].clamp(0, 1).permute(1, 2, 0).contiguous().numpy()
