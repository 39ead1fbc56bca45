"""The observation model: circular blur by an unknown kernel plus white noise, diagonal in Fourier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastem import ops


@dataclass(frozen=True)
class Canvas:
    """A periodic frame: the image sits at the top left, the margin below and to the right joins its borders."""

    height: int
    width: int
    image: tuple[int, int]  # size of the image inside

    @property
    def periodic(self) -> bool:
        """Whether there is no margin: the image itself is taken as periodic."""
        return self.image == (self.height, self.width)

    @classmethod
    def around(cls, image: tuple[int, int], margin: tuple[int, int], multiple: int = 8) -> Canvas:
        """At least `margin` pixels of join in each direction, sizes rounded up to where FFTs are fast."""
        return cls(*(fast_size(n + m, multiple) for n, m in zip(image, margin, strict=True)), image)

    def extend(self, y: Tensor) -> Tensor:
        """`(..., H, W)` -> `(..., height, width)`: leads smoothly from bottom to top and right to left."""
        y = _join_ends(y, self.height - self.image[0], dim=-2)
        return _join_ends(y, self.width - self.image[1], dim=-1)

    def crop(self, x: Tensor) -> Tensor:
        return x[..., : self.image[0], : self.image[1]]

    def inside(self, border: tuple[int, int], like: Tensor) -> Tensor:
        """`(height, width)`: 1 where a pixel is at least `border` away from the edge of the image, 0 elsewhere."""
        mask = torch.zeros(self.height, self.width, dtype=like.dtype, device=like.device)
        (h, w), (top, left) = self.image, border
        mask[top : max(h - top, top), left : max(w - left, left)] = 1
        return mask


@dataclass(frozen=True)
class Observation:
    """What was measured: `y = k (*) x + sigma * noise`, images in [0, 1].

    y `(B, C, H, W)`; sigma `(B,)`, the std of the noise in image units, > 0. The margin of `canvas` was not measured,
    nor was what `seen` `(B, C, H, W)` holds 0 for (saturated pixels). With `gamma` the blur happens in linear light:
    `y = (k (*) x^gamma)^(1 / gamma) + sigma * noise`.
    """

    y: Tensor
    sigma: Tensor
    canvas: Canvas | None = None
    seen: Tensor | None = None
    gamma: float = 1.0

    @classmethod
    def of(
        cls, y: Tensor, sigma: float | Tensor, canvas: Canvas | None = None, *, seen: Tensor | None = None,
        gamma: float = 1.0,
    ) -> Observation:  # fmt: skip
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(y.shape[0])
        if not bool((sigma > 0).all()):
            raise ValueError(
                f"sigma must be > 0, got {sigma.tolist()}: without noise the kernel and the guidance divide by zero. "
                "Use a small floor such as 0.5 / 255."
            )
        return cls(y, sigma, None if canvas is None or canvas.periodic else canvas, seen, gamma)

    @property
    def diagonal(self) -> bool:
        """Whether all of it is diagonal in Fourier: no margin, nothing unseen, a linear blur."""
        return self.canvas is None and self.seen is None and self.gamma == 1

    @property
    def size(self) -> tuple[int, int]:
        return self.y.shape[-2], self.y.shape[-1]

    @cached_property
    def Y(self) -> Tensor:
        """The half spectrum of y, computed once for a whole trajectory."""
        return torch.fft.rfft2(self.y)

    @cached_property
    def log_frequency(self) -> Tensor:
        """log of the frequency in cycles per pixel, `(H, W')`; -inf for the mean."""
        height, width = self.size
        rows = torch.fft.fftfreq(height, dtype=self.y.dtype, device=self.y.device)
        columns = torch.fft.rfftfreq(width, dtype=self.y.dtype, device=self.y.device)
        return torch.hypot(rows[:, None], columns).log()

    def residual(self, X: Tensor, K: Tensor) -> Tensor:
        """The spectrum of `y - H x`, `(B, n, C, H, W')`, from half spectra X alike and K `(B, 1, H, W')`.

        What was not measured counts as explained: the residual is 0 there.
        """
        if self.gamma == 1:
            E = self.Y[:, None] - K[:, None] * X
            if self.diagonal:
                return E
            e = torch.fft.irfft2(E, s=self.size)
        else:
            linear = torch.fft.rfft2(torch.fft.irfft2(X, s=self.size).clamp(0, 1) ** self.gamma)
            predicted = torch.fft.irfft2(K[:, None] * linear, s=self.size).clamp(0, 1) ** (1 / self.gamma)
            e = self.y[:, None] - predicted
        return torch.fft.rfft2(e * self.measured)

    @property
    def measured(self) -> Tensor:
        """1 where y was measured, 0 elsewhere; broadcasts with `(B, n, C, H, W)`."""
        inside = self.y.new_ones(self.size) if self.canvas is None else self.canvas.inside((0, 0), self.y)
        return inside if self.seen is None else inside * self.seen[:, None]

    def for_kernel(self, X: Tensor, K: Tensor) -> tuple[Tensor, Observation]:
        """X and an observation between which the kernel is a plain convolution: for the M-step.

        Both are in linear light, and where a pixel was not seen stands what the present kernel predicts (the E-step of
        a missing measurement).
        """
        if self.seen is None and self.gamma == 1:
            return X, self
        y = self.y
        if self.gamma != 1:
            X = torch.fft.rfft2(torch.fft.irfft2(X, s=self.size).clamp(0, 1) ** self.gamma)
            y = y.clamp(0, 1) ** self.gamma
        if self.seen is not None:
            y = torch.where(self.seen > 0, y, torch.fft.irfft2(K[:, None] * X, s=self.size).mean(dim=1))
        return X, Observation(y, self.sigma, self.canvas)


def blur(x: Tensor, k: Tensor) -> Tensor:
    """Circular true convolution: x `(B, C, H, W)` or `(B, n, C, H, W)`, k `(B or 1, 1, h, w)`, origin at its centre.

    Raises:
        ValueError: if the kernel is larger than the image.
    """
    size = x.shape[-2:]
    check_fits(k, size)
    K = ops.psf_to_otf(k, tuple(size))
    if x.dim() == 5:
        K = K[:, None]
    return torch.fft.irfft2(K * torch.fft.rfft2(x), s=size)


def blur_adjoint(x: Tensor, k: Tensor) -> Tensor:
    """H^T x: correlation with k, by the conjugate OTF (flipping the kernel is wrong for even sizes)."""
    size = x.shape[-2:]
    check_fits(k, size)
    K = ops.psf_to_otf(k, tuple(size))
    if x.dim() == 5:
        K = K[:, None]
    return torch.fft.irfft2(K.conj() * torch.fft.rfft2(x), s=size)


def check_fits(k: Tensor, size: tuple[int, int]) -> None:
    if k.shape[-2] > size[0] or k.shape[-1] > size[1]:
        raise ValueError(
            f"the kernel {k.shape[-2]}x{k.shape[-1]} is larger than the image {size[0]}x{size[1]}; "
            "choose a smaller kernel size or pad the image"
        )


def fast_size(n: int, multiple: int) -> int:
    """The next multiple of `multiple` whose prime factors are at most 7."""
    n = -(-n // multiple) * multiple
    while True:
        rest = n
        for p in (2, 3, 5, 7):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += multiple


def _join_ends(y: Tensor, margin: int, dim: int) -> Tensor:
    """Appends `margin` samples along `dim`: the mirrored end fading (raised cosine) into the mirrored beginning."""
    size = y.shape[dim]
    if margin == 0:
        return y
    i = torch.arange(margin, device=y.device)
    after = y.index_select(dim, _reflect(size + i, size))  # mirrored at the end
    before = y.index_select(dim, _reflect(i - margin, size))  # mirrored at the beginning, of the next period
    fade = 0.5 - 0.5 * torch.cos(torch.pi * (i + 1) / (margin + 1))
    fade = fade.to(y.dtype).view([-1] + [1] * (-1 - dim))
    return torch.cat([y, after + fade * (before - after)], dim=dim)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Any integer index -> 0..size-1, mirrored with the border sample repeated."""
    index = index.remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index)
