"""Image and kernel quality. Every function takes ndarrays or tensors of equal shape and returns a Python float.

Images are `(H, W)`, ndarrays `(H, W, C)`, or tensors `(C, H, W)` and `(B, C, H, W)`, with values in `[0, data_range]`
(uint8 and uint16 are divided by their maximum first). Kernels are `(h, w)` or `(1, 1, h, w)`.

Blind deconvolution cannot tell a shift or a gain of the image from those of the kernel. `psnr_aligned`, `kernel_mse`,
`kernel_error` and `kernel_correlation` therefore take the shift out: whole pixels at the peak of the cross-correlation,
the fraction by Gauss-Newton steps on the squared difference. `psnr_aligned` also takes out the gain.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray | Tensor
MAXIMA = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, torch.uint8: 255, torch.uint16: 65535}


def psnr(a: Array, b: Array, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    a, b = _image_pair(a, b)
    return _psnr((a - b).square().mean().item(), data_range)


def ssim(a: Array, b: Array, data_range: float = 1.0) -> float:
    """Structural similarity, Wang et al. 2004: Gaussian window 11x11 of std 1.5, mean over the pixels whose window is
    whole and over the channels."""
    a, b = _image_pair(a, b)
    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, got {tuple(a.shape[-2:])}")
    taps = torch.exp(-0.5 * ((torch.arange(11, dtype=a.dtype, device=a.device) - 5) / 1.5) ** 2)
    taps = taps / taps.sum()

    def blur(x: Tensor) -> Tensor:
        x = x.reshape(-1, 1, *x.shape[-2:])
        return F.conv2d(F.conv2d(x, taps.view(1, 1, 11, 1)), taps.view(1, 1, 1, 11))

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean().item()


def ms_ssim(a: Array, b: Array, data_range: float = 1.0) -> float:
    """Multi-scale structural similarity, Wang, Simoncelli and Bovik 2003: five scales, as torchmetrics computes it.

    Raises:
        ImportError: without torchmetrics (`pip install fastem[eval]`).
        ValueError: if a side has fewer than 176 pixels: the coarsest window would not fit.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = _image_pair(a, b)
    if not ms_ssim_fits(a.shape[-2:]):
        raise ValueError(f"MS-SSIM needs 176 pixels or more on each side, got {tuple(a.shape[-2:])}")
    a, b = (x.reshape(-1, 1, *x.shape[-2:]) for x in (a, b))
    return multiscale_structural_similarity_index_measure(a, b, data_range=data_range).item()


def ms_ssim_fits(size: tuple[int, int]) -> bool:
    """Whether images of this size have the five scales of MS-SSIM."""
    return min(size) // 2**4 > 10


class Alignment(NamedTuple):
    """What was taken out before scoring: `estimate(p + shift) * gain` is compared with `truth(p)`."""

    psnr: float  # dB, after alignment
    shift: tuple[float, float]  # rows, columns, in pixels
    gain: float


def psnr_aligned(
    estimate: Array, truth: Array, *, max_shift: float = 16, border: int | None = None, data_range: float = 1.0
) -> float:
    """PSNR in dB after the best shift, of at most `max_shift` pixels each way, and gain; see `align`."""
    return align(estimate, truth, max_shift=max_shift, border=border, data_range=data_range).psnr


def align(
    estimate: Array, truth: Array, *, max_shift: float = 16, border: int | None = None, data_range: float = 1.0
) -> Alignment:
    """The shift and gain that bring an estimate closest to the truth, and the PSNR that remains.

    Args:
        estimate, truth: images of equal shape.
        max_shift: largest shift tried each way, in pixels; half the kernel size is natural.
        border: pixels cut from each side before scoring (they may depend on what lies outside the image); by default
            `max_shift` rounded up.

    Raises:
        ValueError: if the shapes differ, or nothing is left inside the border.
    """
    a, b = _image_pair(estimate, truth)
    border = math.ceil(max_shift) if border is None else border
    if min(a.shape[-2:]) <= 2 * max(border, math.floor(max_shift)):
        raise ValueError(
            f"images of {tuple(a.shape[-2:])} leave nothing inside a border of {max(border, max_shift)} pixels"
        )
    shift, gain, mse = _register(a, b, max_shift, border, free_gain=True)
    return Alignment(_psnr(mse, data_range), shift, gain)


def aligned(estimate: Array, found: Alignment) -> Array:
    """The estimate with shift and gain taken out, of the kind and shape it came in, float64. Periodic at the border."""
    channels_last = isinstance(estimate, np.ndarray) and estimate.ndim == 3 and estimate.shape[-1] <= 4
    moved = found.gain * fourier_shift(_channels_first(estimate), (-found.shift[0], -found.shift[1]))
    if isinstance(estimate, Tensor):
        return moved
    return (moved.movedim(0, -1) if channels_last else moved).numpy()


