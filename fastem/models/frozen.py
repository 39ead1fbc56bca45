"""Layers of a U-Net whose weights are frozen, executed with what surrounds them: same weights, same results, less time.

A residual block is one node of autograd. It keeps what the gradient with respect to its input needs and no more: its
input and the map between its convolutions. Activations are channels last, the input of a decoder block stays the pair
(h, skip) it came as, and every sum is made where one of its terms is written. 3x3 convolutions are
those of `fastem.ops.conv` where that pays (float32 on a CPU), and of torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastem.ops.backend import Backend, current_backend, implementation, select
from fastem.ops.conv import ConvKind, PackedConv, fused_conv, pack_adjoint, pack_conv, runs_native

if TYPE_CHECKING:
    from fastem.models.unet import ResBlock

LAST = torch.channels_last
LEAST_FLOPS = 12e6  # of a convolution per image
Film = tuple[Tensor, Tensor]


class Conv(nn.Conv2d):
    """A convolution of 3x3 or 1x1, stride 1, that keeps the size: `forward` is that of torch, or faster."""

    def __init__(self, c_in: int, c_out: int, side: int = 3) -> None:
        super().__init__(c_in, c_out, side, padding=side // 2)
        self.side = side
        self._packed: dict[tuple, tuple[tuple, PackedConv]] = {}

    def forward(self, x: Tensor, n_out: int | None = None) -> Tensor:
        """`n_out`: the first channels only."""
        weight, bias, n_out = self.weight, self.bias, n_out or self.out_channels
        if n_out < self.out_channels:
            weight, bias = weight[:n_out], bias[:n_out]
        recording, size = torch.is_grad_enabled(), x.shape[2:]
        native = x.numel() and runs_native(x) and weight.dtype == x.dtype and large(self, *size, n_out)
        pays = native and (self.pays(*size, self.in_channels, n_out) or self.pays(*size, n_out, self.in_channels))
        if not pays or (recording and (self.weight.requires_grad or self.bias.requires_grad)):
            return F.conv2d(x, weight, bias, padding=self.padding)
        if recording and x.requires_grad:
            return _Conv.apply(x, self, n_out)
        return convolve(self, x, bias, native=True, n_out=n_out)

    def packed(self, adjoint: bool, first: int, n_in: int, n_out: int) -> PackedConv:
        """The weights of n_in inputs, from `first` on, to the first outputs; packed anew after a change."""
        weight = self.weight
        key = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        found = self._packed.get(name := (adjoint, first, n_in, n_out))
        if found is None or found[0] != key:
            pack, kind = pack_adjoint if adjoint else pack_conv, ConvKind.POINT if self.side == 1 else ConvKind.SAME
            with torch.inference_mode(False), torch.no_grad():
                self._packed[name] = found = key, pack(weight.detach()[:n_out, first : first + n_in], kind)
        return found[1]

    def pays(self, height: int, width: int, n_in: int, n_out: int) -> bool:
        """Whether the native convolution is the faster one, as measured on one thread.

        Winograd's transformed weights are read once for a few tiles of 4x4 pixels at a time: they take 4 times the
        memory, which on small maps with many channels is all that counts. The batch does not, so that it changes no
        bit.
        """
        tiles = -(-height // 4) * -(-width // 4)
        return self.side == 1 or (n_in >= 8 and tiles >= 4 and (tiles > 16 or n_in * n_out <= 2**17))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self._packed = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": {}}  # copies start empty


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=LAST)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty((x.shape[0], channels, height, width), dtype=x.dtype, device=x.device, memory_format=LAST)


def _pixels(x: Tensor | None) -> Tensor | None:
    """`(N, H, W, C)` of a map with channels last."""
    return None if x is None else x.permute(0, 2, 3, 1)


def convolve(
    conv: Conv, x: Tensor, bias: Tensor | None, *, native: bool, first: int = 0, n_out: int | None = None,
    residual: Tensor | None = None, keep: bool = False,
) -> Tensor:  # fmt: skip
    """`conv(x)` with this bias, `(O,)` or one per image `(N, O)`, plus `residual`, which is written over unless kept.

    x holds the input channels from `first` on. Maps come and go with channels last. Nothing is recorded.
    """
    x, n_out = channels_last(x), n_out or conv.out_channels
    _, n_in, height, width = x.shape
    if native and conv.pays(height, width, n_in, n_out):
        out = _empty(x, n_out, height, width) if residual is None or keep else residual
        fused_conv(_pixels(x), conv.packed(False, first, n_in, n_out), residual=_pixels(residual), out=_pixels(out),
                   offset=None if bias is None else bias.view(-1, n_out))  # fmt: skip
        return out
    weight = conv.weight[:n_out, first : first + n_in]
    if conv.side == 1 and residual is not None and bias is None and not keep:
        return _add_product(residual, x, weight[:, :, 0, 0].t())
    shared = bias is None or bias.dim() == 1
    out = channels_last(F.conv2d(x, weight, bias if shared else None, padding=conv.padding))
    for term in (None if shared else bias[:, :, None, None].to(out.dtype), residual):
        if term is not None:
            out += term
    return out


def pull_back(
    conv: Conv, grad: Tensor, *, native: bool, first: int = 0, n_in: int | None = None, residual: Tensor | None = None
) -> Tensor:
    """The transpose of `conv` for n_in input channels from `first` on, plus `residual`, which is written over."""
    grad, n_in = channels_last(grad), n_in or conv.in_channels
    _, n_out, height, width = grad.shape
    if native and conv.pays(height, width, n_out, n_in):
        out = _empty(grad, n_in, height, width) if residual is None else residual
        fused_conv(_pixels(grad), conv.packed(True, first, n_in, n_out), residual=_pixels(residual), out=_pixels(out))
        return out
    weight = conv.weight[:n_out, first : first + n_in]
    if conv.side == 1 and residual is not None:
        return _add_product(residual, grad, weight[:, :, 0, 0])
    shape = grad.shape[0], n_in, height, width
    out = channels_last(torch.nn.grad.conv2d_input(shape, weight, grad, padding=conv.padding))
    if residual is not None:
        out += residual
    return out


def _add_product(out: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """`out += x @ matrix` over the channels, in place."""
    out = channels_last(out)
    rows = _pixels(out).view(-1, out.shape[1])
    torch.addmm(rows, _pixels(x).reshape(-1, x.shape[1]), matrix, out=rows)
    return out


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, conv: Conv, n_out: int) -> Tensor:
        ctx.conv = conv
        return convolve(conv, x, conv.bias[:n_out], native=True, n_out=n_out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return pull_back(ctx.conv, grad, native=True), None, None


# ------------------------------------------------------------------------------------------ residual blocks


@dataclass(frozen=True)
class Engine:
    """What a block runs on: decided once, for the backward pass too."""

    ops: ModuleType  # that have the norm
    native: bool  # whether the native convolutions run

    def norm(self, norm: nn.GroupNorm, x: Tensor, skip: Tensor | None, film: Film) -> tuple[Tensor, Tensor, Tensor]:
        """silu(film(norm(x, skip))), mean and 1 / std."""
        return self.ops.group_norm_silu(x, skip, norm.weight, norm.bias, *film, norm.num_groups, norm.eps)

    def norm_backward(
        self, norm: nn.GroupNorm, grad: Tensor, x: Tensor, skip: Tensor | None, moments: Film, film: Film
    ) -> tuple[Tensor, Tensor]:
        return self.ops.group_norm_silu_backward(
            grad, x, skip, *moments, norm.weight, norm.bias, *film, norm.num_groups
        )


def engine_for(block: ResBlock, x: Tensor, e: Tensor, skip: Tensor | None) -> Engine | None:
    """None where the plain block runs: where a gradient is wanted for its weights, and on plain torch."""
    if x.numel() == 0 or (skip is not None and (block.resamples or isinstance(block.skip_connection, nn.Identity))):
        return None
    if torch.is_grad_enabled() and (e.requires_grad or any(p.requires_grad for p in block.weights())):
        return None
    norm = block.in_layers[0].weight
    backend = select("group_norm_silu", [x, norm])
    if backend is Backend.REFERENCE or norm.dtype != torch.float32:
        return None
    native = backend is Backend.NATIVE and x.device.type == "cpu" and block.in_layers[2].weight.dtype == x.dtype
    if x.device.type == "cpu" and not native:
        return None
    return Engine(implementation(backend), native)


def large(conv: Conv, height: int, width: int, n_out: int) -> bool:
    """Whether an image is worth what a node of autograd written in Python costs; yes where native is asked for."""
    flops = 2 * conv.side**2 * conv.in_channels * n_out * height * width
    return flops >= LEAST_FLOPS or current_backend() is not Backend.AUTO


def small(block: ResBlock, x: Tensor) -> bool:
    """Whether a block is left to plain torch, the norms too: on a CPU, where that is the faster way."""
    if x.device.type != "cpu" or current_backend() is not Backend.AUTO:
        return False
    conv, size = block.out_layers[3], block.out_size(*x.shape[2:])
    return not (large(conv, *size, conv.out_channels) and conv.pays(*size, conv.in_channels, conv.out_channels))


def fused_block(block: ResBlock, x: Tensor, e: Tensor, skip: Tensor | None, engine: Engine) -> Tensor:
    """The block of (x, skip) for `e`, what its embedding layers made of the time: `(N, features)`."""
    if torch.is_grad_enabled() and (x.requires_grad or (skip is not None and skip.requires_grad)):
        return _Block.apply(x, skip, e, block, engine)
    with torch.no_grad():
        return _forward(block, x, skip, e, engine)[0]


def _film(block: ResBlock, e: Tensor) -> Film:
    return tuple(e.chunk(2, dim=1)) if block.scale_shift else (None, None)


def _merged(block: ResBlock, x: Tensor, engine: Engine) -> bool:
    """Whether up-sampling and convolution are one transposed convolution: 4/9 of the products, Winograd's are 1/4."""
    conv, (height, width) = block.in_layers[2], x.shape[2:]
    winograd = engine.native and conv.pays(2 * height, 2 * width, conv.in_channels, conv.out_channels)
    return block.up_weight is not None and not winograd


