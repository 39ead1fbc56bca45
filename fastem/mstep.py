"""The M-step: the kernel of each image that best explains it given its particles.

Half-quadratic splitting, Eq. (22)-(25). Only the kernel's support changes between iterations, so the loop never
leaves it: with w = n beta sigma^2, A = Sxy / (Sxx + w) and G = w / (Sxx + w), Eq. (24) is `z = a + g (*) k` with
a, g the values of their inverse transforms around the origin. The identity is exact, projections included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastem import ops
from fastem.operators import check_fits


@dataclass(frozen=True)
class PnP:
    """Plug-and-play prior: a kernel denoiser at noise std `sqrt(lam / beta)` is the proximal step of Eq. (25)."""

    denoiser: nn.Module
    lam: float = 1.0

    def __call__(self, z: Tensor, beta: float) -> Tensor:
        if self.lam == 0:
            return z
        return self.denoiser(z, math.sqrt(self.lam / beta))


@dataclass(frozen=True)
class L1:
    """`lam ||k||_1`: soft threshold at `lam / beta`. On the simplex the norm is constant; the threshold is not."""

    lam: float

    def __call__(self, z: Tensor, beta: float) -> Tensor:
        return (z - self.lam / beta).clamp(min=0)


@dataclass(frozen=True)
class L2:
    """`lam ||k||_2^2`: shrinkage by `beta / (2 lam + beta)`, which the division by the sum undoes."""

    lam: float

    def __call__(self, z: Tensor, beta: float) -> Tensor:
        return z * (beta / (2 * self.lam + beta))


KernelPrior = Callable[[Tensor, float], Tensor]  # (z, beta) -> the proximal step of lam Phi / beta at z


def mstep(
    y: Tensor, x0_hat: Tensor, k: Tensor, *, sigma: float | Tensor, prior: KernelPrior,
    beta: float = 1e5, num_iters: int = 10, compat: str = "paper", solver: str = "hqs", r2: float = 0.0,
) -> Tensor:  # fmt: skip
    """The kernel of each image given its particles, from images.

    Args:
        y: `(B, C, H, W)` in [0, 1], the blurry observations, float32 or float64.
        x0_hat: `(B, n, C, H, W)` in [0, 1], n estimates of each sharp image.
        k: `(B, 1, h, w)`, the kernels to start from; any odd or even size up to that of the image.
        sigma: std of the noise, scalar or `(B,)`, in image units (8-bit 5 is 5 / 255); > 0.
        prior: the proximal step of Eq. (25): `PnP`, `L1`, `L2`, or a function of `(z, beta)`.
        beta: HQS coupling of Eq. (22), on kernel coefficients; not the diffusion `beta`.
        num_iters: HQS iterations; the paper uses 10.
        compat: `"paper"` solves all channels jointly with weight n beta sigma^2; `"released"` solves per channel,
            averages the results and drops the factor n. Equal for one channel and n = 1.
        solver: `"hqs"`, or `"admm"` as in the released program.
        r2: r_t^2 of Appendix D in [0, 1] units: x0_hat is known up to noise of this variance (Eq. D.9).

    Returns:
        `(B, 1, h, w)`, non-negative, sums to 1.

    Raises:
        ValueError: if shapes disagree, the kernel is larger than the image, or an option is unknown.

    Source: Eq. (22)-(25) and D.9, Laroche et al. 2024.
    """
    _check(y, x0_hat, k)
    X, Y = torch.fft.rfft2(x0_hat), torch.fft.rfft2(y)
    sums = ops.spectral_sums(X, Y, per_channel=compat == "released")
    return mstep_from_sums(
        *sums, k, size=y.shape[-2:], count=x0_hat.shape[1] * (1 if compat == "released" else y.shape[1]),
        particles=x0_hat.shape[1], sigma=sigma, prior=prior, beta=beta, num_iters=num_iters, compat=compat,
        solver=solver, r2=r2,
    )  # fmt: skip


def mstep_from_sums(
    Sxy: Tensor, Sxx: Tensor, k: Tensor, *, size: tuple[int, int], count: int, particles: int, sigma: float | Tensor,
    prior: KernelPrior, beta: float, num_iters: int, compat: str, solver: str = "hqs", r2: float | Tensor = 0.0,
    recentred: bool = False,
) -> Tensor:  # fmt: skip
    """`mstep` from the sums of `ops.spectral_sums`, which a sampler has at hand, or adds up over a kernel group.

    With `recentred` the result goes through `ops.recentre`.
    """
    if compat not in ("paper", "released"):
        raise ValueError(f"compat must be 'paper' or 'released', got {compat!r}")
    sigma = torch.as_tensor(sigma, dtype=k.dtype, device=k.device).expand(k.shape[0]).view(-1, 1, 1, 1)
    weight = sigma**2 * beta * (1 if compat == "released" else particles)  # n beta sigma^2
    if isinstance(r2, Tensor) or r2:
        Sxx = Sxx + count * size[0] * size[1] * r2  # Eq. (D.9), unnormalised transform
    a, g = support_filters(Sxy, Sxx, weight, size, k.shape[-2:])
    if solver == "hqs":
        return hqs(a, g, k, prior, beta, num_iters, recentred=recentred)
    if solver == "admm":
        k = admm(a, g, k, prior, beta, num_iters)
        return ops.recentre(k) if recentred else k
    raise ValueError(f"solver must be 'hqs' or 'admm', got {solver!r}")


def support_filters(
    Sxy: Tensor, Sxx: Tensor, weight: Tensor, size: tuple[int, int], ksize: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """a `(B, 1, h, w)` and g `(B, 1, 2h-1, 2w-1)` with `z = a + g (*) k`; several channels are averaged."""
    h, w = ksize
    inverse = 1 / (Sxx + weight)
    A = (Sxy * inverse).mean(dim=1, keepdim=True)
    G = (weight * inverse).mean(dim=1, keepdim=True)
    spatial = torch.fft.irfft2(torch.cat([A, G.to(A.dtype)], dim=1), s=size)
    return ops.crop_support(spatial[:, :1], h, w), ops.crop_support(spatial[:, 1:], 2 * h - 1, 2 * w - 1)


def hqs(
    a: Tensor, g: Tensor, k: Tensor, prior: KernelPrior, beta: float, num_iters: int, *, recentred: bool = False
) -> Tensor:
    """Alternates Eq. (24) and Eq. (25) on the support."""
    chain = (
        prior.denoiser.as_chain()
        if isinstance(prior, PnP) and prior.lam and hasattr(prior.denoiser, "as_chain")
        else None
    )
    if chain is not None:
        noise_std = torch.full((k.shape[0],), math.sqrt(prior.lam / beta), dtype=k.dtype, device=k.device)
        return ops.hqs_chain(a, g, k, noise_std, *chain, num_iters, recentred=recentred)
    for _ in range(num_iters):
        z = ops.project_kernel(a + ops.convolve_support(g, k))  # Eq. (24)
        k = ops.project_kernel(prior(z, beta))  # Eq. (25)
    return ops.recentre(k) if recentred else k


def admm(a: Tensor, g: Tensor, k: Tensor, prior: KernelPrior, beta: float, num_iters: int) -> Tensor:
    """The released program's other solver: scaled dual variable u, projection after the prior only."""
    u = torch.zeros_like(k)
    for _ in range(num_iters):
        z = a + ops.convolve_support(g, k - u)
        k = ops.project_kernel(prior(z + u, beta))
        u = u + z - k
    return k


def _check(y: Tensor, x0_hat: Tensor, k: Tensor) -> None:
    if y.dim() != 4 or x0_hat.dim() != 5 or x0_hat.shape[0] != y.shape[0] or x0_hat.shape[2:] != y.shape[1:]:
        raise ValueError(
            "y must be (B, C, H, W) and x0_hat (B, n, C, H, W) of the same images, "
            f"got {tuple(y.shape)} and {tuple(x0_hat.shape)}"
        )
    if k.dim() != 4 or k.shape[:2] != (y.shape[0], 1):
        raise ValueError(f"k must be (B, 1, h, w) with B = {y.shape[0]}, one kernel per image, got {tuple(k.shape)}")
    check_fits(k, y.shape[-2:])
