"""What a photograph tells before and after it is deblurred: is there a blur at all, is it the same everywhere, and what
did the camera do to the pixels (compression, highlights)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_REACH = 9  # pixels along the gradient on each side: half of the widest edge that is measured
EDGE_CONTRAST = 0.1  # least rise of an edge, image units; and at least 6 sigma
EDGE_SLOPE = 0.02  # least slope per pixel at its steepest point
EDGE_DIRECTIONS, EDGES_PER_DIRECTION = 8, 20  # directions with fewer edges than that have no say
MAX_EDGES = 20_000
SHARP_QUANTILE = 0.1  # of the widths in one direction: backgrounds are out of focus also in sharp photographs


def edge_width(image: Tensor, sigma: float) -> float:
    """How wide the sharpest edges are, in pixels, in the direction in which they are widest.

    A perfect step has a width of 2 pixels: rise over steepest slope, by central differences. Motion
    widens all edges across its direction, so the sharpest tenth of them tells; and it leaves edges along its direction
    alone, so each direction is looked at by itself. Objects differ in sharpness, what counts is that some are sharp.

    Args:
        image: `(C, H, W)` in [0, 1], denoised: noise breaks edges into steep pieces.
        sigma: std of the noise that was in it, image units; fainter edges do not count.

    Returns:
        The width; infinite where the image has too few edges to tell.
    """
    u = image.mean(dim=0)
    gy, gx = torch.zeros_like(u), torch.zeros_like(u)
    gy[1:-1] = (u[2:] - u[:-2]) / 2
    gx[:, 1:-1] = (u[:, 2:] - u[:, :-2]) / 2
    slope = torch.hypot(gy, gx)
    inner, border = torch.zeros_like(u, dtype=torch.bool), EDGE_REACH + 2
    inner[border:-border, border:-border] = True
    rows, cols = (inner & (slope > EDGE_SLOPE)).nonzero(as_tuple=True)
    if len(rows) > 8 * MAX_EDGES:
        rows, cols = (n[:: len(n) // (8 * MAX_EDGES) + 1] for n in (rows, cols))
    at = slope[rows, cols]
    ny, nx = gy[rows, cols] / at, gx[rows, cols] / at

    def along(f: Tensor, steps: Tensor) -> Tensor:
        """`(edges, steps)`: f at so many pixels up the gradient."""
        height, width = f.shape
        y, x = rows[:, None] + ny[:, None] * steps, cols[:, None] + nx[:, None] * steps
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
        return F.grid_sample(f[None, None], grid[None], mode="bilinear", align_corners=True)[0, 0]

    steepest = (at[:, None] >= along(slope, at.new_tensor([-1.0, 1.0]))).all(dim=1)
    rows, cols, ny, nx, at = (v[steepest] for v in (rows, cols, ny, nx, at))
    rise = along(u, torch.arange(-EDGE_REACH, EDGE_REACH + 1, dtype=u.dtype, device=u.device)).diff(dim=1)
    down, up = rise[:, :EDGE_REACH].flip(1), rise[:, EDGE_REACH:]  # outwards, as long as the profile keeps rising
    contrast = sum((half * (half > 0).cumprod(dim=1)).sum(dim=1) for half in (down, up))
    strong = contrast > max(EDGE_CONTRAST, 6 * sigma)
    width = (contrast / at)[strong]
    angle = torch.atan2(ny, nx)[strong]
    widest, sector = -math.inf, math.pi / EDGE_DIRECTIONS
    for i in range(EDGE_DIRECTIONS):
        off = torch.remainder(angle - i * sector + math.pi / 2, math.pi) - math.pi / 2
        near = width[off.abs() < sector]  # sectors overlap: no edge is between two of them
        if len(near) >= EDGES_PER_DIRECTION:
            widest = max(widest, float(near.quantile(SHARP_QUANTILE)))
    return widest if widest > 0 else math.inf


VARIES_QUANTILE, VARIES_RATIO = 0.98, 2.7  # of the blocks: by so much above the median
BLOCK = 32  # pixels


def blur_varies(residual: Tensor) -> bool:
    """Whether one kernel for the whole image leaves a residual `(C, H, W)` much larger in some places than in most.

    Its mean square in blocks is compared. Where the blur differs from the kernel, edges stay in the residual; a wrong
    sigma raises or lowers all blocks alike. Above the threshold lies none of 28 photographs with one blur (noise of
    0.5 and 2 grey levels, ten of them JPEG files), and half of 26 that a turning camera blurred (docs/real_photos.md).
    Fewer than nine blocks are too few to tell.
    """
    if min(residual.shape[-2:]) < BLOCK:
        return False
    blocks = F.avg_pool2d(residual.square().mean(dim=0)[None, None], BLOCK).flatten()
    if blocks.numel() < 9:
        return False
    usual, high = blocks.quantile(blocks.new_tensor([0.5, VARIES_QUANTILE])).tolist()
    return high > VARIES_RATIO * usual


def jpeg_sigma(image: np.ndarray, steps: np.ndarray) -> float:
    """The rms error that JPEG left in the luminance, in image units.

    A coefficient that was stored has an error uniform within its step q, of variance q^2 / 12. Most are rounded to 0:
    for them the error is the coefficient itself. Coefficients of one frequency follow a Laplace distribution; how many
    are stored gives its scale b, `P(|c| > q / 2) = exp(-q / 2b)`, and that the variance of the others.

    Args:
        image: `(H, W)` or `(H, W, 3)` float in [0, 1], at least 8 x 8, upright as `steps` are.
        steps: `(8, 8)`, the quantisation table of the luminance, in grey levels.
    """
    y = 255 * (image if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114]))
    height, width = (n - n % 8 for n in y.shape)
    blocks = y[:height, :width].reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3) - 128
    i = np.arange(8)
    dct = np.sqrt(2 / 8) * np.cos(np.pi * (2 * i + 1) * i[:, None] / 16)
    dct[0] /= math.sqrt(2)
    c = np.abs(dct @ blocks @ dct.T).reshape(-1, 8, 8)
    stored = (c > steps / 2).mean(axis=0)
    rate = -np.log(np.clip(stored, 0.5 / len(c), 1 - 1e-6))  # q / 2b
    known, distance = stored * len(c) >= 10, np.hypot(i, i[:, None])
    known[0, 0] = False
    if 3 <= known.sum() < 63:  # where next to nothing was stored: b falls with a power of the frequency
        slope, offset = np.polyfit(np.log(distance[known]), np.log((steps / rate)[known]), 1)
        fallen = np.exp(offset + min(slope, -1.0) * np.log(distance.clip(min=1)))
        rate = np.where(known, rate, np.maximum(rate, steps / fallen))
    # E[c^2; |c| < q/2] of a Laplace distribution, for q/2 = 1 and b = 1 / rate; the same for both signs
    rate = rate.clip(max=300)
    inside = (2 - np.exp(-rate) * (rate**2 + 2 * rate + 2)) / rate**2
    variance = stored * steps**2 / 12 + inside * (steps / 2) ** 2
    return math.sqrt(float(np.minimum(variance, steps**2 / 12).mean())) / 255


def unsaturated(y: Tensor, level: float) -> Tensor:
    """Like y `(B, C, H, W)`: 1 below `level`, the brightness where a sensor clips, else 0; each channel by itself."""
    return (y < level).to(y.dtype)
