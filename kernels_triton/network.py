"""GroupNorm with scale and shift, and SiLU: float32, float16 or bfloat16 in memory, float32 inside.

Statistics are taken over chunks of each group, by as many programs, and combined in a fixed order: no atomics, and a
sample is the same to the bit in any company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # values per program: pixels times the channels of a group, both powers of two
MAX_CHUNKS = 256  # of a group, and of the reduction over them


@triton.jit
def _tile(
    x_ptr, skip_ptr, n, group, chunk, n_chan, n_skip, n_pixel, size,
    stride_c, stride_p, skip_stride_c, skip_stride_p, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Pixels of a chunk by channels of a group: the values, where they are, and which of them exist."""
    p = (chunk * PIXELS + tl.arange(0, PIXELS)).to(tl.int64)[:, None]
    lane = tl.arange(0, CHANNELS)[None, :]
    c = (group * size + lane).to(tl.int64)
    keep = (p < n_pixel) & (lane < size)
    own = keep & (c < n_chan)
    x = tl.load(x_ptr + n * n_chan * n_pixel + c * stride_c + p * stride_p, own, 0.0).to(tl.float32)
    if SKIP:
        other = n * n_skip * n_pixel + (c - n_chan) * skip_stride_c + p * skip_stride_p
        x += tl.load(skip_ptr + other, keep & (c >= n_chan), 0.0).to(tl.float32)
    return x, p, c, keep


@triton.jit
def _film(n, c, keep, channels, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_n, scale_c, shift_n, shift_c,
          FILM: tl.constexpr):  # fmt: skip
    """gain and offset of h = normalised x * gain + offset."""
    keep = keep & (c < channels)
    gain, offset = tl.load(weight_ptr + c, keep, 0.0), tl.load(bias_ptr + c, keep, 0.0)
    if FILM:
        factor = 1.0 + tl.load(scale_ptr + n * scale_n + c * scale_c, keep, 0.0)
        gain, offset = gain * factor, offset * factor + tl.load(shift_ptr + n * shift_n + c * shift_c, keep, 0.0)
    return gain, offset


@triton.jit
def _moments_kernel(
    x_ptr, skip_ptr, first_ptr, second_ptr, n_chan, n_skip, n_pixel, groups, size, n_chunk,
    stride_c, stride_p, skip_stride_c, skip_stride_p, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Mean of a chunk and the sum of squared differences from it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, group = row // groups, row % groups
    x, p, c, keep = _tile(x_ptr, skip_ptr, n, group, chunk, n_chan, n_skip, n_pixel, size, stride_c, stride_p,
                          skip_stride_c, skip_stride_p, PIXELS, CHANNELS, SKIP)  # fmt: skip
    count = (tl.minimum(PIXELS, n_pixel - chunk * PIXELS) * size).to(tl.float32)
    centre = tl.sum(x) / count
    d = tl.where(keep, x - centre, 0.0)
    off = tl.sum(d)  # the rounding of the mean, which shows where it is far larger than the spread
    tl.store(first_ptr + row * n_chunk + chunk, centre + off / count)
    tl.store(second_ptr + row * n_chunk + chunk, tl.sum(d * d) - off * off / count)


@triton.jit
def _combine_moments_kernel(
    first_ptr, second_ptr, mean_ptr, rstd_ptr, n_pixel, size, n_chunk, eps, PIXELS: tl.constexpr, CHUNKS: tl.constexpr
):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    keep = i < n_chunk
    count = tl.where(keep, tl.minimum(PIXELS, n_pixel - i * PIXELS), 0).to(tl.float32)
    first = tl.load(first_ptr + row * n_chunk + i, keep, 0.0)
    second = tl.load(second_ptr + row * n_chunk + i, keep, 0.0)
    origin = tl.load(first_ptr + row * n_chunk)
    mean = origin + tl.sum((first - origin) * count) / n_pixel
    d = first - mean
    variance = tl.sum(second / size + d * d * count) / n_pixel
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _silu_kernel(
    x_ptr, skip_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    n_chan, n_skip, n_pixel, groups, size, stride_c, stride_p, skip_stride_c, skip_stride_p, y_stride_c, y_stride_p,
    scale_n, scale_c, shift_n, shift_c,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SKIP: tl.constexpr, FILM: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) rstd gain + offset)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, group = row // groups, row % groups
    x, p, c, keep = _tile(x_ptr, skip_ptr, n, group, chunk, n_chan, n_skip, n_pixel, size, stride_c, stride_p,
                          skip_stride_c, skip_stride_p, PIXELS, CHANNELS, SKIP)  # fmt: skip
    channels = n_chan + n_skip
    gain, offset = _film(n, c, c >= 0, channels, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_n, scale_c, shift_n,
                         shift_c, FILM)  # fmt: skip
    h = (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row) * gain + offset
    at = n * channels * n_pixel + c * y_stride_c + p * y_stride_p
    tl.store(y_ptr + at, (h * tl.sigmoid(h)).to(y_ptr.dtype.element_ty), keep)


