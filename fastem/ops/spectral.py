"""Ops on half spectra `(..., H, W' = W // 2 + 1)` of `torch.fft.rfft2`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastem.ops.backend import run


def spectral_sums(X: Tensor, Y: Tensor, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """The sums of Eq. (24) over the particles, and over the channels unless `per_channel`, of each image.

    Args:
        X: `(B, n, C, H, W')` complex, spectra of the particles.
        Y: `(B, C, H, W')` complex, spectra of the observations.
        per_channel: keep the channels apart, as the released program does.

    Returns:
        `sum conj(X) Y` complex and `sum |X|^2` real, both `(B, 1, H, W')`, or `(B, C, H, W')` with `per_channel`.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_spectra(X, Y)
    return run("spectral_sums", X, Y, per_channel)


def wiener_guidance(X: Tensor, Y: Tensor, K: Tensor, sigma2: Tensor, r2: Tensor) -> Tensor:
    """F{ H^T (r^2 H H^T + sigma^2 I)^-1 (y - H x) }, Eq. (17) for a circular convolution H.

    Args:
        X: `(B, n, C, H, W')` complex, spectra of the particles.
        Y: `(B, C, H, W')` complex, spectra of the observations.
        K: `(B, 1, H, W')` complex, half spectra of the kernels (`psf_to_otf`); one kernel serves all images.
        sigma2: `(B,)` or `(1,)` real, variance of the noise in image units; > 0: Eq. (17) divides by it where K = 0.
        r2: real, r_t^2 >= 0 in image units: `(B,)` or `(1,)`, or `(H, W')`, that of each frequency (the covariance of
            x_0 about x0_hat is then circular instead of r^2 I), for all images.

    Returns:
        Like X: the spectrum of the guidance direction of each particle.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_spectra(X, Y)
    if K.dim() != 4 or K.shape[0] not in (1, X.shape[0]) or K.shape[1] != 1 or K.shape[2:] != X.shape[3:]:
        raise ValueError(f"K must be (B, 1, H, W') like X {tuple(X.shape)}, got {tuple(K.shape)}")
    if r2.dim() == 2 and r2.shape != X.shape[3:]:
        raise ValueError(f"r2 must be (B,) or (H, W') like X {tuple(X.shape)}, got {tuple(r2.shape)}")
    for name, value in (("sigma2", sigma2), ("r2", sigma2 if r2.dim() == 2 else r2)):
        if value.dim() != 1 or value.shape[0] not in (1, X.shape[0]):
            raise ValueError(f"{name} must be a tensor (B,) or (1,) for B = {X.shape[0]}, got {tuple(value.shape)}")
    return run("wiener_guidance", X, Y, K, sigma2, r2)


def _check_spectra(X: Tensor, Y: Tensor) -> None:
    if X.dim() != 5 or Y.dim() != 4 or Y.shape[0] != X.shape[0] or Y.shape[1:] != X.shape[2:]:
        raise ValueError(f"X must be (B, n, C, H, W') and Y (B, C, H, W'), got {tuple(X.shape)} and {tuple(Y.shape)}")
    if not (X.is_complex() and Y.is_complex()):
        raise ValueError(f"X and Y must be half spectra of torch.fft.rfft2, got {X.dtype} and {Y.dtype}")
    if torch.promote_types(X.dtype, Y.dtype) != X.dtype:
        raise ValueError(f"X and Y must have one precision, got {X.dtype} and {Y.dtype}")
