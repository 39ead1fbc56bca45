"""How the time of a step grows with images, particles, image size and kernel size; fits the law and prints it.

    python benchmarks/scaling.py [--net natural] [--batch 1 4 16] [--particles 1 4 16] [--sizes 128 256 512]
                                 [--kernels 17 33 64]

One thing varies at a time, the others keep their first value (sizes and kernels: 256 and 33 where they are among the
values). The law is `T = t0 + B n (H / 256)^2 t_net + B c(K) / c(33) t_mstep`: c is the FLOPs of the loop of the M-step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cost_model
import harness
import numpy as np
import torch

from fastem import profiling, ranges, runtime
from fastem.profiling import StageClock, Workload


def cases(batches: list[int], particles: list[int], sizes: list[int], kernels: list[int]) -> list[tuple[int, ...]]:
    """(B, n, H, K), one of them varied at a time."""
    base = (batches[0], particles[0], 256 if 256 in sizes else sizes[0], 33 if 33 in kernels else kernels[0])
    varied = [
        base[:i] + (value,) + base[i + 1 :]
        for i, values in enumerate((batches, particles, sizes, kernels))
        for value in values
    ]
    return list(dict.fromkeys([base, *varied]))


def measure(workload: Workload) -> dict[str, dict[str, float]]:
    """Times of the stages of a step, see `StageClock`; the first steps warm up.

    On a GPU the step itself is that of a replay, which is how the engine runs it; the stages come from single launches.
    """
    device = runtime.resolve_device(workload.device)
    times: dict[str, dict[str, float]] = {}
    for graphs in (False, True) if device.type == "cuda" else (False,):
        run, clock = profiling.prepare(replace(workload, graphs=graphs)), StageClock(device)
        run(2)
        with ranges.listening(clock):
            run(workload.steps)
        times |= clock.stages(workload.steps)
        del run
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return times


def fit(rows: list[dict]) -> dict[str, float]:
    """Milliseconds t0, t_net, t_mstep by least squares on relative errors, and the largest relative error."""
    features = np.array([
        [1.0, row["batch"] * row["particles"] * (row["size"] / 256) ** 2,
         row["batch"] * cost_model.mstep_chain(row["kernel_size"]) / cost_model.mstep_chain(33)]
        for row in rows
    ])  # fmt: skip
    times = np.array([row["step_ms"] for row in rows])
    solution = np.linalg.lstsq(features / times[:, None], np.ones(len(times)), rcond=None)[0]
    error = float(np.abs(features @ solution / times - 1).max())
    return dict(zip(("t0", "t_net", "t_mstep"), map(float, solution), strict=True)) | {"largest_error": error}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--net", default="natural", help="a prior, or " + ", ".join(profiling.RANDOM))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--kernels", type=int, nargs="+", default=[17, 33, 64])
    parser.add_argument("--guidance", default="mean")
    parser.add_argument("--steps", type=int, default=3, help="per measurement; figures are medians")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(arguments)
    device = runtime.resolve_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    clock = "device_ms" if device.type == "cuda" else "cpu_ms"
    print(f"{args.net}, guidance {args.guidance}, {args.dtype}, {device}, {clock.replace('_', ' ')} per step")
    print("  B   n     H   K       step     unet    mstep   images per second of such steps, by wall time")
    rows = []
    for batch, n, size, kernel in cases(args.batch, args.particles, args.sizes, args.kernels):
        times = measure(Workload(
            size=(size, size), batch=batch, particles=n, kernel_size=kernel, guidance=args.guidance, prior=args.net,
            steps=args.steps, device=args.device, dtype=args.dtype, channels_last=device.type == "cuda",
        ))  # fmt: skip
        stages = {path.removeprefix("step/"): row[clock] for path, row in times.items()}
        unet = stages["unet_fwd"] + stages.get("unet_vjp", 0.0)
        wall = times["step"]["wall_ms"]
        rows.append({
            "batch": batch, "particles": n, "size": size, "kernel_size": kernel, "step_ms": stages["step"],
            "wall_ms": wall, "unet_ms": unet, "mstep_ms": stages["mstep"],
        })  # fmt: skip
        print(f"{batch:3d} {n:3d} {size:5d} {kernel:3d} {stages['step']:10.2f} {unet:8.2f} {stages['mstep']:8.2f}"
              f"   {1e3 * batch / wall:.3g}", flush=True)  # fmt: skip
    law = fit(rows) if len(rows) >= 3 else {}
    if law:
        print(f"T = {law['t0']:.2f} + B n (H / 256)^2 {law['t_net']:.2f} + B c(K) / c(33) {law['t_mstep']:.2f} ms, "
              f"within {100 * law['largest_error']:.0f} %")  # fmt: skip
    if args.json:
        harness.write(args.json, "scaling", rows, device=args.device, net=args.net, guidance=args.guidance,
                      dtype=args.dtype, clock=clock, law=law)  # fmt: skip


if __name__ == "__main__":
    main()
