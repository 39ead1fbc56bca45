"""Deconvolution with the true kernel: the engine against a Wiener filter and total variation, both tuned by oracle.

    python benchmarks/deconvolution.py DATA -o results.json [--sigma 2.55 7.65] [--images 12] [--prior natural]
                                       [--guidance mean pigdm] [--particles 4]

DATA holds `sharp/*.png` and `kernels/*.npy`; kernels of up to 49 pixels take part, each image gets one. Blur is
circular, which is exact for all methods. The classical ones get the constant that is best for the mean PSNR of the very
images they are scored on; the engine has its defaults. "plug-and-play" is the bundled prior without a sampler, in the
deterministic loop of Zhang et al. 2021 with the constants of that paper. PiGDM draws samples of the posterior: scored
is the mean of `--particles`, and, as "pigdm, one sample", each of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import fastem
from fastem import io, metrics, synth
from fastem.ops import reference as spec

LARGEST = 49
NSR = [10 ** (e / 4) for e in range(-20, 1)]  # of the Wiener filters
LAM = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]  # of total variation, times sigma in [0, 1]


def load(data: Path, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """`(name, image (H, W, 3) in [0, 1], kernel)`, images and kernels evenly spread over their folders."""
    files, kernels = sorted((data / "sharp").glob("*.png")), sorted((data / "kernels").glob("*.npy"))
    files = [files[i * len(files) // count] for i in range(min(count, len(files)))]
    kernels = [path for path in kernels if max(np.load(path).shape) <= LARGEST]
    cases = []
    for i, file in enumerate(files):
        kernel = kernels[i * len(kernels) // len(files)]
        cases.append((f"{file.stem} {kernel.stem}", io.read_image(file).pixels / np.float32(255), np.load(kernel)))
    return cases


def spectra(y: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Half spectra of the image `(C, H, W)` and of the kernel `(h, w)` on its grid."""
    return torch.fft.rfft2(y), spec.psf_to_otf(k[None, None], y.shape[-2:])[0]


def frequency2(size: tuple[int, int]) -> Tensor:
    """|frequency|^2 on the half spectrum, 1 at the Nyquist frequency of an axis; the lowest stands for the mean."""
    rows, columns = torch.fft.fftfreq(size[0]) * 2, torch.fft.rfftfreq(size[1]) * 2
    return (rows[:, None] ** 2 + columns**2).clamp(min=(2 / max(size)) ** 2)


def wiener(y: Tensor, k: Tensor, sigma: float, nsr: float, natural: bool) -> Tensor:
    """Noise-to-signal ratio `nsr` at every frequency, or (natural) that of images with a 1 / f^2 power spectrum."""
    Y, K = spectra(y, k)
    ratio = nsr * frequency2(y.shape[-2:]) if natural else nsr
    return torch.fft.irfft2(K.conj() * Y / (K.abs() ** 2 + ratio), s=y.shape[-2:])


def total_variation(y: Tensor, k: Tensor, sigma: float, scale: float, num_iters: int = 60) -> Tensor:
    """argmin ||h * x - y||^2 / 2 + lam TV(x) by ADMM, lam = scale sigma; gradients of the channels are coupled.

    Goldstein and Osher 2009 (split Bregman), periodic differences, u the scaled multiplier.
    """
    lam = scale * sigma
    rho = 20 * lam  # of the coupling d = D x; the shrinkage threshold lam / rho is 1 / 20 of the range of the image
    Y, K = spectra(y, k)
    size = y.shape[-2:]
    D = torch.stack([torch.fft.rfft2(_difference(size, axis)) for axis in (0, 1)])[:, None]
    denominator = K.abs() ** 2 + rho * (D.abs() ** 2).sum(0)
    d = torch.zeros(2, *y.shape)
    u = torch.zeros_like(d)
    for _ in range(num_iters):
        X = (K.conj() * Y + rho * (D.conj() * torch.fft.rfft2(d - u)).sum(0)) / denominator
        x = torch.fft.irfft2(X, s=size)
        g = torch.fft.irfft2(D * X, s=size)
        d = g + u
        length = d.square().sum(dim=(0, 1), keepdim=True).sqrt()
        d = d * (1 - lam / rho / length.clamp(min=1e-12)).clamp(min=0)
        u = u + g - d
    return x


def _difference(size: tuple[int, int], axis: int) -> Tensor:
    taps = torch.zeros(size)
    taps[0, 0] = -1
    taps[(-1, 0) if axis == 0 else (0, -1)] = 1
    return taps


