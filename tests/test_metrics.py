import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastem.metrics import (
    align,
    chi2,
    fourier_shift,
    kernel_correlation,
    kernel_error,
    kernel_mse,
    psnr,
    psnr_aligned,
    reblur_loss,
    ssim,
)
from fastem.synth import degrade, motion_kernel


def scene(size=96, channels=3, seed=0):
    """Random boxes, blurred a little so that it is band-limited: edges and flat parts, `(C, H, W)` float64."""
    rng = np.random.default_rng(seed)
    x = np.full((channels, size, size), 0.5)
    for _ in range(40):
        top, left = rng.integers(0, size, 2)
        h, w = rng.integers(4, size // 3, 2)
        x[:, top : top + h, left : left + w] = rng.random((channels, 1, 1))
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    return torch.from_numpy(np.fft.irfft2(np.fft.rfft2(x) * np.exp(-20 * f**2), s=(size, size)))


# -------------------------------------------------------------------------------------------------- images


def test_psnr_by_hand():
    a = np.zeros((4, 4, 3))
    assert psnr(a, a + 0.1) == pytest.approx(20)
    assert psnr(a, a + 25.5, data_range=255) == pytest.approx(20)
    assert psnr(a, a) == math.inf
    assert psnr(np.zeros((4, 4), np.uint8), np.full((4, 4), 51, np.uint8)) == pytest.approx(20 * math.log10(5))


def test_kinds_of_array_agree():
    x, y = scene(48), scene(48, seed=1)
    for score in (psnr, ssim, psnr_aligned):
        assert score(x, y) == pytest.approx(score(x.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy()), abs=1e-12)
        assert score(x, y) == pytest.approx(score(x.numpy(), y), abs=1e-12)


def slow_ssim(a, b):
    """The definition, window by window, of one channel."""
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weight = np.outer(g, g) / g.sum() ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq, c = (
                (weight * (p - mp) ** 2).sum(),
                (weight * (q - mq) ** 2).sum(),
                (weight * (p - mp) * (q - mq)).sum(),
            )
            values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return np.mean(values)


def test_ssim_is_the_definition():
    x = scene(24)
    y = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    expected = np.mean([slow_ssim(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)])
    assert ssim(x, y) == pytest.approx(expected, abs=1e-10)
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, 1 - x) < 0.5


@settings(max_examples=15, deadline=None)
@given(rows=st.floats(-6, 6), cols=st.floats(-6, 6), gain=st.floats(0.7, 1.3), seed=st.integers(0, 5))
def test_alignment_finds_shift_and_gain(rows, cols, gain, seed):
    x = scene(seed=seed)
    noise = 0.005 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    found = align(fourier_shift(x, (rows, cols)) / gain + noise, x, max_shift=8)
    assert found.shift == pytest.approx((rows, cols), abs=0.05)
    assert found.gain == pytest.approx(gain, rel=0.01)
    assert found.psnr > 40


def test_alignment_does_not_look_beyond_max_shift():
    x = scene()
    moved = fourier_shift(x, (7.0, 0.0))
    found = align(moved, x, max_shift=4)
    assert max(map(abs, found.shift)) <= 4
    assert found.psnr < align(moved, x, max_shift=8).psnr - 20


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100), max_shift=st.floats(0, 16))
def test_alignment_never_lowers_psnr(seed, max_shift):
    a, b = scene(64, 1, seed), scene(64, 1, seed + 1)
    border = 16
    inside = (slice(None), slice(border, -border), slice(border, -border))
    assert psnr_aligned(a, b, max_shift=max_shift, border=border) >= psnr(a[inside], b[inside]) - 1e-9


def test_constant_images_can_be_aligned():
    """No slope, so no shift: the system of the Gauss-Newton step is singular."""
    found = align(np.full((40, 40), 0.4), np.full((40, 40), 0.5), max_shift=4)
    assert found.gain == pytest.approx(1.25) and found.psnr > 100


def test_border_is_left_out():
    x = scene()
    spoilt = x.clone()
    spoilt[..., :5, :] = 0
    assert psnr_aligned(spoilt, x, max_shift=2, border=5) > 100
    assert psnr_aligned(spoilt, x, max_shift=2, border=4) < 60


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(2, 12), st.integers(2, 12)), shift=st.tuples(st.integers(-5, 5), st.integers(-5, 5)))
def test_whole_shifts_are_rolls(size, shift):
    x = torch.from_numpy(np.random.default_rng(0).random(size))
    torch.testing.assert_close(fourier_shift(x, shift), x.roll(shift, dims=(0, 1)))


