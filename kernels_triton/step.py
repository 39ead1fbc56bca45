"""Element-wise ops of a sampler step, and the counter-based noise that goes into it."""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program; a multiple of 4, the normals of one Philox counter


@triton.jit
def _predict_x0_kernel(
    x_ptr, eps_ptr, x0_ptr, mask_ptr, alpha_bar_ptr, count, s_hi, s_lo, inv_a,
    ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x0_raw = (x_t - s eps) / a, Eq. (12); clamped and mapped to [0, 1]; mask = not clamped.

    s = s_hi + s_lo beyond float32: at large t the difference is hundreds of times smaller than its terms. ON_DEVICE
    they come from the float64 behind alpha_bar_ptr.
    """
    if ON_DEVICE:
        alpha_bar = tl.load(alpha_bar_ptr)
        s = tl.sqrt(1.0 - alpha_bar)
        s_hi = s.to(tl.float32)
        s_lo = (s - s_hi.to(tl.float64)).to(tl.float32)
        inv_a = (1.0 / tl.sqrt(alpha_bar)).to(tl.float32)
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = e < count
    minus_eps = -tl.load(eps_ptr + e, keep)
    raw = tl.fma(minus_eps, s_lo, tl.fma(minus_eps, s_hi, tl.load(x_ptr + e, keep))) * inv_a
    x0 = tl.where(raw < -1.0, -1.0, tl.where(raw > 1.0, 1.0, raw))  # passes nan on, as clamp does
    tl.store(x0_ptr + e, (x0 + 1.0) * 0.5, keep)
    tl.store(mask_ptr + e, tl.where(raw == x0, 1.0, 0.0), keep)


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> tuple[Tensor, Tensor]:
    """x0_hat of Eq. (12), clamped and mapped from [-1, 1] to [0, 1], and where the clamp let it through.

    x_t, eps float32 in network range, any equal shape -> x0_hat in [0, 1] and a mask of 0 and 1. alpha_bar may be a
    float64 tensor, which the kernel reads.
    """
    x_t, eps = x_t.contiguous(), eps.contiguous()
    x0_hat, mask = torch.empty_like(x_t), torch.empty_like(x_t)
    count, place, numbers = x_t.numel(), None, (0.0, 0.0, 0.0)
    if isinstance(alpha_bar, Tensor):
        place = alpha_bar
    else:
        s = math.sqrt(1 - alpha_bar)
        s_hi = struct.unpack("f", struct.pack("f", s))[0]  # s in float32
        numbers = s_hi, s - s_hi, 1 / math.sqrt(alpha_bar)
    with torch.cuda.device_of(x_t):
        _predict_x0_kernel[(triton.cdiv(count, BLOCK),)](
            x_t, eps, x0_hat, mask, place, count, *numbers, ON_DEVICE=place is not None, BLOCK=BLOCK
        )
    return x0_hat, mask


@triton.jit
def _normal(seed, first_block, particle, step, stream, BLOCK: tl.constexpr):
    """BLOCK standard normals of consecutive elements, from element 4 * first_block on.

    Philox4x32-10 on the counter (block, particle, step, stream) under the key (low, high word of the seed), then
    Box-Muller on the word pairs (0, 1) and (2, 3).
    """
    block = (first_block + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + particle, zero + step.to(tl.uint32), zero + stream.to(tl.uint32))
    u0, u1 = ((w0 >> 9).to(tl.float32) + 0.5) * 2.0**-23, ((w1 >> 9).to(tl.float32) + 0.5) * 2.0**-23
    u2, u3 = ((w2 >> 9).to(tl.float32) + 0.5) * 2.0**-23, ((w3 >> 9).to(tl.float32) + 0.5) * 2.0**-23
    r01, r23 = tl.sqrt(-2.0 * tl.log(u0)), tl.sqrt(-2.0 * tl.log(u2))
    a01, a23 = 6.283185307179586 * u1, 6.283185307179586 * u3
    even = tl.interleave(r01 * tl.cos(a01), r23 * tl.cos(a23))  # elements 0 and 2 of each block
    odd = tl.interleave(r01 * tl.sin(a01), r23 * tl.sin(a23))  # elements 1 and 3
    return tl.interleave(even, odd)


@triton.jit(do_not_specialize=["step", "stream"])
def _philox_normal_kernel(seeds_ptr, out_ptr, n_particles, count, step, stream, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)  # row = b * n + i
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    seed, particle = tl.load(seeds_ptr + row // n_particles), (row % n_particles).to(tl.uint32)
    z = _normal(seed, first // 4, particle, step, stream, BLOCK)
    tl.store(out_ptr + row * count + e, z, e < count)


def philox_normal(seeds: Tensor, n: int, shape: tuple[int, ...], step: int, stream: int) -> Tensor:
    """Standard normal noise `(B, n, *shape)` float32 from counters: seeds `(B,)` int64, one per image.

    Element e of particle i at `step` comes from the block e // 4 of counter (e // 4, i, step, stream) under the key
    (low, high word of the seed): the same noise whatever the batch, the order or the machine.
    """
    seeds = seeds.contiguous()
    count = math.prod(shape)
    out = torch.empty(seeds.shape[0], n, *shape, dtype=torch.float32, device=seeds.device)
    with torch.cuda.device_of(out):
        _philox_normal_kernel[triton.cdiv(count, BLOCK), seeds.shape[0] * n](
            seeds, out, n, count, step, stream, BLOCK=BLOCK
        )
    return out


@triton.jit(do_not_specialize=["step", "stream"])
def _step_update_kernel(
    x_ptr, x0_ptr, noise_ptr, guidance_ptr, seeds_ptr, out_ptr,  # rows (b, i) of `count` elements
    n_particles, count, c0, ct, std, gain, step, stream,  # ON_DEVICE pointers to float64, and int64 for the last two
    NOISE: tl.constexpr, GUIDED: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_{t-1} = c0 (2 x0_hat - 1) + ct x_t + std noise + gain guidance, Eq. (15)."""
    if ON_DEVICE:
        c0, ct = tl.load(c0).to(tl.float32), tl.load(ct).to(tl.float32)
        std, gain = tl.load(std).to(tl.float32), tl.load(gain).to(tl.float32)
        if NOISE == "philox":
            step, stream = tl.load(step), tl.load(stream)
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    e = first + tl.arange(0, BLOCK)
    keep = e < count
    at = row * count + e
    out = c0 * (2.0 * tl.load(x0_ptr + at, keep) - 1.0) + ct * tl.load(x_ptr + at, keep)
    if NOISE == "tensor":
        out += std * tl.load(noise_ptr + at, keep)
    if NOISE == "philox":
        seed, particle = tl.load(seeds_ptr + row // n_particles), (row % n_particles).to(tl.uint32)
        out += std * _normal(seed, first // 4, particle, step, stream, BLOCK)
    if GUIDED:
        out += gain * tl.load(guidance_ptr + at, keep)
    tl.store(out_ptr + at, out, keep)


def step_update(
    x_t: Tensor, x0_hat: Tensor, noise: Tensor | None, guidance: Tensor | None,
    c0: float | Tensor, ct: float | Tensor, std: float | Tensor, gain: float | Tensor,
) -> Tensor:  # fmt: skip
    """`x_{t-1} = c0 (2 x0_hat - 1) + ct x_t + std noise + gain guidance`, Eq. (15); any equal shapes, float32.

    The four numbers may all be float64 tensors, which the kernel reads.
    """
    on_device = isinstance(std, Tensor)
    noisy, guided = on_device or bool(std), guidance is not None and (on_device or bool(gain))
    x_t, x0_hat = x_t.contiguous(), x0_hat.contiguous()
    out = torch.empty_like(x_t)
    count = x_t.numel()
    with torch.cuda.device_of(x_t):
        _step_update_kernel[triton.cdiv(count, BLOCK), 1](
            x_t, x0_hat,
            noise.contiguous() if noisy else None,
            guidance.contiguous() if guided else None,
            None, out, 1, count, c0, ct, std, gain, 0, 0,
            NOISE="tensor" if noisy else "none", GUIDED=guided, ON_DEVICE=on_device, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def step_update_philox(
    x_t: Tensor, x0_hat: Tensor, guidance: Tensor | None, seeds: Tensor,
    c0: float | Tensor, ct: float | Tensor, std: float | Tensor, gain: float | Tensor,
    step: int | Tensor, stream: int | Tensor,
) -> Tensor:  # fmt: skip
    """`step_update` with the noise of `philox_normal(seeds, n, (C, H, W), step, stream)` made on the way.

    x_t, x0_hat, guidance `(B, n, C, H, W)` float32, seeds `(B,)` int64. The last six may all be tensors of one value,
    float64 and for step and stream int64, which the kernel reads.
    """
    on_device = isinstance(std, Tensor)
    noisy, guided = on_device or bool(std), guidance is not None and (on_device or bool(gain))
    x_t, x0_hat, seeds = x_t.contiguous(), x0_hat.contiguous(), seeds.contiguous()
    out = torch.empty_like(x_t)
    batch, n = x_t.shape[:2]
    count = math.prod(x_t.shape[2:])
    with torch.cuda.device_of(x_t):
        _step_update_kernel[triton.cdiv(count, BLOCK), batch * n](
            x_t, x0_hat, None, guidance.contiguous() if guided else None, seeds, out,
            n, count, c0, ct, std, gain, step, stream,
            NOISE="philox" if noisy else "none", GUIDED=guided, ON_DEVICE=on_device, BLOCK=BLOCK,
        )  # fmt: skip
    return out