def kernel_mse(k: Array, k_true: Array, align: bool = True) -> float:
    """Mean squared difference of two kernels, by default after the best shift of k of at most half its size.

    Both are zero-padded to twice their size before they are shifted, so nothing is cut off; the mean is over the pixels
    of the kernel itself. Calibration at 33x33: no kernel at all scores about 5e-5, a shift by one pixel 1e-5 to 7e-5.
    """
    k, k_true = _kernel_pair(k, k_true)
    return _squared_difference(k, k_true, align) / k.numel()


def kernel_error(k: Array, k_true: Array, align: bool = True) -> float:
    """`||k - k_true||^2 / ||k_true||^2`, by default after the best shift; 1 for no kernel at all."""
    k, k_true = _kernel_pair(k, k_true)
    return _squared_difference(k, k_true, align) / k_true.square().sum().item()


def kernel_correlation(k: Array, k_true: Array) -> float:
    """Maximum over whole-pixel shifts of the normalised cross-correlation, in [0, 1] for non-negative kernels.

    Source: Eq. (21) of Chung et al., CVPR 2023.
    """
    k, k_true = _kernel_pair(k, k_true)
    norms = k.norm() * k_true.norm()
    if norms == 0:
        return 0.0
    return (_cross_correlation(_pad_double(k), _pad_double(k_true)).max() / norms).item()


def reblur_loss(y: Array, x: Array, kernel: Array, sigma: float, border: int = 0) -> float:
    """`||k (*) x - y||^2 / M - sigma^2`, Eq. (34) per element: 0 for the truth, negative where noise was fitted.

    The convolution is circular; `border` pixels on each side are left out of the mean.
    """
    return _mean_residual(y, x, kernel, border) - sigma**2


def chi2(y: Array, x: Array, kernel: Array, sigma: float, border: int = 0) -> float:
    """`||k (*) x - y||^2 / (M sigma^2)`: 1 for the truth."""
    if not sigma > 0:
        raise ValueError(f"chi^2 divides by sigma, which must be > 0, got {sigma}")
    return _mean_residual(y, x, kernel, border) / sigma**2


def fourier_shift(x: Tensor, shift: tuple[float, float]) -> Tensor:
    """x `(..., H, W)` moved down and right by fractions of pixels, periodically: the Fourier shift theorem."""
    if shift == (0, 0):
        return x
    size = x.shape[-2:]
    rows, cols = (torch.exp(-2j * math.pi * u * f(n, dtype=x.dtype, device=x.device))
                  for f, n, u in zip((torch.fft.fftfreq, torch.fft.rfftfreq), size, shift, strict=True))  # fmt: skip
    for ramp, n, u in zip((rows, cols), size, shift, strict=True):
        if n % 2 == 0:
            ramp[n // 2] = math.cos(math.pi * u)  # the Nyquist frequency has no sign: the mean of both
    return torch.fft.irfft2(torch.fft.rfft2(x) * rows[:, None] * cols, s=size)


# ------------------------------------------------------------------------------------------------- alignment


def _cross_correlation(a: Tensor, b: Tensor) -> Tensor:
    """`c[u] = sum_p a(p + u) b(p)`, periodic, summed over all but the last two axes."""
    spectrum = torch.fft.rfft2(a) * torch.fft.rfft2(b).conj()
    return torch.fft.irfft2(spectrum.reshape(-1, *spectrum.shape[-2:]).sum(0), s=a.shape[-2:])


def _register(
    a: Tensor, b: Tensor, limit: float, border: int, free_gain: bool, num_steps: int = 4
) -> tuple[tuple[float, float], float, float]:
    """Shift u, |u| <= limit, and gain that minimise the mean square of `gain * a(p + u) - b(p)` inside the border.

    Never worse than no shift: that is one of the starting points.
    """

    def fit(shift: tuple[float, float]) -> tuple[Tensor, float, Tensor]:
        moved = fourier_shift(a, (-shift[0], -shift[1]))
        inner = _inside(moved, border)
        gain = ((inner * target).sum() / inner.square().sum().clamp(min=1e-300)).item() if free_gain else 1.0
        return moved, gain, target - gain * inner

    target = _inside(b, border)
    starts = [(0.0, 0.0), _whole_pixel_shift(a, b, math.floor(limit))]
    best = min(((fit(start), start) for start in starts), key=lambda pair: pair[0][2].square().sum().item())
    for _ in range(num_steps):
        (moved, gain, residual), shift = best
        slopes = [gain * _inside(_derivative(moved, axis), border).flatten() for axis in (-2, -1)]
        columns = torch.stack([*slopes, _inside(moved, border).flatten()] if free_gain else slopes)
        normal, right = (columns @ columns.T).cpu(), (columns @ residual.flatten()).cpu()
        step = torch.linalg.lstsq(normal, right, driver="gelsd").solution  # any rank: an image may be constant
        candidate = tuple(max(-limit, min(limit, u + du)) for u, du in zip(shift, step.tolist(), strict=False))
        fitted = fit(candidate)
        if not fitted[2].square().sum() < residual.square().sum():
            break
        best = fitted, candidate
    (_, gain, residual), shift = best
    return shift, gain, residual.square().mean().item()


def _whole_pixel_shift(a: Tensor, b: Tensor, limit: int) -> tuple[float, float]:
    """The u, |u| <= limit, at which `a(p + u)` correlates best with `b(p)`."""
    a, b = (x - x.mean(dim=(-2, -1), keepdim=True) for x in (a, b))
    around = torch.arange(-limit, limit + 1)
    window = _cross_correlation(a, b).cpu()[around[:, None] % a.shape[-2], around % a.shape[-1]]
    row, col = divmod(int(window.argmax()), len(around))
    return float(row - limit), float(col - limit)


def _inside(x: Tensor, border: int) -> Tensor:
    return x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]


