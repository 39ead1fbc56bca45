"""One whole step of Fast EM on the native backend against plain torch: `python benchmarks/bench_step.py`.

One process, the bundled prior, a blurred random scene. A step is the evaluation of the network, the E-step, the M-step
of the kernel, guidance and noise: what `Deblurrer` repeats. Its time is the difference between two calls of `on_step`;
only steps in which the kernel moves count. The restorations alternate, so that what else runs on the machine slows
both; the ratio is that of the medians.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress

import harness
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--kernel", type=int, default=33)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--guidance", nargs="+", default=["mean"], help="mean, pigdm (one backward pass a step) or dps")
    parser.add_argument("--prior", default="natural")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of the process: for a machine that is shared"
    )
    args = parser.parse_args(arguments)

    clock = harness.clock_of(torch.device("cpu"), args.cpu_time)
    shape = f"{args.size} x {args.size}, kernel {args.kernel}"
    print(f"{shape}, float32, CPU, {'CPU' if args.cpu_time else 'wall'} ms per step: median (fastest)")
    print(f"torch {torch.__version__}; {native.build_info()}")
    y, rows = problem(args.size, args.kernel), []
    backends = ("reference", "native" if native.available() else "auto")
    for guidance, threads, n in itertools.product(args.guidance, args.threads, args.particles):
        torch.set_num_threads(threads)
        options = {"guidance": guidance, "steps": STEPS, "particles": n, "kernel_size": args.kernel}
        engines = {name: Deblurrer(args.prior, **options, backend=name, device="cpu") for name in backends}
        times: dict[str, list[float]] = {backend: [] for backend in engines}
        for round_ in range(args.rounds + 1):
            for backend, engine in engines.items():
                seconds = step_seconds(engine, y, clock)
                times[backend] += seconds if round_ else []  # the first round warms up
        row = {"size": args.size, "kernel_size": args.kernel, "guidance": guidance, "threads": threads, "particles": n}
        row |= harness.summary(times, *backends)
        rows.append(row)
        shown = "  ".join(f"{b} {row['median_ms'][b]:.0f} ({row['fastest_ms'][b]:.0f})" for b in engines)
        print(f"{guidance}, {threads} threads, n = {n}: {shown}  ratio {row['ratio']:.2f}", flush=True)
    if args.json:
        harness.write(args.json, "step", rows, clock="CPU" if args.cpu_time else "wall")


if __name__ == "__main__":
    main()
