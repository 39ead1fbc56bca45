"""Convolutions of a network whose weights are frozen, channels last, with what surrounds them fused in.

Activations are `(N, H, W, C)`, float32, contiguous. Kinds: `SAME` is 3x3 with stride 1 and zero padding 1, `DOWN` is
2x2 with stride 2, `UP` its transpose, `POINT` 1x1; weights are those of `torch.nn.Conv2d` and `ConvTranspose2d`.

The native 3x3 kernel is Winograd's F(4x4, 3x3) (Lavin and Gray 2016) with the points 0, +-5/8, +-25/16, infinity and
pairwise sums over the channels; up to 16 channels it is direct. Its error (rms, against float64, on white noise) is at
most twice that of torch's convolution in float32 and its default layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from fastem.ops.backend import Backend, current_backend, select


class ConvKind(IntEnum):
    SAME = 0
    DOWN = 1
    UP = 2
    POINT = 3


@dataclass(frozen=True)
class PackedConv:
    """Weights in the order the kernels of this machine read them; see `pack_conv`."""

    data: Tensor
    kind: ConvKind
    n_in: int
    n_out: int


def reference_conv(
    x: Tensor,
    weight: Tensor,
    kind: ConvKind = ConvKind.SAME,
    *,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification: `t = (gain z + offset) factor + residual` of the convolution z; silu(t); gain silu'(t).

    x `(N, H, W, C)`; gain and offset `(N or 1, O)`; factor and residual like the output; all in any float precision.
    """
    x = x.permute(0, 3, 1, 2)
    if kind is ConvKind.UP:
        z = F.conv_transpose2d(x, weight, stride=2)
    elif kind is ConvKind.DOWN:
        z = F.conv2d(x, weight, stride=2)
    else:
        z = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    t = z.permute(0, 2, 3, 1)
    if gain is not None:
        t = t * gain[:, None, None]
    if offset is not None:
        t = t + offset[:, None, None]
    if factor is not None:
        t = t * factor
    if residual is not None:
        t = t + residual
    s = t.sigmoid()
    slope = s * (1 + t * (1 - s))
    return t, t * s, slope if gain is None else slope * gain[:, None, None]


def runs_native(x: Tensor) -> bool:
    """Whether `fused_conv` is to run on tensors like x: float32, on the CPU, the extension built and not ruled out.

    Raises:
        RuntimeError: if the native backend is forced and the extension is not built.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or current_backend() is Backend.TRITON:
        return False
    return select("fused_conv", [x]) is Backend.NATIVE


def pack_conv(weight: Tensor, kind: ConvKind = ConvKind.SAME) -> PackedConv:
    """Weights for `fused_conv` on this machine, prepared once: `(O, C, h, w)`, or `(C, O, 2, 2)` for `UP`."""
    n_out, n_in = weight.shape[:2]
    if kind is ConvKind.UP:
        n_in, n_out = n_out, n_in
    return PackedConv(torch.ops.fastem.conv_pack(weight.detach(), kind), kind, n_in, n_out)


def pack_adjoint(weight: Tensor, kind: ConvKind = ConvKind.SAME) -> PackedConv:
    """The same for the adjoint of this convolution, which is its gradient with respect to the input."""
    if kind in (ConvKind.SAME, ConvKind.POINT):
        return pack_conv(weight.flip(2, 3).transpose(0, 1), kind)
    return pack_conv(weight, ConvKind.UP if kind is ConvKind.DOWN else ConvKind.DOWN)


def fused_conv(
    x: Tensor,
    conv: PackedConv,
    *,
    gain: Tensor | None = None,
    offset: Tensor | None = None,
    factor: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    silu: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """The native `reference_conv`: its three results go to those of `out`, `silu` and `slope` that are given.

    An output may be the same tensor as `factor` or `residual`, not as x. The results of an image do not depend on the
    other images or on the number of threads.

    Raises:
        ValueError, TypeError: if a shape, layout, dtype or device disagrees.
        RuntimeError: if an input requires grad.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gain, offset, factor, residual)):
        raise RuntimeError(
            "fused_conv has no backward and an input requires grad. Call it under torch.no_grad(); the gradient with "
            "respect to x is a fused_conv with pack_adjoint(weight)."
        )
    torch.ops.fastem.fused_conv(x, conv.data, conv.kind, conv.n_out, gain, offset, factor, residual, out, silu, slope)
