"""Element-wise layers of the denoising network: float32, float16 or bfloat16 in memory, float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program


@triton.jit
def _film_silu_kernel(
    x_ptr, grad_ptr, scale_ptr, shift_ptr, out_ptr,
    n_chan, n_pixels, scale_stride_n, scale_stride_c, shift_stride_n, shift_stride_c,
    FILM: tl.constexpr, BACKWARD: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """silu(h) with h = x (1 + scale) + shift, or its gradient: grad (1 + scale) s (1 + h (1 - s)), s = sigmoid(h)."""
    n = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # within a sample: 32 bits keep the division cheap
    keep = e < n_chan * n_pixels
    at = n * n_chan * n_pixels + e
    h = tl.load(x_ptr + at, keep).to(tl.float32)
    if FILM:
        c = e % n_chan if CHANNELS_LAST else e // n_pixels
        gain = 1.0 + tl.load(scale_ptr + n * scale_stride_n + c * scale_stride_c, keep).to(tl.float32)
        h = h * gain + tl.load(shift_ptr + n * shift_stride_n + c * shift_stride_c, keep).to(tl.float32)
    s = tl.sigmoid(h)
    if BACKWARD:
        out = tl.load(grad_ptr + at, keep).to(tl.float32) * (s * (1.0 + h * (1.0 - s)))
        if FILM:
            out *= gain
    else:
        out = h * s
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), keep)


def _launch(x: Tensor, grad: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    samples, chan, height, width = x.shape
    if chan * height * width + BLOCK > 2**31:
        raise ValueError(f"a sample may hold at most 2**31 - {BLOCK} elements, got {tuple(x.shape[1:])}: use tiles")
    film = scale is not None and shift is not None
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _film_silu_kernel[triton.cdiv(chan * height * width, BLOCK), samples](
            x, None if grad is None else grad.contiguous(memory_format=layout),
            scale if film else None, shift if film else None, out,
            chan, height * width, *(scale.stride() if film else (0, 0)), *(shift.stride() if film else (0, 0)),
            FILM=film, BACKWARD=grad is not None, CHANNELS_LAST=channels_last, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def film_silu(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """`silu(x * (1 + scale) + shift)` per sample and channel: x `(N, C, H, W)`, scale and shift `(N, C)`, or neither.

    x may be channels-last; the result has its layout. scale and shift may be views of any stride.
    """
    return _launch(x, None, scale, shift)


def film_silu_backward(grad: Tensor, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """The gradient of `film_silu` with respect to x, given that of its output."""
    return _launch(x, grad, scale, shift)
