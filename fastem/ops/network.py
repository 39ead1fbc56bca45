"""Layers of the networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastem.ops import reference
from fastem.ops.backend import Backend, current_backend, run, select, use_backend


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    groups: int = 32,
    eps: float = 1e-5,
    skip: Tensor | None = None,
) -> Tensor:
    """`silu(norm(x) * (1 + scale) + shift)` with norm a GroupNorm: one pass for the statistics, one for the rest.

    The one op that autograd may record: it has a gradient with respect to x and skip. Where a weight, scale or shift
    requires grad as well, plain torch runs.

    Args:
        x: `(N, C, H, W)`, plain or channels last; float32, or 16 bit on a GPU.
        weight, bias: `(C,)` of the norm, float32. Statistics and arithmetic are in float32 whatever x is.
        scale, shift: `(N, C)`, both or neither; halves of one tensor are read in place.
        groups: of the norm; divides C.
        eps: added to the variance, >= 0.
        skip: `(N, C', H, W)`; the norm is that of x and skip concatenated, C + C' channels everywhere above. The
            concatenation is never written.

    Returns:
        `(N, C, H, W)` in the dtype and layout of x; always channels last from the CUDA kernels.

    Raises:
        ValueError: if the shapes or dtypes disagree.
    """
    _check_norm(x, skip, weight, bias, scale, shift, groups, eps)
    args = (x, skip, weight, bias, scale, shift, groups, float(eps))
    if torch.is_grad_enabled():
        if _requires_grad(weight, bias, scale, shift) and current_backend() is Backend.AUTO:
            return reference.group_norm_silu(*args)[0]
        tensors = [t for t in args if isinstance(t, Tensor)]
        if _requires_grad(x, skip) and not _requires_grad(weight, bias, scale, shift):
            backend = select("group_norm_silu", tensors)
            if backend is not Backend.REFERENCE:
                return _GroupNormSilu.apply(backend, *args)
    return run("group_norm_silu", *args)[0]


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, skip, weight, bias, scale, shift, groups, eps):
        y, mean, rstd = run("group_norm_silu", x, skip, weight, bias, scale, shift, groups, eps)
        ctx.save_for_backward(x, skip, mean, rstd, weight, bias, scale, shift)
        ctx.backend, ctx.groups = backend, groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with use_backend(ctx.backend):  # autograd may call from another thread
            dx, dskip = run("group_norm_silu_backward", grad, *ctx.saved_tensors, ctx.groups)
        return None, dx, dskip if ctx.needs_input_grad[2] else None, None, None, None, None, None, None


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _check_norm(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    groups: int, eps: float,
) -> None:  # fmt: skip
    if x.dim() != 4 or not x.shape[1:].numel():
        raise ValueError(f"x must be (N, C, H, W) and not empty, got {tuple(x.shape)}")
    channels = x.shape[1]
    if skip is not None:
        if skip.dim() != 4 or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:] or skip.dtype != x.dtype:
            given = f"{tuple(skip.shape)} {skip.dtype} for x {tuple(x.shape)} {x.dtype}"
            raise ValueError(f"skip must be like x but for its channels, got {given}")
        channels += skip.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    for name, t, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (len(x), channels)),
        ("shift", shift, (len(x), channels)),
    ):
        if t is not None and (tuple(t.shape) != shape or t.dtype != weight.dtype):
            raise ValueError(f"{name} must be {shape} {weight.dtype}, got {tuple(t.shape)} {t.dtype}")
    if (scale is None) != (shift is None):
        raise ValueError("give scale and shift, or neither")
