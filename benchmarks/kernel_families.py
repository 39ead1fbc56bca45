"""Pictures of 64 kernels of each family, and how fast they are drawn.

    python benchmarks/kernel_families.py [-o docs/images]

The kernels are those of seeds 0..63 at 33 x 33, each with its own peak white. The rate is in kernels per second of CPU
time, on one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from fastem import io
from fastem.synth import FAMILIES, motion_kernel


def rate(family: str, size: int, count: int = 200) -> float:
    motion_kernel(size, 0, family)  # fills caches
    start = time.process_time()
    for seed in range(count):
        motion_kernel(size, seed, family)
    return count / (time.process_time() - start)


def sheet(family: str, size: int = 33, zoom: int = 2, columns: int = 8) -> np.ndarray:
    kernels = [motion_kernel(size, seed, family) for seed in range(columns**2)]
    return io.mosaic([io.kernel_picture(k, zoom) for k in kernels], columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="folder for the pictures; without it only rates are told")
    args = parser.parse_args()
    for family in FAMILIES:
        print(f"{family:12s} {rate(family, 33):6.0f} /s at 33 x 33 {rate(family, 64):6.0f} /s at 64 x 64", flush=True)
        if args.out and family != "delta":
            io.write_image(args.out / f"kernels_{family}.png", io.Picture(sheet(family)))


if __name__ == "__main__":
    main()
