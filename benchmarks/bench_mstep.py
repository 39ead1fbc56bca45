"""The M-step against the plain FFT loop of the released program, in one process: `python benchmarks/bench_mstep.py`.

Both see the same images, start and denoiser, on one thread; the calls alternate, the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import Tensor

from fastem import ops
from fastem.models import load_kernel_denoiser
from fastem.mstep import PnP, mstep
from fastem.ops import native, reference
from fastem.synth import motion_kernel


def plain_fft_mstep(
    y: Tensor, x0_hat: Tensor, k: Tensor, *, sigma: float, chain: tuple,
    lam: float = 1.0, beta: float = 1e5, num_iters: int = 10,
) -> Tensor:  # fmt: skip
    """Half-quadratic splitting as the released program does it: every transform at image size, in every iteration.

    y `(1, C, H, W)`, x0_hat `(1, n, C, H, W)`, k `(1, 1, h, w)`; chain as for `ops.denoise_chain`. The channels are
    solved apart and averaged, the weight has no factor n: `compat="released"`.
    """
    height, width = y.shape[-2:]
    h, w = k.shape[-2:]
    weight = sigma**2 * beta
    noise_std = torch.tensor([math.sqrt(lam / beta)], dtype=k.dtype)
    for _ in range(num_iters):
        padded = torch.zeros(1, 1, height, width, dtype=k.dtype)
        padded[..., :h, :w] = k
        K = torch.fft.fft2(padded.roll((-(h // 2), -(w // 2)), dims=(-2, -1)))[0, 0]
        solutions = []
        for c in range(y.shape[1]):
            Y = torch.fft.fft2(y[0, c])
            X = torch.fft.fft2(x0_hat[0, :, c])
            Q = ((X.conj() * Y).sum(0) + weight * K) / ((X.abs() ** 2).sum(0) + weight)
            solutions.append(torch.fft.ifft2(Q).real)
        z = torch.stack(solutions).mean(0).roll((h // 2, w // 2), dims=(-2, -1))[None, None, :h, :w]
        z = reference.project_kernel(z)
        k = reference.project_kernel(reference.denoise_chain(z, noise_std, *chain))
    return k


def problem(n: int, size: int, ksize: int, sigma: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A blurred random scene, n noisy estimates of the sharp one and the delta to start from."""
    generator = torch.Generator().manual_seed(seed)
    scene = torch.rand(1, 3, size // 8, size // 8, generator=generator)
    x = torch.nn.functional.interpolate(scene, size=(size, size), mode="bicubic").clamp(0, 1)
    k_true = torch.from_numpy(motion_kernel(ksize, seed))[None, None]
    y = torch.fft.irfft2(torch.fft.rfft2(x) * reference.psf_to_otf(k_true, (size, size)), s=(size, size))
    y = y + sigma * torch.randn(y.shape, generator=generator)
    x0_hat = x[:, None] + 0.02 * torch.randn(1, n, 3, size, size, generator=generator)
    delta = torch.zeros(1, 1, ksize, ksize)
    delta[..., ksize // 2, ksize // 2] = 1
    return y, x0_hat, delta


def alternate(functions: dict, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each function, one call of each per round: other programs on the machine do not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_:  # the first round warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--kernels", type=int, nargs="+", default=[33])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = load_kernel_denoiser("kernel")
    chain, prior, sigma = denoiser.as_chain(), PnP(denoiser), 5 / 255
    print(f"torch {torch.__version__}, {native.build_info()}, 1 thread, float32, CPU time, medians of {args.rounds}")
    print("image  K   n   plain FFT    reference    native   ratio   max |difference|")
    for size in args.sizes:
        for ksize in args.kernels:
            for n in args.particles:
                y, x0_hat, k = problem(n, size, ksize, sigma, seed=n)
                options = {"sigma": sigma, "prior": prior, "compat": "released"}

                def fast(backend, data=(y, x0_hat, k), options=options):
                    with ops.use_backend(backend), torch.no_grad():
                        return mstep(*data, **options)

                with torch.no_grad():
                    plain = plain_fft_mstep(y, x0_hat, k, sigma=sigma, chain=chain)
                    times = alternate(
                        {
                            "plain": lambda data=(y, x0_hat, k): plain_fft_mstep(*data, sigma=sigma, chain=chain),
                            "reference": lambda: fast("reference"),
                            "native": lambda: fast("native"),
                        },
                        args.rounds,
                    )
                    difference = (fast("native") - plain).abs().max().item()
                ms = {name: 1e3 * seconds for name, seconds in times.items()}
                print(
                    f"{size:5d} {ksize:3d} {n:3d} {ms['plain']:9.1f} ms {ms['reference']:9.1f} ms "
                    f"{ms['native']:6.1f} ms {ms['plain'] / ms['native']:6.1f}x  {difference:.1e}"
                )


if __name__ == "__main__":
    main()
