"""The specification: every op in plain torch, in any float precision. Fast versions prove themselves against it.

Shapes: particles `(B, n, C, H, W)`, observations `(B, C, H, W)`, kernels `(B, 1, h, w)` with their origin at
`(h // 2, w // 2)`; half spectra are those of `torch.fft.rfft2`, `(..., H, W // 2 + 1)`. Upper case is Fourier.
Sums run over the particles n of one image, never over the images B.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------- spectral


def psf_to_otf(k: Tensor, size: tuple[int, int]) -> Tensor:
    """F(P k): kernel `(B, 1, h, w)` -> half spectrum `(B, 1, H, W // 2 + 1)` of the kernel centred at the origin."""
    h, w = k.shape[-2:]
    padded = F.pad(k, (0, size[1] - w, 0, size[0] - h))
    return torch.fft.rfft2(padded.roll((-(h // 2), -(w // 2)), dims=(-2, -1)))


def spectral_sums(X: Tensor, Y: Tensor, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """The sums of Eq. (24) over the particles (and the channels) of each image.

    X `(B, n, C, H, W')`, Y `(B, C, H, W')` -> `sum conj(X) Y` complex and `sum |X|^2` real, both
    `(B, 1, H, W')`, or `(B, C, H, W')` where `per_channel` keeps the channels apart (the released program).
    """
    dims = (1,) if per_channel else (1, 2)
    Sxy, Sxx = (X.conj() * Y[:, None]).sum(dims), (X.real**2 + X.imag**2).sum(dims)
    return (Sxy, Sxx) if per_channel else (Sxy[:, None], Sxx[:, None])


def wiener_guidance(X: Tensor, Y: Tensor, K: Tensor, sigma2: Tensor, r2: Tensor) -> Tensor:
    """F{ H^T (r^2 H H^T + sigma^2 I)^-1 (y - H x) }, Eq. (17) for a circular convolution H.

    X `(B, n, C, H, W')`, Y `(B, C, H, W')`, K `(B, 1, H, W')`, sigma2 real `(B,)` and > 0, r2 real `(B,)`, or
    `(H, W')` where r^2 I is a circular covariance -> like X.
    """
    Y, K = Y[:, None], K[:, None]
    r2 = r2 if r2.dim() == 2 else r2.view(-1, 1, 1, 1, 1)
    gain = 1 / (r2 * (K.real**2 + K.imag**2) + sigma2.view(-1, 1, 1, 1, 1))
    return K.conj() * (Y - K * X) * gain


# --------------------------------------------------------------------------------- kernels on their support


def crop_support(z: Tensor, h: int, w: int) -> Tensor:
    """The `h x w` values around the origin of a periodic map `(..., H, W)`, origin to `(h // 2, w // 2)`.

    Indices are taken modulo the size, so the window may be larger than the map.
    """
    rows = (torch.arange(h, device=z.device) - h // 2) % z.shape[-2]
    cols = (torch.arange(w, device=z.device) - w // 2) % z.shape[-1]
    return z[..., rows[:, None], cols]


def convolve_support(g: Tensor, k: Tensor) -> Tensor:
    """`(g (*) k)[p] = sum_q g[p - q] k[q]` with p and q on the support: g `(B, 1, 2h-1, 2w-1)`, k `(B, 1, h, w)`."""
    batch = k.shape[0]
    h, w = k.shape[-2:]  # conv2d correlates: the flipped kernel makes it a true convolution
    return F.conv2d(g.transpose(0, 1), k.flip(-2, -1), groups=batch).reshape(batch, 1, h, w)


def project_kernel(z: Tensor) -> Tensor:
    """Negative values to 0, then divided by the sum, as the released program does. A map without mass gives nan."""
    z = z.clamp(min=0)
    return z / z.sum(dim=(-2, -1), keepdim=True)


def project_simplex(z: Tensor) -> Tensor:
    """The nearest non-negative kernel of sum 1: `max(z - tau, 0)`, tau by sorting (Held et al. 1974)."""
    flat = z.flatten(-2)
    u = flat.sort(dim=-1, descending=True).values
    excess = u.cumsum(-1) - 1
    index = torch.arange(1, u.shape[-1] + 1, device=z.device)
    rho = (u * index > excess).sum(-1, keepdim=True).clamp(min=1)  # 0 only for nan, which passes on
    tau = excess.gather(-1, rho - 1) / rho
    return (flat - tau).clamp(min=0).view_as(z)


def simplex_least_squares(g: Tensor, b: Tensor, k: Tensor, num_iters: int) -> Tensor:
    """`argmin 1/2 k^T G k - b^T k` over kernels >= 0 of sum 1, by FISTA (Beck and Teboulle 2009) from `k`.

    G is Toeplitz: `G k = g (*) k` on the support, g `(B, 1, 2h-1, 2w-1)` an autocorrelation; b, k `(B, 1, h, w)`.
    The step is 1 / L with L the l1 norm of g, which bounds the largest eigenvalue of G.
    """
    step = 1 / g.abs().sum(dim=(-2, -1), keepdim=True)
    momentum, t = k, 1.0
    for _ in range(num_iters):
        previous = k
        k = project_simplex(momentum - step * (convolve_support(g, momentum) - b))
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = k + (t - 1) / t_next * (k - previous)
        t = t_next
    return k


def denoise_chain(
    k: Tensor, noise_std: Tensor, weights: list[Tensor], biases: list[Tensor | None], scale: float
) -> Tensor:
    """A plain chain of same-size convolutions with ReLU between, on (kernel, constant noise-level plane).

    k `(B, 1, h, w)`, noise_std `(B,)`; weights `(out, in, 3, 3)`, 2 inputs first, 1 output last; both input planes
    are multiplied by `scale`, the output divided by it.
    """
    h = torch.cat([k, noise_std.view(-1, 1, 1, 1).expand_as(k)], dim=1) * scale
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        h = F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)
        if i < last:
            h = h.relu()
    return h / scale


def hqs_chain(
    a: Tensor, g: Tensor, k: Tensor, noise_std: Tensor,
    weights: list[Tensor], biases: list[Tensor | None], scale: float, num_iters: int, recentred: bool = False,
) -> Tensor:  # fmt: skip
    """The whole M-step loop with a denoiser chain as prior: Eq. (24) and (25), `num_iters` times.

    a, k `(B, 1, h, w)`, g `(B, 1, 2h-1, 2w-1)`, noise_std `(B,)`; the chain as in `denoise_chain`. With `recentred` the
    result goes through `recentre`.
    """
    for _ in range(num_iters):
        z = project_kernel(a + convolve_support(g, k))  # Eq. (24)
        k = project_kernel(denoise_chain(z, noise_std, weights, biases, scale))  # Eq. (25)
    return recentre(k) if recentred else k


def centre_of_mass(k: Tensor) -> Tensor:
    """`(B, 1, h, w)` -> `(B, 2)`: row and column of the centre of mass."""
    h, w = k.shape[-2:]
    mass = k.sum(dim=(-2, -1))
    rows = (k.sum(-1) * torch.arange(h, device=k.device, dtype=k.dtype)).sum(-1)
    cols = (k.sum(-2) * torch.arange(w, device=k.device, dtype=k.dtype)).sum(-1)
    return torch.cat([rows / mass, cols / mass], dim=1)


def recentre(k: Tensor) -> Tensor:
    """Moves each kernel by a cubic spline so that its centre of mass sits at `(h - h % 2) / 2 + (1 - h % 2) / 2`.

    The interpolation of the released program (spline order 3, zeros outside, mirrored prefilter): neither clipped
    nor renormalised, so small negative values and a sum other than 1 are possible. k `(B, 1, h, w)`; a kernel of
    no mass, or not finite, becomes 0.
    """
    h, w = k.shape[-2:]
    row, col = centre_of_mass(k).unbind(1)
    rows = spline_shift_matrix(h // 2 + 0.5 * (1 - h % 2) - row, h)
    cols = spline_shift_matrix(w // 2 + 0.5 * (1 - w % 2) - col, w)
    moved = rows @ k[:, 0] @ cols.transpose(-1, -2)
    good = moved.isfinite().all(-1).all(-1)
    return torch.where(good[:, None, None], moved, 0.0)[:, None]


def spline_shift_matrix(shift: Tensor, size: int) -> Tensor:
    """`(B,)` shifts in pixels -> `(B, size, size)` matrices that shift a signal by cubic-spline interpolation.

    Source position `i - shift`; positions outside `[0, size - 1]` give 0. Coefficients from the mirror-extended
    prefilter (Unser 1999).
    """
    kwargs = {"dtype": shift.dtype, "device": shift.device}
    position = torch.arange(size, **kwargs) - shift[:, None]
    inside = (position >= 0) & (position <= size - 1)
    base = position.floor()
    frac = position - base
    taps = torch.stack(
        [(1 - frac) ** 3, 4 - 6 * frac**2 + 3 * frac**3, 1 + 3 * frac + 3 * frac**2 - 3 * frac**3, frac**3]
    )
    out = torch.zeros(shift.shape[0], size, size, **kwargs)
    for j in range(4):
        index = _mirror((base + (j - 1)).nan_to_num(0.0).long(), size)
        out.scatter_add_(2, index[..., None], (taps[j] / 6 * inside)[..., None])
    return out @ _spline_prefilter(size, shift.dtype, shift.device)


def _mirror(index: Tensor, size: int) -> Tensor:
    """Indices reflected about the first and last sample."""
    if size == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index)


@lru_cache(maxsize=32)
def _spline_prefilter(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Samples -> cubic B-spline coefficients, the inverse of the mirrored (1, 4, 1) / 6 interpolation matrix."""
    with torch.inference_mode(False):  # the matrix outlives the mode of its first caller
        return _invert_spline(size).to(device, dtype)


