"""The natural-image prior: a fully convolutional denoiser for any image size.

Architecture: a U-Net of plain residual blocks on 2x2 pixel-unshuffled input, conditioned on the
noise level by feature-wise affine maps. There is no attention and no normalisation layer, so
nothing depends on the size of the image: 64-pixel training patches transfer to whole photographs.

Preconditioning: Karras et al. 2022 (EDM), Table 1 and Eq. (7).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NaturalConfig:
    """What it takes to rebuild a `NaturalPrior`; stored in the metadata of its weights file."""

    widths: tuple[int, ...] = (64, 96, 128)  # channels per level, finest (half resolution) first
    num_blocks: int = 2  # residual blocks per level and side
    unshuffle: int = 2  # side of the pixel blocks folded into channels at the input
    channels: int = 3
    embedding: int = 64  # features of the noise-level embedding
    sigma_data: float = 0.5  # std of the training images in [-1, 1]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, config: dict) -> NaturalConfig:
        return cls(**{**config, "widths": tuple(config["widths"])})


SIZES = {  # by name, also that of the weights file
    "natural": NaturalConfig(),  # 1.8 M parameters
    "natural-large": NaturalConfig(widths=(128, 192, 256), num_blocks=4, embedding=128),  # 14.0 M parameters, for a GPU
}


class ResBlock(nn.Module):
    """`x + conv(act(film(conv(act(x)))))`, the second convolution starting at zero."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for layer in (self.film, self.conv2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(x))
        scale, shift = self.film(emb).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, h, 1 + scale)
        return x + self.conv2(F.silu(h))


class NaturalPrior(nn.Module):
    """Denoiser `D(x; sigma)` of natural images in [-1, 1], for any height and width.

    `forward(x, sigma)`: x `(N, C, H, W)` = clean image + sigma * white noise; sigma `(N,)`, in the
    [-1, 1] range of x. Returns the posterior mean of the clean image, `(N, C, H, W)`.
    """

    def __init__(self, config: NaturalConfig = NaturalConfig()) -> None:
        super().__init__()
        self.config = config
        widths, emb = config.widths, config.embedding
        folded = config.channels * config.unshuffle**2
        self.embed = nn.Sequential(nn.Linear(17, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.conv_in = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(self._blocks(w) for w in widths[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.middle = self._blocks(widths[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        self.decoder = nn.ModuleList(self._blocks(w) for w in widths[:-1])
        self.conv_out = nn.Conv2d(widths[0], folded, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        # c_noise features: the level itself and 8 fixed octaves of it (buffers travel with the weights)
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-2, 3, 8), persistent=False)

    def _blocks(self, width: int) -> nn.ModuleList:
        return nn.ModuleList(ResBlock(width, self.config.embedding) for _ in range(self.config.num_blocks))

    @property
    def stride(self) -> int:
        """Height and width are padded to multiples of this inside `forward`."""
        return self.config.unshuffle * 2 ** (len(self.config.widths) - 1)

    @property
    def torso_dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def set_torso_dtype(self, dtype: torch.dtype) -> NaturalPrior:
        """Runs all convolutions but the last in `dtype`; the noise level, input and output stay in float32."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module is not self.conv_out:
                module.to(dtype)
        return self

    def flops(self, height: int, width: int) -> int:
        """Floating-point operations of the convolutions for one image; a training step takes three times as many."""
        blocks = -(-height // self.stride) * -(-width // self.stride)
        pixels = blocks * (self.stride // self.config.unshuffle) ** 2  # of the finest level

        def weights(blocks: nn.ModuleList) -> int:
            return sum(block.conv1.weight.numel() + block.conv2.weight.numel() for block in blocks)

        total = pixels * (self.conv_in.weight.numel() + self.conv_out.weight.numel())
        for encoder, decoder, down, up in zip(self.encoder, self.decoder, self.down, self.up, strict=True):
            total += pixels * (weights(encoder) + weights(decoder))
            pixels //= 4
            total += pixels * (down.weight.numel() + up.weight.numel())
        total += pixels * weights(self.middle)
        return 2 * total

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = pad_to_multiple(x, self.stride)
        sigma = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.config.sigma_data**2
        c_skip = self.config.sigma_data**2 / variance
        c_out = sigma * self.config.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.log() / 4
        denoised = c_skip * x + c_out * self.features(c_in * x, c_noise.flatten())  # EDM Eq. (7)
        return denoised[..., :height, :width]

    def features(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """The raw network F of EDM Eq. (7): unit-variance input and output."""
        phase = c_noise[:, None] * self.frequencies
        emb = self.embed(torch.cat([c_noise[:, None], phase.sin(), phase.cos()], dim=1))
        h = self.conv_in(F.pixel_unshuffle(x, self.config.unshuffle).to(self.torso_dtype))
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
            h = down(h)
        for block in self.middle:
            h = block(h, emb)
        for blocks, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            h = up(h) + skips.pop()
            for block in blocks:
                h = block(h, emb)
        with torch.autocast("cuda" if h.is_cuda else "cpu", enabled=False):  # 16 bits end here: low noise needs more
            out = self.conv_out(h.to(self.conv_out.weight.dtype))
        return F.pixel_shuffle(out, self.config.unshuffle)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Replicates the bottom and right borders of `(N, C, H, W)` up to multiples of `multiple`."""
    height, width = x.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return x
