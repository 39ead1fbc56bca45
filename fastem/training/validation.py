"""What a trained image prior is worth: denoising by noise level, the error table of PiGDM, size-invariance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

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
    """`[[sigma, mean squared error], ...]` of `model(x, sigma)` on clean images `(N, C, H, W)` in [-1, 1].

    Levels are log-uniform over those of training. The error is that of x0_hat in PiGDM, which `EpsModel.r2` looks up.
    """
    noise = _noise(clean, seed)
    levels = torch.linspace(math.log(LOWEST), math.log(HIGHEST), num_levels, dtype=torch.float64).exp().tolist()
    with torch.no_grad():
        return [
            [sigma, (_denoise(model, clean + sigma * noise, sigma) - clean).square().mean().item()] for sigma in levels
        ]


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