def _invert_spline(size: int) -> Tensor:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    i = torch.arange(size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for offset, weight in ((-1, 1 / 6), (0, 4 / 6), (1, 1 / 6)):
        matrix[i, _mirror(i + offset, size)] += weight
    return torch.linalg.inv(matrix)


# ------------------------------------------------------------------------------------------- sampler steps


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> tuple[Tensor, Tensor]:
    """x0_hat of Eq. (12), clamped and mapped from [-1, 1] to [0, 1], and where the clamp let it through.

    x_t, eps in network range, any equal shape -> x0_hat in [0, 1] and a mask of the same dtype (1 inside or on
    the border, else 0).
    """
    x0_raw = _root(1 / alpha_bar) * x_t - _root(1 / alpha_bar - 1) * eps  # Eq. (12)
    x0_hat = x0_raw.clamp(-1, 1)
    return (x0_hat + 1) / 2, (x0_raw == x0_hat).to(x_t.dtype)


def step_update(
    x_t: Tensor, x0_hat: Tensor, noise: Tensor, guidance: Tensor | None, c0: float, ct: float, std: float, gain: float
) -> Tensor:
    """`x_{t-1} = c0 (2 x0_hat - 1) + ct x_t + std noise + gain guidance`, Eq. (15); any equal shapes.

    The numbers are floats, or 0-dim tensors, whose value decides nothing here.
    """
    out = c0 * (2 * x0_hat - 1) + ct * x_t
    if isinstance(std, Tensor) or std:
        out = out + std * noise
    if guidance is not None and (isinstance(gain, Tensor) or gain):
        out = out + gain * guidance
    return out


def _root(value: float | Tensor) -> float | Tensor:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


_MASK32 = 0xFFFFFFFF


def philox4x32(key: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): key `(..., 2)`, counter `(..., 4)`, 32-bit words in int64 -> `(..., 4)`."""
    k0, k1 = key.unbind(-1)
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps: the low 64 bits are right
        high0, low0 = (p0 >> 32) & _MASK32, p0 & _MASK32
        high1, low1 = (p1 >> 32) & _MASK32, p1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def philox_normal(
    seeds: Tensor, n: int, shape: tuple[int, ...], step: int | Tensor, stream: int | Tensor
) -> Tensor:  # fmt: skip
    """Standard normal noise `(B, n, *shape)` float32 from counters: seeds `(B,)` int64, one per image.

    Element e of particle i at `step` comes from the block e // 4 of counter (e // 4, i, step, stream) under the key
    (low, high word of the seed): the same noise whatever the batch, the order or the machine.
    """
    batch, count = seeds.shape[0], math.prod(shape)
    blocks = -(-count // 4)
    device = seeds.device
    block = torch.arange(blocks, device=device).expand(batch, n, blocks)
    particle = torch.arange(n, device=device)[:, None].expand(batch, n, blocks)
    words = [w.expand_as(block) if isinstance(w, Tensor) else torch.full_like(block, w) for w in (step, stream)]
    counter = torch.stack([block, particle, *words], dim=-1)
    key = torch.stack([seeds & _MASK32, (seeds >> 32) & _MASK32], dim=-1)[:, None, None].expand(batch, n, blocks, 2)
    words = philox4x32(key, counter)
    u = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    radius = (-2 * u[..., 0::2].log()).sqrt()  # Box-Muller: words (0, 1) and (2, 3) make a pair each
    angle = 2 * math.pi * u[..., 1::2]
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.reshape(batch, n, 4 * blocks)[..., :count].reshape(batch, n, *shape)


# ------------------------------------------------------------------------------------------- network layers


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """3x3 convolution, stride 1, zero padding 1, plus an optional residual: x `(N, C, H, W)`, weight `(O, C, 3, 3)`."""
    out = F.conv2d(x, weight, bias, padding=1)
    return out if residual is None else out + residual


def group_norm_silu(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`silu(norm(x) (1 + scale) + shift)` with norm a GroupNorm of `groups` groups, weight and bias `(C,)`.

    x `(N, C, H, W)`; with skip, x and skip are the first and the last channels of one input. scale and shift `(N, C)`,
    or neither. Works in the precision of the weights, and returns that of x. Also returns mean and
    `1 / sqrt(variance + eps)` of each group, `(N, groups)`.
    """
    joined = (x if skip is None else torch.cat([x, skip], dim=1)).to(weight.dtype)
    batch, channels, height, width = joined.shape
    h, mean, rstd = torch.native_group_norm(joined, weight, bias, batch, channels, height * width, groups, eps)
    if scale is not None and shift is not None:
        h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
    return F.silu(h).to(x.dtype), mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, shift: Tensor | None, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of `group_norm_silu` with respect to x and skip (empty without one), given that of its output.

    `rstd (q - mean(q) - n mean(q n))`, means over each group, with n the normalised input and q the gradient with
    respect to it.
    """
    joined = (x if skip is None else torch.cat([x, skip], dim=1)).to(weight.dtype)
    channels = joined.shape[1]

    def per_channel(t: Tensor) -> Tensor:  # (N, groups) or (N, C) -> (N, C, 1, 1)
        return t.repeat_interleave(channels // t.shape[1], dim=1)[:, :, None, None]

    def group_mean(t: Tensor) -> Tensor:
        return per_channel(t.unflatten(1, (groups, -1)).mean(dim=(2, 3, 4)))

    gain, offset = weight[None], bias[None]
    if scale is not None and shift is not None:
        gain, offset = gain * (1 + scale), offset * (1 + scale) + shift
    n = (joined - per_channel(mean)) * per_channel(rstd)
    h = n * gain[:, :, None, None] + offset[:, :, None, None]
    s = h.sigmoid()
    q = grad.to(weight.dtype) * (s * (1 + h * (1 - s))) * gain[:, :, None, None]
    full = (per_channel(rstd) * (q - group_mean(q) - n * group_mean(q * n))).to(x.dtype)
    if skip is None:
        return full, full.new_empty(0)
    return full[:, : x.shape[1]], full[:, x.shape[1] :]
