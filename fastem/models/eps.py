"""Adapters: every network, whatever it was trained to predict, answers `eps = model(x_t, t)`.

`x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise` is `(N, C, H, W)` with x_0 in [-1, 1]; t is a time step
of the linear 1000-step schedule, `(N,)` or a number, fractions allowed; eps has the shape of x_t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastem.models.natural import NaturalPrior
from fastem.models.unet import UNet, batch_times
from fastem.schedules import Schedule

HALVES = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=16)
def _log_snr_table(device: torch.device) -> Tensor:
    alphas_cumprod = Schedule.linear().alphas_cumprod
    with torch.inference_mode(False):  # the table outlives the mode of its first caller
        return torch.tensor(np.log(alphas_cumprod / (1 - alphas_cumprod)), dtype=torch.float64, device=device)


def log_snr(t: Tensor | float) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)) at t, float64: linear between the 1000 steps, constant outside."""
    t = torch.as_tensor(t, dtype=torch.float64)
    table = _log_snr_table(t.device)
    t = t.clamp(0, len(table) - 1)
    i = t.detach().long().clamp(max=len(table) - 2)
    return torch.lerp(table[i], table[i + 1], t - i)


def alpha_bar(t: Tensor | float) -> Tensor:
    """alpha_bar at time step t, float64, for fractional t too (see `log_snr`); differentiable."""
    return log_snr(t).sigmoid()


