"""Adapters to eps = model(x_t, t): each against the formula it stands for."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastem.models import (
    DenoiserEps,
    EpsModel,
    ErrorSpectrum,
    GaussianEps,
    NaturalConfig,
    NaturalPrior,
    TiledEps,
    UNetEps,
    alpha_bar,
)
from fastem.models.eps import mirror_pad
from fastem.models.unet import UNet, UNetConfig
from fastem.schedules import Schedule, time_of_sigma


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(net, std=0.1):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net.eval().requires_grad_(False)


# --- noise levels ---------------------------------------------------------------------------------------------


def test_alpha_bar_at_and_between_steps():
    steps = torch.arange(1000)
    assert torch.allclose(alpha_bar(steps), torch.from_numpy(Schedule.linear().alphas_cumprod), rtol=1e-13, atol=0)
    assert alpha_bar(500) > alpha_bar(500.3) > alpha_bar(501)
    assert alpha_bar(-5) == alpha_bar(0) and alpha_bar(2000.0) == alpha_bar(999)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 3.0, 100.0])
def test_alpha_bar_inverts_time_of_sigma(sigma):
    ab = alpha_bar(time_of_sigma(sigma)).item()
    assert math.sqrt((1 - ab) / ab) == pytest.approx(sigma, rel=1e-9)


def test_r2_default_and_table():
    model = EpsModel(3)
    assert model.r2(0.5) == pytest.approx(0.125)
    model = EpsModel(3, r2=[[0.1, 1e-3], [1.0, 1e-1]])
    assert model.r2(0.1) == pytest.approx(1e-3) and model.r2(1.0) == pytest.approx(1e-1)
    assert model.r2(10**-0.5) == pytest.approx(1e-2)  # straight in log-log
    assert model.r2(0.01) == pytest.approx(1e-5) and model.r2(50.0) == pytest.approx(1e-1)
    assert model.error_spectrum(0.5) == EpsModel(3).error_spectrum(0.5) == ErrorSpectrum(0.25)  # the noise
    unequal = [[0.1, 0.2, 0.3]], [[0.1, 0.2, 0.3, 0.0]]
    for bad in ([], [[0.1]], *unequal, [[0.2, 1.0], [0.1, 1.0]], [[0.1, -1.0]], [[0.1, math.nan]]):
        with pytest.raises(ValueError, match="sigma ascending"):
            EpsModel(3, r2=bad)


def test_error_spectrum_of_the_table():
    model = EpsModel(3, r2=[[0.1, 1e-3, 0.1, 1.5], [1.0, 1e-1, 0.001, 2.5]])
    assert model.r2(0.1) == pytest.approx(1e-3)
    assert model.error_spectrum(10**-0.5) == pytest.approx((0.1, 0.01, 2.0))
    assert model.error_spectrum(0.01) == pytest.approx((1e-4, 0.1, 1.5))
    assert model.error_spectrum(5.0) == pytest.approx((25, 0.001, 2.5))
    spectrum = ErrorSpectrum(4.0, 0.1, 2.0)
    assert spectrum.at(np.array([0, 0.1, 0.3])) == pytest.approx([4, 2, 0.4])
    assert ErrorSpectrum(4.0).at(np.array([0, 0.5])) == pytest.approx(4)


# --- U-Net ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    return randomised(UNet(UNetConfig((32, 32, 32), 32, num_head_channels=16, attention_levels=(1,))))


def test_variance_channels_are_dropped(unet):
    x, t = randn(2, 3, 16, 24, dtype=torch.float32), torch.tensor([3.0, 400.5])
    eps = UNetEps(unet)(x, t)
    assert eps.std() > 0 and torch.equal(eps, unet(x, t)[:, :3])


@pytest.mark.parametrize("size", [(1, 5), (3, 17), (15, 16), (16, 33)], ids=str)
def test_any_size_by_mirrored_borders(unet, size):
    x = randn(1, 3, *size, dtype=torch.float32)
    eps = UNetEps(unet)(x, 10)
    assert eps.shape == x.shape
    padded = mirror_pad(x, *(side + -side % 4 for side in size))
    assert torch.equal(eps, unet(padded, 10)[:, :3, : size[0], : size[1]])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_mirror_pad_is_symmetric_continuation(height, width, bottom, right):
    x = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    padded = mirror_pad(x, height + bottom, width + right)

    def source(i, length):  # ... 2 1 0 | 0 1 2 ... L-1 | L-1 ... 1 0 | 0 1 ...
        i = i % (2 * length)
        return torch.where(i < length, i, 2 * length - 1 - i)

    rows, columns = source(torch.arange(height + bottom), height), source(torch.arange(width + right), width)
    assert torch.equal(padded, x[..., rows[:, None], columns])


def test_output_channels_must_be_eps_or_eps_and_variances():
    with pytest.raises(ValueError, match="twice as many"):
        UNetEps(UNet(UNetConfig((32,), 32, in_channels=3, out_channels=5, num_head_channels=32)))


# --- denoisers ------------------------------------------------------------------------------------------------


class GaussianDenoiser(nn.Module):
    """The best denoiser of white Gaussian images: mean + v / (v + sigma^2) (x - mean)."""

    config = SimpleNamespace(channels=3)

    def __init__(self, mean, variance):
        super().__init__()
        self.mean, self.variance = mean, variance

    def forward(self, x, sigma):
        return self.mean + self.variance / (self.variance + sigma.view(-1, 1, 1, 1) ** 2) * (x - self.mean)


def test_denoiser_becomes_the_exact_eps():
    mean = 0.3 * randn(3, 4, 6)
    x, t = randn(4, 3, 4, 6, seed=1), torch.tensor([0.0, 10.25, 500.0, 999.0], dtype=torch.float64)
    exact = GaussianEps(mean, 0.2)(x, t)
    assert torch.allclose(DenoiserEps(GaussianDenoiser(mean, 0.2))(x, t), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (13, 9)], ids=str)
def test_natural_prior_predicts_what_its_denoiser_does(size):
    prior = randomised(NaturalPrior(NaturalConfig(widths=(8, 12), num_blocks=1, embedding=8))).double()
    x, t = randn(2, 3, *size), torch.tensor([20.0, 700.7], dtype=torch.float64)
    model = DenoiserEps(prior)
    assert model.channels == 3
    ab = alpha_bar(t).view(-1, 1, 1, 1)
    x0_hat = (x - (1 - ab).sqrt() * model(x, t)) / ab.sqrt()  # Eq. (12)
    denoised = prior(x / ab.sqrt(), ((1 - ab) / ab).sqrt().flatten())
    assert (denoised - x).abs().max() > 0.1 and torch.allclose(x0_hat, denoised, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(x, 20.0)[:1], model(x, t)[:1])


# --- tiles ----------------------------------------------------------------------------------------------------


class Pixelwise(EpsModel):
    """Depends on nothing but the pixel and t: tiles must not change it."""

    def forward(self, x_t, t):
        return torch.sin(3 * x_t) + t.view(-1, 1, 1, 1) / 1000


class Local(EpsModel):
    """A 3x3 convolution that sees zeros beyond the border, as networks do, and records its batch sizes."""

    def __init__(self, size=None):
        super().__init__(3, image_size=size)
        self.batches = []
        self.register_buffer("weight", randn(3, 3, 3, 3, seed=5))

    def forward(self, x_t, t):
        assert self.image_size in (None, x_t.shape[-1]) and len(t) == len(x_t)
        self.batches.append(len(x_t))
        return torch.tanh(F.conv2d(x_t, self.weight, padding=1)) + t.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("tile, overlap", [(16, 4), (16, 0), (16, 15), (256, 64)], ids=str)
def test_tile_weights_are_a_partition_of_unity(tile, overlap):
    tiled = TiledEps(Pixelwise(3), tile, overlap)
    for length in range(tile, 6 * tile, max(1, tile // 16)):
        total, windows = torch.zeros(length, dtype=torch.float64), tiled.windows(length)
        for start, weight in windows:
            assert 0 <= start <= length - tile and weight.shape == (tile,) and (weight >= 0).all()
            total[start : start + tile] += weight
        assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-12)
        shared = [a + tile - b for (a, _), (b, _) in zip(windows, windows[1:], strict=False)]
        assert all(s >= overlap for s in shared)
        if overlap:  # no seam: weights change by no more than the steepest step of the cosine, about
            steepest = torch.stack([F.pad(w, (s, length - tile - s)) for s, w in windows]).diff().abs().max()
            assert steepest <= 1.5 * math.sin(math.pi / 2 / overlap)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 12), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_tiles_leave_a_pixelwise_network_unchanged(height, width, overlap, batch):
    x, t = randn(2, 3, height, width), torch.tensor([7.0, 300.5], dtype=torch.float64)
    tiled = TiledEps(Pixelwise(3), tile=16, overlap=overlap, batch=batch)
    assert torch.allclose(tiled(x, t), Pixelwise(3)(x, t), rtol=1e-12, atol=1e-12)


def test_tiles_of_a_local_network_show_no_seams():
    x = randn(1, 3, 64, 96)  # cut exactly where tiles without overlap meet
    plain = Local()(x, torch.tensor([9.0], dtype=torch.float64))
    error = {overlap: (TiledEps(Local(32), 32, overlap)(x, 9.0) - plain).abs() for overlap in (0, 16)}
    assert error[0].max() > 0.1, "tiles without overlap must show that this test sees seams"
    assert error[16].max() < 0.01
    assert (error[16] > 1e-9).double().mean() < 0.2  # the rest is equal


@pytest.mark.parametrize("size", [(40, 25), (9, 16), (50, 7)], ids=str)
def test_gradient_through_tiles(size):
    tiled = TiledEps(Local(16), tile=16, overlap=6, batch=3)
    x, v, t = randn(2, 3, *size).requires_grad_(), randn(2, 3, *size, seed=1), randn(2).abs()
    (gradient,) = torch.autograd.grad(tiled(x, t), x, v)

    def plainly(x):  # the definition, recorded by autograd as a whole
        padded = mirror_pad(x, max(size[0], 16), max(size[1], 16))
        eps = torch.zeros_like(padded)
        for i, w_i in tiled.windows(padded.shape[-2]):
            for j, w_j in tiled.windows(padded.shape[-1]):
                tile = tiled.model(padded[..., i : i + 16, j : j + 16], t) * torch.outer(w_i, w_j)
                eps = eps + F.pad(tile, (j, padded.shape[-1] - 16 - j, i, padded.shape[-2] - 16 - i))
        return eps[..., : size[0], : size[1]]

    assert torch.allclose(tiled(x, t), plainly(x), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(plainly(x), x, v)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-10)


def test_memory_is_bounded_and_rows_do_not_meet():
    net = Local(16)
    tiled = TiledEps(net, tile=16, overlap=4, batch=4)
    x, t = randn(3, 3, 50, 50, dtype=torch.float32).requires_grad_(), torch.tensor([1.0, 2.0, 3.0])
    net.float()
    together = tiled(x, t)
    assert set(net.batches) == {4}  # 16 tiles per image
    with torch.no_grad():
        assert torch.equal(tiled(x[1:2], t[1:2]), together[1:2])
    net.batches.clear()
    torch.autograd.grad(together.sum(), x)
    assert set(net.batches) == {4} and len(net.batches) == 12


def test_tiled_passes_on_what_the_model_knows():
    model = Pixelwise(3, image_size=256, r2=[[0.1, 1e-3]])
    model.sha256 = "abc"
    tiled = TiledEps(model)
    assert (tiled.channels, tiled.image_size, tiled.sha256, tiled.r2(0.1)) == (3, None, "abc", model.r2(0.1))
    assert tiled.error_spectrum(0.1) == model.error_spectrum(0.1)
    with pytest.raises(ValueError, match="overlap < tile"):
        TiledEps(model, tile=64, overlap=64)


# --- the oracle -----------------------------------------------------------------------------------------------


def half_spectrum_power(channels, height, width):
    """A positive spectrum, symmetric where the half spectrum holds both of a mirrored pair."""
    noise = randn(channels, height, width, seed=3)
    return torch.fft.rfft2(noise).abs() ** 2 / (height * width) + 0.05


@pytest.mark.parametrize("size", [(2, 4, 6), (1, 5, 7), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("t", [0.0, 37.5, 600.0, 999.0])
def test_gaussian_eps_matches_a_dense_solve(size, t):
    numel, mean = math.prod(size), 0.5 * randn(*size)
    prior = GaussianEps(mean, half_spectrum_power(*size))
    basis = torch.eye(numel, dtype=torch.float64).view(numel, *size)
    S = torch.fft.irfft2(torch.fft.rfft2(basis) * prior.power, s=size[1:]).reshape(numel, numel)
    assert torch.allclose(S, S.T) and torch.linalg.eigvalsh(S).min() > 0
    x, ab = randn(2, *size, seed=4), alpha_bar(t).item()
    centred = (x - math.sqrt(ab) * mean).reshape(2, numel)
    covariance = ab * S + (1 - ab) * torch.eye(numel, dtype=torch.float64)
    expected = math.sqrt(1 - ab) * torch.linalg.solve(covariance, centred.T).T.view_as(x)
    assert torch.allclose(prior(x, t), expected, rtol=1e-9, atol=1e-11)

    sigma = math.sqrt((1 - ab) / ab)  # posterior of x_0 given x_0 + sigma noise
    posterior = S - S @ torch.linalg.solve(S + sigma**2 * torch.eye(numel, dtype=torch.float64), S)
    assert prior.r2(sigma) == pytest.approx(posterior.diagonal().mean().item(), rel=1e-8)


def test_gaussian_eps_is_differentiable_in_x_and_t():
    prior = GaussianEps(0.2 * randn(2, 4, 5), half_spectrum_power(2, 4, 5))
    x, t = randn(2, 2, 4, 5).requires_grad_(), torch.tensor([300.25, 20.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(prior, (x, t), eps=1e-5, atol=1e-6)


def test_gaussian_samples_have_the_power_of_the_prior():
    prior = GaussianEps(0.2 * randn(1, 8, 10), half_spectrum_power(1, 8, 10))
    x = prior.sample(4000, torch.Generator().manual_seed(0)) - prior.mean
    power = torch.fft.rfft2(x, norm="ortho").abs().square().mean(0)
    assert torch.allclose(power, prior.power, rtol=0.15)
    with pytest.raises(ValueError, match=">= 0"):
        GaussianEps(prior.mean, -1.0)
    with pytest.raises(ValueError, match="images"):
        prior(torch.zeros(1, 1, 8, 9), 0)
