"""The ADM U-Net of guided-diffusion checkpoints: same state-dict names, any input size, any dtype.

Source: Dhariwal and Nichol 2021 (architecture), Ho et al. 2020 (time embedding).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastem import ops
from fastem.models import frozen
from fastem.models.frozen import Conv
from fastem.ops.backend import Backend, use_backend

IMAGE_SIZE = {4: 64, 5: 128, 6: 256, 7: 512}  # of the published networks, by number of levels
PREPARED = 4  # schedules whose tables a network keeps
HEAD_CHANNELS = 64  # channels per attention head of the published networks


@dataclass(frozen=True)
class UNetConfig:
    """What it takes to build a `UNet`. All of it but heads and attention order shows in a state dict."""

    widths: tuple[int, ...]  # channels per level, full resolution first; multiples of 32
    base: int  # features of the time embedding; the published networks have base = widths[0]
    in_channels: int = 3
    out_channels: int = 6  # twice in_channels where the variance is learned
    num_blocks: int = 1  # residual blocks per level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = ()
    scale_shift: bool = True  # the time embedding scales and shifts; otherwise it is added
    resblock_updown: bool = True  # residual blocks change the resolution; otherwise plain convolutions do
    num_heads: int | None = None  # used where num_head_channels is None
    num_head_channels: int | None = HEAD_CHANNELS
    new_attention_order: bool = False  # qkv channels are (3, heads, d); in the legacy order (heads, 3, d)
    image_size: int | None = None  # side of the training images

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, config: dict) -> UNetConfig:
        sequences = {name: tuple(config[name]) for name in ("widths", "attention_levels")}
        return cls(**{**config, **sequences})

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        new_attention_order: bool = False,
        image_size: int | None = None,
    ) -> UNetConfig:
        """Reads the architecture off names and shapes.

        Heads leave no trace in a state dict. Where neither number is given (None or -1), they have 64
        channels, as in the published networks, provided that divides the width of every attention.

        Raises:
            KeyError: a tensor the architecture is read from is missing.
            ValueError: the blocks do not form a U-Net, or the heads must be told.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        paths = [name.split(".") for name in shapes]
        num_inputs, num_outputs = _count(paths, "input_blocks"), _count(paths, "output_blocks")
        # An up block is the only layer after the first of an output block that is not an attention.
        outputs = [p for p in paths if p[0] == "output_blocks" and len(p) > 3]
        ups = sorted({int(p[1]) for p in outputs if p[2] != "0" and p[3] in ("in_layers", "conv")})
        levels, per_level = len(ups) + 1, num_outputs // (len(ups) + 1)
        num_blocks = per_level - 1
        regular = ups == [per_level * level - 1 for level in range(1, levels)] and num_outputs == levels * per_level
        if not regular or num_inputs != levels * per_level:
            raise ValueError(
                f"{num_inputs} input and {num_outputs} output blocks, up-sampling after {ups}, "
                "do not form levels of equally many blocks"
            )
        first = [per_level * (levels - 1 - level) for level in range(levels)]  # output block that opens a level
        widths = tuple(shapes[f"output_blocks.{i}.0.out_layers.3.weight"][0] for i in first)

        num_heads, num_head_channels = (n if n != -1 else None for n in (num_heads, num_head_channels))
        if num_heads is None and num_head_channels is None:
            num_head_channels = HEAD_CHANNELS
            attention = [shape[1] for name, shape in shapes.items() if name.endswith(".qkv.weight")]
            bad = [width for width in attention if width % HEAD_CHANNELS]
            if bad:
                raise ValueError(
                    f"attention over {bad[0]} channels does not divide into heads of {HEAD_CHANNELS}; "
                    "pass num_heads or num_head_channels of its training configuration"
                )
        return cls(
            widths=widths,
            base=shapes["time_embed.0.weight"][1],
            in_channels=shapes["input_blocks.0.0.weight"][1],
            out_channels=shapes["out.2.weight"][0],
            num_blocks=num_blocks,
            attention_levels=tuple(n for n, i in enumerate(first) if f"output_blocks.{i}.1.qkv.weight" in shapes),
            scale_shift=shapes["output_blocks.0.0.emb_layers.1.weight"][0] == 2 * widths[-1],
            resblock_updown=not any(p[3] == "conv" for p in outputs),
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            new_attention_order=new_attention_order,
            image_size=image_size or IMAGE_SIZE.get(levels),
        )


