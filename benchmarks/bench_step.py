"""One whole step of Fast EM on the native backend against plain torch: `python benchmarks/bench_step.py`.

One process, the bundled prior, a blurred random scene. A step is the evaluation of the network, the E-step, the M-step
of the kernel, guidance and noise: what `Deblurrer` repeats. Its time is the difference between two calls of `on_step`;
only steps in which the kernel moves count. The restorations alternate, so that what else runs on the machine slows
both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from fastem.engine import Deblurrer
from fastem.ops import native, reference
from fastem.synth import motion_kernel

SIGMA = 5 / 255
STEPS = 6


class _RunEnds(Exception):
    pass


def problem(size: int, ksize: int) -> Tensor:
    """A blurred random scene `(1, 3, size, size)` with noise of 5 grey levels."""
    generator = torch.Generator().manual_seed(0)
    scene = torch.rand(1, 3, size // 8, size // 8, generator=generator)
    x = torch.nn.functional.interpolate(scene, size=(size, size), mode="bicubic").clamp(0, 1)
    k = torch.from_numpy(motion_kernel(ksize, 0))[None, None]
    y = torch.fft.irfft2(torch.fft.rfft2(x) * reference.psf_to_otf(k, (size, size)), s=(size, size))
    return y + SIGMA * torch.randn(y.shape, generator=generator)


def step_seconds(engine: Deblurrer, y: Tensor, clock: Callable[[], float]) -> list[float]:
    """Seconds of the second half of the steps of one run, where the kernel moves; no second search for the kernel."""
    ends: list[float] = []

    def on_step(done: int, total: int) -> None:
        ends.append(clock())
        if done == STEPS:
            raise _RunEnds

    with suppress(_RunEnds):
        engine.restore(y, SIGMA, torch.zeros(1, dtype=torch.int64), on_step=on_step)
    return [end - start for start, end in zip(ends, ends[1:], strict=False)][len(ends) // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--kernel", type=int, default=33)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--guidance", nargs="+", default=["mean"], help="mean, pigdm (one backward pass a step) or dps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of the process: for a machine that is shared"
    )
    args = parser.parse_args()

    clock = time.process_time if args.cpu_time else time.perf_counter
    shape = f"{args.size} x {args.size}, kernel {args.kernel}"
    print(f"{shape}, float32, CPU, {'CPU' if args.cpu_time else 'wall'} ms per step: median (fastest)")
    print(f"torch {torch.__version__}; {native.build_info()}")
    y = problem(args.size, args.kernel)
    for guidance in args.guidance:
        for threads in args.threads:
            torch.set_num_threads(threads)
            for n in args.particles:
                options = {"guidance": guidance, "steps": STEPS, "particles": n, "kernel_size": args.kernel}
                engines = {name: Deblurrer(**options, backend=name, device="cpu") for name in ("reference", "native")}
                times: dict[str, list[float]] = {backend: [] for backend in engines}
                for round_ in range(args.rounds + 1):
                    for backend, engine in engines.items():
                        seconds = step_seconds(engine, y, clock)
                        times[backend] += seconds if round_ else []  # the first round warms up
                medians = {backend: statistics.median(values) for backend, values in times.items()}
                shown = "  ".join(f"{b} {1e3 * medians[b]:.0f} ({1e3 * min(v):.0f})" for b, v in times.items())
                ratio = medians["reference"] / medians["native"]
                print(f"{guidance}, {threads} threads, n = {n}: {shown}  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
