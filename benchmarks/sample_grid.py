"""What a prior believes: a grid of unconditional samples, to look at.

    python benchmarks/sample_grid.py -o docs/images/samples.png [--prior natural] [--rows 3] [--columns 4] [--size 128]

The deterministic sampler of Karras et al. 2022 (EDM), Algorithm 1 with Euler steps: noise levels from 80 down to 0.02
in [-1, 1] units, then the posterior mean.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastem
from fastem import io
from fastem.schedules import time_of_sigma


def noise_levels(num_steps: int, highest: float = 80.0, lowest: float = 0.02, rho: float = 7.0) -> list[float]:
    """EDM Eq. (5)."""
    ramp = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), num_steps)
    return (ramp**rho).tolist()


@torch.no_grad()
def unconditional(model: torch.nn.Module, x: Tensor, num_steps: int) -> Tensor:
    """White noise `(N, C, H, W)` of std 1 -> samples in [-1, 1]."""
    levels = noise_levels(num_steps)
    x = levels[0] * x
    for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
        eps = model(x / (1 + sigma**2) ** 0.5, time_of_sigma(sigma))
        x = x + (following - sigma) * eps  # EDM Eq. (4): dx / dsigma = (x - D) / sigma = eps
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--prior", default="natural")
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = fastem.load_model(args.prior)
    rows = []
    for row in range(args.rows):
        generator = torch.Generator().manual_seed(args.seed + row)
        noise = torch.randn(args.columns, model.channels, args.size, args.size, generator=generator)
        rows.append(torch.cat(list(unconditional(model, noise, args.steps)), dim=-1))
    grid = torch.cat(rows, dim=-2).permute(1, 2, 0)
    pixels = ((grid + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    io.write_image(args.out, io.Picture(pixels))


if __name__ == "__main__":
    main()