@triton.jit
def _backward_kernel(
    x_ptr, skip_ptr, grad_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    first_ptr, second_ptr, dx_ptr, dskip_ptr,
    n_chan, n_skip, n_pixel, groups, size, n_chunk,
    stride_c, stride_p, skip_stride_c, skip_stride_p, y_stride_c, y_stride_p, scale_n, scale_c, shift_n, shift_c,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, SKIP: tl.constexpr, FILM: tl.constexpr, CHUNKS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """With nx = (x - mean) rstd and q the gradient with respect to it: the sums of q and q nx over a chunk (SUMS), or
    from them dx = rstd (q - mean(q) - nx mean(q nx))."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, group = row // groups, row % groups
    x, p, c, keep = _tile(x_ptr, skip_ptr, n, group, chunk, n_chan, n_skip, n_pixel, size, stride_c, stride_p,
                          skip_stride_c, skip_stride_p, PIXELS, CHANNELS, SKIP)  # fmt: skip
    channels = n_chan + n_skip
    gain, offset = _film(n, c, c >= 0, channels, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_n, scale_c, shift_n,
                         shift_c, FILM)  # fmt: skip
    rstd = tl.load(rstd_ptr + row)
    nx = (x - tl.load(mean_ptr + row)) * rstd
    h = nx * gain + offset
    s = tl.sigmoid(h)
    at = n * channels * n_pixel + c * y_stride_c + p * y_stride_p
    q = tl.load(grad_ptr + at, keep, 0.0).to(tl.float32) * (s * (1.0 + h * (1.0 - s))) * gain
    if SUMS:
        tl.store(first_ptr + row * n_chunk + chunk, tl.sum(q))
        tl.store(second_ptr + row * n_chunk + chunk, tl.sum(q * nx))
    else:
        i = tl.arange(0, CHUNKS)
        total = n_pixel.to(tl.float32) * size
        mean_q = tl.sum(tl.load(first_ptr + row * n_chunk + i, i < n_chunk, 0.0)) / total
        mean_qx = tl.sum(tl.load(second_ptr + row * n_chunk + i, i < n_chunk, 0.0)) / total
        dx = (rstd * (q - mean_q - nx * mean_qx)).to(dx_ptr.dtype.element_ty)
        own = n * n_chan * n_pixel + c * stride_c + p * stride_p
        tl.store(dx_ptr + own, dx, keep & (c < n_chan))
        if SKIP:
            other = n * n_skip * n_pixel + (c - n_chan) * skip_stride_c + p * skip_stride_p
            tl.store(dskip_ptr + other, dx, keep & (c >= n_chan))


class _Problem:
    """Sizes, layouts and the grid of a call."""

    def __init__(self, x: Tensor, skip: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int):
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.x, self.skip = self.laid_out(x), None if skip is None else self.laid_out(skip)
        batch, n_chan, height, width = x.shape
        n_skip = 0 if skip is None else skip.shape[1]
        self.n_pixel, self.channels = height * width, n_chan + n_skip
        size = self.channels // groups
        lanes = triton.next_power_of_2(size)
        pixels = max(1, BLOCK // lanes)
        while triton.cdiv(self.n_pixel, pixels) > MAX_CHUNKS:
            pixels *= 2
        self.n_chunk, self.rows, self.size = triton.cdiv(self.n_pixel, pixels), batch * groups, size
        self.grid = (self.rows, self.n_chunk)
        self.sizes = (n_chan, n_skip, self.n_pixel, groups, size)
        self.strides = (*self.steps(n_chan), *self.steps(n_skip))  # of a channel and of a pixel
        self.y_strides = self.steps(self.channels)
        film = (scale, shift) if scale is not None and shift is not None else ()
        self.film = film or (None, None)
        self.film_strides = [s for t in film for s in t.stride()] or [0] * 4
        self.tile = {"PIXELS": pixels, "CHANNELS": lanes, "SKIP": skip is not None}
        self.has_film = {"FILM": bool(film)}
        self.chunks = {"CHUNKS": triton.next_power_of_2(self.n_chunk)}

    def laid_out(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=self.layout)

    def steps(self, channels: int) -> tuple[int, int]:
        return (1, channels) if self.layout is torch.channels_last else (self.n_pixel, 1)

    def sums(self) -> tuple[Tensor, Tensor]:
        both = torch.empty(2, self.rows, self.n_chunk, device=self.x.device)
        return both[0], both[1]


def group_norm_silu(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`silu(norm(x) (1 + scale) + shift)`, and mean and `1 / sqrt(variance + eps)` of each group, `(N, groups)`.

    x `(N, C, H, W)`, plain or channels last, and the result like it; with skip, x and skip are the first and the last
    channels of one input. weight, bias `(C,)`; scale, shift `(N, C)` of any stride, or neither; float32.
    """
    a = _Problem(x, skip, scale, shift, groups)
    y = torch.empty(x.shape[0], a.channels, *x.shape[2:], dtype=x.dtype, device=x.device, memory_format=a.layout)
    mean, rstd = (torch.empty(x.shape[0], groups, device=x.device) for _ in range(2))
    first, second = a.sums()
    with torch.cuda.device_of(x):
        _moments_kernel[a.grid](a.x, a.skip, first, second, *a.sizes, a.n_chunk, *a.strides, **a.tile)
        _combine_moments_kernel[(a.rows,)](
            first, second, mean, rstd, a.n_pixel, a.size, a.n_chunk, eps, PIXELS=a.tile["PIXELS"], **a.chunks
        )
        _silu_kernel[a.grid](
            a.x, a.skip, y, mean, rstd, weight.contiguous(), bias.contiguous(), *a.film, *a.sizes, *a.strides,
            *a.y_strides, *a.film_strides, **a.tile, **a.has_film,
        )  # fmt: skip
    return y, mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, shift: Tensor | None, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of `group_norm_silu` with respect to x and skip (empty without one), given that of its output."""
    a = _Problem(x, skip, scale, shift, groups)
    dx = torch.empty_like(a.x)
    dskip = a.x.new_empty(0) if a.skip is None else torch.empty_like(a.skip)
    first, second = a.sums()
    with torch.cuda.device_of(x):
        for only_sums in (True, False):
            _backward_kernel[a.grid](
                a.x, a.skip, a.laid_out(grad), mean.contiguous(), rstd.contiguous(), weight.contiguous(),
                bias.contiguous(), *a.film, first, second, dx, dskip, *a.sizes, a.n_chunk, *a.strides, *a.y_strides,
                *a.film_strides, **a.tile, **a.has_film, **a.chunks, SUMS=only_sums,
            )  # fmt: skip
    return dx, dskip
