"""The first kernel: found on images with strong edges, for any size of image and support."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastem import ops
from fastem.initial import CoarseToFine, centre, centre_by_pixels, difference_spectra, fit_on_simplex, shrink
from fastem.metrics import fourier_shift, kernel_correlation, kernel_error
from fastem.operators import Canvas, blur
from fastem.synth import degrade, motion_kernel


def edges(height, width, seed, channels=3):
    """`(1, C, H, W)` float32: random rectangles."""
    rng = np.random.default_rng(seed)
    x = torch.full((1, channels, height, width), 0.5)
    for _ in range(25):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        down, across = rng.integers(4, height // 2), rng.integers(4, width // 2)
        colour = torch.tensor(rng.uniform(0.05, 0.95, channels), dtype=torch.float32)
        x[..., top : top + down, left : left + across] = colour[:, None, None]
    return x


def assert_kernel(k, size):
    assert tuple(k.shape[1:]) == (1, *size) and torch.isfinite(k).all() and (k >= 0).all()
    torch.testing.assert_close(k.sum((-2, -1)), torch.ones(k.shape[0], 1, dtype=k.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image", [(64, 64), (80, 56), (61, 75)], ids=str)
@pytest.mark.parametrize("size", [9, 12], ids=str)
def test_finds_the_kernel(image, size):
    for seed in (1, 2):
        k_true = motion_kernel(size, seed)
        y = degrade(edges(*image, seed), k_true, 0.0, 0)
        k = CoarseToFine()(y, (size, size))
        assert_kernel(k, (size, size))
        delta = torch.zeros_like(k)
        delta[..., size // 2, size // 2] = 1
        found, no_blur = (kernel_correlation(guess[0, 0], k_true) for guess in (k, delta))
        assert found > 0.8 and found > no_blur + 0.05


def test_finds_a_rectangular_kernel_across_a_border():
    """A photo, not periodic: on a canvas, with the kernel known to lie within 5 x 11 pixels."""
    rows, cols = torch.meshgrid(torch.linspace(-1, 1, 5), torch.arange(11.0), indexing="ij")
    k_true = torch.exp(-8 * (rows - (cols - 5) / 8) ** 2)[None, None]
    k_true = k_true / k_true.sum()
    photo = blur(edges(96, 112, 4), k_true)[..., 8:80, 8:104]
    canvas = Canvas.around((72, 96), (11, 11))
    k = CoarseToFine()(canvas.extend(photo), (5, 11), canvas)
    assert_kernel(k, (5, 11))
    assert kernel_correlation(k[0, 0], k_true[0, 0]) > 0.8


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 3), (2, 2), (4, 6), (3, 9), (16, 16), (15, 19)], ids=str)
def test_any_support(size):
    y = degrade(edges(16, 19, 0), motion_kernel(3, 0), 0.0, 0)
    k = CoarseToFine()(y, size)
    assert_kernel(k, size)
    off = ops.centre_of_mass(k)[0] - torch.tensor([n // 2 for n in size])
    assert (off.abs() <= 0.5 + 1e-4).all() or max(size) > 9  # half a pixel; a kernel as wide as the image may wrap


@pytest.mark.parametrize("size", [(9, 9), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_image_without_edges_still_gives_a_kernel(name, level, size, request):
    """Constant, or a slope too gentle to count: there is nothing to fit, next to an image where there is."""
    if name == "native":
        request.getfixturevalue("native_backend")
    y = torch.full((3, 3, 24, 20), level)
    y[1] = edges(24, 20, 0)
    y[2] += 0.01 * torch.sin(torch.arange(20) * math.pi / 10)
    with ops.use_backend(name):
        assert_kernel(CoarseToFine()(y, size), size)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_image_does_not_see_its_company(name, request):
    """Bit for bit whatever the other image is, odd sizes too; in the other place of the batch up to rounding."""
    if name == "native":
        request.getfixturevalue("native_backend")
    mine, others = edges(32, 27, 0), [edges(32, 27, 1), edges(32, 27, 2), 5 * edges(32, 27, 3)]
    with ops.use_backend(name):
        first = [CoarseToFine()(torch.cat([mine, other]), (7, 7))[0] for other in others]
        last = [CoarseToFine()(torch.cat([other, mine]), (7, 7))[1] for other in others]
    assert all(torch.equal(first[0], k) for k in first) and all(torch.equal(last[0], k) for k in last)
    torch.testing.assert_close(first[0], last[0], rtol=0, atol=1e-5)
    assert not torch.equal(first[0], CoarseToFine()(torch.cat([others[0], others[1]]), (7, 7))[0])


@given(st.integers(1, 129), st.integers(1, 129))
def test_scales_end_at_the_full_size(h, w):
    scales = CoarseToFine().scales((h, w))
    assert scales[-1] == (h, w) and max(scales[0]) <= max(5, min(h, w) if max(h, w) <= 5 else 5)
    for small, large in zip(scales, scales[1:], strict=False):
        assert all(1 <= a <= b for a, b in zip(small, large, strict=True)) and small != large
        assert all(a % 2 == 1 or a == b for a, b in zip(small, large, strict=True))


# --------------------------------------------------------------------------------------------------- parts


def test_fit_on_simplex_recovers_the_kernel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 24, 25, generator=generator, dtype=torch.float64)
    k_true = torch.rand(2, 1, 4, 5, generator=generator, dtype=torch.float64) ** 3
    k_true = k_true / k_true.sum((-2, -1), keepdim=True)
    X, Y = torch.fft.rfft2(x), torch.fft.rfft2(blur(x, k_true))
    start = torch.full_like(k_true, 1 / 20)
    k = fit_on_simplex(X.conj() * Y, X.abs() ** 2, start, (24, 25), ridge=0.0, num_iters=400)
    torch.testing.assert_close(k, k_true, rtol=0, atol=1e-4)
    smooth = fit_on_simplex(X.conj() * Y, X.abs() ** 2, start, (24, 25), ridge=10.0, num_iters=400)
    assert (smooth.square().sum((-2, -1)) < 0.7 * k_true.square().sum((-2, -1))).all()  # the ridge flattens


def test_difference_spectra_are_forward_differences():
    x = torch.rand(1, 1, 6, 7, dtype=torch.float64)
    X = torch.fft.rfft2(x)
    Dy, Dx = difference_spectra((6, 7), X)
    assert Dy.shape == (6, 1) and Dx.shape == (1, 4) and Dy.dtype == torch.complex128
    for D, dim in ((Dy, -2), (Dx, -1)):
        torch.testing.assert_close(torch.fft.irfft2(D * X, s=(6, 7)), x.roll(-1, dim) - x, rtol=0, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.data())
def test_shrink_keeps_low_frequencies(height, width, data):
    shape = tuple(data.draw(st.integers(3, n)) for n in (height, width))

    def wave(h, w):
        rows, cols = torch.arange(h, dtype=torch.float64)[:, None] / h, torch.arange(w, dtype=torch.float64) / w
        return 0.4 + torch.cos(2 * math.pi * rows + 0.3) * torch.sin(2 * math.pi * cols + 0.5)

    torch.testing.assert_close(shrink(wave(height, width)[None, None], shape)[0, 0], wave(*shape), rtol=0, atol=1e-12)
    full = torch.rand(1, 2, height, width, dtype=torch.float64)
    assert torch.equal(shrink(full, (height, width)), full)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(-4, 4), st.integers(-4, 4))
def test_centre_by_pixels(h, w, down, across):
    k = torch.zeros(1, 1, h, w, dtype=torch.float64)
    k[..., h // 2, w // 2] = 1
    moved = k.roll((down, across), (-2, -1))
    assert torch.equal(centre_by_pixels(moved), k)
    torch.testing.assert_close(centre(moved), k, rtol=0, atol=1e-12)  # whole pixels are exact: a delta stays one
    nothing = centre_by_pixels(torch.zeros_like(k))
    assert torch.equal(nothing, torch.zeros_like(k))


@pytest.mark.parametrize("family", ["shake", "boracchi"])
def test_centred_by_fractions_of_pixels(family):
    """A kernel that was moved by a fraction comes back, and much nearer than by whole pixels."""
    k = torch.stack([torch.from_numpy(motion_kernel(33, seed, family))[None] for seed in range(4)]).double()
    k = torch.nn.functional.avg_pool2d(k, 3, 1, 1)  # smooth enough for its grid
    by = (2.3, -1.15), (2.4, -1.3), (1.6, 0.45), (-0.5, 0.25)
    moved = torch.cat([fourier_shift(one[None], u) for one, u in zip(k, by, strict=True)]).clamp(min=0)
    found = centre(moved)
    off = ops.centre_of_mass(found) - 16
    assert off.abs().max() < 0.1 and found.min() >= 0
    torch.testing.assert_close(found.sum((-2, -1)), torch.ones(4, 1, dtype=torch.float64))
    for one, truth, whole in zip(found, k, centre_by_pixels(moved), strict=True):
        assert kernel_error(one[0], truth[0]) < 0.02
        assert (one - truth).norm() < (whole - truth).norm() / 2
