"""Training of small diffusion priors: of kernels and of the tilt of turbulent air, for parallel diffusion (BlindDPS).

`fastem train kernel-prior` and `fastem train tilt-prior`. Both are ADM U-Nets that predict eps on the linear 1000-step
schedule (Ho et al. 2020, the loss without weights), so that `fastem.load_model` takes the files they write. In [-1, 1]:

- a kernel k is `2 k / max(k) - 1`, and comes back as `(x_0 + 1) / 2`, clipped at 0 and divided by its sum (BlindDPS);
- a tilt is `x_0 = tilt / TILT_UNIT`, clipped; the file says so under "unit", pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastem import io
from fastem.models import EpsModel, UNet, UNetConfig, UNetEps, load_model
from fastem.models.checkpoints import save_unet
from fastem.models.eps import alpha_bar
from fastem.samplers import DDIM
from fastem.schedules import TRAIN_STEPS, Schedule
from fastem.synth import motion_kernel, tilt_field
from fastem.training.core import BandBalance, TrainConfig, Trainer, tell
from fastem.training.kernel_denoiser import FIRST_SEED, KernelPool

KERNEL_FAMILIES = {"shake": 0.4, "randomwalk": 0.25, "boracchi": 0.1, "gp": 0.1, "line": 0.05, "gaussian": 0.1}
TILT_UNIT = 1.65  # pixels of tilt at x_0 = 1: three times the std in the middle of a field
TILT_SIZE = 256  # side of the fields that crops are cut from
SIGMA_RANGE = (0.01, 157.0)  # of the linear schedule
SAMPLE_STEPS = 100
NUM_HELD_OUT = 64

DEFAULTS = TrainConfig(minutes=25.0, cooldown=6.0, batch_size=32, lr=5e-4, warmup=200, ema_halflife=1000.0)


@dataclass(frozen=True)
class PriorTask:
    """What differs between the priors; everything in x_0 is in [-1, 1].

    Attributes:
        name: of the weights file.
        network: to train.
        draw: `(count, generator)` -> x_0 `(count, C, H, W)`, never of a held-out seed.
        held_out: x_0 `(N, C, H, W)` of seeds that `draw` does not know.
        picture: x_0 `(C, H, W)` -> `(h, w)` uint8, to look at.
        statistics: x_0 `(N, C, H, W)` -> numbers by which samples are compared with held-out data.
        card: what it is and what it was trained on.
        unit: what x_0 = 1 is in units of the data, where that is fixed.
    """

    name: str
    network: UNetConfig
    draw: Callable[[int, torch.Generator], Tensor]
    held_out: Tensor
    picture: Callable[[Tensor], np.ndarray]
    statistics: Callable[[Tensor], dict[str, float]]
    card: dict
    unit: float | None = None


# -------------------------------------------------------------------------------------------------- kernels


def kernel_unet(size: int, width: int = 32) -> UNetConfig:
    """Four levels as in BlindDPS, half as wide: 4.3 M parameters at width 32, attention at a quarter of the size."""
    return UNetConfig(
        widths=(width, 2 * width, 3 * width, 4 * width), base=width, in_channels=1, out_channels=1,
        attention_levels=(2,), num_head_channels=32, image_size=size,
    )  # fmt: skip


def kernel_to_unit(k: Tensor) -> Tensor:
    """Kernels `(N, 1, h, w)` -> x_0 in [-1, 1], the peak of each at 1."""
    return 2 * k / k.amax(dim=(-2, -1), keepdim=True) - 1


def kernel_from_unit(x_0: Tensor) -> Tensor:
    """x_0 -> kernels that are non-negative and sum to 1 (the scale, which `kernel_to_unit` drops, is that sum)."""
    k = (x_0 + 1).clamp(min=0)
    return k / k.sum(dim=(-2, -1), keepdim=True).clamp(min=1e-12)


def kernel_statistics(x_0: Tensor) -> dict[str, float]:
    """Medians: sum of squares, extent (std of the mass about its centre, pixels), and share of pixels above 2 %."""
    k = kernel_from_unit(x_0)
    rows, cols = (torch.arange(n, dtype=k.dtype, device=k.device) for n in k.shape[-2:])
    variance = 0
    for positions, mass in ((rows, k.sum(-1)), (cols, k.sum(-2))):
        mean = (mass * positions).sum(-1, keepdim=True)
        variance = variance + (mass * (positions - mean) ** 2).sum(-1)
    peak = k.amax(dim=(-2, -1), keepdim=True)
    return {
        "sum_of_squares": k.square().sum(dim=(-2, -1)).median().item(),
        "extent": variance.sqrt().median().item(),
        "support": (k > 0.02 * peak).float().mean(dim=(-2, -1)).median().item(),
    }


def kernel_task(size: int = 64, width: int = 32, num_kernels: int = 20_000, device: str = "cpu") -> PriorTask:
    """Kernels of `fastem.synth`, all families of motion and Gaussians, mirrored and turned."""
    pool = KernelPool(num_kernels, device, {size: 1.0}, KERNEL_FAMILIES)
    families = list(KERNEL_FAMILIES)
    held_out = [motion_kernel(size, seed, families[seed % len(families)]) for seed in range(NUM_HELD_OUT)]
    return PriorTask(
        name="kernel-prior",
        network=kernel_unet(size, width),
        draw=lambda count, generator: kernel_to_unit(pool.draw(size, count, generator)),
        held_out=kernel_to_unit(torch.from_numpy(np.stack(held_out))[:, None]),
        picture=lambda x_0: io.kernel_picture(kernel_from_unit(x_0)[0].cpu().numpy(), zoom=2),
        statistics=kernel_statistics,
        card={
            "what": f"diffusion prior of {size} x {size} blur kernels, eps, for x_0 = 2 k / max(k) - 1",
            "data": f"{num_kernels} synthetic kernels, families {json.dumps(KERNEL_FAMILIES)}; no photographs",
        },
    )


# ----------------------------------------------------------------------------------------------------- tilt


def tilt_unet(size: int, width: int = 32) -> UNetConfig:
    """Four levels, attention in the middle only; fields are smooth over three pixels and alike everywhere."""
    return UNetConfig(
        widths=(width, width, 2 * width, 2 * width), base=width, in_channels=2, out_channels=2,
        num_head_channels=32, image_size=size,
    )  # fmt: skip


class TiltPool:
    """Tilt fields of `fastem.synth.tilt_field`, cropped at random, mirrored, turned, each component of either sign."""

    def __init__(self, count: int, size: int, device: str | torch.device = "cpu", first_seed: int = FIRST_SEED) -> None:
        self.size = size
        fields = np.stack([tilt_field(max(TILT_SIZE, size), first_seed + i) for i in range(count)])
        self.fields = torch.from_numpy(fields).to(device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`(count, 2, size, size)`, pixels."""
        device, room = self.fields.device, self.fields.shape[-1] - self.size + 1

        def integers(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=device)

        which, top, left = integers(len(self.fields)), integers(room), integers(room)
        span = torch.arange(self.size, device=device)
        rows, cols = (top[:, None] + span)[:, None, :, None], (left[:, None] + span)[:, None, None, :]
        crops = self.fields[which[:, None, None, None], torch.arange(2, device=device)[:, None, None], rows, cols]
        flip, turn, transpose, swap = ((integers(2) == 1)[:, None, None, None] for _ in range(4))
        crops = torch.where(flip, crops.flip(-1), crops)
        crops = torch.where(turn, crops.flip(-2), crops)
        crops = torch.where(transpose, crops.transpose(-1, -2), crops)
        crops = torch.where(swap, crops.flip(1), crops)
        return crops * (2 * torch.stack([integers(2), integers(2)], dim=1) - 1)[:, :, None, None]


