"""Synthetic blur: kernels of camera shake and of the classical families, the degradation `y = k (*) x + noise`, and the
tilt of turbulent air.

A kernel is the time a point spends at each pixel of the sensor. Every family below draws a path with a
`numpy.random.Generator`; one renderer centres the path by its own mean and splats it bilinearly. Bilinear weights keep
the mean of the path, so a kernel is centred without being resampled.

Sources: tremor bands of hand-held cameras in the manner of Gavant et al., IEEE Sensors 2011 (our parameters, not
theirs); Borodenko's random walk, as used by BlindDPS (Chung et al., CVPR 2023); Boracchi and Foi, IEEE TIP 2012;
Gaussian-process paths of Schuler et al., PAMI 2016. Tilt fields of random patches, as in BlindDPS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Generator = np.random.Generator
NUM_TIMES = 256  # samples of a path over the exposure
MAX_STEP = 0.2  # pixels between splatted points


def motion_kernel(size: int, seed: int, family: str = "shake") -> np.ndarray:
    """A random blur kernel, the same for the same arguments.

    Args:
        size: side in pixels, odd or even, >= 1. The kernel always fits.
        seed: a non-negative integer.
        family: `"shake"` hand-held camera, `"randomwalk"`, `"boracchi"`, `"gp"` (other models of motion), or
            `"line"`, `"gaussian"`, `"defocus"`, `"delta"`.

    Returns:
        `(size, size)` float32, non-negative, sums to 1, centre of mass at `(size // 2, size // 2)`.

    Raises:
        ValueError: if the size is not positive or the family unknown.
    """
    if int(size) != size or size < 1:
        raise ValueError(f"the size of a kernel is a whole number of pixels >= 1, got {size}")
    if family not in FAMILIES:
        raise ValueError(f"unknown kernel family {family!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[family](int(size), np.random.Generator(np.random.PCG64(seed)))


# ------------------------------------------------------------------------------------------------ families


def _shake(size: int, rng: Generator) -> np.ndarray:
    """Drift, slow wander, arm tremor (3-5 Hz), physiological tremor (8-12 Hz) and sometimes the jolt of the shutter."""
    exposure = rng.choice([1 / 30, 1 / 15, 1 / 8, 1 / 4, 1 / 2])  # seconds
    t = (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES  # in exposures
    path = np.outer(t, _direction(rng)) * rng.normal(1, 0.5)
    wander = _ornstein_uhlenbeck(NUM_TIMES, 1 / NUM_TIMES, rng.uniform(0.03, 0.3) / exposure, rng)
    path += rng.uniform(0.2, 1) * wander.cumsum(0) / NUM_TIMES
    path += rng.uniform(0, 0.15) * _tremor(t * exposure, rng.uniform(3, 5), 1.5, rng)
    path += rng.uniform(0, 0.08) * _tremor(t * exposure, rng.uniform(8, 12), 3.0, rng)
    if rng.random() < 0.15:
        since = np.clip(t - rng.random(), 0, None)
        path += np.outer(1 - np.exp(-since / 0.2), _direction(rng)) * rng.uniform(0.2, 1)
    return _render(path, size, length=_shake_length(size, rng), blur=rng.uniform(0.2, 0.5))


def _randomwalk(size: int, rng: Generator) -> np.ndarray:
    """Steps of random length whose heading keeps to one side until it jitters to the other."""
    intensity = rng.uniform(0.2, 1)
    diagonal = math.sqrt(2) * size
    total = 0.75 * diagonal * (rng.random() + rng.random() * intensity**2)
    steps = rng.beta(1, 30, size=400) * (1.1 - intensity) * diagonal
    steps = steps[: max(2, int(np.searchsorted(steps.cumsum(), total)))]
    widest, jitter = rng.uniform(0, math.pi * intensity), rng.beta(2, 20)
    angles = rng.triangular(0, intensity * widest, widest + 0.1, size=len(steps))
    angles[0] = rng.uniform(-widest, widest)
    turns = np.where(rng.random(len(steps) - 1) < jitter, -1.0, 1.0)
    signs = np.concatenate([[1.0], np.sign(angles[0]) * turns.cumprod()])
    heading = signs * angles + rng.uniform(0, math.pi)
    nodes = np.stack([np.sin(heading), np.cos(heading)], axis=1) * steps[:, None]
    return _render(_equidistant(nodes.cumsum(0)), size, blur=rng.uniform(0.25, 0.5))


def _boracchi(size: int, rng: Generator, num_steps: int = 2000) -> np.ndarray:
    """A particle of constant speed with inertia, Gaussian shake, a pull to the centre and rare reversals."""
    speed = 60 / 64 * size / (num_steps - 1)  # pixels per step
    pull, reversal, shake = 0.7 * rng.random(), 0.2 * rng.random(), 10 * rng.random()
    anxiety = 0.1 * rng.random() if rng.random() < 0.75 else 0.005
    impulses = rng.normal(size=num_steps) + 1j * rng.normal(size=num_steps)
    impulses = (anxiety * shake * speed * impulses).tolist()
    turns = np.exp(1j * (math.pi + rng.random(num_steps) - 0.5))
    turns = (2 * turns * (rng.random(num_steps) < reversal * anxiety)).tolist()
    pull *= anxiety * speed
    v, x = speed * complex(*_direction(rng)), 0j
    path = []
    for impulse, turn in zip(impulses, turns, strict=True):
        v += turn * v + impulse - pull * x
        v *= speed / abs(v)
        x += v
        path.append(x)
    exposed = np.array(path[: max(2, int(num_steps * rng.uniform(0.25, 1)))])
    return _render(np.stack([exposed.real, exposed.imag], axis=1), size, blur=rng.uniform(0.2, 0.5))


def _gaussian_process(size: int, rng: Generator) -> np.ndarray:
    """Smooth paths: each coordinate a Matern-5/2 process of length 0.3 exposures and std a quarter of the half size."""
    path = _matern_factor(128, 0.3) @ rng.normal(size=(128, 2)) * (0.25 * size / 2)
    return _render(path, size, blur=rng.uniform(0.2, 0.5))


def _line(size: int, rng: Generator) -> np.ndarray:
    """Uniform motion along a straight line."""
    t = (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES
    return _render(np.outer(t, _direction(rng)), size, length=_shake_length(size, rng), blur=rng.uniform(0.2, 0.5))


def _gaussian(size: int, rng: Generator) -> np.ndarray:
    """An anisotropic Gaussian; its 3-sigma ellipse fits the support."""
    reach = (size - 1) // 2
    std = rng.uniform(min(0.3, reach / 3), max(reach / 3, 1e-3), size=2)
    angle = rng.uniform(0, math.pi)
    rows, cols = _grid(size)
    u, v = math.cos(angle) * rows + math.sin(angle) * cols, math.cos(angle) * cols - math.sin(angle) * rows
    k = np.exp(-0.5 * ((u / std[0]) ** 2 + (v / std[1]) ** 2))
    return _finish(np.where(np.maximum(abs(rows), abs(cols)) <= reach, k, 0))


def _defocus(size: int, rng: Generator) -> np.ndarray:
    """A disc with a soft edge one pixel wide."""
    reach = (size - 1) // 2
    radius = rng.uniform(0.5, max(0.5, reach - 0.5))
    return _finish(np.clip(radius + 0.5 - np.hypot(*_grid(size)), 0, 1))


def _delta(size: int, rng: Generator) -> np.ndarray:
    """No blur."""
    k = np.zeros((size, size))
    k[size // 2, size // 2] = 1
    return _finish(k)


FAMILIES: dict[str, Callable[[int, Generator], np.ndarray]] = {
    "shake": _shake,
    "randomwalk": _randomwalk,
    "boracchi": _boracchi,
    "gp": _gaussian_process,
    "line": _line,
    "gaussian": _gaussian,
    "defocus": _defocus,
    "delta": _delta,
}


# ------------------------------------------------------------------------------------------ parts of a path


def _direction(rng: Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.sin(angle), math.cos(angle)])


def _shake_length(size: int, rng: Generator) -> float:
    """Extent of the path in pixels: log-uniform in 4..20 for a 33-pixel kernel, in proportion for larger ones."""
    longest = 20 / 33 * size
    return math.exp(rng.uniform(math.log(min(4, longest / 2)), math.log(longest)))


def _ornstein_uhlenbeck(count: int, dt: float, tau: float, rng: Generator) -> np.ndarray:
    """`(count, 2)`: two stationary unit-variance processes of correlation time `tau`; `count * dt / tau < 600`."""
    decay = dt / tau
    growth = np.exp(decay * np.arange(count))[:, None]
    steps = rng.normal(size=(count, 2)) * growth
    steps[1:] *= math.sqrt(-math.expm1(-2 * decay))
    return steps.cumsum(0) / growth


def _tremor(seconds: np.ndarray, frequency: float, bandwidth: float, rng: Generator, num_waves: int = 8) -> np.ndarray:
    """`(len(seconds), 2)`: two unit-variance narrow-band processes around `frequency` Hz."""
    f = rng.normal(frequency, bandwidth / 2, size=(num_waves, 1, 2))
    phase = rng.uniform(0, 2 * math.pi, size=(num_waves, 1, 2))
    amplitude = rng.rayleigh(1 / math.sqrt(num_waves), size=(num_waves, 1, 2))
    return (amplitude * np.sin(2 * math.pi * f * seconds[:, None] + phase)).sum(0)


@lru_cache(maxsize=2)
def _matern_factor(count: int, length: float) -> np.ndarray:
    """Cholesky factor of the Matern-5/2 covariance at `count` times in [0, 1]."""
    t = np.linspace(0, 1, count)
    d = math.sqrt(5) * abs(t[:, None] - t) / length
    return np.linalg.cholesky((1 + d + d**2 / 3) * np.exp(-d) + 1e-9 * np.eye(count))


def _equidistant(nodes: np.ndarray, count: int = NUM_TIMES) -> np.ndarray:
    """A polyline `(m, 2)` walked at constant speed: `(count, 2)` points at equal distances."""
    walked = np.concatenate([[0], np.hypot(*np.diff(nodes, axis=0).T).cumsum()])
    at = np.linspace(0, walked[-1], count)
    return np.stack([np.interp(at, walked, nodes[:, i]) for i in range(2)], axis=1)


# ------------------------------------------------------------------------------------------------ rendering


def _render(path: np.ndarray, size: int, blur: float, length: float | None = None) -> np.ndarray:
    """Splats a path `(n, 2)` of equal times, in pixels, into a kernel.

    The path is scaled to the extent `length` where one is given, and down where it would leave the support; `blur` is
    the std in pixels of the lens that follows.
    """
    reach = (size - 1) // 2
    radius = min(2, reach // 2)  # of the lens
    if length is not None:
        path = path * (length / max(np.hypot(*np.ptp(path, axis=0)), 1e-9))
    path = path - _dense(path).mean(0)
    half = reach - radius
    path = path * min(1.0, half / max(abs(path).max(), 1e-9))
    points = _dense(path)
    points = points - points.mean(0)  # again: how dense it gets depends on the scale
    points = points.clip(-half, half) + size // 2

    base = points.astype(int)
    frac = points - base
    side = size + 1  # one more, for the zero weights beyond a point on the last pixel
    k = np.zeros(side * side)
    for i, row in enumerate((1 - frac[:, 0], frac[:, 0])):
        for j, col in enumerate((1 - frac[:, 1], frac[:, 1])):
            k += np.bincount((base[:, 0] + i) * side + base[:, 1] + j, row * col, side * side)
    k = k.reshape(side, side)[:size, :size]
    if radius:
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / blur) ** 2)
        k = _convolve_axis(_convolve_axis(k, taps, 0), taps, 1)
    return _finish(np.where(k < 1e-4 * k.max(), 0, k))


def _dense(path: np.ndarray) -> np.ndarray:
    """Linear interpolation in time, fine enough that consecutive points are less than MAX_STEP pixels apart."""
    longest = np.hypot(*np.diff(path, axis=0).T).max()
    factor = max(1, math.ceil(longest / MAX_STEP))
    if factor == 1:
        return path
    at = np.arange((len(path) - 1) * factor + 1) / factor
    return np.stack([np.interp(at, np.arange(len(path)), path[:, i]) for i in range(2)], axis=1)


def _convolve_axis(k: np.ndarray, taps: np.ndarray, axis: int) -> np.ndarray:
    radius = len(taps) // 2
    padded = np.pad(k, [(radius, radius) if i == axis else (0, 0) for i in range(2)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps), axis=axis)
    return windows @ taps


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column distances from the origin `size // 2`."""
    rows, cols = np.indices((size, size), dtype=float) - size // 2
    return rows, cols


