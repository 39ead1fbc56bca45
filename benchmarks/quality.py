"""Quality of blind and non-blind restoration on a folder of sharp images and kernels, with the engine's defaults.

    python benchmarks/quality.py DATA -o results.json [--sigma 5 10] [--boundary circular valid] [--known] [--limit N]

DATA holds `sharp/` and `faces/` (256 x 256 PNG) and `kernels/*.npy`. Image i gets kernel i modulo their number, of
those of up to 33 pixels. PSNR is shift-aligned and gain-compensated; the gain is over the blurred input, aligned too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import fastem
from fastem import io, metrics, synth

KERNEL_SIZE = 33


def load_images(data: Path) -> list[tuple[str, np.ndarray]]:
    files = sorted((data / "sharp").glob("*.png")) + sorted((data / "faces").glob("*.png"))
    return [(f.stem, io.read_image(f).pixels.astype(np.float32) / 255) for f in files]


def load_kernels(data: Path) -> list[tuple[str, np.ndarray]]:
    files = sorted((data / "kernels").glob("*.npy"))
    given = [(f.stem, np.load(f)) for f in files]
    return [(name, synth.pad_kernel(k, KERNEL_SIZE)) for name, k in given if max(k.shape) <= KERNEL_SIZE]


def run(
    engine: fastem.Deblurrer, x: np.ndarray, k: np.ndarray, sigma: float, boundary: str, seed: int, known: bool
) -> dict:
    y = synth.degrade(x, k, sigma, seed, boundary=boundary)
    if boundary == "valid":
        x = x[KERNEL_SIZE // 2 : KERNEL_SIZE // 2 + y.shape[0], KERNEL_SIZE // 2 : KERNEL_SIZE // 2 + y.shape[1]]
    start = time.perf_counter()
    r = engine(y, sigma=sigma, seed=seed, kernel=k if known else None)
    seconds = time.perf_counter() - start
    before, after = metrics.psnr_aligned(y, x), metrics.psnr_aligned(r.image, x)
    return {
        "psnr_input": before, "psnr": after, "gain": after - before, "psnr_raw": metrics.psnr(r.image, x),
        "kernel_correlation": metrics.kernel_correlation(r.kernel, k),
        "kernel_mse": metrics.kernel_mse(r.kernel, k), "chi2": r.reblur, "seconds": seconds,
    }  # fmt: skip


def summary(rows: list[dict]) -> dict:
    gains, correlations = [r["gain"] for r in rows], [r["kernel_correlation"] for r in rows]
    return {
        "images": len(rows), "gain_mean": statistics.mean(gains), "gain_median": statistics.median(gains),
        "worse_by_0.3_dB": sum(g < -0.3 for g in gains), "correlation_median": statistics.median(correlations),
        "correlation_mean": statistics.mean(correlations),
        "seconds_median": statistics.median(r["seconds"] for r in rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--sigma", type=float, nargs="+", default=[5, 10], help="grey levels")
    parser.add_argument("--boundary", nargs="+", default=["circular", "valid"])
    parser.add_argument("--known", action="store_true", help="give the true kernel: the non-blind upper bound")
    parser.add_argument("--limit", type=int, help="only every so many-th image")
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE for Deblurrer (JSON value)")
    args = parser.parse_args()
    options = {name: json.loads(value) for name, value in (o.split("=", 1) for o in args.option)}
    engine = fastem.Deblurrer(kernel_size=KERNEL_SIZE, **options)
    images, kernels = load_images(args.data), load_kernels(args.data)
    report = {"config": engine.config, "torch": torch.__version__, "known": args.known, "groups": []}
    everything: list[dict] = []
    for sigma in args.sigma:
        for boundary in args.boundary:
            rows = []
            for i in range(0, len(images), args.limit or 1):
                (name, x), (kernel_name, k) = images[i], kernels[i % len(kernels)]
                row = run(engine, x, k, sigma / 255, boundary, i, args.known)
                rows.append({"image": name, "kernel": kernel_name, "sigma": sigma, "boundary": boundary, **row})
                print(f"{name:20s} {kernel_name:16s} sigma {sigma:g} {boundary:8s} gain {row['gain']:+.2f} "
                      f"corr {row['kernel_correlation']:.2f} {row['seconds']:.1f} s", flush=True)  # fmt: skip
            everything += rows
            report["groups"].append({"sigma": sigma, "boundary": boundary, **summary(rows), "rows": rows})
            print({**summary(rows), "sigma": sigma, "boundary": boundary}, flush=True)
    report["all"] = summary(everything)
    print(report["all"])
    with io.atomic_write(args.out) as file:
        file.write(json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
