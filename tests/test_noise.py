"""The noise estimate against pictures blurred and made noisy here, so that the true level is known."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastem.noise import estimate_sigma


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Circular true convolution of `(H, W, C)` with a kernel centred at `(h // 2, w // 2)`."""
    h, w = kernel.shape
    padded = np.zeros(image.shape[:2])
    padded[:h, :w] = kernel
    otf = np.fft.rfft2(np.roll(padded, (-(h // 2), -(w // 2)), axis=(0, 1)))
    return np.fft.irfft2(np.fft.rfft2(image, axes=(0, 1)) * otf[..., None], s=image.shape[:2], axes=(0, 1))


def scene(seed: int, size: int = 192) -> np.ndarray:
    """A picture with edges, texture and shading, blurred along a diagonal: `(size, size, 3)` float64 in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    image = np.stack([0.5 + 0.2 * np.sin(6 * x + c) * np.cos(5 * y) for c in range(3)], axis=-1)
    for _ in range(60):
        top, left = rng.integers(0, size - 8, 2)
        h, w = rng.integers(6, size // 3, 2)
        image[top : top + h, left : left + w] = rng.uniform(0.15, 0.85, 3) + rng.normal(0, 0.05, (1, 1, 3))
    image[: size // 3] += 0.02 * rng.standard_normal((size // 3, size, 1))  # fine texture
    kernel = np.eye(9) + np.eye(9, k=1)
    return blur(image.clip(0.1, 0.9), kernel / kernel.sum())


@pytest.mark.parametrize("level", [2, 5, 10, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_within_five_percent_on_blurred_noise(seed, level):
    noisy = scene(seed) + level / 255 * np.random.default_rng(seed).standard_normal((192, 192, 3))
    assert estimate_sigma(noisy) * 255 == pytest.approx(level, rel=0.05)


@pytest.mark.parametrize("level", [2, 5, 10, 20])
def test_clipped_and_quantised(level):
    image = (scene(3) * 2.4 - 0.7).clip(0, 1)  # large parts are black or white
    noisy = image + level / 255 * np.random.default_rng(3).standard_normal(image.shape)
    stored = np.round(noisy.clip(0, 1) * 255) / 255
    naive = np.std(stored - image) * 255
    truth = np.hypot(level, 1 / np.sqrt(12))
    assert estimate_sigma(stored) * 255 == pytest.approx(truth, rel=0.05)
    assert naive < 0.97 * truth, "the test picture is not clipped enough to show anything"


def test_layouts_agree_and_repeat():
    noisy = (scene(0) + 0.02 * np.random.default_rng(0).standard_normal((192, 192, 3))).astype(np.float32)
    first = estimate_sigma(noisy)
    assert first == estimate_sigma(noisy)
    assert first == pytest.approx(estimate_sigma(noisy.transpose(2, 0, 1)), rel=1e-6)
    gray = estimate_sigma(noisy[..., 0])
    assert gray == pytest.approx(0.02, rel=0.05)
    assert gray == estimate_sigma(np.repeat(noisy[..., :1], 3, axis=2))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_constant_is_noise_free(value):
    assert estimate_sigma(np.full((64, 64, 3), value)) == 0.0


def test_letterbox_does_not_dilute():
    noisy = scene(0) + 5 / 255 * np.random.default_rng(0).standard_normal((192, 192, 3))
    boxed = np.zeros((400, 192, 3))
    boxed[104:296] = noisy
    assert estimate_sigma(boxed) * 255 == pytest.approx(5, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_any_size_is_finite(height, width, channels, seed):
    image = np.random.default_rng(seed).uniform(-0.2, 1.2, (height, width, channels))
    assert 0 <= estimate_sigma(image) < 2


def test_small_picture_is_roughly_right():
    noise = np.random.default_rng(0).standard_normal((16, 16, 3))
    assert estimate_sigma(0.5 + 0.05 * noise) == pytest.approx(0.05, rel=0.15)


@pytest.mark.parametrize("shape", [(), (5,), (8, 8, 7), (7, 8, 9), (2, 2, 2, 2), (0, 4)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="image must be"):
        estimate_sigma(np.zeros(shape))


def test_nan_is_refused():
    with pytest.raises(ValueError, match="finite"):
        estimate_sigma(np.full((8, 8), np.nan))


@pytest.mark.skipif("FASTEM_TEST_DATA" not in os.environ, reason="FASTEM_TEST_DATA not set")
@pytest.mark.parametrize("level", [2, 5, 10, 20])
def test_photos(level):
    data = Path(os.environ["FASTEM_TEST_DATA"])
    photos, kernels = sorted((data / "sharp").glob("*.png")), sorted((data / "kernels").glob("*.npy"))
    assert photos and kernels
    for index, photo in enumerate(photos):
        image = np.asarray(Image.open(photo).convert("RGB")) / 255
        noise = np.random.default_rng(index).standard_normal(image.shape)
        noisy = blur(image, np.load(kernels[index % len(kernels)])) + level / 255 * noise
        assert estimate_sigma(noisy) * 255 == pytest.approx(level, rel=0.05), photo.name
        stored = np.round(noisy.clip(0, 1) * 255) / 255
        assert estimate_sigma(stored) * 255 == pytest.approx(np.hypot(level, 1 / np.sqrt(12)), rel=0.05), photo.name
