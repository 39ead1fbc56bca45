"""Kernel denoisers side by side: gain over white noise, change of clean kernels, and kernels found by M-steps.

    python benchmarks/kernel_denoising.py kernel other.safetensors [--images FOLDER] [--limit 10]

Kernels are of seeds that are not trained on. With a folder of images, each is cut to its middle 256 x 256 pixels and
blurred; the M-step (10 iterations from a delta, Eq. 22-25) sees x0_hat of the bundled prior at two levels of diffusion
noise. The relative error of a kernel is `||k - k*||^2 / ||k*||^2`, shifts and all.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch

import fastem
from fastem import io
from fastem.schedules import time_of_sigma
from fastem.synth import motion_kernel
from fastem.training.kernel_denoiser import clean_change, denoising_gain

SIZES = (17, 25, 33, 49, 64, 65)
LEVELS = (3e-4, 1.41e-3, 3.16e-3, 1e-2)
FAMILIES = ("randomwalk", "boracchi", "gp", "line", "gaussian", "defocus")


def held_out(size: int, family: str = "shake", count: int = 50) -> torch.Tensor:
    return torch.from_numpy(np.stack([motion_kernel(size, seed, family) for seed in range(count)]))[:, None]


def show(name: str, model: torch.nn.Module, kernels: torch.Tensor, level: float) -> None:
    gain, change = denoising_gain(model, kernels, level), clean_change(model, kernels, level)
    print(f"  {name:14s} {level:8.2e}  gain {gain.mean():6.2f} dB, least {gain.min():6.2f};  clean kernels change "
          f"{100 * change.mean():6.2f} %, most {100 * change.max():6.2f} %", flush=True)  # fmt: skip


def middle(file: Path, side: int = 256) -> torch.Tensor | None:
    """`(3, side, side)` in [0, 1], None where the picture is smaller."""
    x = torch.from_numpy(io.read_image(file).pixels.astype("float32") / 255)
    if min(x.shape[:2]) < side:
        return None
    top, left = (x.shape[0] - side) // 2, (x.shape[1] - side) // 2
    return x[top : top + side, left : left + side].permute(2, 0, 1).expand(3, side, side)


@torch.no_grad()
def mstep_errors(denoisers: dict[str, torch.nn.Module], files: list[Path]) -> None:
    prior = fastem.load_model("natural")
    for sigma in (5, 10):
        for sigma_t in (0.2, 0.6):  # of the diffusion, in [-1, 1]
            errors: dict[str, list[float]] = {name: [] for name in denoisers}
            for seed, file in enumerate(files):
                x, k = middle(file), motion_kernel(33, seed)
                if x is None:
                    continue
                y = fastem.degrade(x, k, sigma / 255, seed)
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
                a = (1 + sigma_t**2) ** -0.5
                x_t = a * (2 * x + sigma_t * noise - 1)[None]
                x0_hat = (x_t - sigma_t * a * prior(x_t, time_of_sigma(sigma_t))) / a / 2 + 0.5
                delta = torch.from_numpy(motion_kernel(33, 0, "delta"))[None, None]
                for name, denoiser in denoisers.items():
                    found = fastem.mstep(y[None], x0_hat[None], delta, sigma=sigma / 255, prior=fastem.PnP(denoiser))
                    error = np.square(found[0, 0].numpy() - k).sum() / np.square(k).sum()
                    errors[name].append(float(error))
            for name, values in errors.items():
                print(f"  {name:24s} sigma {sigma:2d}, sigma_t {sigma_t}: relative error "
                      f"{statistics.mean(values):.3f} mean, {statistics.median(values):.3f} median, "
                      f"{len(values)} images", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("denoisers", nargs="+", help="bundled names or files")
    parser.add_argument("--images", type=Path, help="sharp pictures for M-steps")
    parser.add_argument("--limit", type=int, default=10, help="the first so many pictures, by name")
    args = parser.parse_args()
    denoisers = {name: fastem.load_kernel_denoiser(name) for name in args.denoisers}
    for name, model in denoisers.items():
        print(name)
        for size in SIZES:
            for level in LEVELS if size == 33 else (1.41e-3, 3.16e-3):
                show(f"shake {size}", model, held_out(size), level)
        for family in FAMILIES:
            show(f"{family} 33", model, held_out(33, family), 3.16e-3)
    if args.images:
        files = sorted(p for p in args.images.iterdir() if p.suffix.lower() in io.IMAGE_SUFFIXES)[: args.limit]
        mstep_errors(denoisers, files)


if __name__ == "__main__":
    main()
