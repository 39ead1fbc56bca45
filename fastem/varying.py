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
from fastem.initial import difference_spectra, drop_faint
from fastem.operators import Observation, check_fits
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


@dataclass
class WindowSums:
    """What the M-step of each window needs, added up over the steps of a run that restores with `blurs`.

    Called after each step of a run. As in `fastem.em.EdgeEM` the steps below `sigma_on` count, late ones more, and of
    each window the strongest edges of x0_hat teach; those near the border of the image do not.
    """

    blurs: VaryingBlur
    observation: Observation
    sigma_on: float = 0.8
    edges: float = 0.15
    memory: float = 0.9
    cross: Tensor | float = 0.0  # (P, m1, m2') complex
    energy: Tensor | float = 0.0

    def __call__(self, step: Step, x0_hat: Tensor, k: Tensor) -> None:
        """x0_hat `(1, n, C, H, W)` in [0, 1]."""
        if step.sigma_t > self.sigma_on:
            return
        windows, canvas = self.blurs.windows, self.observation.canvas
        x = x0_hat.mean(dim=(1, 2))
        y, inside = self.observation.y.mean(dim=1), torch.ones(windows.size, dtype=x.dtype, device=x.device)
        if canvas is not None:  # what was not measured is what the present kernels make of x
            y = torch.where(canvas.inside((0, 0), y) > 0, y, self.blurs(x))
            inside = canvas.inside(tuple(m // 4 for m in self.blurs.kernels.shape[-2:]), x)
        D, size = difference_spectra(windows.size, torch.fft.rfft2(x)), windows.size
        G, R = ([torch.fft.irfft2(d * torch.fft.rfft2(v), s=size) for d in D] for v in (x, y))
        weights = windows.weights(x)
        teaches = weights.sqrt() * self._strongest(sum(g.square() for g in G) * inside, inside)
        cross = energy = 0
        for g, r in zip(G, R, strict=True):
            X = torch.fft.rfft2(windows.cut(g)[0] * teaches)
            cross = cross + X.conj() * torch.fft.rfft2(windows.cut(r)[0] * weights.sqrt())
            energy = energy + X.real**2 + X.imag**2
        self.cross, self.energy = self.memory * self.cross + cross, self.memory * self.energy + energy

    def _strongest(self, strength: Tensor, inside: Tensor) -> Tensor:
        """`(P, m1, m2)`: 1 for the largest of each window, a part `edges` of its pixels inside the image."""
        windows = self.blurs.windows
        support = (windows.weights(strength) > 0).to(strength)
        ranked = (windows.cut(strength)[0] * support).flatten(1)
        count = (self.edges * (windows.cut(inside) * support).flatten(1).sum(dim=1)).round().long().clamp(min=1)
        least = ranked.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
        return ((ranked >= least) & (ranked > 0)).to(strength).view_as(support)


def fit_kernels(
    cross: Tensor, energy: Tensor, kernels: Tensor, windows: Windows, *, coupling: float = 1.0, ridge: float = 0.4,
    sweeps: int = 3, num_iters: int = 30,
) -> Tensor:  # fmt: skip
    """The M-step `(P, h, w)` from `WindowSums`: in each window least squares on the simplex, neighbours coupled.

    `sum_p 1/2 k_p^T G_p k_p - b_p^T k_p + coupling / 4 sum_{p~q} ||k_p - k_q||^2`, block Jacobi; G_p and b_p in units
    of the mean gradient energy, so that windows without edges follow their neighbours. The kernels move together until
    their mean is centred, by whole pixels: a shift between neighbours would distort the image.
    """
    h, w = kernels.shape[-2:]
    patch = tuple(windows.weights(kernels).shape[-2:])
    b = ops.crop_support(torch.fft.irfft2(cross, s=patch)[:, None], h, w)
    g = ops.crop_support(torch.fft.irfft2(energy.to(cross.dtype), s=patch)[:, None], 2 * h - 1, 2 * w - 1)
    own = g[:, 0, h - 1, w - 1]
    scale = own.mean().clamp(min=1e-12)
    b, g = b / scale, g / scale
    edges = windows.neighbours().to(kernels)
    g[:, 0, h - 1, w - 1] += coupling * edges.sum(dim=1) + ridge * own / scale
    k = kernels
    for _ in range(sweeps):
        pull = coupling * torch.einsum("pq,qhw->phw", edges, k)
        fitted = ops.simplex_least_squares(g, b + pull[:, None], k[:, None].contiguous(), num_iters)[:, 0]
        k = torch.where(torch.isfinite(fitted).all(-1).all(-1)[:, None, None], fitted, k)
    k = drop_faint(k[:, None])[:, 0]
    off = ops.centre_of_mass(k.mean(dim=0)[None, None])[0].tolist()
    return k.roll((round(h // 2 - off[0]), round(w // 2 - off[1])), dims=(-2, -1))