def _finish(k: np.ndarray) -> np.ndarray:
    return (k / k.sum()).astype(np.float32)


# ---------------------------------------------------------------------------------------------- degradation


def pad_kernel(kernel: np.ndarray, size: int) -> np.ndarray:
    """A kernel `(h, w)` in the middle of a `(size, size)` one: the origins `(h // 2, w // 2)` coincide."""
    h, w = kernel.shape
    if max(h, w) > size:
        raise ValueError(f"a kernel of {(h, w)} does not fit into {size} x {size}")
    padded = np.zeros((size, size), kernel.dtype)
    top, left = size // 2 - h // 2, size // 2 - w // 2
    padded[top : top + h, left : left + w] = kernel
    return padded


def degrade(
    image: np.ndarray | Tensor, kernel: np.ndarray | Tensor, sigma: float, seed: int, boundary: str = "circular"
) -> np.ndarray | Tensor:
    """`k (*) x + sigma n`: a true convolution with its origin at `(h // 2, w // 2)`, and white Gaussian noise.

    Args:
        image: ndarray `(H, W)` or `(H, W, C)`, uint8, uint16 or float in [0, 1]; or a tensor `(C, H, W)` or
            `(B, C, H, W)`, float in [0, 1] or uint8.
        kernel: `(h, w)`, non-negative, sums to 1; for a batch also `(B, 1, h, w)`.
        sigma: std of the noise in image units (8-bit 5 is 5 / 255), >= 0.
        seed: of the noise. The same image as ndarray or tensor gets the same noise.
        boundary: `"circular"`, the size of the image; or `"valid"`, `(H - h + 1, W - w + 1)`: no pixel depends on
            anything outside the image.

    Returns:
        float32, the same kind and layout as the image; not clipped.

    Raises:
        ValueError: if the kernel is negative, not finite, does not sum to 1 (within 1e-4) or is larger than the image;
            if sigma looks like grey levels; if the image is not finite or of an unknown layout.
        TypeError: if the image is of another kind.
    """
    x, restore = _channels_first(image)
    k = _checked_kernel(kernel, x.shape)
    if not 0 <= sigma < 1:  # also catches nan
        raise ValueError(
            f"sigma is a std in image units, 0 <= sigma < 1, got {sigma}; 8-bit noise of 5 is sigma = 5 / 255"
        )
    if boundary not in ("circular", "valid"):
        raise ValueError(f"boundary must be 'circular' or 'valid', got {boundary!r}")
    (height, width), (h, w) = x.shape[-2:], k.shape[-2:]
    padded = np.zeros((*k.shape[:-2], height, width))
    padded[..., :h, :w] = k
    K = np.fft.rfft2(np.roll(padded, (-(h // 2), -(w // 2)), axis=(-2, -1)))
    y = np.fft.irfft2(K * np.fft.rfft2(x), s=(height, width))
    if boundary == "valid":
        y = y[..., h - 1 - h // 2 : height - h // 2, w - 1 - w // 2 : width - w // 2]
    if sigma:
        y = y + sigma * np.random.Generator(np.random.PCG64(seed)).standard_normal(y.shape)
    return restore(y.astype(np.float32))


# ------------------------------------------------------------------------------------------------- turbulence


def tilt_field(
    size: int | tuple[int, int], seed: int, *, num_patches: int | None = None, half: int = 32,
    strength: tuple[float, float] = (0.1, 0.4), blur: float = 1.0, limit: float = 2.5,
) -> np.ndarray:  # fmt: skip
    """How far turbulent air shifts each pixel of a picture: a sum of patches of smoothed white noise at random places.

    Patches of `2 half` pixels lie wholly inside the field. Where it is covered by n of them on average, each component
    has the variance `n E[S^2] G^2`, S uniform in `strength` and `G^2 = sum g^2` of the smoothing Gaussian g (0.0796 for
    `blur` 1). By default n = 55 in the middle (std 0.55 pixels), whatever the size, as of 500 patches on 256 x 256;
    within `2 half` of a border n falls linearly to nearly nothing. See `tilt_std`.

    Args:
        size: side of the field or `(H, W)`, in pixels, >= `2 half`.
        seed: a non-negative integer; the same for the same arguments.
        num_patches: how many; None keeps their density.
        half: half the side of a patch, pixels.
        strength: range of the factor S of a patch.
        blur: std of the Gaussian in pixels, cut off at 3 std. The noise is zero outside its patch.
        limit: shifts are clipped to this many pixels.

    Returns:
        `(2, H, W)` float32, pixels: the shift to the right and down of the point that a pixel shows; see `apply_tilt`.

    Raises:
        ValueError: if the size is less than a patch, or a number is not positive.

    Source: Chung et al., CVPR 2023 (BlindDPS), after Chimitt and Chan 2020; patches of 64 pixels, smoothed, summed.
    """
    (height, width), num_patches = _tilt_layout(size, num_patches, half)
    if not (0 <= strength[0] <= strength[1] and blur > 0 and limit > 0):
        raise ValueError(f"strength is a range >= 0, blur and limit are > 0; got {strength}, {blur}, {limit}")
    rng = np.random.Generator(np.random.PCG64(seed))
    side, smooth = 2 * half, _smoothing(2 * half, blur)
    field = np.zeros((2, height, width))
    for start in range(0, num_patches, 64):  # at a time: a large field has many
        count = min(64, num_patches - start)
        tops, lefts = (rng.integers(0, extent - side + 1, count) for extent in (height, width))
        patches = smooth @ rng.standard_normal((count, 2, side, side)) @ smooth
        patches *= rng.uniform(*strength, (count, 1, 1, 1))
        for top, left, patch in zip(tops, lefts, patches, strict=True):
            field[:, top : top + side, left : left + side] += patch
    return field.clip(-limit, limit).astype(np.float32)


def tilt_std(
    size: int | tuple[int, int], *, num_patches: int | None = None, half: int = 32,
    strength: tuple[float, float] = (0.1, 0.4), blur: float = 1.0,
) -> np.ndarray:  # fmt: skip
    """`(H, W)` float64: std of each component of `tilt_field` at each pixel, pixels, before clipping.

    Exact: the probability that a patch covers a pixel, times its variance there, which the zeros outside the patch
    lower at its border.
    """
    sides, num_patches = _tilt_layout(size, num_patches, half)
    inside = (_smoothing(2 * half, blur) ** 2).sum(1)  # variance within a patch, along one axis
    covered = [np.convolve(np.ones(side - 2 * half + 1), inside) / (side - 2 * half + 1) for side in sides]
    low, high = strength
    return np.sqrt(num_patches * (low**2 + low * high + high**2) / 3 * np.outer(*covered))


def _tilt_layout(size: int | tuple[int, int], num_patches: int | None, half: int) -> tuple[tuple[int, int], int]:
    height, width = (size, size) if isinstance(size, int) else size
    if half < 1 or min(height, width) < 2 * half:
        raise ValueError(f"a tilt field is at least as large as its patches of {2 * half}, got {height} x {width}")
    if num_patches is None:  # 500 on 256 x 256, where patches of 64 have 193 x 193 places
        places = (height - 2 * half + 1) * (width - 2 * half + 1)
        num_patches = max(1, round(500 * places / 193**2 * (32 / half) ** 2))
    if num_patches < 1:
        raise ValueError(f"a tilt field has at least 1 patch, got {num_patches}")
    return (height, width), num_patches


def _smoothing(count: int, std: float) -> np.ndarray:
    """`(count, count)`, symmetric: a Gaussian filter of `count` values, cut off at 3 std, with zeros outside."""
    radius = math.ceil(3 * std)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / std) ** 2)
    offset = np.subtract.outer(np.arange(count), np.arange(count)) + radius
    return np.where((offset >= 0) & (offset <= 2 * radius), (taps / taps.sum())[offset.clip(0, 2 * radius)], 0)


def apply_tilt(image: Tensor, tilt: Tensor) -> Tensor:
    """The image as seen through a tilt field: pixel `(r, c)` shows the point `(r + tilt_1, c + tilt_0)`, bilinearly.

    Args:
        image: `(B, C, H, W)`, any range.
        tilt: `(B, 2, H, W)` or `(1, 2, H, W)`, pixels, as of `tilt_field`.

    Returns:
        `(B, C, H, W)`; zero where the point lies outside. Differentiable in both; neither is changed.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if image.dim() != 4 or tilt.dim() != 4 or tilt.shape[1:] != (2, *image.shape[2:]):
        raise ValueError(
            f"tilt is (B, 2, H, W) for an image (B, C, H, W), got {tuple(tilt.shape)} for {tuple(image.shape)}"
        )
    height, width = image.shape[-2:]
    rows = torch.arange(height, dtype=tilt.dtype, device=tilt.device)[:, None] + tilt[:, 1]
    cols = torch.arange(width, dtype=tilt.dtype, device=tilt.device) + tilt[:, 0]
    # align_corners=True: -1 and 1 are the centres of the first and the last pixel
    grid = torch.stack([2 * cols / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], dim=-1)
    grid = grid.to(image.dtype).expand(len(image), -1, -1, -1)
    return torch.nn.functional.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


# --------------------------------------------------------------------------------------------------- checks


def _channels_first(image: np.ndarray | Tensor) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray | Tensor]]:
    """The image as float64 `(..., C, H, W)` in [0, 1], and the way back to its own kind and layout."""
    if isinstance(image, Tensor):
        if image.dim() not in (3, 4):
            raise ValueError(f"a tensor image is (C, H, W) or (B, C, H, W), got {tuple(image.shape)}")
        device = image.device
        x = _unit_range(image.detach().cpu().numpy())
        return x, lambda y: torch.from_numpy(np.ascontiguousarray(y)).to(device)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"an image is an ndarray or a tensor, got {type(image).__name__}; use numpy.asarray(picture)")
    if image.ndim == 2:
        return _unit_range(image)[None], lambda y: y[0]
    if image.ndim == 3 and image.shape[-1] <= 4:
        return np.moveaxis(_unit_range(image), -1, 0), lambda y: np.ascontiguousarray(np.moveaxis(y, 0, -1))
    raise ValueError(
        f"an ndarray image is (H, W), or (H, W, C) with C <= 4, got {image.shape}; use a tensor for (C, H, W)"
    )


def _unit_range(x: np.ndarray) -> np.ndarray:
    if x.size == 0:
        raise ValueError(f"the image is empty: {x.shape}")
    if x.dtype in (np.uint8, np.uint16):
        return x / float(np.iinfo(x.dtype).max)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"an image is uint8, uint16 or float in [0, 1], got {x.dtype}")
    if not np.isfinite(x).all():
        raise ValueError(f"the image has {np.count_nonzero(~np.isfinite(x))} values that are not finite")
    if abs(x).max() > 16:
        raise ValueError(f"a float image is in [0, 1], this one reaches {abs(x).max():.4g}; divide 8-bit values by 255")
    return x.astype(np.float64)


def _checked_kernel(kernel: np.ndarray | Tensor, image_shape: tuple[int, ...]) -> np.ndarray:
    """float64 `(h, w)` or `(B, 1, h, w)`, fit to blur the image."""
    k = kernel.detach().cpu().numpy() if isinstance(kernel, Tensor) else np.asarray(kernel)
    k = k.astype(np.float64)
    if k.ndim != 2 and not (k.ndim == 4 and len(image_shape) == 4 and k.shape[:2] in ((1, 1), (image_shape[0], 1))):
        raise ValueError(
            f"a kernel is (h, w), or (B, 1, h, w) for a batch of B images, got {k.shape} for an image {image_shape}"
        )
    if not np.isfinite(k).all() or (k < 0).any():
        raise ValueError("a kernel is finite and non-negative")
    if k.shape[-2] > image_shape[-2] or k.shape[-1] > image_shape[-1]:
        raise ValueError(f"the kernel {k.shape[-2:]} is larger than the image {tuple(image_shape[-2:])}")
    worst = max(np.ravel(k.sum(axis=(-2, -1))), key=lambda total: abs(total - 1))
    if abs(worst - 1) > 1e-4:
        raise ValueError(f"a kernel sums to 1, this one to {worst:.6g}; normalise it first: kernel / kernel.sum()")
    return k
