"""Training of the kernel and tilt priors with tiny networks, and its parts against closed forms."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastem.models import UNetConfig, alpha_bar, load_model, read_checkpoint
from fastem.synth import motion_kernel, tilt_field
from fastem.training import TrainConfig, kernel_task, tilt_task, train_diffusion_prior
from fastem.training.diffusion_prior import (
    NUM_HELD_OUT,
    TILT_UNIT,
    TiltPool,
    draw_samples,
    eps_error,
    eps_loss_by_time,
    kernel_from_unit,
    kernel_statistics,
    kernel_to_unit,
    kernel_unet,
    sigma_of,
    tilt_statistics,
    tilt_unet,
)

QUICK = TrainConfig(minutes=5, cooldown=0, batch_size=2, warmup=2, ema_halflife=3, max_steps=3)


@pytest.fixture(autouse=True)
def quick_validation(monkeypatch):
    monkeypatch.setattr("fastem.training.diffusion_prior.SAMPLE_STEPS", 3)


def tiny(task, levels=2):
    network = UNetConfig(
        widths=(32,) * levels, base=32, in_channels=task.network.in_channels, out_channels=task.network.out_channels,
        num_head_channels=32, image_size=task.network.image_size,
    )  # fmt: skip
    return replace(task, network=network, held_out=task.held_out[:4])


@pytest.fixture(scope="module")
def kernel():
    return tiny(kernel_task(11, num_kernels=20))


@pytest.fixture(scope="module")
def tilt():
    return tiny(tilt_task(16, num_fields=2), levels=1)


class Normal(torch.nn.Module):
    """eps in closed form where x_0 is normal with this std."""

    def __init__(self, std):
        super().__init__()
        self.std = torch.nn.Parameter(torch.tensor(std))

    def forward(self, x_t, t):
        ab = alpha_bar(torch.as_tensor(t)).to(x_t.dtype).view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * x_t / (ab * self.std**2 + 1 - ab)


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["kernel", "tilt"])
def test_training_resumes_and_gives_a_prior_that_loads(name, request, tmp_path):
    task = request.getfixturevalue(name)
    whole = train_diffusion_prior(tmp_path / "whole", task, QUICK, num_samples=3)
    train_diffusion_prior(tmp_path / "parts", task, replace(QUICK, max_steps=1), num_samples=1)
    torch.manual_seed(99)  # what happened in between must not matter
    resumed = train_diffusion_prior(tmp_path / "parts", task, QUICK, num_samples=1)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    other = train_diffusion_prior(tmp_path / "other", task, replace(QUICK, seed=1), num_samples=1)
    assert not all(map(torch.equal, whole.state_dict().values(), other.state_dict().values()))

    path = tmp_path / "whole" / f"{task.name}.safetensors"
    loaded, x_t = load_model(path), torch.randn_like(task.held_out)
    assert loaded.channels == x_t.shape[1] and loaded.image_size == x_t.shape[-1]
    torch.testing.assert_close(loaded(x_t, 500), whole(x_t, 500), atol=2e-3, rtol=2e-2)  # stored in 16 bits
    metadata = read_checkpoint(path).metadata
    assert metadata.get("unit") == (TILT_UNIT if name == "tilt" else None)
    validation = json.loads((tmp_path / "whole" / "validation.json").read_text())
    assert [band["t"] for band in validation["eps_loss"]] == [[t, t + 99] for t in range(0, 1000, 100)]
    assert set(validation["statistics"]) == {"held_out", "samples"} and validation["num_steps"] == 3
    assert metadata["card"]["validation"] == validation
    with Image.open(tmp_path / "whole" / "samples.png") as sheet:
        assert sheet.width >= 2 * x_t.shape[-1]


def test_training_lowers_the_loss(tilt, tmp_path):
    model = train_diffusion_prior(tmp_path, tilt, replace(QUICK, max_steps=40, batch_size=4, lr=3e-3, ema_halflife=3))
    losses = [band["eps_loss"] for band in eps_loss_by_time(model, tilt.held_out)]
    assert losses[-1] < 0.5 and max(losses) < 1.05  # 1 is the loss of a network that says nothing


def test_a_fresh_run_starts_from_given_weights(kernel, tilt, tmp_path):
    first = train_diffusion_prior(tmp_path / "a", kernel, replace(QUICK, lr=0.01), num_samples=1)
    file, still = tmp_path / "a" / "kernel-prior.safetensors", replace(QUICK, lr=0.0, max_steps=1)
    second = train_diffusion_prior(tmp_path / "b", kernel, still, init=file, num_samples=1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="no U-Net of 2 channels, as a tilt-prior is"):
        train_diffusion_prior(tmp_path / "c", tilt, still, init=file)
    with pytest.raises(ValueError, match="no U-Net of 1 channels"):
        train_diffusion_prior(tmp_path / "c", kernel, still, init="natural")


# ---------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("make", [kernel_unet, tilt_unet])
def test_networks_are_small_and_take_any_size(make):
    from fastem.models import UNet, UNetEps

    config = make(33)
    model = UNetEps(UNet(config))
    assert sum(p.numel() for p in model.parameters()) < 4.5e6 and model.image_size == 33
    x = torch.randn(1, config.in_channels, 33, 33)
    assert model(x, 10).shape == x.shape


def test_eps_loss_against_the_closed_form():
    """Of normal x_0 with std s the least error at sigma is s^2 / (s^2 + sigma^2); of a wrong std it is larger."""
    x_0 = 0.5 * torch.randn(32, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    right, wrong = (eps_loss_by_time(Normal(std), x_0) for std in (0.5, 0.1))
    for band, worse in zip(right, wrong, strict=True):
        times = band["t"][0] + torch.arange(32) * 100 // 32
        expected = (0.25 / (0.25 + sigma_of(times) ** 2)).mean().item()
        assert band["eps_loss"] == pytest.approx(expected, rel=0.03, abs=1e-4)
        assert worse["eps_loss"] > band["eps_loss"]
        assert band["sigma"] == pytest.approx(sigma_of(torch.tensor(band["t"])).tolist())


def test_eps_error_is_that_of_the_noise():
    x_0, noise = torch.rand(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    t = torch.tensor([0, 500, 999])
    nothing = eps_error(lambda x_t, t: torch.zeros_like(x_t), x_0, t, noise)
    torch.testing.assert_close(nothing, noise.square().mean(dim=(1, 2, 3)))
    ab = alpha_bar(t).float().view(-1, 1, 1, 1)
    known = eps_error(lambda x_t, t: (x_t - ab.sqrt() * x_0) / (1 - ab).sqrt(), x_0, t, noise)
    assert known.max() < 1e-5


def test_samples_have_the_distribution_of_the_prior():
    x = draw_samples(Normal(0.3), (8, 1, 32, 32), num_steps=250, seed=0)
    assert x.std().item() == pytest.approx(0.3, rel=0.03) and abs(x.mean()) < 0.01
    assert torch.equal(x, draw_samples(Normal(0.3), (8, 1, 32, 32), num_steps=250, seed=0))
    assert draw_samples(Normal(0.25), x.shape, num_steps=250, seed=0).std() < 0.27


def test_kernels_survive_the_scaling():
    k = torch.from_numpy(np.stack([motion_kernel(33, seed, "randomwalk") for seed in range(4)]))[:, None]
    x_0 = kernel_to_unit(k)
    assert x_0.amin() == -1 and (x_0.amax(dim=(1, 2, 3)) == 1).all()
    torch.testing.assert_close(kernel_from_unit(x_0), k)


def test_kernel_statistics_of_a_line():
    k = torch.zeros(1, 1, 15, 15)
    k[..., 7, 2:13] = 1 / 11
    found = kernel_statistics(kernel_to_unit(k))
    assert found["sum_of_squares"] == pytest.approx(1 / 11) and found["support"] == pytest.approx(11 / 225)
    assert found["extent"] == pytest.approx(math.sqrt((11**2 - 1) / 12))


def test_kernel_prior_never_sees_a_held_out_kernel():
    task = kernel_task(17, num_kernels=40)
    drawn = task.draw(200, torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 1, 17, 17) and drawn.amin() == -1 and drawn.amax() == 1
    assert len(task.held_out) == NUM_HELD_OUT
    least = min((drawn - one).abs().amax(dim=(1, 2, 3)).min() for one in task.held_out)
    assert least > 1e-3


def test_tilt_crops_are_those_of_fields():
    """Some mirror image, turn, swap or sign of a crop; of the std and smoothness of whole fields."""
    pool = TiltPool(1, 256, first_seed=5)
    field = np.sort(abs(tilt_field(256, 5)).ravel())
    whole = pool.draw(2, torch.Generator().manual_seed(0))
    for one in whole:
        np.testing.assert_allclose(np.sort(one.abs().numpy().ravel()), field)
    crops = TiltPool(2, 64).draw(40, torch.Generator().manual_seed(0))
    assert crops.shape == (40, 2, 64, 64)
    found = tilt_statistics(crops / TILT_UNIT)
    assert found["correlation_1"] == pytest.approx(math.exp(-1 / 4), abs=0.02)
    assert found["correlation_4"] == pytest.approx(math.exp(-4), abs=0.02)
    assert 0.35 < found["std"] < 0.6