def _derivative(x: Tensor, axis: int) -> Tensor:
    """Along one axis, of the band-limited periodic function through the samples."""
    size = x.shape[axis]
    f = torch.fft.fftfreq(size, dtype=x.dtype, device=x.device)
    if size % 2 == 0:
        f[size // 2] = 0
    ramp = (2j * math.pi * f).reshape(-1, *[1] * (-axis - 1))
    return torch.fft.ifft(torch.fft.fft(x, dim=axis) * ramp, dim=axis).real


def _squared_difference(k: Tensor, k_true: Tensor, align: bool) -> float:
    if not align:
        return (k - k_true).square().sum().item()
    a, b = _pad_double(k), _pad_double(k_true)
    return _register(a, b, min(k.shape) / 2, 0, free_gain=False)[2] * a.numel()


def _pad_double(k: Tensor) -> Tensor:
    h, w = k.shape
    return F.pad(k, (w // 2, w - w // 2, h // 2, h - h // 2))


def _mean_residual(y: Array, x: Array, kernel: Array, border: int) -> float:
    y, x = _image_pair(y, x)
    k = _kernel(kernel)
    h, w = k.shape
    height, width = y.shape[-2:]
    if h > height or w > width:
        raise ValueError(f"the kernel {(h, w)} is larger than the image {(height, width)}")
    if min(height, width) <= 2 * border:
        raise ValueError(f"images of {(height, width)} leave nothing inside a border of {border} pixels")
    padded = F.pad(k.to(y.device), (0, width - w, 0, height - h)).roll((-(h // 2), -(w // 2)), dims=(-2, -1))
    residual = torch.fft.irfft2(torch.fft.rfft2(padded) * torch.fft.rfft2(x), s=(height, width)) - y
    return _inside(residual, border).square().mean().item()


def _psnr(mse: float, data_range: float) -> float:
    return math.inf if mse == 0 else 10 * math.log10(data_range**2 / mse)


# ---------------------------------------------------------------------------------------------------- inputs


def _tensor(x: Array, what: str) -> Tensor:
    """float64 on the device it was on; integers by their maximum."""
    if not isinstance(x, (np.ndarray, Tensor)):
        raise TypeError(f"{what} is an ndarray or a tensor, got {type(x).__name__}; use numpy.asarray")
    largest = MAXIMA.get(x.dtype, 1)
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.array(x, np.float64))  # a copy: any stride, byte order or read-only memory will do
    if x.numel() == 0:
        raise ValueError(f"{what} is empty: {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{what} has values that are not finite")
    return x.detach().double() / largest


def _image_pair(a: Array, b: Array) -> tuple[Tensor, Tensor]:
    """Both as float64 `(..., C, H, W)` or `(H, W)` on one device."""
    first, second = _channels_first(a), _channels_first(b)
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"images to compare have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if first.shape != second.shape:
        raise ValueError("images to compare are both ndarrays (H, W, C) or both tensors (C, H, W)")
    return first, second.to(first.device)


def _channels_first(x: Array) -> Tensor:
    t = _tensor(x, "an image")
    if isinstance(x, np.ndarray) and x.ndim == 3 and x.shape[-1] <= 4:
        return t.movedim(-1, 0)
    if not 2 <= t.dim() <= 4:
        raise ValueError(f"an image is (H, W), (H, W, C), (C, H, W) or (B, C, H, W), got {tuple(t.shape)}")
    return t


def _kernel(k: Array) -> Tensor:
    t = _tensor(k, "a kernel")
    if t.dim() != 2 and (t.dim() != 4 or t.shape[:2] != (1, 1)):
        raise ValueError(f"a kernel is (h, w) or (1, 1, h, w), got {tuple(t.shape)}")
    return t.reshape(t.shape[-2:])


def _kernel_pair(k: Array, k_true: Array) -> tuple[Tensor, Tensor]:
    a, b = _kernel(k), _kernel(k_true)
    if a.shape != b.shape:
        raise ValueError(
            f"kernels to compare have one shape, got {tuple(a.shape)} and {tuple(b.shape)}; zero-pad the smaller "
            "around its centre, as fastem.synth.pad_kernel does"
        )
    return a.cpu(), b.cpu()