class ErrorSpectrum(NamedTuple):
    """Variance of the error of x0_hat by frequency, `peak / (1 + (f / cutoff)^power)`, f in cycles per pixel.

    The noise of x_t is left as it is where images are strong, at low frequencies, and removed where they are weak:
    `peak` is its variance. An infinite cutoff is white.
    """

    peak: float
    cutoff: float = math.inf
    power: float = 1.0

    def at(self, frequency: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # 1 / inf is what is meant
            return self.peak / (1 + (frequency / self.cutoff) ** self.power)


class EpsModel(nn.Module):
    """What the samplers hold; see the module's docstring for x_t, t and eps.

    Attributes:
        channels: C of the images.
        image_size: side of the training images where the network is tied to it (see `TiledEps`), else None.
        sha256: of the weights file, None if there was none.
    """

    def __init__(self, channels: int, image_size: int | None = None, r2: Sequence[Sequence[float]] | None = None):
        super().__init__()
        self.channels, self.image_size, self.sha256 = channels, image_size, None
        self.r2_table = None if r2 is None else np.asarray(r2, dtype=np.float64)
        if self.r2_table is not None:
            table = self.r2_table
            good = table.ndim == 2 and table.shape[1] in (2, 4) and len(table) > 0 and np.isfinite(table).all()
            if not (good and (table > 0).all() and (np.diff(table[:, 0]) > 0).all()):
                raise ValueError(
                    "r2 must be a list of [sigma, mean squared error] or [sigma, mean squared error, cutoff, power], "
                    "positive, sigma ascending"
                )

    def r2(self, sigma_t: float) -> float:
        """Mean squared error of x0_hat per pixel, [-1, 1] units, at `sigma_t = sqrt((1 - alpha_bar) / alpha_bar)`.

        Interpolated (log-log) in the table measured for these weights. Below it the error is a fixed part of the
        noise, above it constant. Without a table, that of the best linear estimate of pixels with std 0.5.
        """
        if self.r2_table is None:
            return sigma_t**2 / (1 + (sigma_t / 0.5) ** 2)
        sigma, mse = self.r2_table.T[:2]
        if sigma_t < sigma[0]:
            return float(mse[0] * (sigma_t / sigma[0]) ** 2)
        return float(np.exp(np.interp(math.log(sigma_t), np.log(sigma), np.log(mse))))

    def error_spectrum(self, sigma_t: float) -> ErrorSpectrum:
        """The same error by frequency: what PiGDM takes for r_t^2.

        The network's Jacobian in its gradient is the covariance at each frequency. Where that exceeds r_t^2, as it does
        the mean over all frequencies at the low ones, a step overshoots by their ratio and the run diverges.

        Interpolated in the table (cutoff log-log), its ends beyond. Without one, the largest error there can be: that
        of the noise, at every frequency.
        """
        if self.r2_table is None or self.r2_table.shape[1] < 4:
            return ErrorSpectrum(sigma_t**2)
        sigma, _, cutoff, power = self.r2_table.T
        at, levels = math.log(sigma_t), np.log(sigma)
        cutoff, power = math.exp(np.interp(at, levels, np.log(cutoff))), float(np.interp(at, levels, power))
        return ErrorSpectrum(sigma_t**2, cutoff, power)

    def prepare(self, times: Sequence[float]) -> None:
        """Told before a run on which time steps the network will be asked, with frozen weights."""

    def program(self) -> Hashable:
        """Equal as long as the same operations run on the same weights: what a recorded step may be reused for."""
        return id(self)

    def set_precision(self, dtype: torch.dtype) -> None:
        """Runs the body of the network in `dtype`, if it has one; input and output stay as they are."""


class _Unscale(torch.autograd.Function):
    """Divides the gradient of each image by what `_Scale` multiplied it with."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.scale[0], None


class _Scale(torch.autograd.Function):
    """Brings the gradient of each image to a largest value in [1, 2), by a power of two found on the device."""

    @staticmethod
    def forward(ctx, eps: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return eps.view_as(eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.scale[:] = [power_of_two(grad)]
        return grad * ctx.scale[0], None


def power_of_two(grad: Tensor) -> Tensor:
    """`(N, 1, 1, 1)`: what brings the largest value of each image `(N, C, H, W)` float32 to [1, 2); 1 for 0 and nan."""
    largest = grad.abs().amax(dim=(1, 2, 3), keepdim=True)
    below = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone: exact, without a log
    return torch.where((below > 0) & (below < 2.0**126), 1 / below, 1.0)


def evaluate_16bit(net: Callable[[Tensor, Tensor | float], Tensor], x: Tensor, t: Tensor | float) -> Tensor:
    """`net(x, t)` with a body of 16 bits: its backward pass is linear, so gradients are scaled into their range."""
    scale: list[Tensor] = []
    return _Scale.apply(net(_Unscale.apply(x, scale), t), scale)


class UNetEps(EpsModel):
    """A guided-diffusion U-Net: variance channels dropped, any image size by mirrored borders."""

    def __init__(self, net: UNet, r2: Sequence[Sequence[float]] | None = None) -> None:
        config = net.config
        if config.out_channels not in (config.in_channels, 2 * config.in_channels):
            raise ValueError(
                f"a network of {config.in_channels} channels must put out as many, or twice as many with variances, "
                f"got {config.out_channels}"
            )
        super().__init__(config.in_channels, config.image_size, r2)
        self.net = net
        net.num_outputs = config.in_channels  # the variances of networks that learn them are not computed

    def prepare(self, times: Sequence[float]) -> None:
        if not any(p.requires_grad for p in self.net.parameters()):
            self.net.prepare(times)

    def program(self) -> Hashable:
        return id(self), self.net.prepared

    def set_precision(self, dtype: torch.dtype) -> None:
        self.net.set_torso_dtype(dtype)

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        height, width = x_t.shape[-2:]
        x = mirror_pad(x_t, height + -height % self.net.stride, width + -width % self.net.stride)
        eps = evaluate_16bit(self.net, x, t) if self.net.torso_dtype in HALVES else self.net(x, t)
        return eps[..., :height, :width]


class DenoiserEps(EpsModel):
    """A denoiser `D(x; sigma)` of images in [-1, 1], as in EDM (Karras et al. 2022)."""

    def __init__(self, denoiser: NaturalPrior, r2: Sequence[Sequence[float]] | None = None) -> None:
        super().__init__(denoiser.config.channels, r2=r2)
        self.denoiser = denoiser

    def set_precision(self, dtype: torch.dtype) -> None:
        getattr(self.denoiser, "prior", self.denoiser).set_torso_dtype(dtype)  # behind the fused kernels

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        ab = alpha_bar(batch_times(t, x_t))
        a, s, sigma = (v.to(x_t.dtype).view(-1, 1, 1, 1) for v in (ab.sqrt(), (1 - ab).sqrt(), (1 / ab - 1).sqrt()))
        network = getattr(self.denoiser, "prior", self.denoiser)
        if getattr(network, "torso_dtype", None) in HALVES:
            x0_hat = evaluate_16bit(network, x_t / a, sigma.flatten())
        else:
            x0_hat = self.denoiser(x_t / a, sigma.flatten())
        return (x_t - a * x0_hat) / s


class TiledEps(EpsModel):
    """Any image size for a network tied to one: overlapping tiles, blended by smooth weights that sum to 1.

    Smaller images are mirrored up to the tile. At most `batch` tiles are in memory at a time, also during the
    gradient with respect to x_t, which evaluates the network a second time (there is none with respect to
    weights). Images are tiled one by one, so eps does not depend on the other rows.
    """

    def __init__(self, model: EpsModel, tile: int = 256, overlap: int = 64, batch: int = 4) -> None:
        if not 0 <= overlap < tile or batch < 1:
            raise ValueError(f"0 <= overlap < tile and batch >= 1 are needed, got {overlap}, {tile} and {batch}")
        super().__init__(model.channels)
        self.model, self.tile, self.overlap, self.batch = model, tile, overlap, batch
        self.sha256 = model.sha256
        self._tiles: tuple = (None, [])  # the tiles of the last size

    def r2(self, sigma_t: float) -> float:
        return self.model.r2(sigma_t)

    def error_spectrum(self, sigma_t: float) -> ErrorSpectrum:
        return self.model.error_spectrum(sigma_t)

    def prepare(self, times: Sequence[float]) -> None:
        self.model.prepare(times)

    def program(self) -> Hashable:
        return self.model.program(), self.tile, self.overlap, self.batch

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        height, width = x_t.shape[-2:]
        x, t = mirror_pad(x_t, max(height, self.tile), max(width, self.tile)), batch_times(t, x_t)
        if x.shape[-2:] == (self.tile, self.tile):
            eps = self.model(x, t)
        else:
            eps = torch.cat([_Tiled.apply(row[None], time[None], self) for row, time in zip(x, t, strict=True)])
        return eps[..., :height, :width]

    def windows(self, length: int) -> list[tuple[int, Tensor]]:
        """Start and float64 weights `(tile,)` of the tiles that cover `length` pixels; the weights sum to 1."""
        count = math.ceil((length - self.overlap) / (self.tile - self.overlap)) if length > self.tile else 1
        starts = [round(i * (length - self.tile) / max(count - 1, 1)) for i in range(count)]
        weights = torch.zeros(count, length, dtype=torch.float64)
        for i, start in enumerate(starts):
            window = torch.ones(self.tile, dtype=torch.float64)
            if i > 0:
                window *= self._ramp(starts[i - 1] + self.tile - start)
            if i < count - 1:
                window *= self._ramp(start + self.tile - starts[i + 1]).flip(0)
            weights[i, start : start + self.tile] = window
        weights /= weights.sum(0)
        return [(start, w[start : start + self.tile]) for start, w in zip(starts, weights, strict=True)]

    def _ramp(self, shared: int) -> Tensor:
        """0 to 1 by a raised cosine of `overlap` pixels amid the `shared` ones, 1 on the rest of the tile."""
        rise = max(self.overlap, 1)
        position = torch.arange(self.tile, dtype=torch.float64) + 0.5 - (shared - rise) / 2
        return torch.sin(math.pi / 2 * (position / rise).clamp(0, 1)) ** 2

    def tiles(self, x: Tensor) -> list[list[tuple[slice, slice, Tensor]]]:
        """Micro-batches of equal length (the last is padded by weight 0): rows, columns and weights of each tile."""
        key = (x.shape[-2], x.shape[-1], x.device, x.dtype)
        if key != self._tiles[0]:  # made once per size: the copy of the weights would make the host wait in every step
            with torch.inference_mode(False):
                self._tiles = key, self._cut(*key)
        return self._tiles[1]

    def _cut(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> list:
        cut = [
            (slice(i, i + self.tile), slice(j, j + self.tile), torch.outer(w_i, w_j).to(device, dtype))
            for i, w_i in self.windows(height)
            for j, w_j in self.windows(width)
        ]
        count = math.ceil(len(cut) / self.batch)
        size = math.ceil(len(cut) / count)
        rows, columns, weight = cut[-1]
        cut += [(rows, columns, torch.zeros_like(weight))] * (count * size - len(cut))
        return [cut[i : i + size] for i in range(0, len(cut), size)]


class _Tiled(torch.autograd.Function):
    """Tiles of one image through the network, and the gradient tile by tile: neither keeps more than a micro-batch."""

    @staticmethod
    def forward(ctx, x: Tensor, t: Tensor, tiled: TiledEps) -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.tiled = tiled
        eps = torch.zeros_like(x)
        for batch in tiled.tiles(x):
            eps_tiles = tiled.model(torch.cat([x[..., i, j] for i, j, _ in batch]), t.expand(len(batch)))
            for (i, j, weight), eps_tile in zip(batch, eps_tiles, strict=True):
                eps[0, :, i, j] += weight * eps_tile
        return eps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_eps: Tensor) -> tuple[Tensor, None, None]:
        x, t = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        for batch in ctx.tiled.tiles(x):
            x_tiles = torch.cat([x[..., i, j] for i, j, _ in batch]).requires_grad_()
            cotangent = torch.cat([weight * grad_eps[..., i, j] for i, j, weight in batch])
            with torch.enable_grad():
                eps_tiles = ctx.tiled.model(x_tiles, t.expand(len(batch)))
            (grad_tiles,) = torch.autograd.grad(eps_tiles, x_tiles, cotangent)
            for (i, j, _), grad_tile in zip(batch, grad_tiles, strict=True):
                grad_x[0, :, i, j] += grad_tile
        return grad_x, None, None


def mirror_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Mirrors the bottom and right borders (edge pixels repeated) until `x` measures `height` x `width`."""
    for dim, size in ((-2, height), (-1, width)):
        while (missing := size - x.shape[dim]) > 0:
            strip = min(missing, x.shape[dim])
            x = torch.cat([x, x.narrow(dim, x.shape[dim] - strip, strip).flip(dim)], dim)
    return x
