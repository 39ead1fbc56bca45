"""What a photograph tells before and after it is deblurred: whether there is a blur at all, and whether it is one."""

from __future__ import annotations

import math

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
