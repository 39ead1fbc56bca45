"""What a step costs by formula: FLOPs and least bytes of each stage, for a device that has not been measured yet.

    python benchmarks/cost_model.py [--net ffhq-random] [--size 256] [--batch 1] [--particles 1] [--kernel 33]

Two FLOPs per multiply-add of convolutions, matrix products and transforms; pointwise work counts 0. Bytes are those of
an engine that moves each tensor once where fusing could not avoid it. `tests/test_benchmarks.py` holds the formulas
against a count of what torch dispatches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastem.models.natural import NaturalConfig
from fastem.models.unet import UNetConfig
from fastem.profiling import RANDOM

FLOAT = 4  # bytes
CHAIN = [(2, 32), (32, 32), (32, 32), (32, 32), (32, 1)]  # channels of the kernel denoiser's 3x3 convolutions


@dataclass(frozen=True)
class Flops:
    """Of one image; what is in products and what is in convolutions costs its double with the gradient, attention
    its triple: two products forward, four backward."""

    convolution: float = 0.0
    attention: float = 0.0
    linear: float = 0.0

    @property
    def forward(self) -> float:
        return self.convolution + self.attention + self.linear

    @property
    def forward_and_vjp(self) -> float:
        """With the gradient with respect to the image; the weights are frozen and the time embedding has none."""
        return 2 * self.convolution + 3 * self.attention + self.linear

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.convolution + other.convolution, self.attention + other.attention, self.linear + other.linear
        )


def unet(config: UNetConfig, height: int, width: int) -> Flops:
    """The U-Net of guided diffusion on one image, walked block by block as it is built."""
    emb = 4 * config.base
    total = Flops(linear=2 * (config.base * emb + emb * emb))

    def conv(c_in: int, c_out: int, pixels: float, side: int = 3) -> Flops:
        return Flops(convolution=2 * side**2 * c_in * c_out * pixels)

    def res(c_in: int, c_out: int, pixels: float) -> Flops:
        """At the resolution of its convolutions, which is that of its output."""
        cost = conv(c_in, c_out, pixels) + conv(c_out, c_out, pixels)
        cost += Flops(linear=2 * emb * c_out * (2 if config.scale_shift else 1))
        return cost if c_in == c_out else cost + conv(c_in, c_out, pixels, side=1)

    def attention(c: int, pixels: float) -> Flops:
        return conv(c, 4 * c, pixels, side=1) + Flops(attention=2 * 2 * pixels**2 * c)  # qkv and projection; q k, w v

    def pixels_at(level: int) -> float:
        return height * width / 4**level

    levels = range(len(config.widths))
    width_now, skips = config.widths[0], [config.widths[0]]
    total += conv(config.in_channels, width_now, pixels_at(0))
    for level in levels:
        pixels = pixels_at(level)
        for _ in range(config.num_blocks):
            total += res(width_now, config.widths[level], pixels)
            width_now = config.widths[level]
            if level in config.attention_levels:
                total += attention(width_now, pixels)
            skips.append(width_now)
        if level != levels[-1]:
            down = res if config.resblock_updown else conv
            total += down(width_now, width_now, pixels_at(level + 1))
            skips.append(width_now)
    middle = pixels_at(levels[-1])
    total += res(width_now, width_now, middle) + attention(width_now, middle) + res(width_now, width_now, middle)
    for level in reversed(levels):
        pixels = pixels_at(level)
        for i in range(config.num_blocks + 1):
            total += res(width_now + skips.pop(), config.widths[level], pixels)
            width_now = config.widths[level]
            if level in config.attention_levels:
                total += attention(width_now, pixels)
            if level and i == config.num_blocks:
                up = res if config.resblock_updown else conv
                total += up(width_now, width_now, pixels_at(level - 1))
    return total + conv(width_now, config.out_channels, pixels_at(0))


def natural(config: NaturalConfig, height: int, width: int) -> Flops:
    """The bundled kind of prior on one image whose sides are multiples of its stride."""
    pixels = [height * width / (config.unshuffle**2 * 4**level) for level in range(len(config.widths))]
    folded = config.channels * config.unshuffle**2
    convolution = 2 * 2 * 9 * folded * config.widths[0] * pixels[0]  # in and out
    linear = 2 * (17 * config.embedding + config.embedding**2)
    for level, (c, p) in enumerate(zip(config.widths, pixels, strict=True)):
        sides = 1 if level == len(config.widths) - 1 else 2
        blocks = sides * config.num_blocks
        convolution += blocks * 2 * 2 * 9 * c * c * p
        linear += blocks * 2 * config.embedding * 2 * c
    for a, b, p in zip(config.widths, config.widths[1:], pixels[1:], strict=False):
        convolution += 2 * 2 * 4 * a * b * p  # 2x2 down, and up again
    return Flops(convolution=convolution, linear=linear)


def fft(count: int, height: int, width: int) -> float:
    """Real transforms of `count` planes."""
    return 2.5 * count * height * width * math.log2(height * width)


def mstep_chain(kernel: int, num_iters: int = 10) -> float:
    """The loop of the M-step on the support: the filter g and the denoiser, in every iteration."""
    taps = kernel**2
    return num_iters * (2 * taps**2 + 2 * 9 * taps * sum(a * b for a, b in CHAIN))


def mstep(particles: int, height: int, width: int, kernel: int, channels: int = 3, num_iters: int = 10) -> float:
    """One image: sums over its particles, one inverse transform of the two filters, the loop."""
    half = height * (width // 2 + 1)
    return 12 * particles * channels * half + fft(2, height, width) + mstep_chain(kernel, num_iters)


def guidance_bytes(particles: int, height: int, width: int, channels: int = 3) -> float:
    """X and Y read, V written, as half spectra of complex float32."""
    return 2 * FLOAT * height * (width // 2 + 1) * channels * (2 * particles + 1)


def update_bytes(particles: int, height: int, width: int, *, guided: bool, channels: int = 3) -> float:
    """x_t, x0_hat and the guidance read, x_{t-1} written; the noise is drawn in the kernel."""
    return FLOAT * particles * channels * height * width * (4 if guided else 3)


def groupnorm_silu_bytes(batch: int, channels: int, height: int, width: int, itemsize: int) -> float:
    """Read once for the statistics, once to normalise; written once."""
    return 3 * itemsize * batch * channels * height * width


def step(config: UNetConfig, batch: int, particles: int, size: int, kernel: int, *, vjp: bool = True) -> dict:
    """FLOPs of a step of Fast EM by stage, for `batch` images of `particles` each."""
    cost, rows = unet(config, size, size), batch * particles
    return {
        "unet_fwd": rows * cost.forward,
        "unet_vjp": rows * (cost.forward_and_vjp - cost.forward) if vjp else 0.0,
        "x0": fft(3 * rows, size, size),
        "mstep": batch * mstep(particles, size, size, kernel),
        "guidance": fft(3 * rows + batch, size, size) + 16 * 3 * rows * size * (size // 2 + 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="ffhq-random", choices=list(RANDOM))
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--kernel", type=int, default=33)
    args = parser.parse_args(arguments)
    cost = unet(RANDOM[args.net], args.size, args.size)
    print(f"{args.net}, {args.size}x{args.size}, one image: {cost.forward / 1e9:.3f} GFLOP forward "
          f"(convolutions {cost.convolution / 1e9:.3f}, attention {cost.attention / 1e9:.3f}, "
          f"linear {cost.linear / 1e9:.3f}), {cost.forward_and_vjp / 1e9:.3f} forward and VJP")  # fmt: skip
    stages = step(RANDOM[args.net], args.batch, args.particles, args.size, args.kernel)
    print(f"a step of Fast EM, B = {args.batch}, n = {args.particles}, K = {args.kernel}:")
    for name, flops in stages.items():
        print(f"  {name:9s} {flops / 1e9:12.3f} GFLOP  {100 * flops / sum(stages.values()):6.2f} %")


if __name__ == "__main__":
    main()
