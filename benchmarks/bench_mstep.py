"""The M-step against the plain FFT loop of the released program, in one process: `python benchmarks/bench_mstep.py`.

Both see the same images, start and denoiser, on one thread; the calls alternate, the ratio is that of the medians.
`--recentre` adds the shift that follows: on the device here, through the host and scipy in the released program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import harness
import torch
from torch import Tensor

from fastem import ops, runtime
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
    noise_std = torch.full((1,), math.sqrt(lam / beta), dtype=k.dtype, device=k.device)
    for _ in range(num_iters):
        padded = torch.zeros(1, 1, height, width, dtype=k.dtype, device=k.device)
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


def host_recentre(k: Tensor) -> Tensor:
    """The shift of the centre of mass to the centre, by scipy on the host, as the released program does it."""
    from scipy import ndimage

    image = k[0, 0].cpu().numpy()
    centre = [s // 2 + 0.5 * (1 - s % 2) for s in image.shape]
    offset = [c - m for c, m in zip(centre, ndimage.center_of_mass(image), strict=True)]
    return torch.from_numpy(ndimage.shift(image, offset)).to(k.device)[None, None]


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--kernels", type=int, nargs="+", default=[33])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="on a GPU wall time, each call waited for")
    parser.add_argument("--recentre", action="store_true", help="with the shift to the centre that follows each M-step")
    args = parser.parse_args(arguments)
    device = runtime.resolve_device(args.device)
    torch.set_num_threads(1)
    denoiser = load_kernel_denoiser("kernel").to(device)
    chain, prior, sigma = denoiser.as_chain(), PnP(denoiser), 5 / 255
    clock = harness.clock_of(device, cpu_time=True)
    where = "1 thread, CPU time" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {native.build_info()}, {where}, float32, medians of {args.rounds}")
    print("image  K   n   plain FFT    reference    native   ratio (quartiles)    max |difference|")
    rows = []
    for size, ksize, n in itertools.product(args.sizes, args.kernels, args.particles):
        y, x0_hat, k = (t.to(device) for t in problem(n, size, ksize, sigma, seed=n))

        def plain(y=y, x0_hat=x0_hat, k=k):
            k = plain_fft_mstep(y, x0_hat, k, sigma=sigma, chain=chain)
            return host_recentre(k) if args.recentre else k

        def fast(backend, y=y, x0_hat=x0_hat, k=k):
            with ops.use_backend(backend):
                k = mstep(y, x0_hat, k, sigma=sigma, prior=prior, compat="released")
                return ops.recentre(k) if args.recentre else k

        fastest = "native" if native.has_cuda() or (native.available() and device.type == "cpu") else "reference"
        calls = {"plain": plain} | {name: partial(fast, name) for name in dict.fromkeys(("reference", fastest))}
        with torch.no_grad():
            times = harness.alternate(calls, args.rounds, clock)
            difference = (fast(fastest) - plain()).abs().max().item()
        row = {"size": size, "kernel_size": ksize, "particles": n, "recentre": args.recentre, "difference": difference}
        row |= harness.summary(times, "plain", fastest)
        rows.append(row)
        shown = "".join(f"{value:9.1f} ms " for value in row["median_ms"].values())
        low, high = row["ratio_quartiles"]
        print(f"{size:5d} {ksize:3d} {n:3d} {shown} {row['ratio']:5.1f}x ({low:.1f} to {high:.1f})  {difference:.1e}")
    if args.json:
        harness.write(args.json, "mstep", rows, device=args.device, threads=1)


if __name__ == "__main__":
    main()
