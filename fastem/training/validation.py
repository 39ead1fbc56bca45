"""What a trained image prior is worth: denoising by noise level, the error table of PiGDM, size-invariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastem.models import ErrorSpectrum

LEVELS = (5, 15, 25, 50, 100)  # grey levels
PATCH, MAX_PATCHES = 96, 32
LOWEST, HIGHEST = 0.005, 160.0  # noise levels of training, [-1, 1] units
BATCH = 8

Denoiser = Callable[[Tensor, Tensor], Tensor]  # D(x; sigma) of images in [-1, 1]


@torch.no_grad()
def validate(model: Denoiser, images: Sequence[np.ndarray], stride: int, device: torch.device | str) -> dict:
    """Figures of merit on `(H, W, 3)` uint8 pictures, of which the first `MAX_PATCHES` take part.

    The patches are cut from the middle, as large as the smallest picture allows, at most `PATCH`, in multiples of
    `stride`.
    """
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1 for image in images[:MAX_PATCHES]]
    side = min(PATCH, *(min(x.shape[-2:]) for x in images))
    clean = torch.stack([_centre(x, side - side % stride or side) for x in images]).to(device)
    return {
        "pictures": len(images),
        "patch": clean.shape[-1],
        "psnr_db": {f"{level:g}": round(denoising_psnr(model, clean, level), 3) for level in LEVELS},
        "size_invariance": size_invariance(model, [x.to(device) for x in images]),
        "r2": measure_r2(model, clean),
    }


def _centre(x: Tensor, side: int) -> Tensor:
    top, left = ((size - side) // 2 for size in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


def _noise(like: Tensor, seed: int) -> Tensor:
    """White noise that does not depend on the device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def _denoise(model: Denoiser, noisy: Tensor, sigma: float) -> Tensor:
    """In batches that fit any device."""
    return torch.cat([model(x, torch.full((len(x),), sigma, device=x.device)) for x in noisy.split(BATCH)])


def _psnr(error: Tensor) -> float:
    """Of errors in [-1, 1] units, `(N, ...)`: mean over the images of the decibels of each."""
    return (10 * torch.log10(4 / error.flatten(1).square().mean(dim=1))).mean().item()


def denoising_psnr(model: Denoiser, clean: Tensor, level: float, seed: int = 0) -> float:
    """Mean PSNR in dB on `(N, C, H, W)` in [-1, 1] at white noise of `level` grey levels, not clipped."""
    sigma = 2 * level / 255
    return _psnr(_denoise(model, clean + sigma * _noise(clean, seed), sigma) - clean)


def measure_r2(model: Denoiser, clean: Tensor, num_levels: int = 20, seed: int = 0) -> list[list[float]]:
    """`[[sigma, mean squared error, cutoff, power], ...]` of `model(x, sigma)` on clean `(N, C, H, W)` in [-1, 1].

    Levels are log-uniform over those of training. The error is that of x0_hat in PiGDM, which `EpsModel.r2` and
    `EpsModel.error_spectrum` look up. The spectrum is that of the image with the largest error in each band: on busy
    images PiGDM overshoots with the mean.
    """
    noise = _noise(clean, seed)
    rows = []
    for sigma in np.geomspace(LOWEST, HIGHEST, num_levels).tolist():
        error = _denoise(model, clean + sigma * noise, sigma) - clean
        frequency, variance = radial_spectrum(error)
        fitted = fit_spectrum(frequency, variance.max(axis=0), sigma**2)
        rows.append([sigma, error.square().mean().item(), fitted.cutoff, fitted.power])
    return rows


def radial_spectrum(error: Tensor, num_bands: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles per pixel, `(bands,)`, and the variance about each of `(N, C, H, W)`, `(N, bands)`: equal
    to that of a pixel if the error is white. Bands are evenly spread in log frequency; empty ones are left out."""
    rows, columns = (torch.fft.fftfreq(size, dtype=torch.float64) for size in error.shape[-2:])
    frequency = torch.hypot(rows[:, None], columns).flatten()
    power = torch.fft.fft2(error.double().cpu(), norm="ortho").abs().square().mean(dim=1).flatten(1)
    edges = torch.linspace(math.log(1 / max(error.shape[-2:])), math.log(0.5**0.5), num_bands + 1, dtype=torch.float64)
    band = torch.bucketize(frequency.log(), edges[1:-1], right=True)  # the mean of an image falls into the first
    kept = frequency > 0
    values = torch.cat([torch.ones_like(frequency)[None], frequency[None], power])
    sums = values.new_zeros(len(values), num_bands).index_add_(1, band[kept], values[:, kept])
    count, frequencies, *variances = sums[:, sums[0] > 0]
    return (frequencies / count).numpy(), (torch.stack(variances) / count).numpy()


def fit_spectrum(frequency: np.ndarray, variance: np.ndarray, peak: float) -> ErrorSpectrum:
    """The `ErrorSpectrum` with this peak closest to the variances, least squares of their logarithms."""
    cutoff, power = np.geomspace(1e-4, 10, 201)[:, None, None], np.linspace(0.5, 4, 71)[:, None]
    fitted = -np.log1p((frequency / cutoff) ** power)
    wanted = np.log(np.clip(variance / peak, 1e-12, 1))  # more than the noise is chance
    distance = np.square(fitted - wanted).sum(axis=-1)
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    return ErrorSpectrum(peak, float(cutoff[i, 0, 0]), float(power[j, 0]))


@torch.no_grad()
def size_invariance(
    model: Denoiser, images: Sequence[Tensor], level: float = 25, tile: int = 96, margin: int = 24
) -> dict | None:
    """How much a large image gains over its tiles, each denoised alone, under the same noise.

    Tiles lack what lies beyond their borders, so the plain comparison measures the borders too. The fair one looks at
    the same pixels in both, those at least `margin` away from the border of a tile.

    Args:
        images: `(C, H, W)` in [-1, 1]; of each the middle that is whole tiles; those under two tiles do not take part.
        level: noise std, grey levels.

    Returns:
        Mean PSNR in dB of the whole images and of the tiles, and their difference, plain and of the interior; None
        if no image is large enough.
    """
    sigma = 2 * level / 255
    scores = []
    for i, image in enumerate(images):
        rows, columns = (size // tile for size in image.shape[-2:])
        if rows * columns < 2:
            continue
        top, left = (size % tile // 2 for size in image.shape[-2:])
        clean = image[None, :, top : top + rows * tile, left : left + columns * tile]
        noisy = clean + sigma * _noise(clean, i)
        whole = _denoise(model, noisy, sigma) - clean
        cut = _tiles(noisy, tile)
        tiles = _denoise(model, cut, sigma) - _tiles(clean, tile)
        errors = _tiles(whole, tile), tiles
        inner = [e[..., margin : tile - margin, margin : tile - margin] for e in errors]
        scores.append([_psnr(e[None]) for e in (*errors, *inner)])
    if not scores:
        return None
    whole, tiles, whole_inner, tiles_inner = np.mean(scores, axis=0).round(3).tolist()
    return {
        "level": level,
        "images": len(scores),
        "tile": tile,
        "plain": {"whole_db": whole, "tiles_db": tiles, "difference_db": round(whole - tiles, 3)},
        "interior": {
            "margin": margin,
            "whole_db": whole_inner,
            "tiles_db": tiles_inner,
            "difference_db": round(whole_inner - tiles_inner, 3),
        },
    }


def _tiles(x: Tensor, tile: int) -> Tensor:
    """`(1, C, H, W)` -> its tiles `(N, C, tile, tile)`, row by row."""
    return x[0].unfold(1, tile, tile).unfold(2, tile, tile).permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()