def test_mismatched_images_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) and \(5, 4\)"):
        psnr(np.zeros((4, 4)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(np.zeros((10, 20)), np.zeros((10, 20)))
    with pytest.raises(ValueError, match="nothing inside a border of 16"):
        psnr_aligned(np.zeros((32, 64)), np.zeros((32, 64)))
    with pytest.raises(TypeError, match="numpy.asarray"):
        psnr([[0.0]], [[0.0]])
    with pytest.raises(ValueError, match="not finite"):
        psnr(np.full((4, 4), np.nan), np.zeros((4, 4)))
    with pytest.raises(ValueError, match="empty"):
        psnr(np.zeros((0, 4)), np.zeros((0, 4)))


# ------------------------------------------------------------------------------------------------- kernels


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.floats(-5, 5), cols=st.floats(-5, 5))
def test_kernel_scores_ignore_shifts(seed, rows, cols):
    k = torch.from_numpy(np.pad(motion_kernel(21, seed), 8)).double()
    smooth = torch.fft.irfft2(torch.fft.rfft2(k) * torch.exp(-16 * torch.fft.rfftfreq(37) ** 2), s=k.shape)
    smooth = torch.fft.irfft2(torch.fft.rfft2(smooth) * torch.exp(-16 * torch.fft.fftfreq(37)[:, None] ** 2), s=k.shape)
    moved = fourier_shift(smooth, (rows, cols))
    assert kernel_error(moved, smooth) < 0.01
    assert kernel_mse(moved, smooth) < 1e-6
    assert kernel_correlation(moved, smooth) > 0.9  # whole pixels only
    assert kernel_correlation(fourier_shift(smooth, (round(rows), round(cols))), smooth) == pytest.approx(1)


def test_kernel_scores_by_hand():
    k, delta = motion_kernel(33, 0), motion_kernel(33, 0, "delta")
    assert kernel_error(np.zeros_like(k), k) == pytest.approx(1)
    assert kernel_mse(np.zeros_like(k), k) == pytest.approx((k.astype(float) ** 2).mean())
    assert kernel_mse(k, delta, align=False) == pytest.approx(((k.astype(float) - delta) ** 2).mean())
    assert kernel_correlation(delta, k) == pytest.approx(k.max() / np.linalg.norm(k))
    assert kernel_correlation(np.zeros_like(k), k) == 0
    rolled = np.roll(k, 3, axis=1)
    assert kernel_mse(rolled, k) < 1e-12 < kernel_mse(rolled, k, align=False)


@settings(max_examples=20, deadline=None)
@given(a=st.integers(0, 500), b=st.integers(0, 500), size=st.sampled_from([9, 16, 33]))
def test_kernel_alignment_only_helps(a, b, size):
    k, k_true = motion_kernel(size, a), motion_kernel(size, b, "gp")
    assert kernel_mse(k, k_true) <= kernel_mse(k, k_true, align=False) + 1e-12
    assert 0 <= kernel_correlation(k, k_true) <= 1 + 1e-9


def test_kernel_metrics_accept_batches_of_one_and_refuse_other_sizes():
    k = torch.from_numpy(motion_kernel(9, 0))
    assert kernel_mse(k[None, None], k.numpy()) == 0
    with pytest.raises(ValueError, match="zero-pad the smaller"):
        kernel_mse(k, np.ones((11, 11)))
    with pytest.raises(ValueError, match=r"\(h, w\) or \(1, 1, h, w\)"):
        kernel_correlation(torch.zeros(2, 1, 9, 9), torch.zeros(2, 1, 9, 9))


# -------------------------------------------------------------------------------------------------- reblur


@pytest.mark.parametrize("size", [(9, 9), (8, 6)], ids=str)
def test_reblurring_the_truth_leaves_the_noise(size):
    x, sigma = scene().permute(1, 2, 0).numpy(), 5 / 255
    k = np.random.default_rng(0).random(size) ** 4  # far from symmetric
    k = k / k.sum()
    y = degrade(x, k, sigma, seed=0)
    assert chi2(y, x, k, sigma) == pytest.approx(1, abs=0.03)
    assert reblur_loss(y, x, k, sigma) == pytest.approx(0, abs=0.03 * sigma**2)
    assert chi2(y, x, motion_kernel(33, 6), sigma) > 1.2
    assert chi2(y, x, k[::-1, ::-1], sigma) > 1.02


def test_reblur_border_and_errors():
    x, k = scene().numpy(), motion_kernel(9, 0)
    y = degrade(torch.from_numpy(x), k, 0, 0).double()
    y[..., :3, :] = 9
    assert reblur_loss(y, x, k, 0, border=3) == pytest.approx(0, abs=1e-12)
    assert reblur_loss(y, x, k, 0) > 1
    with pytest.raises(ValueError, match="sigma, which must be > 0"):
        chi2(y, x, k, 0)
    with pytest.raises(ValueError, match="larger than the image"):
        chi2(y[..., :5], x[..., :5], k, 0.1)