@torch.no_grad()
def plug_and_play(
    model: torch.nn.Module, y: Tensor, k: Tensor, sigma: float, steps: int = 8, lam: float = 0.23
) -> Tensor:
    """Zhang et al. 2021 (DPIR), Eq. (6): least squares on y about the last estimate, then the denoiser, at noise levels
    from 49 grey levels down to sigma."""
    Y, K = spectra(y, k)
    x = y
    for level in np.geomspace(49 / 255, sigma, steps).tolist():
        weight = lam * sigma**2 / level**2
        z = torch.fft.irfft2((K.conj() * Y + weight * torch.fft.rfft2(x)) / (K.abs() ** 2 + weight), s=y.shape[-2:])
        x = (model(2 * z[None] - 1, torch.tensor([2 * level]))[0] + 1) / 2
    return x


def tuned(method: Callable[[Tensor, Tensor, float], Tensor], cases: list, grid: list[float]) -> tuple[float, list]:
    """The constant of the grid with the best mean PSNR, and the scores with it. Ends where the mean falls."""
    best, scores_of_best = grid[0], []
    for constant in grid:
        scores = [metrics.psnr(method(y, k, constant).clamp(0, 1), x) for x, y, k in cases]
        if scores_of_best and statistics.mean(scores) < statistics.mean(scores_of_best) - 0.5:
            break
        if not scores_of_best or statistics.mean(scores) > statistics.mean(scores_of_best):
            best, scores_of_best = constant, scores
    return best, scores_of_best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--sigma", type=float, nargs="+", default=[2.55, 7.65], help="grey levels")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--guidance", nargs="*", default=["mean", "pigdm"])
    parser.add_argument("--prior", default="natural")
    parser.add_argument("--particles", type=int, default=4, help="of pigdm")
    parser.add_argument("--steps", type=int, help="of the engine; default: its own for each guidance")
    args = parser.parse_args()
    given = load(args.data, args.images)
    report = {"images": [name for name, _, _ in given], "torch": torch.__version__, "groups": []}
    for level in args.sigma:
        sigma = level / 255
        cases = []  # x, y (C, H, W) and k (h, w)
        for i, (_, x, k) in enumerate(given):
            y = synth.degrade(x, k, sigma, i, boundary="circular")
            cases.append((*(torch.from_numpy(image).permute(2, 0, 1) for image in (x, y)), torch.from_numpy(k).float()))
        group = {"sigma": level, "psnr": {"blurred": [metrics.psnr(y.clamp(0, 1), x) for x, y, _ in cases]}}
        classical = {
            "wiener": (lambda y, k, c, s=sigma: wiener(y, k, s, c, natural=False), NSR),
            "wiener 1/f^2": (lambda y, k, c, s=sigma: wiener(y, k, s, c, natural=True), NSR),
            "total variation": (lambda y, k, c, s=sigma: total_variation(y, k, s, c), LAM),
        }
        for name, (method, grid) in classical.items():
            constant, group["psnr"][name] = tuned(method, cases, grid)
            group[f"{name}, constant"] = constant
            print(f"sigma {level:g}  {name:16} {statistics.mean(group['psnr'][name]):6.2f} dB, constant {constant:.3g}",
                  flush=True)  # fmt: skip
        model = fastem.load_model(args.prior).denoiser
        scores = [metrics.psnr(plug_and_play(model, y, k, sigma).clamp(0, 1), x) for x, y, k in cases]
        group["psnr"]["plug-and-play"] = scores
        print(f"sigma {level:g}  {'plug-and-play':16} {statistics.mean(scores):6.2f} dB", flush=True)
        for guidance in args.guidance:
            engine = fastem.Deblurrer(
                args.prior, method="known", guidance=guidance, boundary="circular", steps=args.steps,
                particles=args.particles if guidance == "pigdm" else 1,
            )  # fmt: skip
            report.setdefault("engine", {})[guidance] = engine.config
            start, scores, ones = time.perf_counter(), [], []
            for i, (x, y, k) in enumerate(cases):
                restored = engine(y, sigma=sigma, seed=i, kernel=k.numpy())
                scores.append(metrics.psnr(restored.image.clamp(0, 1), x))
                samples = torch.from_numpy(restored.samples).permute(0, 3, 1, 2)
                ones.append(statistics.mean(metrics.psnr(sample, x) for sample in samples))
                print(f"sigma {level:g}  {guidance:6} {report['images'][i]:40} {scores[-1]:6.2f} dB", flush=True)
            group["psnr"][guidance] = scores
            if guidance == "pigdm":
                group["psnr"]["pigdm, one sample"] = ones
                print(f"sigma {level:g}  pigdm, one sample {statistics.mean(ones):6.2f} dB", flush=True)
            group[f"{guidance}, seconds per image"] = (time.perf_counter() - start) / len(cases)
            print(f"sigma {level:g}  {guidance:16} {statistics.mean(scores):6.2f} dB", flush=True)
        group["mean"] = {name: statistics.mean(scores) for name, scores in group["psnr"].items()}
        report["groups"].append(group)
    with io.atomic_write(args.out) as file:
        file.write(json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