def _count(paths: list[list[str]], name: str) -> int:
    """Number of blocks in the list `name`, which must be numbered from 0 without gaps."""
    numbers = {int(path[1]) for path in paths if path[0] == name and len(path) >= 4}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"{name} are not numbered 0, 1, 2, ...")
    return len(numbers)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """`[cos(t w), sin(t w)]` with `w_j = 10000^(-j / half)`, `(N,)` -> `(N, dim)`; an odd `dim` ends in a zero."""
    half = dim // 2
    w = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    phase = t[:, None] * w
    return F.pad(torch.cat([phase.cos(), phase.sin()], dim=1), (0, dim % 2))


def batch_times(t: Tensor | float, x: Tensor) -> Tensor:
    """`t`, a number or one per row of `x`, as `(N,)` in at least float32 on the device of `x`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(t, Tensor):
        return torch.full((len(x),), float(t), dtype=dtype, device=x.device)  # a fill, not a copy from the host
    if t.numel() not in (1, len(x)):
        raise ValueError(f"t must be a number or hold one per image, got shape {tuple(t.shape)} for {len(x)} images")
    return t.to(x.device, dtype).flatten().expand(len(x))


class GroupNorm32(nn.GroupNorm):
    """32 groups, statistics and arithmetic in the dtype of the weights: float32 in a 16-bit torso too."""

    def __init__(self, width: int) -> None:
        super().__init__(32, width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    def then_silu(self, x: Tensor, film: tuple[Tensor, Tensor] | None = None, skip: Tensor | None = None) -> Tensor:
        """`silu(norm(x) * (1 + scale) + shift)` for film = (scale, shift), `(N, C)` each; skip as in the op."""
        scale, shift = film or (None, None)
        return ops.group_norm_silu(
            x, self.weight, self.bias, scale, shift, groups=self.num_groups, eps=self.eps, skip=skip
        )


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_double(x))


def sub_pixel_weight(weight: Tensor) -> Tensor:
    """Of a 3x3 convolution `(O, C, 3, 3)` that follows nearest x2: the weights `(C, O, 4, 4)` of one transposed one.

    Each output pixel sees at most 2 x 2 different inputs: rows 2i and 2i + 1 have the taps (w0, w1 + w2) of rows i - 1
    and i, and (w0 + w1, w2) of rows i and i + 1. That is `conv_transpose2d` with stride 2, padding 1.
    """
    flipped = weight.flip(2, 3).transpose(0, 1)
    padded = F.pad(flipped.double(), (1, 1, 1, 1))
    sums = padded[..., :-1, :-1] + padded[..., 1:, :-1] + padded[..., :-1, 1:] + padded[..., 1:, 1:]
    return sums.to(weight.dtype).contiguous()


def _same(x: Tensor) -> Tensor:
    return x


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


ADJOINTS = {_same: _same, _double: lambda x: 4 * _halve(x), _halve: lambda x: _double(0.25 * x)}


class ResBlock(nn.Module):
    """`skip(x) + conv(act(film(norm(conv(resample(act(norm(x))))), emb)))`, with `x` resampled alike.

    `plain` is the specification, and what runs where weights are trained; `frozen.fused_block` is the same, faster.
    """

    fuse = True  # False: always `plain`, for a compiler

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, resample=_same) -> None:
        super().__init__()
        self.scale_shift, self.resample = config.scale_shift, resample
        features = 2 * c_out if config.scale_shift else c_out
        self.in_layers = nn.Sequential(GroupNorm32(c_in), nn.SiLU(), Conv(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * config.base, features))
        self.out_layers = nn.Sequential(
            GroupNorm32(c_out), nn.SiLU(), nn.Identity(), _zeroed(Conv(c_out, c_out))
        )  # the identity stands where training has its dropout
        self.skip_connection = nn.Identity() if c_in == c_out else Conv(c_in, c_out, 1)
        self._layers = (*self.in_layers[::2], self.emb_layers[1], *self.out_layers[::3], self.skip_connection)
        self.up_weight: Tensor | None = None  # instead of up-sampling and convolution, see `merged_upsampling`

    def merged_upsampling(self) -> Tensor | None:
        """Nearest x2 and the convolution behind it as one transposed convolution, with 4 / 9 of the operations."""
        return sub_pixel_weight(self.in_layers[2].weight.detach()) if self.resample is _double else None

    def weights(self) -> Iterator[Tensor]:
        """All parameters; `parameters` takes as long as a small convolution."""
        for layer in self._layers:
            yield from layer._parameters.values()

    @property
    def resamples(self) -> bool:
        return self.resample is not _same

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        twice = {_halve: 1, _double: 4}.get(self.resample, 2)
        return height * twice // 2, width * twice // 2

    @property
    def resample_adjoint(self) -> Callable[[Tensor], Tensor]:
        return ADJOINTS[self.resample]

    def forward(
        self, x: Tensor, emb: Tensor | None, film: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """`film` is `emb_layers(emb)` where it was computed before, for one image or all.

        With `skip` it is the block of x and skip concatenated; only `plain` writes the concatenation.
        """
        e = self.emb_layers(emb) if film is None else film.expand(len(x), -1)
        small = self.fuse and frozen.small(self, x)
        engine = frozen.engine_for(self, x, e, skip) if self.fuse and not small else None
        if engine is not None:
            return frozen.fused_block(self, x, e, skip, engine)
        joined = x if skip is None else torch.cat([x, skip], dim=1)
        with use_backend(Backend.REFERENCE) if small else nullcontext():
            return self.plain(joined, e)

    def plain(self, x: Tensor, e: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = norm.then_silu(x)
        if self.up_weight is None:
            h = conv(self.resample(h))
        else:
            h = F.conv_transpose2d(h, self.up_weight, conv.bias, stride=2, padding=1)
        norm, _, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm.then_silu(h, (scale, shift))
        else:
            h = norm.then_silu(h + e.to(h.dtype)[:, :, None, None])
        return self.skip_connection(self.resample(x)) + conv(h)


class AttentionBlock(nn.Module):
    """`x + proj(softmax(q^T k / sqrt(d)) v)` over all pixels."""

    def __init__(self, width: int, config: UNetConfig) -> None:
        super().__init__()
        heads = width // config.num_head_channels if config.num_head_channels else config.num_heads
        if not heads or width % heads or (config.num_head_channels and width % config.num_head_channels):
            raise ValueError(
                f"attention over {width} channels does not divide into heads: "
                f"num_heads={config.num_heads}, num_head_channels={config.num_head_channels}"
            )
        self.heads, self.new_order = heads, config.new_attention_order
        self.norm = GroupNorm32(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = _zeroed(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.norm(x.flatten(2)).transpose(1, 2)  # (N, H W, width)
        qkv = F.linear(flat, self.qkv.weight[:, :, 0], self.qkv.bias)
        if self.new_order:
            qkv = qkv.unflatten(2, (3, self.heads, -1)).transpose(2, 3)
        else:
            qkv = qkv.unflatten(2, (self.heads, 3, -1))
        # Each (N, heads, H W, d), d adjacent in memory: the fused kernels of torch want it so.
        q, k, v = qkv.transpose(1, 2).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax in float32 whatever the dtype
        h = F.linear(h.transpose(1, 2).flatten(2), self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Sequential):
    """Layers of one resolution; the time embedding, or what was made of it, goes to those that take it."""

    def forward(
        self, x: Tensor, emb: Tensor | None, films: Iterator[Tensor] = iter(()), skip: Tensor | None = None  # noqa: B008
    ) -> Tensor:  # fmt: skip
        """With `skip` the first layer, a residual block, sees x and skip concatenated."""
        for layer in self:
            x = layer(x, emb, next(films, None), skip) if isinstance(layer, ResBlock) else layer(x)
            skip = None
        return x


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `UNet.prepare` computed; a recorded step refers to it, so it counts as itself, not by its values."""

    numbers: tuple[float, ...]  # the times, ascending
    times: Tensor  # the same, (S,) on the device, at least float32
    rows: Tensor  # (S, features of all blocks)
    up_weights: list[Tensor | None]  # of each block

    def row(self, t: Tensor | float) -> Tensor | None:
        """`(1, features)`; None for a number that is not in the table, or several times."""
        if isinstance(t, Tensor):
            if t.dim() > 0:
                return None
            t = t.to(self.times.dtype)
            at = torch.searchsorted(self.times, t.view(1)).clamp(max=len(self.times) - 1)
            return torch.where(self.times.index_select(0, at) == t, self.rows.index_select(0, at), math.nan)
        at = bisect_left(self.numbers, t)
        if at == len(self.numbers) or self.numbers[at] != t:
            return None
        return self.rows[at : at + 1]


