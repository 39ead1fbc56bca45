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
from fastem.models.checkpoints import load_model, save_natural
from fastem.models.eps import DenoiserEps
from fastem.models.natural import SIZES, NaturalConfig, NaturalPrior
from fastem.runtime.placement import has_native
from fastem.training import parallel
from fastem.training.core import BandBalance, TrainConfig, Trainer, tell
from fastem.training.data import Pictures, hold_out, read_pictures, validation_split, without
from fastem.training.validation import validate

SCALES = (1.0, 0.75, 0.6, 0.5)  # of the training pictures


class ImagePool:
    """uint8 RGB images of different sizes in one flat tensor, cropped at random on its device.

    Args:
        scales: each image takes part at each of them (antialiased), all scales equally often: smaller copies are
            sharper, and free of compression artefacts and subsampled chroma.
    """

    def __init__(
        self,
        images: list[np.ndarray],
        patch: int,
        device: str | torch.device = "cpu",
        scales: tuple[float, ...] = (1.0,),
    ) -> None:
        copies = [(image if scale == 1 else io.resize(image, scale), scale) for image in images for scale in scales]
        copies = [(image, scale) for image, scale in copies if min(image.shape[:2]) >= patch]
        images = [image for image, _ in copies]
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
        # of one scale every pixel is equally likely
        self.weights = (pixels / torch.tensor([scale**2 for _, scale in copies])).double().to(device)

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
    init: str | Path | None = None,
    validation: list[Path] | None = None,
    amp: bool | None = None,
    report: Callable[[dict], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
) -> NaturalPrior:
    """Trains (or resumes) a natural-image prior on folders of images or tar shards; see `data.read_pictures`.

    Writes `out/training.pt` (resume state), `out/log.jsonl`, `out/validation.json` and the weights, `out/natural`
    (or another name of `SIZES`) `.safetensors`; returns the model with averaged weights. All of that also where
    `stop()`, asked before each step, ends it early. Under torchrun the processes train together.

    Args:
        init: weights a fresh run starts from, a bundled name or a file.
        validation: pictures to validate on, instead of a validation folder beside `train/` or of those held out.
        amp: whether the network computes in bfloat16, all but its last layer; by default on devices that can.

    Raises:
        ValueError: if there is nothing to train on, or `init` does not fit the network or the run to resume.
    """
    out.mkdir(parents=True, exist_ok=True)
    with parallel.joined(device) as device:
        on_gpu = device.startswith("cuda")
        if amp is None:
            amp = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_native(torch.bfloat16)
        torch.manual_seed(config.seed)
        model = NaturalPrior(network)
        notes = {} if init is None else {"init": _start_from(init, model)}
        model = model.to(memory_format=torch.channels_last)
        flops = 3 * model.flops(config.patch, config.patch)
        trainer = Trainer(model, config, out / "training.pt", device, flops=flops, compiled=on_gpu, notes=notes)
        if init is not None and trainer.notes != notes:
            raise ValueError(
                f"{out} holds a run to resume that did not start from {init}: leave out --init, or give another folder"
            )
        training, held_out = read_data(data, validation)
        pool = ImagePool([pixels for _, pixels in training], config.patch, device, SCALES)

        def loss_of(model: nn.Module, generator: torch.Generator, balance: BandBalance) -> Tensor:
            clean = pool.sample(config.batch_size, generator)
            sigma = sample_sigma(config.batch_size, generator, device)
            noise = torch.randn(clean.shape, generator=generator, device=device)
            noisy = (clean + sigma[:, None, None, None] * noise).contiguous(memory_format=torch.channels_last)
            with torch.autocast(pool.flat.device.type, torch.bfloat16, enabled=amp):
                denoised = model(noisy, sigma)
            error = (denoised - clean).square().mean(dim=(1, 2, 3))
            c_out2 = (sigma * network.sigma_data) ** 2 / (sigma**2 + network.sigma_data**2)
            return balance(error / c_out2, sigma)

        tell(trainer.run(loss_of, stop), out / "log.jsonl", report)
        num_processes = parallel.size()
        first = parallel.rank() == 0
    trainer.ema.copy_to(model)
    model.eval()
    if not first:
        return model
    figures = {
        "what": f"{name_of(network)} after {trainer.step} steps, averaged weights, float32",
        "held_out": held_out is not training,  # from this run; what the weights it started from saw is not known
        **validate(model, [pixels for _, pixels in held_out], model.stride, device),
    }
    with io.atomic_write(out / "validation.json") as file:
        file.write(json.dumps(figures | trainer.notes, indent=1).encode())
    r2 = figures.pop("r2")
    card = {
        "what": "denoiser of natural images in [-1, 1], any size",
        "data": f"{len(training)} pictures from {', '.join(path.name for path in data)}",
        **trainer.notes,
        "recipe": {**asdict(config), "num_steps": trainer.step, "bfloat16": amp},
        "compute": {
            "minutes": round(trainer.seconds / 60, 1),
            "processes": num_processes,
            "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads each",
        },
        "validation": figures,
        "r2": f"mean squared error on {figures['pictures']} patches of {figures['patch']} pixels",
    }
    save_natural(out / f"{name_of(network)}.safetensors", model, r2=r2, card=card)
    return model


def name_of(network: NaturalConfig) -> str:
    """The name of a size, also that of its weights file; other networks go by that of the default."""
    return next((name for name, config in SIZES.items() if config == network), "natural")


def _start_from(init: str | Path, model: NaturalPrior) -> dict:
    """Copies the weights of a natural-image prior, and tells where they come from, for the card."""
    loaded = load_model(init)
    if not isinstance(loaded, DenoiserEps) or loaded.denoiser.config != model.config:
        what = loaded.denoiser.config if isinstance(loaded, DenoiserEps) else type(loaded).__name__
        raise ValueError(f"--init {init} is another network: {what}; to be trained is {model.config} (--size)")
    model.load_state_dict(loaded.denoiser.prior.state_dict())
    return {"weights": Path(init).name, "sha256": loaded.sha256}


def read_data(data: list[Path], validation: list[Path] | None) -> tuple[Pictures, Pictures]:
    """`(pictures to train on, pictures to validate on)`; the same list twice if there is but one picture."""
    pictures = list(read_pictures(data))
    if not pictures:
        raise ValueError(f"no pictures in {', '.join(map(io.shown, data))}; give folders of images, or tar shards")
    given = validation or validation_split(data)
    if not given:
        return hold_out(pictures)
    held_out = list(read_pictures(given))
    if not held_out:
        raise ValueError(f"no pictures to validate on in {', '.join(map(io.shown, given))}")
    return without(pictures, held_out), held_out
