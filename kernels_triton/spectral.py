"""Ops on half spectra. Complex numbers are read as interleaved (re, im) float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # complex elements per program


@triton.jit
def _wiener_guidance_kernel(
    X_ptr, Y_ptr, K_ptr, V_ptr, sigma2_ptr, r2_ptr,  # X, V (B, n, C, F); Y (B, C, F); K (B, 1, F)
    n_particles, n_chan, n_freq, Y_stride_b, K_stride_b, scalar_stride_b,  # strides in elements; 0 broadcasts
    COLOURED: tl.constexpr, BLOCK: tl.constexpr,  # r2 (F) instead of (B)
):  # fmt: skip
    """V = conj(K) (Y - K X) / (r^2 |K|^2 + sigma^2), Eq. (17)."""
    row = tl.program_id(0).to(tl.int64)  # row = (b * n + i) * C + c; 64-bit: offsets overflow 32
    b, c = row // (n_particles * n_chan), row % n_chan
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = f < n_freq
    x, y, k = 2 * (row * n_freq + f), 2 * (b * Y_stride_b + c * n_freq + f), 2 * (b * K_stride_b + f)
    x_re, x_im = tl.load(X_ptr + x, keep), tl.load(X_ptr + x + 1, keep)
    y_re, y_im = tl.load(Y_ptr + y, keep), tl.load(Y_ptr + y + 1, keep)
    k_re, k_im = tl.load(K_ptr + k, keep, 0.0), tl.load(K_ptr + k + 1, keep, 0.0)
    e_re = y_re - (k_re * x_re - k_im * x_im)  # E = Y - K X
    e_im = y_im - (k_re * x_im + k_im * x_re)
    sigma2 = tl.load(sigma2_ptr + b * scalar_stride_b)
    if COLOURED:
        r2 = tl.load(r2_ptr + f, keep, 0.0)
    else:
        r2 = tl.load(r2_ptr + b * scalar_stride_b)
    gain = 1.0 / (r2 * (k_re * k_re + k_im * k_im) + sigma2)
    tl.store(V_ptr + x, gain * (k_re * e_re + k_im * e_im), keep)  # V = conj(K) E gain
    tl.store(V_ptr + x + 1, gain * (k_re * e_im - k_im * e_re), keep)


def wiener_guidance(X: Tensor, Y: Tensor, K: Tensor, sigma2: Tensor, r2: Tensor) -> Tensor:
    """F{ H^T (r^2 H H^T + sigma^2 I)^-1 (y - H x) }, Eq. (17) for a circular convolution H.

    X `(B, n, C, H, W')`, Y `(B, C, H, W')`, K `(B, 1, H, W')` complex64, sigma2 `(B,)`, r2 `(B,)` or `(H, W')` float32
    -> like X. Y, K and the scalars may have one image for all B.
    """
    batch, n, chan = X.shape[:3]
    n_freq = X.shape[3] * X.shape[4]
    X, Y, K = X.contiguous(), Y.contiguous(), K.contiguous()
    coloured = r2.dim() == 2
    if not coloured:
        sigma2, r2 = torch.broadcast_tensors(sigma2, r2)
    sigma2, r2 = sigma2.contiguous(), r2.contiguous()
    V = torch.empty_like(X)
    with torch.cuda.device_of(X):
        _wiener_guidance_kernel[batch * n * chan, triton.cdiv(n_freq, BLOCK)](
            *(torch.view_as_real(t) for t in (X, Y, K, V)), sigma2, r2,
            n, chan, n_freq,
            chan * n_freq if Y.shape[0] > 1 else 0,
            n_freq if K.shape[0] > 1 else 0,
            1 if sigma2.shape[0] > 1 else 0,
            COLOURED=coloured, BLOCK=BLOCK,
        )  # fmt: skip
    return V


@triton.jit
def _spectral_sums_kernel(
    X_ptr, Y_ptr, Sxy_ptr, Sxx_ptr,  # X (B, n, C, F), Y (B, C, F)
    n_particles, n_chan, n_freq,
    PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sxy = sum conj(X) Y and Sxx = sum |X|^2 over the particles (and channels) of one image, never over images."""
    row = tl.program_id(0).to(tl.int64)  # b * C + c if PER_CHANNEL, else b
    if PER_CHANNEL:
        b, first, last = row // n_chan, row % n_chan, row % n_chan + 1
    else:
        b, first, last = row, row * 0, row * 0 + n_chan
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = f < n_freq
    xy_re, xy_im = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    xx = tl.zeros((BLOCK,), tl.float32)
    for c in range(first, last):
        y = 2 * ((b * n_chan + c) * n_freq + f)
        y_re, y_im = tl.load(Y_ptr + y, keep, 0.0), tl.load(Y_ptr + y + 1, keep, 0.0)
        for i in range(n_particles):
            x = 2 * (((b * n_particles + i) * n_chan + c) * n_freq + f)
            x_re, x_im = tl.load(X_ptr + x, keep, 0.0), tl.load(X_ptr + x + 1, keep, 0.0)
            xy_re += x_re * y_re + x_im * y_im
            xy_im += x_re * y_im - x_im * y_re
            xx += x_re * x_re + x_im * x_im
    s = row * n_freq + f
    tl.store(Sxy_ptr + 2 * s, xy_re, keep)
    tl.store(Sxy_ptr + 2 * s + 1, xy_im, keep)
    tl.store(Sxx_ptr + s, xx, keep)


def spectral_sums(X: Tensor, Y: Tensor, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """The sums of Eq. (24) over the particles (and the channels) of each image.

    X `(B, n, C, H, W')`, Y `(B, C, H, W')` complex64 -> `sum conj(X) Y` complex and `sum |X|^2` real, both
    `(B, 1, H, W')`, or `(B, C, H, W')` where `per_channel` keeps the channels apart.
    """
    batch, n, chan, height, width = X.shape
    n_freq, rows = height * width, chan if per_channel else 1
    X, Y = X.contiguous(), Y.contiguous()
    Sxy = X.new_empty(batch, rows, height, width)
    Sxx = torch.empty_like(Sxy, dtype=torch.float32)
    with torch.cuda.device_of(X):
        _spectral_sums_kernel[batch * rows, triton.cdiv(n_freq, BLOCK)](
            *(torch.view_as_real(t) for t in (X, Y, Sxy)), Sxx, n, chan, n_freq,
            PER_CHANNEL=per_channel, BLOCK=BLOCK,
        )  # fmt: skip
    return Sxy, Sxx
