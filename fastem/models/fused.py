"""The natural-image prior executed by fused native convolutions: same weights, same results, less time.

Activations stay channels last from the first convolution to the last and see no pass of their own: each convolution
also adds its residual and writes the activation that the next one reads. The gradient with respect to the image needs
only the slopes of the activations, which the same convolutions write.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fastem.models.natural import NaturalConfig, NaturalPrior, ResBlock, pad_to_multiple
from fastem.ops.conv import ConvKind, PackedConv, fused_conv, pack_adjoint, pack_conv, runs_native


class FusedNaturalPrior(nn.Module):
    """`NaturalPrior` with the same `forward(x, sigma)`: faster where the native kernels run, the original elsewhere.

    They run for float32 on the CPU when no gradient is wanted for weights or sigma. The gradient with respect to x
    works once: create_graph=True raises. An image's result is the same to the bit whatever else is in the
    batch and on any number of threads. Weights changed in place are noticed. The packed weights (4 times the size of
    the weights, 8 once gradients were asked for) and the buffers of the last image size are kept until `release()`.
    """

    def __init__(self, prior: NaturalPrior) -> None:
        super().__init__()
        if prior.config.num_blocks < 1:
            raise ValueError(f"every level needs a residual block, got num_blocks={prior.config.num_blocks}")
        self.prior = prior
        self.config = prior.config
        self.release()

    @property
    def stride(self) -> int:
        """Height and width are padded to multiples of this inside `forward`."""
        return self.prior.stride

    def release(self) -> None:
        """Frees what was kept for the next call."""
        self._network: _Network | None = None
        self._pool = _Pool()

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        if not self._runs_native(x, sigma):
            return self.prior(x, sigma)
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.stride).contiguous()
        network = self._current_network()
        levels = network.noise_levels(sigma.reshape(-1).expand(len(x)))
        if torch.is_grad_enabled() and x.requires_grad:
            denoised = _Denoise.apply(x, levels, network, self._pool)
        else:
            with torch.no_grad():
                denoised = network.denoise(x, levels, _Workspace(self._pool, x, self.config))
        return denoised[..., :height, :width]

    def _runs_native(self, x: Tensor, sigma: Tensor) -> bool:
        if x.numel() == 0 or not (runs_native(x) and runs_native(self.prior.conv_in.weight)):
            return False
        wants_more = sigma.requires_grad or any(p.requires_grad for p in self.prior.parameters())
        return not (torch.is_grad_enabled() and wants_more)

    def _current_network(self) -> _Network:
        """The packed weights, packed anew if a weight was replaced or changed in place."""
        key = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.prior.parameters())
        network = self._network
        if network is None or network.key != key:
            self._network = network = _Network(self.prior, key)
        return network

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_network": None, "_pool": _Pool()}  # copies start empty


class _Denoise(torch.autograd.Function):
    """D(x; sigma) for padded x, and its vector-Jacobian product."""

    @staticmethod
    def forward(ctx, x: Tensor, levels: _NoiseLevels, network: _Network, pool: _Pool) -> Tensor:
        ctx.levels, ctx.network, ctx.pool = levels, network, pool
        ctx.slopes = _Slopes(pool, x, network.config)
        return network.denoise(x, levels, _Workspace(pool, x, network.config), ctx.slopes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "FusedNaturalPrior has no second derivatives and create_graph=True asks for them. "
                "Differentiate the prior it was made from: fused.prior."
            )
        grad = grad.contiguous()
        workspace = _Workspace(ctx.pool, grad, ctx.network.config)
        return ctx.network.pull_back(grad, ctx.levels, workspace, ctx.slopes), None, None, None


@dataclass
class _NoiseLevels:
    """What depends on the noise level alone, for N images."""

    c_skip: Tensor  # (N, 1): EDM Table 1
    c_out: Tensor
    c_in: Tensor
    films: list[tuple[Tensor, Tensor]]  # gain and offset (N, width) of each block, in the order they run


class _Conv:
    """One layer: its bias `(1, O)`, and its weights and their adjoint, packed at the first use."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, kind: ConvKind = ConvKind.SAME) -> None:
        self._weight, self._kind = layer.weight.detach(), kind
        self.bias = layer.bias.detach()[None]

    @cached_property
    def weight(self) -> PackedConv:
        return pack_conv(self._weight, self._kind)

    @cached_property
    def adjoint(self) -> PackedConv:
        return pack_adjoint(self._weight, self._kind)


