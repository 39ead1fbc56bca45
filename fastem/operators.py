"""The observation model: circular blur by an unknown kernel plus white noise, diagonal in Fourier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastem import ops


@dataclass(frozen=True)
class Observation:
    """What was measured: `y = k (*) x + sigma * noise`, images in [0, 1].

    y `(B, C, H, W)`; sigma `(B,)`, the std of the noise in image units, > 0.
    """

    y: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, y: Tensor, sigma: float | Tensor) -> Observation:
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(y.shape[0])
        if not bool((sigma > 0).all()):
            raise ValueError(
                f"sigma must be > 0, got {sigma.tolist()}: without noise the kernel and the guidance divide by zero. "
                "Use a small floor such as 0.5 / 255."
            )
        return cls(y, sigma)

    @property
    def size(self) -> tuple[int, int]:
        return self.y.shape[-2], self.y.shape[-1]

    @cached_property
    def Y(self) -> Tensor:
        """The half spectrum of y, computed once for a whole trajectory."""
        return torch.fft.rfft2(self.y)


def blur(x: Tensor, k: Tensor) -> Tensor:
    """Circular true convolution: x `(B, C, H, W)` or `(B, n, C, H, W)`, k `(B or 1, 1, h, w)`, origin `(h // 2, w // 2)`.

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