class UNet(nn.Module):
    """`net(x, t)`: x `(N, in_channels, H, W)`, t the original time step(s), `(N,)` or a number.

    Returns `(N, out_channels, H, W)`: eps, and behind it the variance values of networks that learn them.
    H and W must be multiples of `stride` (`eps.UNetEps` pads).
    """

    fuse = True  # whether layers choose what runs them, as those of a `ResBlock` do

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        levels, emb = range(len(config.widths)), 4 * config.base
        self.time_embed = nn.Sequential(nn.Linear(config.base, emb), nn.SiLU(), nn.Linear(emb, emb))

        width = config.widths[0]
        self.input_blocks = nn.ModuleList([Block(Conv(config.in_channels, width))])
        skips = [width]
        for level in levels:
            for _ in range(config.num_blocks):
                self.input_blocks.append(Block(*self._layers(level, width)))
                skips.append(width := config.widths[level])
            if level != levels[-1]:
                down = ResBlock(width, width, config, _halve) if config.resblock_updown else Downsample(width)
                self.input_blocks.append(Block(down))
                skips.append(width)

        self.middle_block = Block(
            ResBlock(width, width, config), AttentionBlock(width, config), ResBlock(width, width, config)
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for i in range(config.num_blocks + 1):
                layers = self._layers(level, width + skips.pop())
                width = config.widths[level]
                if level and i == config.num_blocks:
                    up = ResBlock(width, width, config, _double) if config.resblock_updown else Upsample(width)
                    layers.append(up)
                self.output_blocks.append(Block(*layers))
        self.out = nn.Sequential(GroupNorm32(width), nn.SiLU(), _zeroed(Conv(width, config.out_channels)))
        self.num_outputs = config.out_channels  # fewer drop the last channels
        self.prepared: Prepared | None = None
        self._prepared: OrderedDict[tuple, Prepared] = OrderedDict()

    def _layers(self, level: int, c_in: int) -> list[nn.Module]:
        width = self.config.widths[level]
        layers: list[nn.Module] = [ResBlock(c_in, width, self.config)]
        if level in self.config.attention_levels:
            layers.append(AttentionBlock(width, self.config))
        return layers

    @property
    def stride(self) -> int:
        return 2 ** (len(self.config.widths) - 1)

    @property
    def torso_dtype(self) -> torch.dtype:
        return self.input_blocks[0][0].weight.dtype

    def set_torso_dtype(self, dtype: torch.dtype) -> UNet:
        """Runs convolutions and attention of all blocks in `dtype`, for example `torch.float16`.

        Norms, the time embedding and the output convolution stay in float32, and so do input and output.
        """
        self._forget()
        for module in (*self.input_blocks.modules(), *self.middle_block.modules(), *self.output_blocks.modules()):
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.to(dtype)
        return self

    @torch.no_grad()
    def prepare(self, times: Sequence[float]) -> None:
        """For inference with frozen weights: scales and shifts of these times from a table, up-sampling merged.

        `forward` takes them where t is one of the times as a number, or a 0-dim tensor that holds one of them (the
        result is nan where it does not: nothing on the host looks). Call it again after a change of the weights.
        """
        weights = tuple((p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in self.parameters())
        key = (tuple(sorted(set(times))), weights)
        found = self._prepared.pop(key, None)
        blocks = self._blocks()
        if found is None:
            weight = self.time_embed[0].weight
            t = torch.tensor(key[0], dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
            emb = self.time_embed(timestep_embedding(t, self.config.base))
            rows = torch.cat([block.emb_layers(emb) for block in blocks], dim=1)
            found = Prepared(key[0], t, rows, [block.merged_upsampling() for block in blocks])
            while len(self._prepared) >= PREPARED:
                self._prepared.popitem(last=False)
        self._prepared[key] = self.prepared = found
        for block, weight in zip(blocks, found.up_weights, strict=True):
            block.up_weight = weight

    def _forget(self) -> None:
        self._prepared.clear()
        self.prepared = None
        for block in self._blocks():
            block.up_weight = None

    def _apply(self, fn, recurse: bool = True):
        self._forget()  # made of weights that move, or change their type
        return super()._apply(fn, recurse)

    def _blocks(self) -> list[ResBlock]:
        return [m for m in self.modules() if isinstance(m, ResBlock)]  # in the order they run

    def _films(self, t: Tensor | float) -> Iterator[Tensor] | None:
        """What the table holds for t, `(1, features)` for each block; None where it has to be computed."""
        row = None if self.prepared is None else self.prepared.row(t)
        return None if row is None else iter(row.split([b.emb_layers[1].out_features for b in self._blocks()], dim=1))

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        if x.shape[-2] % self.stride or x.shape[-1] % self.stride:
            size = tuple(x.shape[-2:])
            raise ValueError(f"height and width must be multiples of {self.stride}, got {size}; pad, or use UNetEps")
        films, emb = self._films(t), None
        if films is None:
            films, emb = iter(()), self.time_embed(timestep_embedding(batch_times(t, x), self.config.base))
        h, skips = x.to(self.torso_dtype), []
        for block in self.input_blocks:
            h = block(h, emb, films)
            skips.append(h)
        h = self.middle_block(h, emb, films)
        for block in self.output_blocks:
            h = block(h, emb, films, skips.pop())
        norm, _, conv = self.out
        small = self.fuse and h.device.type == "cpu" and not frozen.large(conv, *h.shape[2:], conv.in_channels)
        with use_backend(Backend.REFERENCE) if small else nullcontext():
            h = norm.then_silu(h.to(conv.weight.dtype))
        return conv(h, self.num_outputs).to(x.dtype)


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
