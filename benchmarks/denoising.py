"""Gaussian denoising by a prior: mean PSNR over a folder of photographs, noise not clipped.

    python benchmarks/denoising.py FOLDER [--prior natural] [--sigma 15 25 50] [--limit 50]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

import fastem
from fastem import io
from fastem.schedules import time_of_sigma


@torch.no_grad()
def denoise(model: torch.nn.Module, y: torch.Tensor, sigma: float) -> torch.Tensor:
    """y `(C, H, W)` in [0, 1] with noise of std sigma -> the prior's estimate, through its eps interface."""
    sigma_t = 2 * sigma
    a, s = (1 + sigma_t**2) ** -0.5, sigma_t * (1 + sigma_t**2) ** -0.5
    x_t = a * (2 * y[None] - 1)
    return (((x_t - s * model(x_t, time_of_sigma(sigma_t))) / a + 1) / 2)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prior", default="natural")
    parser.add_argument("--sigma", type=float, nargs="+", default=[15, 25, 50], help="grey levels")
    parser.add_argument("--limit", type=int, default=50, help="the first so many images, by name")
    args = parser.parse_args()
    model = fastem.load_model(args.prior)
    files = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in io.IMAGE_SUFFIXES)[: args.limit]
    for sigma in args.sigma:
        scores = []
        for i, file in enumerate(files):
            x = torch.from_numpy(io.read_image(file).pixels.astype("float32") / 255).permute(2, 0, 1)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            scores.append(fastem.psnr(denoise(model, x + sigma / 255 * noise, sigma / 255), x))
        print(f"sigma {sigma:g}: {statistics.mean(scores):.2f} dB mean of {len(files)} images", flush=True)


if __name__ == "__main__":
    main()
