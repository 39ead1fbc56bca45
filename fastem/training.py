"""Training of the bundled priors: `fastem train image-prior` and `fastem train kernel-denoiser`.

The learning rate follows warm-up, constant, cool-down: a run may stop at any time, be resumed with
more minutes, and is brought to rest by a linear decay over the last `cooldown` minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastem import io
from fastem.models.natural import NaturalConfig, NaturalPrior

NUM_BANDS = 12  # noise bands, equal in ln(sigma), in which the loss is tracked and balanced


@dataclass(frozen=True)
class TrainConfig:
    """How long and how hard; the defaults are the recipe of the bundled natural prior on two CPU cores."""

    minutes: float = 120.0  # wall-clock time of this call
    cooldown: float = 25.0  # minutes of linear decay to zero at its end; 0 leaves the run resumable at full rate
    batch_size: int = 32
    patch: int = 48
    lr: float = 1e-3
    warmup: int = 300  # steps
    ema_halflife: float = 2000.0  # steps
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_minutes: float = 5.0


class ImagePool:
    """uint8 RGB images of different sizes in one flat tensor, cropped at random on its device."""

    def __init__(self, images: list[np.ndarray], patch: int, device: str | torch.device = "cpu") -> None:
        images = [image for image in images if min(image.shape[:2]) >= patch]
        if not images:
            raise ValueError(f"no training image is at least {patch} pixels on its short side; give larger images or --patch")
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


class BandBalance:
    """Divides the loss of each noise band by its running mean, so that every band gains equal decibels."""

    LOW, HIGH = math.log(0.005), math.log(160.0)

    def __init__(self, device: torch.device | str) -> None:
        self.mean = torch.ones(NUM_BANDS, device=device)

    def __call__(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """loss, sigma `(N,)` -> the balanced mean loss, a scalar."""
        band = ((sigma.log() - self.LOW) / (self.HIGH - self.LOW) * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)
        with torch.no_grad():
            count = torch.zeros_like(self.mean).index_add_(0, band, torch.ones_like(loss))
            total = torch.zeros_like(self.mean).index_add_(0, band, loss.detach())
            rate = 1 - 0.98**count
            self.mean += rate * (total / count.clamp(min=1) - self.mean)
        return (loss / self.mean[band]).mean()


class Ema:
    """Exponential moving average of the parameters, with a half-life in steps that grows from zero."""

    def __init__(self, model: nn.Module, halflife: float) -> None:
        self.halflife = halflife
        self.params = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = 0.5 ** (1 / min(self.halflife, max(step * 0.1, 1e-3)))
        torch._foreach_lerp_(self.params, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for param, average in zip(model.parameters(), self.params, strict=True):
            param.copy_(average)


class Trainer:
    """One optimisation run: step, average, checkpoint, resume. What is learned is `loss_of(model, generator)`."""

    def __init__(self, model: nn.Module, config: TrainConfig, state_file: Path, device: str = "cpu") -> None:
        self.model, self.config, self.state_file, self.device = model.to(device), config, state_file, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0)
        self.ema = Ema(self.model, config.ema_halflife)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.balance = BandBalance(device)
        self.step = 0
        self.seconds = 0.0  # spent in all calls
        if state_file.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.params = [p.to(self.device) for p in state["ema"]]
        self.generator.set_state(state["rng"].cpu())
        self.balance.mean = state["bands"]
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.params,
            "rng": self.generator.get_state(),
            "bands": self.balance.mean,
            "step": self.step,
            "seconds": self.seconds,
            "config": asdict(self.config),
        }
        with io.atomic_write(self.state_file) as file:
            torch.save(state, file)

    def run(self, loss_of: Callable[[nn.Module, torch.Generator, BandBalance], Tensor]) -> Iterator[dict]:
        """Trains for `config.minutes`; yields a progress record about every 10 seconds."""
        config, start, base = self.config, time.monotonic(), self.seconds
        told = saved = start
        loss_sum, steps_told = 0.0, self.step
        self.model.train()
        while True:
            now = time.monotonic()
            left = config.minutes - (now - start) / 60
            if left <= 0:
                break
            rate = min(1.0, (self.step + 1) / config.warmup)
            if config.cooldown > 0:
                rate *= min(1.0, left / config.cooldown)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * rate
            loss = loss_of(self.model, self.generator, self.balance)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.model, self.step)
            loss_sum += loss.item()
            now = time.monotonic()
            self.seconds = base + now - start
            if now - told > 10:
                done = self.step - steps_told
                yield {
                    "step": self.step,
                    "minutes": round((now - start) / 60, 2),
                    "lr": config.lr * rate,
                    "loss": loss_sum / done,
                    "samples_per_s": done * config.batch_size / (now - told),
                    "bands": [round(v, 4) for v in self.balance.mean.tolist()],
                }
                told, loss_sum, steps_told = now, 0.0, self.step
            if now - saved > 60 * config.checkpoint_minutes:
                self.save()
                saved = now
        self.save()


def train_image_prior(
    data: list[Path],
    out: Path,
    config: TrainConfig = TrainConfig(),
    network: NaturalConfig = NaturalConfig(),
    device: str = "cpu",
    report: Callable[[dict], None] = lambda record: None,
) -> NaturalPrior:
    """Trains (or resumes) a natural-image prior on folders of images or tar shards.

    Writes `out/training.pt` (resume state) and returns the model with averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = NaturalPrior(network).to(memory_format=torch.channels_last)
    trainer = Trainer(model, config, out / "training.pt", device)
    pool = ImagePool(multi_scale(list(io.iter_training_images(data))), config.patch, device)

    def loss_of(model: nn.Module, generator: torch.Generator, balance: BandBalance) -> Tensor:
        clean = pool.sample(config.batch_size, generator)
        sigma = sample_sigma(config.batch_size, generator, device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = (clean + sigma[:, None, None, None] * noise).contiguous(memory_format=torch.channels_last)
        error = (model(noisy, sigma) - clean).square().mean(dim=(1, 2, 3))
        c_out2 = (sigma * network.sigma_data) ** 2 / (sigma**2 + network.sigma_data**2)
        return balance(error / c_out2, sigma)

    for record in trainer.run(loss_of):
        report(record)
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
    trainer.ema.copy_to(model)
    return model.eval()