class _Block:
    """`x + conv2(silu(gain conv1(silu(x)) + offset))`: bias and film of the first convolution are one affine map."""

    def __init__(self, block: ResBlock) -> None:
        self.conv1, self.conv2 = _Conv(block.conv1), _Conv(block.conv2)
        self._film, self._bias = block.film, block.conv1.bias.detach()

    def film(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = _linear(self._film, embedding).chunk(2)
        return (1 + scale).float(), ((1 + scale) * self._bias + shift).float()


class _Stage:
    """One chain of blocks, and the convolution that leads into it."""

    def __init__(self, level: int, entry: _Conv, blocks: nn.ModuleList) -> None:
        self.level, self.entry, self.blocks = level, entry, [_Block(block) for block in blocks]


class _Network:
    """The layers in the order they run: stages of levels 0, 1, .., deepest, .., 1, 0."""

    def __init__(self, prior: NaturalPrior, key: tuple) -> None:
        self.key = key  # of the weights it was made from
        self.config, self._embed, self._frequencies = prior.config, prior.embed, prior.frequencies
        down = [_Conv(layer, ConvKind.DOWN) for layer in prior.down]
        up = [_Conv(layer, ConvKind.UP) for layer in prior.up]
        entries, chains = [_Conv(prior.conv_in), *down], [*prior.encoder, prior.middle]
        self.encoder = [_Stage(i, *parts) for i, parts in enumerate(zip(entries, chains, strict=True))]
        self.decoder = [_Stage(i, *parts) for i, parts in enumerate(zip(up, prior.decoder, strict=True))][::-1]
        self.stages = self.encoder + self.decoder
        self.conv_out = _Conv(prior.conv_out)

    @torch.no_grad()
    def noise_levels(self, sigma: Tensor) -> _NoiseLevels:
        """EDM Table 1 and the affine maps of the blocks at sigma `(N,)`.

        In double and one image at a time, so that neither the batch nor the threads can change a bit.
        """
        data = self.config.sigma_data
        scalars, films = [], []
        for s in sigma.double():
            variance = s**2 + data**2
            scalars.append(torch.stack([data**2 / variance, s * data / variance.sqrt(), 1 / variance.sqrt()]))
            c_noise = s.log() / 4
            phase = c_noise * self._frequencies
            h = torch.cat([c_noise[None], phase.sin(), phase.cos()])
            for layer in self._embed:
                h = _linear(layer, h) if isinstance(layer, nn.Linear) else layer(h)
            films.append([block.film(h) for stage in self.stages for block in stage.blocks])
        c_skip, c_out, c_in = torch.stack(scalars, dim=1).float()[..., None]
        batched = [tuple(torch.stack(rows) for rows in zip(*block, strict=True)) for block in zip(*films, strict=True)]
        return _NoiseLevels(c_skip, c_out, c_in, batched)

    def denoise(self, x: Tensor, levels: _NoiseLevels, work: _Workspace, slopes: _Slopes | None = None) -> Tensor:
        """EDM Eq. (7) for x `(N, C, H, W)`; also writes the slopes of all activations if they are wanted."""
        films = iter(levels.films)
        slope = iter(slopes.tensors if slopes else [None] * (2 * len(levels.films)))

        torch.mul(_unshuffled(x, self.config), _as_pixels(levels.c_in), out=work.image6)
        source = work.image
        for stage in self.stages:
            h, a, b = work.h[stage.level], work.a[stage.level], work.b[stage.level]
            skip = h if stage in self.decoder else None
            fused_conv(source, stage.entry.weight, offset=stage.entry.bias, residual=skip, out=h, silu=a,
                       slope=next(slope))  # fmt: skip
            for block in stage.blocks:
                gain, offset = next(films)
                fused_conv(a, block.conv1.weight, gain=gain, offset=offset, silu=b, slope=next(slope))
                last = block is stage.blocks[-1]  # no activation reads its output
                fused_conv(b, block.conv2.weight, offset=block.conv2.bias, residual=h, out=h, silu=None if last else a,
                           slope=None if last else next(slope))  # fmt: skip
            source = h
        fused_conv(source, self.conv_out.weight, gain=_channels(levels.c_out, self.conv_out.bias),
                   offset=levels.c_out * self.conv_out.bias, out=work.image)  # fmt: skip
        denoised = x * levels.c_skip[..., None, None]
        _unshuffled(denoised, self.config).add_(work.image6)
        return denoised

    def pull_back(self, grad: Tensor, levels: _NoiseLevels, work: _Workspace, slopes: _Slopes) -> Tensor:
        """`J^T grad`, J the Jacobian of `denoise`; the layers of `denoise` from last to first."""
        slope = reversed(slopes.tensors)
        torch.mul(_unshuffled(grad, self.config), _as_pixels(levels.c_out), out=work.image6)
        source, exit_conv = work.image, self.conv_out
        for stage in reversed(self.stages):
            g, b = work.h[stage.level], work.b[stage.level]
            skip = g if stage in self.encoder[:-1] else None
            fused_conv(source, exit_conv.adjoint, residual=skip, out=g)
            for block in reversed(stage.blocks):
                fused_conv(g, block.conv2.adjoint, factor=next(slope), out=b)
                fused_conv(b, block.conv1.adjoint, factor=next(slope), residual=g, out=g)
            source, exit_conv = g, stage.entry
        fused_conv(source, exit_conv.adjoint, gain=_channels(levels.c_in, work.image), out=work.image)
        pulled = grad * levels.c_skip[..., None, None]
        _unshuffled(pulled, self.config).add_(work.image6)
        return pulled


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return (layer.weight.double() * x).sum(1) + layer.bias  # not a matrix product: its bits depend on the threads


def _unshuffled(x: Tensor, config: NaturalConfig) -> Tensor:
    """View of `(N, C, H, W)` as `(N, H / u, W / u, C, u, u)`: `pixel_unshuffle`, channels last."""
    n, channels, height, width = x.shape
    u = config.unshuffle
    return x.view(n, channels, height // u, u, width // u, u).permute(0, 2, 4, 1, 3, 5)


def _as_pixels(c: Tensor) -> Tensor:
    return c[..., None, None, None, None]


def _channels(c: Tensor, like: Tensor) -> Tensor:
    return c.expand(-1, like.shape[-1]).contiguous()


class _Pool:
    """Buffers of the last image size that wait for the next call: fresh memory costs a page fault per 4 KB."""

    def __init__(self) -> None:
        self._buffers: tuple[tuple, dict[str, list[list[Tensor]]]] = (), {}

    def take(self, kind: str, size: tuple, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        current, free = self._buffers  # read at once, replaced at once: other threads may be here
        if current != size:
            free = {}
            self._buffers = size, free
        try:
            return free[kind].pop()
        except (KeyError, IndexError):
            with torch.inference_mode(False):
                return [torch.empty(shape) for shape in shapes]

    def give(self, kind: str, size: tuple, tensors: list[Tensor]) -> None:
        current, free = self._buffers
        if current == size:
            free.setdefault(kind, []).append(tensors)

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._buffers[1].values())


class _Loan:
    """Buffers from the pool, which has them back when the last reference to the loan goes."""

    def __init__(self, pool: _Pool, size: tuple, shapes: list[tuple[int, ...]]) -> None:
        self._pool, self._size = pool, size
        self.tensors = pool.take(type(self).__name__, size, shapes)

    def __del__(self) -> None:
        self._pool.give(type(self).__name__, self._size, self.tensors)


def _level_shapes(x: Tensor, config: NaturalConfig) -> list[tuple[int, int, int, int]]:
    """`(N, H, W, C)` of the activations of each level for images like x `(N, C, H, W)`."""
    n, _, height, width = x.shape
    sides = [config.unshuffle * 2**level for level in range(len(config.widths))]
    return [(n, height // side, width // side, c) for side, c in zip(sides, config.widths, strict=True)]


class _Workspace(_Loan):
    """What one pass through the network needs: the folded image, and three activations per level."""

    def __init__(self, pool: _Pool, x: Tensor, config: NaturalConfig) -> None:
        shapes = _level_shapes(x, config)
        n, height, width, _ = shapes[0]
        folded = (n, height, width, config.channels * config.unshuffle**2)
        super().__init__(pool, tuple(x.shape), [folded] + 3 * shapes)
        self.image, *rest = self.tensors
        self.image6 = self.image.view(n, height, width, config.channels, config.unshuffle, config.unshuffle)
        levels = len(shapes)
        self.h, self.a, self.b = rest[:levels], rest[levels : 2 * levels], rest[2 * levels :]


class _Slopes(_Loan):
    """The slopes of all activations, two per block, in the order they run: all that the gradient needs."""

    def __init__(self, pool: _Pool, x: Tensor, config: NaturalConfig) -> None:
        shapes = _level_shapes(x, config)
        stages = shapes + shapes[-2::-1]  # down and up again
        super().__init__(pool, tuple(x.shape), [shape for shape in stages for _ in range(2 * config.num_blocks)])
