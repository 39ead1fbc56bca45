"""The parts of a step, each on plain torch and on the native backend."""

from __future__ import annotations

import torch

from fastem import ops
from fastem.models import load_kernel_denoiser
from fastem.mstep import PnP, mstep_from_sums

SIGMA = 5 / 255


def randn(bench, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(bench.device).manual_seed(len(shape))
    return torch.randn(*shape, device=bench.device, generator=generator, dtype=dtype)


def spectra(bench, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """X `(1, n, 3, H, W')`, Y `(1, 3, H, W')` and K `(1, 1, H, W')` of random images and a random kernel."""
    size, side = bench.sizes["size"], bench.sizes["kernel"]
    k = randn(bench, 1, 1, side, side).abs()
    X, Y = (torch.fft.rfft2(randn(bench, *lead, 3, size, size)) for lead in ((1, n), (1,)))
    return X, Y, ops.psf_to_otf(k / k.sum(), (size, size))


def test_zupdate(bench, backend):
    """Eq. (24) on the support of the kernel: `z = a + g (*) k`."""
    side = bench.sizes["kernel"]
    g, k = randn(bench, 1, 1, 2 * side - 1, 2 * side - 1), randn(bench, 1, 1, side, side)
    bench("zupdate", ops.convolve_support, (g, k), kernel_size=side, backend=backend)


def test_mstep(bench, backend, n):
    """All of the M-step after the transforms: sums, filters, ten iterations with the denoiser, recentring."""
    size, side = bench.sizes["size"], bench.sizes["kernel"]
    X, Y, _ = spectra(bench, n)
    k = torch.full((1, 1, side, side), 1 / side**2, device=bench.device)
    prior = PnP(load_kernel_denoiser("kernel").to(bench.device))

    def call(X, Y, k):
        k = mstep_from_sums(
            *ops.spectral_sums(X, Y), k, size=(size, size), count=3 * n, particles=n, sigma=SIGMA, prior=prior,
            beta=1e5, num_iters=10, compat="paper",
        )  # fmt: skip
        return ops.recentre(k)

    bench("mstep", call, (X, Y, k), size=size, kernel_size=side, n=n, backend=backend)


def test_guidance(bench, backend, n):
    """Eq. (17) between the transforms."""
    X, Y, K = spectra(bench, n)
    sigma2, r2 = (torch.full((1,), value, device=bench.device) for value in (SIGMA**2, 0.1))
    size = bench.sizes["size"]
    bench("guidance", lambda X, Y, K: ops.wiener_guidance(X, Y, K, sigma2, r2), (X, Y, K), size=size, n=n,
          backend=backend)  # fmt: skip


def test_update(bench, backend, n):
    """Eq. (15) with its noise."""
    size = bench.sizes["size"]
    x_t, x0_hat, g = (randn(bench, 1, n, 3, size, size) for _ in range(3))
    seeds = torch.zeros(1, dtype=torch.int64, device=bench.device)

    def call(x_t, x0_hat, g):
        return ops.step_update_philox(x_t, x0_hat, g, seeds, 0.3, 0.7, 0.1, 1e-3, 5, 1)

    bench("update", call, (x_t, x0_hat, g), size=size, n=n, backend=backend)


def test_groupnorm_silu(bench, backend, B):
    """Norm, affine map and activation of the widest level of a U-Net."""
    size = bench.sizes["net_size"]
    x = randn(bench, B, 128, size, size).contiguous(memory_format=torch.channels_last)
    weight, bias, scale, shift = (randn(bench, *shape) for shape in ((128,), (128,), (B, 128), (B, 128)))
    bench("groupnorm_silu", lambda x: ops.group_norm_silu(x, weight, bias, scale, shift), (x,), B=B, size=size,
          channels=128, backend=backend)  # fmt: skip
