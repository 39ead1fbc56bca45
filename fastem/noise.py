"""Blind estimation of the noise level: how much white Gaussian noise a (blurred) picture carries.

A blurred picture is smooth: its small patches lie near a low-dimensional subspace, and what is left in the other
directions is noise. `estimate_sigma` takes the eigenvalues of the covariance of patches and finds the ones that
noise alone explains (Chen, Zhu, Heng, "An efficient statistical method for image noise level estimation", ICCV 2015).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

PATCH_SIZES = (6, 5, 4, 3)  # the largest one that the picture has enough patches for is used
PATCHES_PER_DIMENSION = 40  # fewer, and the spread of the noise eigenvalues biases the answer
MAX_PATCHES = 100_000
NORMAL_MAD = 0.6744897501960817  # median |x| of a standard normal x


def estimate_sigma(image: np.ndarray) -> float:
    """The standard deviation of the noise in `image`, in image units (8-bit 5 is 5 / 255).

    Args:
        image: `(H, W)`, `(H, W, C)` or `(C, H, W)` float in [0, 1] (C <= 4), any size; finite. Values outside [0, 1]
            are fine (noise added without clipping).

    Returns:
        A finite float >= 0; 0 for a constant picture. Within 2 % for noise of 2 to 20 grey levels on blurred 256 x 256
        pictures; quantisation to 8 bits counts as noise of 0.29 grey levels. Deterministic. Patches that touch
        saturated black or white are left out, as clipping hides noise.

    Raises:
        ValueError: if the shape is none of the above or a value is not finite.
    """
    image = _channels_last(np.asarray(image, dtype=np.float32))
    if (image == image[..., :1]).all():
        image = image[..., :1]  # gray in three copies: equal channels would look like directions without noise
    if not np.isfinite(image).all():
        raise ValueError("estimate_sigma needs finite values, got NaN or infinity in the image")
    for size in PATCH_SIZES:
        patches = _patches(image, size)
        if len(patches) < PATCHES_PER_DIMENSION * patches.shape[1]:
            continue
        for usable in _unclipped(patches, image):
            if len(usable) >= PATCHES_PER_DIMENSION * patches.shape[1]:
                return _noise_of_eigenvalues(_covariance_eigenvalues(usable))
    return _near_nyquist(image)


def _channels_last(image: np.ndarray) -> np.ndarray:
    """`(H, W, C)`, from any of the accepted layouts."""
    if image.ndim == 2 and image.size:
        return image[:, :, None]
    if image.ndim == 3 and image.size:
        if image.shape[2] <= 4:
            return image
        if image.shape[0] <= 4:
            return image.transpose(1, 2, 0)
    raise ValueError(f"image must be (H, W), (H, W, C) or (C, H, W) with C <= 4, not empty; got shape {image.shape}")


def _patches(image: np.ndarray, size: int) -> np.ndarray:
    """`(N, C * size * size)`: patches on a regular grid, dense unless there are too many; exactly flat ones left out.

    A flat patch (letterbox, cut-out background) has lost its noise and would pull the estimate towards zero.
    """
    h, w, c = image.shape
    if min(h, w) < size:
        return np.empty((0, c * size * size), np.float32)
    stride = 1 + int(np.sqrt((h - size + 1) * (w - size + 1) / MAX_PATCHES))
    windows = sliding_window_view(image, (size, size), axis=(0, 1))[::stride, ::stride]
    patches = windows.reshape(-1, c * size * size)
    return patches[np.ptp(patches, axis=1) > 0]


def _unclipped(patches: np.ndarray, image: np.ndarray) -> Iterator[np.ndarray]:
    """Subsets of the patches that clipping to [0, 1] cannot have touched, the most trustworthy first.

    Leaving out patches that hold a saturated pixel is not enough: next to black, those that stay are the ones whose
    noise happened to be positive. So the patch means must keep a distance of 3 sigma, for the sigma found so far.
    """
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1 or (low > 0 and high < 1):
        yield patches  # nothing was clipped
        return
    inside = patches[((patches > 0) & (patches < 1)).all(axis=1)]
    means = patches.reshape(len(patches), image.shape[2], -1).mean(axis=2)
    kept = inside
    for _ in range(3):
        if len(kept) < PATCHES_PER_DIMENSION * patches.shape[1]:
            break
        margin = 3 * _noise_of_eigenvalues(_covariance_eigenvalues(kept))
        kept = patches[((means > margin) & (means < 1 - margin)).all(axis=1)]
    yield kept
    yield inside
    yield patches


def _covariance_eigenvalues(patches: np.ndarray) -> np.ndarray:
    """Ascending, float64, clamped at 0."""
    centred = patches - patches.mean(axis=0, dtype=np.float64).astype(np.float32)
    covariance = (centred.T @ centred).astype(np.float64) / len(patches)
    return np.linalg.eigvalsh(covariance).clip(min=0)


def _noise_of_eigenvalues(eigenvalues: np.ndarray) -> float:
    """Algorithm 1 of Chen et al.: drop the largest eigenvalues until mean and median agree; both are then sigma^2."""
    for count in range(len(eigenvalues), 0, -1):
        mean = eigenvalues[:count].mean()
        if mean <= np.median(eigenvalues[:count]):
            break
    return float(np.sqrt(mean))


def _near_nyquist(image: np.ndarray) -> float:
    """For pictures too small for patch statistics: the median absolute response of a filter that passes the highest
    frequencies only, second differences along both axes (Immerkaer 1996), of which a blur has left next to nothing.
    """
    axes = [axis for axis in (0, 1) if image.shape[axis] >= 3]
    for axis in axes:
        image = np.diff(image, n=2, axis=axis) / np.sqrt(6.0)  # (1, -2, 1), unit norm
    return float(np.median(np.abs(image))) / NORMAL_MAD if axes else 0.0
