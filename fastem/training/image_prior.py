"""Training of the natural-image prior: `fastem train image-prior`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastem import io
from fastem.models.checkpoints import save_natural
from fastem.models.natural import NaturalConfig, NaturalPrior
from fastem.training.core import BandBalance, TrainConfig, Trainer


class ImagePool:
    """uint8 RGB images of different sizes in one flat tensor, cropped at random on its device."""

    def __init__(self, images: list[np.ndarray], patch: int, device: str | torch.device = "cpu") -> None:
        images = [image for image in images if min(image.shape[:2]) >= patch]
        if not images:
            raise ValueError(
                f"no training image is at least {patch} pixels on its short side; give larger images or --patch"
            )
        sizes = torch.tensor([image.shape[:2] for image in images])
        pixels = sizes.prod(dim=1)
        self.patch = patch
        self.heights, self.widths = sizes[:, 0].to(device), sizes[:, 1].to(device)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), pixels.cumsum(0)[:-1]]).to(device)
        self.flat = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images])).to(device)
        self.weights = pixels.double().to(device)  # every pixel is equally likely

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`(count, 3, patch, patch)` float32 in [-1, 1]: random crops, flipped, rotated, recoloured."""
        device = self.flat.device

        def uniform() -> Tensor:
            return torch.rand(count, generator=generator, device=device)

        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        top = (uniform() * (self.heights[which] - self.patch + 1)).long()
        left = (uniform() * (self.widths[which] - self.patch + 1)).long()
        span = torch.arange(self.patch, device=device)
        rows, cols = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
        index = self.offsets[which][:, None, None] + rows * self.widths[which][:, None, None] + cols
        crops = self.flat[index].permute(0, 3, 1, 2).float() / 127.5 - 1

        flip, turn, transpose = (uniform() < 0.5 for _ in range(3))
        crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
        crops = torch.where(turn[:, None, None, None], crops.flip(-2), crops)
        crops = torch.where(transpose[:, None, None, None], crops.transpose(-1, -2), crops)
        gray = (uniform() < 0.05)[:, None, None, None]
        crops = torch.where(gray, crops.mean(dim=1, keepdim=True).expand_as(crops), crops)
        gain = (0.8 + 0.4 * uniform())[:, None, None, None]
        return ((crops + 1) * gain - 1).clamp(-1, 1)


def multi_scale(images: list[np.ndarray], scales: tuple[float, ...] = (1.0, 0.75, 0.5)) -> list[np.ndarray]:
    """Each image at each scale (antialiased): smaller copies are sharper and free of compression artefacts."""
    return [image if scale == 1 else io.resize(image, scale) for image in images for scale in scales]


def sample_sigma(count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """Noise levels in [-1, 1] units: mostly those at which deconvolution happens, the rest wide."""
    narrow = torch.randn(count, generator=generator, device=device) * 1.1 - 1.6
    low, high = math.log(0.005), math.log(160.0)
    wide = low + (high - low) * torch.rand(count, generator=generator, device=device)
    pick = torch.rand(count, generator=generator, device=device) < 0.75
    return torch.where(pick, narrow, wide).clamp(low, high).exp()


def train_image_prior(
    data: list[Path],
    out: Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
    network: NaturalConfig = NaturalConfig(),  # noqa: B008  (frozen)
    device: str = "cpu",
    report: Callable[[dict], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
) -> NaturalPrior:
    """Trains (or resumes) a natural-image prior on folders of images or tar shards.

    Writes `out/training.pt` (resume state), `out/log.jsonl` and `out/natural.safetensors`, and returns the model with
    averaged weights; also where `stop()`, asked before each step, ends it early.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = NaturalPrior(network).to(memory_format=torch.channels_last)
    trainer = Trainer(model, config, out / "training.pt", device)
    images = list(io.iter_training_images(data))
    pool = ImagePool(multi_scale(images), config.patch, device)

    def loss_of(model: nn.Module, generator: torch.Generator, balance: BandBalance) -> Tensor:
        clean = pool.sample(config.batch_size, generator)
        sigma = sample_sigma(config.batch_size, generator, device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = (clean + sigma[:, None, None, None] * noise).contiguous(memory_format=torch.channels_last)
        error = (model(noisy, sigma) - clean).square().mean(dim=(1, 2, 3))
        c_out2 = (sigma * network.sigma_data) ** 2 / (sigma**2 + network.sigma_data**2)
        return balance(error / c_out2, sigma)

    for record in trainer.run(loss_of, stop):
        report(record)
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
    trainer.ema.copy_to(model)
    model.eval()
    r2 = measure_r2(model, pool.sample(64, torch.Generator(device).manual_seed(config.seed)))
    card = {
        "what": "denoiser of natural images in [-1, 1], any size",
        "data": f"{len(images)} pictures from {', '.join(path.name for path in data)}",
        "recipe": {**asdict(config), "num_steps": trainer.step, "total_minutes": round(trainer.seconds / 60, 1)},
        "r2": "mean squared error on 64 patches of the training images",
    }
    save_natural(out / "natural.safetensors", model, r2=r2, card=card)
    return model


@torch.no_grad()
def measure_r2(model: nn.Module, clean: Tensor, num_levels: int = 20, seed: int = 0) -> list[list[float]]:
    """`[[sigma, mean squared error], ...]` of `model(x, sigma)` on clean images `(N, C, H, W)` in [-1, 1].

    Levels are log-uniform over those of training. The error is that of x0_hat in PiGDM, which `EpsModel.r2` looks up.
    """
    generator = torch.Generator(clean.device).manual_seed(seed)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    levels = torch.linspace(math.log(0.005), math.log(160.0), num_levels, dtype=torch.float64).exp().tolist()
    table = []
    for sigma in levels:
        x0_hat = model(clean + sigma * noise, torch.full((len(clean),), sigma, device=clean.device))
        table.append([sigma, (x0_hat - clean).square().mean().item()])
    return table