def tilt_statistics(x_0: Tensor) -> dict[str, float]:
    """Std in pixels, and the correlation of pixels 1 and 4 apart (of smoothed white noise 0.78 and 0.02)."""
    tilt = TILT_UNIT * x_0
    energy = tilt.square().mean()
    return {
        "std": energy.sqrt().item(),
        "correlation_1": ((tilt[..., 1:] * tilt[..., :-1]).mean() / energy).item(),
        "correlation_4": ((tilt[..., 4:] * tilt[..., :-4]).mean() / energy).item(),
    }


def tilt_task(size: int = 128, width: int = 32, num_fields: int = 200, device: str = "cpu") -> PriorTask:
    """Crops of tilt fields, of their middle and of their borders, where they fade."""
    pool = TiltPool(num_fields, size, device)
    held_out = TiltPool(8, size, first_seed=0).draw(NUM_HELD_OUT, torch.Generator().manual_seed(0))

    def to_unit(tilt: Tensor) -> Tensor:
        return (tilt / TILT_UNIT).clamp(-1, 1)

    return PriorTask(
        name="tilt-prior",
        network=tilt_unet(size, width),
        draw=lambda count, generator: to_unit(pool.draw(count, generator)),
        held_out=to_unit(held_out),
        picture=lambda x_0: ((x_0[0] + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy(),
        statistics=tilt_statistics,
        card={
            "what": f"diffusion prior of tilt (right, down) of turbulent air, eps, for x_0 = tilt / {TILT_UNIT} pixels",
            "data": f"crops of {size} pixels of {num_fields} synthetic fields of fastem.synth.tilt_field",
        },
        unit=TILT_UNIT,
    )


# ------------------------------------------------------------------------------------------------- training


def train_diffusion_prior(
    out: Path,
    task: PriorTask,
    config: TrainConfig = DEFAULTS,
    device: str = "cpu",
    init: str | Path | None = None,
    num_samples: int = 16,
    report: Callable[[dict], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
) -> UNetEps:
    """Trains (or resumes) a diffusion prior and validates it; `config.patch` is not used.

    Writes `out/training.pt` (resume state), `out/log.jsonl`, `out/NAME.safetensors`, `out/validation.json` (eps loss by
    noise, and statistics of samples beside those of held-out data) and `out/samples.png`; returns the model with
    averaged weights. All of that also where `stop()`, asked before each step, ends the training early. A fresh run
    starts from the weights `init` (a file of a U-Net) where they are given; their network replaces that of the task.

    Raises:
        ValueError: if `init` is no U-Net, or one of other channels.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = UNetEps(UNet(task.network)) if init is None else _initial(init, task)
    balance = BandBalance(device, *SIGMA_RANGE)
    trainer = Trainer(model.to(memory_format=torch.channels_last), config, out / "training.pt", device, balance=balance)

    def loss_of(model: torch.nn.Module, generator: torch.Generator, balance: BandBalance) -> Tensor:
        x_0 = task.draw(config.batch_size, generator)
        t = torch.randint(TRAIN_STEPS, (len(x_0),), generator=generator, device=x_0.device)
        error = eps_error(model, x_0, t, torch.randn(x_0.shape, generator=generator, device=x_0.device))
        balance(error, sigma_of(t))  # to tell the loss of each band, not to weigh it
        return error.mean()

    tell(trainer.run(loss_of, stop), out / "log.jsonl", report)
    trainer.ema.copy_to(model)
    model.eval().requires_grad_(False)
    held_out = task.held_out.to(device)
    samples = draw_samples(model, (num_samples, *held_out.shape[1:]), SAMPLE_STEPS, config.seed)
    validation = {
        "eps_loss": eps_loss_by_time(model, held_out),
        "statistics": {"held_out": task.statistics(held_out), "samples": task.statistics(samples)},
        "num_steps": trainer.step,
    }
    with io.atomic_write(out / "validation.json") as file:
        file.write(json.dumps(validation, indent=1).encode())
    columns = max(1, round(math.sqrt(num_samples)))
    sheet = io.mosaic([task.picture(x_0) for x_0 in samples], columns)
    io.write_image(out / "samples.png", io.Picture(sheet))
    recipe = {**asdict(config), "num_steps": trainer.step, "total_minutes": round(trainer.seconds / 60, 1)}
    card = {**task.card, "licence": "MIT", "recipe": recipe, "validation": validation}
    extra = {} if task.unit is None else {"unit": task.unit}
    save_unet(out / f"{task.name}.safetensors", model.net, card=card, **extra)
    return model


def _initial(source: str | Path, task: PriorTask) -> UNetEps:
    """The network to start from, free to learn."""
    model = load_model(source)
    if not isinstance(model, UNetEps) or model.channels != task.network.in_channels:
        raise ValueError(f"{source} is no U-Net of {task.network.in_channels} channels, as a {task.name} is")
    return model.train().requires_grad_(True)


def sigma_of(t: Tensor) -> Tensor:
    """Noise std relative to x_0 at time steps t, float32: `sqrt((1 - alpha_bar) / alpha_bar)`."""
    ab = alpha_bar(t)
    return ((1 - ab) / ab).sqrt().float()


def eps_error(model: torch.nn.Module, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """`(N,)`: mean squared error of the predicted noise in `x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise`."""
    ab = alpha_bar(t).to(x_0.dtype).view(-1, 1, 1, 1)
    x_t = ab.sqrt() * x_0 + (1 - ab).sqrt() * noise
    return (model(x_t, t) - noise).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def eps_loss_by_time(model: EpsModel, x_0: Tensor, num_bands: int = 10, seed: int = 0) -> list[dict]:
    """Mean eps loss on x_0 `(N, C, H, W)` in bands of equally many time steps; each x_0 is seen once in every band."""
    generator = torch.Generator().manual_seed(seed)
    width = TRAIN_STEPS // num_bands
    bands = []
    for first in range(0, TRAIN_STEPS, width):
        t = first + (torch.arange(len(x_0)) * width // len(x_0))
        noise = torch.randn(x_0.shape, generator=generator)
        chunks = zip(x_0.split(16), t.split(16), noise.split(16), strict=True)
        errors = torch.cat([eps_error(model, x, at.to(x.device), n.to(x.device)) for x, at, n in chunks])
        ends = sigma_of(torch.tensor([first, first + width - 1])).tolist()
        bands.append({"t": [first, first + width - 1], "sigma": ends, "eps_loss": errors.mean().item()})
    return bands


@torch.no_grad()
def draw_samples(model: EpsModel, shape: tuple[int, ...], num_steps: int, seed: int) -> Tensor:
    """`shape` samples of the prior by DDIM on a respaced schedule, x0_hat clamped to [-1, 1].

    Deterministic but for the start: at 100 steps the spread of DDIM samples is a third as wrong as that of DDPM.
    """
    device = next(model.parameters()).device
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for step in Schedule.linear().respace(num_steps).reverse():
        eps = model(x_t, step.t)
        x0_hat = ((x_t - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)).clamp(-1, 1)  # Eq. (12)
        mean_x0, mean_xt, _ = DDIM().coefficients(step)
        x_t = mean_x0 * x0_hat + mean_xt * x_t
    return x_t
