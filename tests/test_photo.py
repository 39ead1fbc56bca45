"""What a photograph tells: edges, residuals, compression, highlights, the size of the blur."""

from __future__ import annotations

import io as bytes_io

import numpy as np
import pytest
import torch
from PIL import Image

from fastem import io, ops, photo
from fastem.initial import find_kernel_size
from fastem.operators import Canvas, Observation, blur
from fastem.synth import degrade, motion_kernel


def discs(size=128, seed=0, count=25) -> np.ndarray:
    """`(size, size, 3)`: random discs with edges in all directions, one pixel wide."""
    rng = np.random.default_rng(seed)
    rows, cols = np.indices((size, size))
    x = np.full((size, size, 3), 0.5)
    for _ in range(count):
        far = np.hypot(rows - rng.uniform(0, size), cols - rng.uniform(0, size)) - rng.uniform(size / 16, size / 4)
        x += np.clip(0.5 - far, 0, 1)[..., None] * (rng.uniform(0.1, 0.9, 3) - x)
    return x.astype(np.float32)


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).permute(2, 0, 1)


# ----------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("length", [1, 5, 9])
def test_edge_width(length):
    """Motion along one axis widens the edges across it by its length; those along it do not hide that."""
    x = degrade(discs(), np.ones((1, length)) / length, 0, 0)
    width = photo.edge_width(tensor(x), 0.0)
    assert width < 2.2 if length == 1 else 0.7 * length < width < 1.5 * length + 1
    turned = photo.edge_width(tensor(x.transpose(1, 0, 2)), 0.0)
    assert turned == pytest.approx(width, rel=0.05)


def test_no_edges_no_answer():
    ramp = np.linspace(0.2, 0.8, 64)[None, :, None] * np.ones((64, 1, 3))
    assert photo.edge_width(tensor(ramp), 0.01) == np.inf
    assert photo.edge_width(torch.full((3, 16, 16), 0.5), 0.01) == np.inf  # smaller than an edge is looked at
    assert photo.edge_width(tensor(discs()), 0.5) == np.inf  # no edge rises above such noise


# ------------------------------------------------------------------------------------------------- residuals


def test_a_residual_that_is_not_noise():
    noise = 0.02 * torch.randn(3, 160, 192, generator=torch.Generator().manual_seed(0))
    assert not photo.blur_varies(noise)
    one_place, larger = noise.clone(), noise.clone()
    one_place[:, :64, :64] *= 3
    assert photo.blur_varies(one_place)
    assert photo.blur_varies(one_place / 10), "however small it is"
    larger[:, :64, :64] *= 1.4
    assert not photo.blur_varies(larger), "texture leaves more than sky"
    assert not photo.blur_varies(one_place[:, 32:96, 32:96]), "too few blocks to tell"
    assert not photo.blur_varies(one_place[:, :20]), "no block at all"


# ----------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("quality", [50, 75, 90])
def test_jpeg_sigma_is_the_error_of_the_luminance(quality):
    y = degrade(discs(256, seed=1, count=200), motion_kernel(9, 1), 1.5 / 255, 1).clip(0, 1)
    buffer = bytes_io.BytesIO()
    Image.fromarray(np.round(255 * y).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    read = io.decode_image(buffer.getvalue())
    z = read.pixels / 255
    error = np.std((z - y) @ np.array([0.299, 0.587, 0.114]))
    estimate = photo.jpeg_sigma(z, read.quantization)
    assert error / 1.5 < estimate < 1.5 * error
    assert photo.jpeg_sigma(z, 4 * read.quantization) > 1.3 * estimate


def test_quantization_tables_are_read_upright(tmp_path):
    pixels = Image.fromarray(np.round(255 * discs(64)).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    pixels.save(tmp_path / "a.jpg", quality=60)
    pixels.save(tmp_path / "turned.jpg", quality=60, exif=exif)
    pixels.save(tmp_path / "a.png")
    upright, turned = (io.read_image(tmp_path / name).quantization for name in ("a.jpg", "turned.jpg"))
    assert upright.shape == (8, 8) and np.array_equal(turned, upright.T) and not np.array_equal(turned, upright)
    assert io.read_image(tmp_path / "a.png").quantization is None


# ------------------------------------------------------------------------------------- highlights and gamma


def spectra(x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.fft.rfft2(x[:, None]), ops.psf_to_otf(k, tuple(x.shape[-2:]))


def test_blur_in_linear_light():
    x, k = tensor(discs(48))[None].double(), torch.from_numpy(motion_kernel(9, 2)).double()[None, None]
    y = blur(x**2.2, k).clamp(0, 1) ** (1 / 2.2)
    linear, plain = (Observation.of(y, 0.01, gamma=gamma).residual(*spectra(x, k)) for gamma in (2.2, 1.0))
    assert torch.fft.irfft2(linear, s=(48, 48)).abs().max() < 1e-9
    assert torch.fft.irfft2(plain, s=(48, 48)).abs().max() > 0.02
    X, light = Observation.of(y, 0.01, gamma=2.2).for_kernel(*spectra(x, k))
    assert light.diagonal and light.residual(X, spectra(x, k)[1]).abs().max() < 1e-9 * X.abs().max()


def test_saturated_pixels_pull_nothing():
    x, k = 1.7 * tensor(discs(48))[None].double(), torch.from_numpy(motion_kernel(9, 2)).double()[None, None]
    y = blur(x, k).clamp(max=1)
    seen = photo.unsaturated(y, 1.0)
    assert 0.02 < 1 - seen.mean() < 0.9
    X, K = spectra(x, k)
    for canvas in (None, Canvas(48, 48, (40, 44))):
        masked = Observation.of(y, 0.01, canvas, seen=seen)
        assert torch.fft.irfft2(masked.residual(X, K), s=(48, 48)).abs().max() < 1e-9
        assert torch.fft.irfft2(Observation.of(y, 0.01, canvas).residual(X, K), s=(48, 48)).abs().max() > 0.1
    _, filled = Observation.of(y, 0.01, seen=seen).for_kernel(X, K)
    assert (filled.y - blur(x, k)).abs().max() < 1e-9, "what was clipped is what the kernel predicts"


# -------------------------------------------------------------------------------------------- size of the blur


@pytest.mark.parametrize(("length", "start"), [(7, 33), (31, 15)])
def test_find_kernel_size(length, start):
    k = np.zeros((41, 41))
    k[20, 20 - length // 2 : 20 + length // 2 + 1] = 1 / length
    y = tensor(degrade(discs(160, seed=2, count=60), k, 0, 0))[None]
    size = find_kernel_size(y, start, 65, periodic=True)
    assert size % 2 == 1 and length <= size <= 1.5 * length + 12
