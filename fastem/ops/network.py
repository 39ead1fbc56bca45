"""Pointwise layers of the networks, forward and input gradient."""

from __future__ import annotations

from torch import Tensor

from fastem.ops.backend import run


def film_silu(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """`silu(x * (1 + scale) + shift)` per sample and channel, or `silu(x)`.

    Args:
        x: `(N, C, H, W)`, plain or channels last; the result has its layout.
        scale, shift: `(N, C)`, both or neither; halves of one tensor are read in place.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_film(x, scale, shift)
    return run("film_silu", x, scale, shift)


def film_silu_backward(grad: Tensor, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """The gradient of `film_silu` with respect to x, given `grad`, that of its output; same shapes as there."""
    _check_film(x, scale, shift)
    if grad.shape != x.shape:
        raise ValueError(f"grad must have the shape of x, {tuple(x.shape)}, got {tuple(grad.shape)}")
    return run("film_silu_backward", grad, x, scale, shift)


def _check_film(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("give scale and shift, or neither")
    if scale is not None and shift is not None and not scale.shape == shift.shape == x.shape[:2]:
        got = f"{tuple(scale.shape)} and {tuple(shift.shape)}"
        raise ValueError(f"scale and shift must be {tuple(x.shape[:2])}, got {got}")