def _forward(block: ResBlock, x: Tensor, skip: Tensor | None, e: Tensor, engine: Engine) -> tuple[Tensor, tuple]:
    """The output, and what the gradient needs beside the film: input, moments, and the map in the middle."""
    norm1, _, conv1 = block.in_layers
    norm2, _, _, conv2 = block.out_layers
    point, native = block.skip_connection, engine.native
    x, skip = channels_last(x), None if skip is None else channels_last(skip)
    a, *moments1 = engine.norm(norm1, x, skip, (None, None))
    bias = conv1.bias if block.scale_shift else conv1.bias + e.to(x.dtype)  # (N, O): the embedding is added
    if _merged(block, x, engine):
        h = F.conv_transpose2d(a, block.up_weight, stride=2, padding=1)
        h = channels_last(h.add_(bias.view(-1, h.shape[1], 1, 1)))
    else:
        h = convolve(conv1, block.resample(a), bias, native=native)
    b, *moments2 = engine.norm(norm2, h, None, _film(block, e))

    residual = block.resample(x)
    if not isinstance(point, nn.Identity):
        residual = convolve(point, residual, point.bias, native=native)
        if skip is not None:
            residual = convolve(point, skip, None, native=native, first=x.shape[1], residual=residual)
    out = convolve(conv2, b, conv2.bias, native=native, residual=residual, keep=residual is x)
    return out, (x, skip, h, *moments1, *moments2)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, skip: Tensor | None, e: Tensor, block: ResBlock, engine: Engine) -> Tensor:
        out, saved = _forward(block, x, skip, e, engine)
        ctx.block, ctx.engine = block, engine
        ctx.save_for_backward(*saved, e)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        block, engine, native = ctx.block, ctx.engine, ctx.engine.native
        x, skip, h, *moments, e = ctx.saved_tensors
        norm1, _, conv1 = block.in_layers
        norm2, _, _, conv2 = block.out_layers
        point, grad = block.skip_connection, channels_last(grad)
        g, _ = engine.norm_backward(norm2, pull_back(conv2, grad, native=native), h, None, moments[2:], _film(block, e))
        if _merged(block, x, engine):
            g = channels_last(F.conv2d(g, block.up_weight, stride=2, padding=1))
        else:
            g = block.resample_adjoint(pull_back(conv1, g, native=native))
        dx, dskip = engine.norm_backward(norm1, g, x, skip, moments[:2], (None, None))
        split = x.shape[1]
        if isinstance(point, nn.Identity) or block.resamples:
            through = grad if isinstance(point, nn.Identity) else pull_back(point, grad, native=native)
            dx += block.resample_adjoint(through)
        else:
            dx = pull_back(point, grad, native=native, n_in=split, residual=dx)
            if skip is not None:
                rest = point.in_channels - split
                dskip = pull_back(point, grad, native=native, first=split, n_in=rest, residual=dskip)
        return dx, None if skip is None else dskip, None, None, None
