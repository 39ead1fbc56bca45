"""A blur that changes over the image: efficient filter flow, a grid of kernels that blend into each other.

`A x = sum_p h_p (*) (w_p x)` with windows w_p that sum to 1 and one kernel per window (Hirsch, Sra, Schoelkopf and
Harmeling 2010). Each term lives on a patch of the image, so that applying A costs a few small FFTs per window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastem import ops
from fastem.guidance import Number, Variance
from fastem.initial import CoarseToFine, difference_spectra
from fastem.operators import Canvas, Observation, check_fits
from fastem.schedules import Step

STRIDE, MAX_GRID = 64, 8  # pixels between windows at least, and windows along one side at most


@dataclass(frozen=True)
class Windows:
    """Where the windows of a periodic frame are: `grid` of them, equally spaced, each cos^2 over two spacings.

    A patch is the support of a window and `reach` pixels around it, so that a blur of up to that reach stays inside.
    """

    size: tuple[int, int]  # (H, W)
    grid: tuple[int, int]
    reach: tuple[int, int]

    @classmethod
    def over(cls, size: tuple[int, int], ksize: tuple[int, int]) -> Windows:
        """At least 2 x 2 windows, at least a kernel apart from each other if the frame is large enough."""
        spacing = [max(STRIDE, m, math.ceil(n / MAX_GRID)) for n, m in zip(size, ksize, strict=True)]
        grid = tuple(max(n // s, 2) for n, s in zip(size, spacing, strict=True))
        return cls(size, grid, tuple(m // 2 for m in ksize))

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    @cached_property
    def _axes(self) -> list[tuple[Tensor, Tensor]]:
        """For rows and columns: pixel indices and weights of each window, `(grid, patch)`."""
        axes = []
        for n, count, reach in zip(self.size, self.grid, self.reach, strict=True):
            spacing = n / count
            centre = (torch.arange(count, dtype=torch.float64) + 0.5) * spacing - 0.5
            patch = min(2 * (math.ceil(spacing) + reach) + 1, n)
            pixel = centre.round().long()[:, None] - patch // 2 + torch.arange(patch)
            off = torch.remainder(pixel - centre[:, None] + n / 2, n) - n / 2
            weight = torch.where(off.abs() < spacing, torch.cos(math.pi / 2 * off / spacing) ** 2, 0.0)
            axes.append((pixel % n, weight))
        return axes

    def weights(self, like: Tensor) -> Tensor:
        """`(P, m1, m2)`: the windows on their patches."""
        (_, rows), (_, cols) = self._axes
        return (rows[:, None, :, None] * cols[None, :, None, :]).flatten(0, 1).to(like)

    def cut(self, x: Tensor) -> Tensor:
        """`(..., H, W)` -> `(..., P, m1, m2)`, not weighted."""
        (rows, _), (cols, _) = self._axes
        return x[..., rows[:, None, :, None], cols[None, :, None, :]].flatten(-4, -3)

    def add(self, patches: Tensor) -> Tensor:
        """The adjoint of `cut`: patches added where they came from, in a fixed order."""
        (rows, _), (cols, _) = self._axes
        x = patches.new_zeros(*patches.shape[:-3], *self.size)
        for p in range(self.count):
            i, j = divmod(p, self.grid[1])
            x[..., rows[i][:, None], cols[j]] += patches[..., p, :, :]  # a patch holds no pixel twice
        return x

    def neighbours(self) -> Tensor:
        """`(P, P)`: 1 for windows side by side (the frame is periodic, the image in it is not: no wrap)."""
        i, j = (torch.arange(self.count) // self.grid[1], torch.arange(self.count) % self.grid[1])
        return ((i[:, None] - i).abs() + (j[:, None] - j).abs() == 1).float()


class VaryingBlur:
    """The operator A and its adjoint for kernels `(P, h, w)` of non-negative values and sum 1."""

    def __init__(self, windows: Windows, kernels: Tensor) -> None:
        self.windows, self.kernels = windows, kernels
        self._w = windows.weights(kernels)
        check_fits(kernels, tuple(self._w.shape[-2:]))
        self._K = ops.psf_to_otf(kernels[:, None], tuple(self._w.shape[-2:]))[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        """`A x`, `(..., H, W)`."""
        patches = torch.fft.rfft2(self.windows.cut(x) * self._w)
        return self.windows.add(torch.fft.irfft2(self._K * patches, s=tuple(self._w.shape[-2:])))

    def adjoint(self, y: Tensor) -> Tensor:
        """`A^T y`."""
        patches = torch.fft.rfft2(self.windows.cut(y))
        return self.windows.add(torch.fft.irfft2(self._K.conj() * patches, s=tuple(self._w.shape[-2:])) * self._w)

    def on_grid(self) -> Tensor:
        """`(rows, cols, h, w)`"""
        return self.kernels.view(*self.windows.grid, *self.kernels.shape[-2:])

    def mean_kernel(self) -> Tensor:
        """`(1, 1, h, w)`"""
        return self.kernels.mean(dim=0)[None, None]


@dataclass(frozen=True)
class VaryingMean:
    """`fastem.guidance.PosteriorMean` for a blur that varies.

    `mu = x0_hat + r^2 A^T (r^2 A A^T + sigma^2)^-1 (y - A x0_hat)`. A A^T is not diagonal in Fourier: conjugate
    gradients, preconditioned by the inverse for the mean kernel. What lies outside the image was not measured and has
    no row in A. The kernel that the sampler passes is not used.
    """

    blur: VaryingBlur
    inflation: float = 1.0
    num_iters: int = 6
    jacobian = False

    def seen(self, x0_hat: Tensor) -> Tensor:
        return x0_hat

    def r2(self, step: Step, r2: Variance) -> float:
        """r_t^2 in [0, 1] units."""
        return r2(step.sigma_t) / 4

    def mean(self, X: Tensor, K: Tensor, observation: Observation, r2: Number) -> Tensor:
        """The spectrum of mu, like X."""
        x = torch.fft.irfft2(X, s=observation.size)
        sigma2 = ((self.inflation * observation.sigma) ** 2).view(-1, 1, 1, 1, 1)
        mask = 1.0 if observation.canvas is None else observation.canvas.inside((0, 0), x)
        K = ops.psf_to_otf(self.blur.mean_kernel(), observation.size)[:, None]
        gain = 1 / (r2 * (K.real**2 + K.imag**2) + sigma2)

        def operator(u: Tensor) -> Tensor:
            return r2 * mask * self.blur(self.blur.adjoint(mask * u)) + sigma2 * u

        def precondition(u: Tensor) -> Tensor:
            return mask * torch.fft.irfft2(gain * torch.fft.rfft2(u), s=observation.size)

        residual = mask * (observation.y[:, None] - self.blur(x))
        u = conjugate_gradients(operator, residual, precondition, self.num_iters)
        return X + torch.fft.rfft2(r2 * self.blur.adjoint(u))


def conjugate_gradients(operator, b: Tensor, precondition, num_iters: int) -> Tensor:
    """`operator^-1 b` for a symmetric positive operator; each image of b `(B, n, C, H, W)` is a system of its own."""

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return (a * c).sum(dim=(2, 3, 4), keepdim=True)

    u, r = torch.zeros_like(b), b
    p = z = precondition(r)
    rz, tiny = dot(r, z), torch.finfo(b.dtype).tiny
    for _ in range(num_iters):
        q = operator(p)
        step = rz / dot(p, q).clamp(min=tiny)
        u, r = u + step * p, r - step * q
        z = precondition(r)
        rz, before = dot(r, z), rz
        p = z + rz / before.clamp(min=tiny) * p
    return u


# -------------------------------------------------------------------------------------------------- finding kernels


def first_kernels(denoised: Tensor, k: Tensor, windows: Windows, canvas: Canvas | None, search: CoarseToFine) -> Tensor:
    """`(P, h, w)`: the coarse-to-fine search in each window, from the kernel of the whole image `(1, 1, h, w)`.

    denoised `(1, C, H, W)` fills the frame. The search runs over the finer scales only: the coarse ones of a small
    window know less than the kernel of the whole.
    """
    patches = windows.cut(denoised)[0].movedim(0, 1)  # (P, C, m1, m2)
    size, ksize = tuple(patches.shape[-2:]), tuple(k.shape[-2:])
    around = Canvas.around(size, ksize)
    start = k.expand(windows.count, -1, -1, -1)
    found = search(around.extend(patches), ksize, around, start=start)
    found = torch.stack([align_to(one, k[0, 0]) for one in found[:, 0]])
    trust = gradient_energy(denoised, windows, canvas)
    return couple(found, k[0, 0], trust, windows)


def align_to(k: Tensor, anchor: Tensor) -> Tensor:
    """k `(h, w)` rolled by whole pixels to where it correlates best with the anchor, at most a quarter of its size.

    A shift between neighbouring kernels would be a distortion of the image.
    """
    h, w = k.shape
    shape = (2 * h, 2 * w)
    product = torch.fft.rfft2(anchor, s=shape) * torch.fft.rfft2(k, s=shape).conj()
    correlation = torch.fft.irfft2(product, s=shape)
    rows, cols = torch.arange(-(h // 4), h // 4 + 1), torch.arange(-(w // 4), w // 4 + 1)
    best = correlation[rows[:, None] % shape[0], cols % shape[1]].flatten().argmax().item()
    row, col = divmod(best, len(cols))
    return k.roll((int(rows[row]), int(cols[col])), dims=(0, 1))


def gradient_energy(x: Tensor, windows: Windows, canvas: Canvas | None) -> Tensor:
    """`(P,)`: sum of squared gradients of x `(1, C, H, W)` in each window, relative to the mean over the windows."""
    X = torch.fft.rfft2(x)
    g2 = sum(torch.fft.irfft2(D * X, s=windows.size).square() for D in difference_spectra(windows.size, X))
    if canvas is not None:
        g2 = g2 * canvas.inside((1, 1), x)
    energy = (windows.cut(g2.sum(dim=(0, 1))) * windows.weights(x)).sum(dim=(-2, -1))
    return energy / energy.mean().clamp(min=1e-12)


def couple(kernels: Tensor, anchor: Tensor, trust: Tensor, windows: Windows, strength: float = 0.1) -> Tensor:
    """Kernels `(P, h, w)` between themselves, their neighbours and the anchor; windows without edges follow.

    `argmin sum_p trust_p ||k_p - kernels_p||^2 + strength (sum_{p~q} ||k_p - k_q||^2 / 2 + ||k_p - anchor||^2 / 10)`.
    """
    edges = windows.neighbours().to(kernels)
    laplacian = torch.diag(edges.sum(dim=1)) - edges
    eye = torch.eye(len(kernels), dtype=kernels.dtype, device=kernels.device)
    system = torch.diag(trust) + strength * (laplacian + 0.1 * eye)
    right = trust[:, None] * kernels.flatten(1) + 0.1 * strength * anchor.flatten()
    return torch.linalg.solve(system, right).view_as(kernels)


def fit_kernels(
    x: Tensor, y: Tensor, kernels: Tensor, windows: Windows, canvas: Canvas | None, *, coupling: float = 0.05,
    ridge: float = 0.05, sweeps: int = 3, num_iters: int = 20,
) -> Tensor:  # fmt: skip
    """The M-step: in each window the least squares on the simplex in the gradient domain, neighbours coupled.

    `sum_p 1/2 k_p^T G_p k_p - b_p^T k_p + coupling / 2 sum_{p~q} ||k_p - k_q||^2`, block Jacobi; G_p and b_p in units
    of the mean gradient energy, so that windows without edges follow their neighbours. x, y `(1, C, H, W)`.
    """
    h, w = kernels.shape[-2:]
    weights = windows.weights(x)
    patch = tuple(weights.shape[-2:])
    known = (weights > 0).to(x)
    if canvas is not None:
        known = known * windows.cut(canvas.inside((h // 2, w // 2), x))
    cross = energy = 0
    for D in difference_spectra(windows.size, torch.fft.rfft2(x)):
        gx, gy = (windows.cut(torch.fft.irfft2(D * torch.fft.rfft2(v), s=windows.size))[0] for v in (x, y))
        G, Y = torch.fft.rfft2(gx * known), torch.fft.rfft2(gy)
        cross, energy = cross + (G.conj() * Y).sum(dim=0), energy + (G.real**2 + G.imag**2).sum(dim=0)
    b = ops.crop_support(torch.fft.irfft2(cross, s=patch)[:, None], h, w)
    g = ops.crop_support(torch.fft.irfft2(energy, s=patch)[:, None], 2 * h - 1, 2 * w - 1)
    scale = g[:, 0, h - 1, w - 1].mean().clamp(min=1e-12)
    b, g = b / scale, g / scale
    edges = windows.neighbours().to(x)
    g[:, 0, h - 1, w - 1] += coupling * edges.sum(dim=1) + ridge
    anchor, k = kernels, kernels
    for _ in range(sweeps):
        pull = coupling * torch.einsum("pq,qhw->phw", edges, k) + ridge * anchor
        fitted = ops.simplex_least_squares(g, b + pull[:, None], k[:, None].contiguous(), num_iters)[:, 0]
        k = torch.where(torch.isfinite(fitted).all(-1).all(-1)[:, None, None], fitted, k)
    return k
