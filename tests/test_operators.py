"""The blur, its adjoint and the canvas, for odd and even sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastem import ops
from fastem.operators import Canvas, Observation, blur, blur_adjoint, fast_size
from fastem.ops import reference

SIZES = st.integers(1, 70)
KERNELS = [(1, 1), (3, 5), (4, 4), (8, 8), (5, 2), (9, 12)]


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernels(batch, h, w, seed=1):
    k = uniform(batch, 1, h, w, seed=seed)
    return k / k.sum((-2, -1), keepdim=True)


@pytest.mark.parametrize("ksize", KERNELS, ids=str)
@pytest.mark.parametrize("size", [(9, 12), (16, 13)], ids=str)
def test_blur_is_a_sum_of_shifts(ksize, size):
    """`(k (*) x)(p) = sum_q k(q) x(p - q + origin)`, circular, without any FFT."""
    x, k = uniform(2, 3, *size), kernels(2, *ksize)
    h, w = ksize
    expected = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            expected += k[:, :, i, j, None, None] * x.roll((i - h // 2, j - w // 2), dims=(-2, -1))
    torch.testing.assert_close(blur(x, k), expected, rtol=0, atol=1e-14)
    particles = torch.stack([x, x.flip(-1)], dim=1)
    torch.testing.assert_close(blur(particles, k)[:, 0], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(blur_adjoint(particles, k)[:, 0], blur_adjoint(x, k), rtol=0, atol=1e-14)


def gap(adjoint, ksize, size=(16, 13)) -> float:
    """|<H x, y> - <x, H^T y>| relative to |<H x, y>|."""
    x, y, k = uniform(2, 3, *size, seed=2) - 0.5, uniform(2, 3, *size, seed=3) - 0.5, kernels(2, *ksize)
    left, right = (blur(x, k) * y).sum(), (x * adjoint(y, k)).sum()
    return float((left - right).abs() / left.abs())


@pytest.mark.parametrize("ksize", KERNELS, ids=str)
def test_adjoint(ksize):
    assert gap(blur_adjoint, ksize) < 1e-12


@pytest.mark.parametrize("ksize", KERNELS, ids=str)
def test_flipping_the_kernel_is_the_adjoint_for_odd_sizes_only(ksize):
    flipped = gap(lambda y, k: blur(y, k.flip(-2, -1)), ksize)
    assert flipped < 1e-12 if all(n % 2 for n in ksize) else flipped > 1e-2


def test_a_kernel_larger_than_the_image_is_refused():
    for operator in (blur, blur_adjoint):
        for ksize in ((9, 3), (3, 9)):
            with pytest.raises(ValueError, match=f"kernel {ksize[0]}x{ksize[1]} is larger than the image 8x8"):
                operator(uniform(1, 1, 8, 8), kernels(1, *ksize))


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES)
def test_canvas_keeps_the_image_and_joins_its_borders(height, width, down, across):
    y = uniform(1, 2, height, width, seed=height)
    canvas = Canvas.around((height, width), (down, across))
    assert canvas.height >= height + down and canvas.width >= width + across and not canvas.periodic
    extended = canvas.extend(y)
    assert extended.shape == (1, 2, canvas.height, canvas.width)
    assert torch.equal(canvas.crop(extended), y)
    for dim, size in ((-2, height), (-1, width)):
        margin = extended.shape[dim] - size
        own = (y.diff(dim=dim).abs().max() if size > 1 else 0) + math.pi / 2 / (margin + 1) * (y.max() - y.min())
        border = (extended - extended.roll(1, dim)).abs()  # also across the period
        assert border.max() <= own + 1e-12, "the join is steeper than the image and the fade together"
    assert extended.min() >= y.min() - 1e-12 and extended.max() <= y.max() + 1e-12


def test_without_a_canvas_a_ramp_jumps():
    """Negative control of the continuity above: the period of a bare ramp has a jump, that of its canvas none."""
    y = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    extended = Canvas.around((64, 64), (32, 32)).extend(y)
    assert (y - y.roll(1, -1)).abs().max() == 1
    assert (extended - extended.roll(1, -1)).abs().max() < 0.06


@given(SIZES, SIZES)
def test_no_margin_is_no_canvas(height, width):
    canvas, y = Canvas(height, width, (height, width)), uniform(1, 1, height, width)
    assert canvas.periodic and torch.equal(canvas.extend(y), y)
    assert Observation.of(y, 0.1, canvas).canvas is None


@given(st.integers(1, 5000), st.sampled_from([1, 2, 8, 16]))
def test_fast_size(n, multiple):
    size = fast_size(n, multiple)
    assert n <= size < 2 * n + 2 * multiple and size % multiple == 0
    for p in (2, 3, 5, 7):
        while size % p == 0:
            size //= p
    assert size == 1


def test_inside_marks_pixels_away_from_the_edge():
    canvas = Canvas(16, 16, (10, 8))
    mask = canvas.inside((2, 3), uniform(1))
    assert mask.shape == (16, 16) and mask[2:8, 3:5].all() and mask.sum() == 6 * 2
    assert canvas.inside((6, 0), uniform(1)).sum() == 0  # nothing is that far from the edge
    assert canvas.inside((0, 0), uniform(1)).sum() == 80


@pytest.mark.parametrize("ksize", [(3, 3), (4, 6)], ids=str)
def test_the_margin_was_not_measured(ksize):
    y, k, canvas = uniform(2, 3, 12, 15), kernels(2, *ksize), Canvas(24, 32, (12, 15))
    observation = Observation.of(canvas.extend(y), 0.1, canvas)
    x = uniform(2, 4, 3, 24, 32, seed=5)
    K = ops.psf_to_otf(k, observation.size)
    residual = torch.fft.irfft2(observation.residual(torch.fft.rfft2(x), K), s=observation.size)
    torch.testing.assert_close(canvas.crop(residual), y[:, None] - canvas.crop(blur(x, k)), rtol=0, atol=1e-13)
    residual[..., :12, :15] = 0
    assert residual.abs().max() < 1e-13
    everywhere = Observation.of(canvas.extend(y), 0.1).residual(torch.fft.rfft2(x), K)
    expected = canvas.extend(y)[:, None] - blur(x, k)
    torch.testing.assert_close(torch.fft.irfft2(everywhere, s=observation.size), expected, rtol=0, atol=1e-13)


def test_observation():
    y = uniform(3, 1, 6, 7).float()
    observation = Observation.of(y, 0.1)
    assert observation.sigma.shape == (3,) and observation.size == (6, 7)
    assert observation.Y is observation.Y  # once for a whole trajectory
    torch.testing.assert_close(observation.Y, torch.fft.rfft2(y))
    sigma = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(Observation.of(y, sigma).sigma, sigma)
    for wrong in (0, -0.1, math.nan, torch.tensor([0.1, 0.0, 0.1])):
        with pytest.raises(ValueError, match="sigma must be > 0"):
            Observation.of(y, wrong)


def test_a_delta_at_the_origin_is_no_blur():
    """A delta at `(h // 2, w // 2)` is the identity for every parity."""
    for h in range(1, 6):
        for w in range(1, 6):
            k = torch.zeros(1, 1, h, w, dtype=torch.float64)
            k[..., h // 2, w // 2] = 1
            one = torch.ones(1, 1, 6, 4, dtype=torch.complex128)
            torch.testing.assert_close(reference.psf_to_otf(k, (6, 7)), one)
