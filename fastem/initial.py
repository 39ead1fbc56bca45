"""A first kernel from nothing but the blurry image: coarse to fine, with a sparse-gradient image in place of the prior.

A diffusion model denoises a blurry image into a blurry image: an EM that starts from "no blur" stays there (Nguyen et
al. 2025 show that the joint optimum is the delta). What breaks the tie are a few strong edges. At each scale of a
pyramid an image with few non-zero gradients is fitted to the observation (Xu, Lu, Xu, Jia 2011; Pan, Hu, Su, Yang
2014), and the kernel is the least-squares fit on the simplex in the gradient domain. The observation comes denoised
by the diffusion prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastem import ops
from fastem.operators import Canvas

BORDER, BORDER_MASS = 2, 0.01  # pixels; a kernel with more mass than this so near the border wants a larger support
FAINT = 0.05  # of the peak: smaller values are what noise leaves of an empty background, and haze the image
CUT_MASS, MARGIN = 0.005, 4  # what may lie outside the support that is kept, and pixels added around the rest


@dataclass(frozen=True)
class CoarseToFine:
    """Constants of the search; tuned on motion kernels of up to 33 pixels in 256 x 256 photographs."""

    ratio: float = math.sqrt(2)  # between scales
    num_iters: int = 5  # image-kernel alternations per scale
    sparsity: float = 4e-3  # weight of the number of non-zero gradients, images in [0, 1]
    sparsity_decay: float = 1.1  # it falls by this factor per alternation, down to
    sparsity_min: float = 1e-4
    coupling_max: float = 1e3  # where the splitting of image and gradients ends
    ridge: float = 0.1  # of the kernel fit, relative to the energy of the gradients
    solver_iters: int = 40  # of the kernel fit
    threshold: float = FAINT  # kernel values below this part of the peak are dropped

    def __call__(
        self, y: Tensor, kernel_size: tuple[int, int], canvas: Canvas | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """The kernel of each image.

        Args:
            y: `(B, C, H, W)` in [0, 1], periodic, with as little noise as possible.
            kernel_size: (h, w) of the support; no larger than the image.
            canvas: where y was measured, if it is not periodic: the rest is filled by the fitted images, and gradients
                near the border teach nothing.
            seen: like y, 0 for pixels of y that are wrong (saturated): they are filled like the margin.

        Returns:
            `(B, 1, h, w)`, non-negative, sums to 1, centre of mass within half a pixel of `(h // 2, w // 2)`.
        """
        y = y.mean(dim=1, keepdim=True)
        seen = None if seen is None else seen.amin(dim=1, keepdim=True)
        k = None
        for size in self.scales(kernel_size):
            factor = max(s / full for s, full in zip(size, kernel_size, strict=True))
            shape = tuple(min(n, max(2 * round(n * factor / 2), m)) for n, m in zip(y.shape[-2:], size, strict=True))
            k = _smallest(y, size) if k is None else _resize_kernel(k, size)
            frame = None if canvas is None or canvas.periodic else canvas
            k = self._alternate(shrink(y, shape), k, shape, frame, seen)
        return k

    def scales(self, kernel_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Kernel sizes from about 5 pixels up to the full one; all but the last are odd."""
        sizes = [kernel_size]
        while max(sizes[-1]) > 5:
            sizes.append(tuple(max(_odd_below(n / self.ratio, n), 1) for n in sizes[-1]))
        return sizes[::-1]

    def _alternate(
        self, y: Tensor, k: Tensor, shape: tuple[int, int], canvas: Canvas | None, unsaturated: Tensor | None = None
    ) -> Tensor:
        measured = inside = None
        if canvas is not None:
            border = tuple(
                max(n // 2 for n in k.shape[-2:]) * m // (2 * s)
                for m, s in zip((canvas.height, canvas.width), shape, strict=True)
            )
            measured, inside = (F.interpolate(canvas.inside(b, y)[None, None], size=shape) for b in ((0, 0), border))
        if unsaturated is not None:  # a coarse pixel counts if all of it does
            whole = 1 - F.adaptive_max_pool2d(1 - unsaturated, shape)
            measured = whole if measured is None else measured * whole
        Y, sparsity, D = torch.fft.rfft2(y), self.sparsity, difference_spectra(shape, y)
        for _ in range(self.num_iters):
            K = ops.psf_to_otf(k, shape)
            X, *G = self._sparse_gradients(Y, K, sparsity, shape)
            if measured is not None:
                Y = torch.fft.rfft2(torch.where(measured > 0, y, torch.fft.irfft2(K * X, s=shape)))
            R = [difference * Y for difference in D]
            if inside is not None:  # gradients near the border teach nothing: the present kernel explains them
                outer = [torch.fft.rfft2(torch.fft.irfft2(g, s=shape) * (1 - inside)) for g in G]
                G = [g - o for g, o in zip(G, outer, strict=True)]
                R = [r - K * o for r, o in zip(R, outer, strict=True)]
            k = self._fit(G, R, k, shape)
            sparsity = max(sparsity / self.sparsity_decay, self.sparsity_min)
        return k

    def _sparse_gradients(self, Y: Tensor, K: Tensor, sparsity: float, shape: tuple[int, int]) -> tuple[Tensor, ...]:
        """Spectra of `x = argmin ||k * x - y||^2 + sparsity ||grad x||_0` and its few gradients (Xu et al.)."""
        Dy, Dx = difference_spectra(shape, Y)
        K2, D2 = K.real**2 + K.imag**2, Dy.real**2 + Dy.imag**2 + Dx.real**2 + Dx.imag**2
        X, data, coupling = Y, K.conj() * Y, 2 * sparsity
        while True:
            gy, gx = torch.fft.irfft2(Dy * X, s=shape), torch.fft.irfft2(Dx * X, s=shape)
            keep = gy**2 + gx**2 > sparsity / coupling
            Gy, Gx = torch.fft.rfft2(gy * keep), torch.fft.rfft2(gx * keep)
            coupling *= 2
            if coupling >= 2 * self.coupling_max:
                return X, Gy, Gx
            X = (data + coupling / 2 * (Dy.conj() * Gy + Dx.conj() * Gx)) / (K2 + coupling / 2 * D2)

    def _fit(self, G: list[Tensor], R: list[Tensor], k: Tensor, shape: tuple[int, int]) -> Tensor:
        """The kernel that best turns the sparse gradients G into R, those of y; the old one without gradients."""
        energy = sum(g.real**2 + g.imag**2 for g in G)
        cross = sum(g.conj() * r for g, r in zip(G, R, strict=True))
        fitted = fit_on_simplex(cross, energy, k, shape, self.ridge, self.solver_iters)
        fitted = centre_by_pixels(drop_faint(fitted, self.threshold))
        good = torch.isfinite(fitted).all(dim=-1).all(dim=-1)[..., None, None]
        return torch.where(good, fitted, k)


def find_kernel_size(
    y: Tensor, start: int, largest: int, *, periodic: bool = False, seen: Tensor | None = None,
    search: CoarseToFine = CoarseToFine(),
) -> int:  # fmt: skip
    """A side, in pixels, of a support that holds the kernel of each image: odd, from 9 to `largest`.

    A kernel larger than its support piles up at the border of the support: then the support grows by half. One that
    fits is cut to the rows and columns that hold its mass, and a margin.

    Args:
        y: `(B, C, H, W)` in [0, 1], denoised.
        start, largest: odd sides to begin and to end with; not larger than the image.
        periodic: y has no border.
        seen: see `CoarseToFine`.
    """
    size = start
    while True:
        ksize, canvas, framed, mask = (size, size), None, y, seen
        if not periodic:
            canvas = Canvas.around((y.shape[-2], y.shape[-1]), ksize)
            framed = canvas.extend(y)
            mask = None if seen is None else canvas.extend(seen).round()
        k = search(framed, ksize, canvas, mask)
        k = k / k.sum(dim=(-2, -1), keepdim=True)
        border = 1 - k[..., BORDER:-BORDER, BORDER:-BORDER].sum(dim=(-2, -1))
        if size >= largest or not bool((border > BORDER_MASS).any()):
            break
        size = min(_odd_below(1.5 * size, 2 * size), largest)
    reach = 0
    for dim in (-2, -1):
        tail = k.sum(dim=dim).flatten(0, 1).sum(dim=0) / len(k)  # along the other axis
        outside = torch.stack([tail[: i + 1].sum() + tail[len(tail) - i - 1 :].sum() for i in range(size // 2)])
        reach = max(reach, size // 2 - int((outside < CUT_MASS).sum()))
    return min(max(2 * (reach + MARGIN) + 1, 9), size)


def fit_on_simplex(
    cross: Tensor, energy: Tensor, k: Tensor, shape: tuple[int, int], ridge: float, num_iters: int
) -> Tensor:
    """`argmin ||x * k - y||^2 + ridge R(0) ||k||^2` over kernels >= 0 of sum 1, from spectra of its normal equations.

    cross, energy `(B, 1, H, W')`: sums of `conj(X) Y` and `|X|^2`, in whatever filter whitens them; R is the
    autocorrelation, the inverse transform of `energy`. k `(B, 1, h, w)` starts the iteration. Without energy the
    result is nan.
    """
    h, w = k.shape[-2:]
    spatial = torch.fft.irfft2(torch.cat([cross, energy.to(cross.dtype)], dim=1), s=shape)
    b = ops.crop_support(spatial[:, :1], h, w)
    g = ops.crop_support(spatial[:, 1:], 2 * h - 1, 2 * w - 1)
    scale = g[..., h - 1 : h, w - 1 : w]  # R(0)
    b, g = b / scale, g / scale
    g[..., h - 1, w - 1] += ridge
    return ops.simplex_least_squares(g, b, k, num_iters)


def difference_spectra(shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Half spectra `(H, 1)` and `(1, W')` of the forward differences down and across."""
    fy = torch.fft.fftfreq(shape[0], dtype=like.real.dtype, device=like.device)[:, None]
    fx = torch.fft.rfftfreq(shape[1], dtype=like.real.dtype, device=like.device)[None]
    return torch.exp(2j * math.pi * fy) - 1, torch.exp(2j * math.pi * fx) - 1


def shrink(y: Tensor, shape: tuple[int, int]) -> Tensor:
    """Periodic images at a smaller size without aliasing: the low frequencies of `(..., H, W)`."""
    height, width = y.shape[-2:]
    if shape == (height, width):
        return y
    Y = torch.fft.fftshift(torch.fft.fft2(y), dim=(-2, -1))
    top, left = height // 2 - shape[0] // 2, width // 2 - shape[1] // 2
    Y = torch.fft.ifftshift(Y[..., top : top + shape[0], left : left + shape[1]], dim=(-2, -1))
    return torch.fft.ifft2(Y).real * (shape[0] * shape[1] / (height * width))


def drop_faint(k: Tensor, threshold: float = FAINT) -> Tensor:
    """Kernels without their values below this part of the peak; the rest sums to 1."""
    k = torch.where(k < threshold * k.amax(dim=(-2, -1), keepdim=True), 0.0, k)
    return k / k.sum(dim=(-2, -1), keepdim=True)


def centre_by_pixels(k: Tensor) -> Tensor:
    """Rolls each kernel by whole pixels so that its centre of mass is nearest to `(h // 2, w // 2)`."""
    h, w = k.shape[-2:]
    centre = torch.tensor([h // 2, w // 2], dtype=k.dtype, device=k.device)
    shift = (centre - ops.centre_of_mass(k)).nan_to_num(0.0).round().long()
    rows = (torch.arange(h, device=k.device) - shift[:, :1]) % h
    cols = (torch.arange(w, device=k.device) - shift[:, 1:]) % w
    images = torch.arange(k.shape[0], device=k.device)[:, None, None]
    return k[:, 0][images, rows[:, :, None], cols[:, None, :]][:, None]


def centre(k: Tensor) -> Tensor:
    """Moves each kernel until its centre of mass is at `(h // 2, w // 2)`, within a tenth of a pixel: it blurs an image
    and does not move it.

    Sinc interpolation, less what falls below 0 or is faint. Kernels have a positive sum.
    """
    h, w = k.shape[-2:]
    k = centre_by_pixels(k)
    off = ops.centre_of_mass(k) - k.new_tensor([h // 2, w // 2])
    rows, cols = (
        torch.sinc(torch.arange(n, device=k.device)[:, None] - torch.arange(n, device=k.device) + u[:, None, None])
        for n, u in ((h, off[:, 0]), (w, off[:, 1]))
    )
    return drop_faint((rows @ k[:, 0] @ cols.mT)[:, None].clamp(min=0))


def _smallest(y: Tensor, size: tuple[int, int]) -> Tensor:
    """The start at the coarsest scale: a small box, as far as the support allows."""
    h, w = size
    k = y.new_zeros(y.shape[0], 1, h, w)
    k[..., max(h // 2 - 1, 0) : h // 2 + 2, max(w // 2 - 1, 0) : w // 2 + 2] = 1
    return k / k.sum(dim=(-2, -1), keepdim=True)


def _resize_kernel(k: Tensor, size: tuple[int, int]) -> Tensor:
    k = F.interpolate(k, size=size, mode="bicubic", align_corners=False).clamp(min=0)
    return k / k.sum(dim=(-2, -1), keepdim=True)


def _odd_below(value: float, limit: int) -> int:
    """The odd number nearest below or at `value`, or the next one up where that stays under `limit`."""
    n = int(value)
    return n if n % 2 else (n + 1 if n + 1 < limit else n - 1)
