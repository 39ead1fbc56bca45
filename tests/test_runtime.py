"""Where the search for the kernel looks in a large photo, and what is refused before it starts."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastem import runtime
from fastem.engine import BLIND_SIGMA, LOSSY_SIGMA, SIGMA_FLOOR, Deblurrer
from fastem.models import EpsModel, NaturalConfig, NaturalPrior
from fastem.models.eps import DenoiserEps

CPU = torch.device("cpu")


def small_prior() -> EpsModel:
    torch.manual_seed(0)
    return DenoiserEps(NaturalPrior(NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8)).requires_grad_(False))


def textured(height: int, width: int, top: int, left: int, side: int = 60) -> torch.Tensor:
    """`(1, 3, height, width)`: flat but for a square of stripes."""
    y = torch.full((1, 3, height, width), 0.5)
    y[..., top : top + side, left : left + side] = (torch.arange(side) % 20 < 10).float()
    return y


def test_images_up_to_the_limit_come_back_as_they_are():
    y = torch.rand(1, 3, 30, 50)
    assert runtime.busiest_window(y, pixels=1500) is y


@pytest.mark.parametrize("place", [(0, 0), (900, 1200), (1140, 1540), (0, 1540), (500, 300)])
def test_window_holds_the_texture(place):
    y = textured(1200, 1600, *place)
    window = runtime.busiest_window(y, pixels=480_000)
    assert window.shape[-2] * window.shape[-1] <= 480_000 and window.shape[-2] >= runtime.WINDOW_SIDE
    assert (window == 1).sum() == (y == 1).sum()  # all the stripes are in it


def test_each_image_of_a_batch_has_its_own_window():
    ys = [textured(900, 900, 20, 30), textured(900, 900, 800, 700)]
    together = runtime.busiest_window(torch.cat(ys), pixels=300_000)
    for alone, window in zip(ys, together, strict=True):
        torch.testing.assert_close(runtime.busiest_window(alone, pixels=300_000)[0], window, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(150, 15000), (15000, 150), (1301, 1301), (700, 3001)])
def test_window_of_any_shape_fits(size):
    window = runtime.busiest_window(torch.rand(1, 1, *size))
    height, width = window.shape[-2:]
    assert height * width <= runtime.WINDOW_PIXELS and height <= size[0] and width <= size[1]
    assert min(height, width) >= min(*size, runtime.WINDOW_SIDE)


def test_what_cannot_fit_in_memory_is_refused_with_numbers(monkeypatch):
    gigabytes = {"SC_PHYS_PAGES": 8_000_000, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr(os, "sysconf", gigabytes.__getitem__)
    runtime.check_memory((3000, 4000), 1, jacobian=False, device=CPU)
    with pytest.raises(MemoryError, match=r"4000 x 3000 pixels with 16 particles need about \d+ GB.*has 8 GB"):
        runtime.check_memory((3000, 4000), 16, jacobian=False, device=CPU)


def scene(sigma: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(40, 210, (5, 6, 3), np.uint8)).resize((48, 40)), np.float64)
    return (smooth + rng.normal(0, sigma, smooth.shape)).clip(0, 255).round().astype(np.uint8)


def test_estimates_of_lossy_files_have_a_floor(tmp_path):
    engine = Deblurrer(small_prior(), kernel_size=5, steps=2, device="cpu")
    Image.fromarray(scene(0)).save(tmp_path / "a.jpg", quality=90)
    pixels = np.asarray(Image.open(tmp_path / "a.jpg"))
    for image in (tmp_path / "a.jpg", Image.open(tmp_path / "a.jpg")):
        result = engine(image)
        assert result.sigma > SIGMA_FLOOR and result.sigma_estimated
        assert any(warning.startswith("W_LOSSY") for warning in result.warnings)
    for result in (engine(pixels), engine(tmp_path / "a.jpg", sigma=1 / 255), engine(tmp_path / "a.jpg", lossy=False)):
        assert result.sigma == pytest.approx(BLIND_SIGMA) and not any("W_LOSSY" in w for w in result.warnings)
    noisy = engine(scene(8), lossy=True)  # noise that survived counts as it is
    assert noisy.sigma > 2 * LOSSY_SIGMA and not any("W_LOSSY" in warning for warning in noisy.warnings)


def test_constant_colours_hold_no_information():
    engine = Deblurrer(small_prior(), kernel_size=5, steps=2, device="cpu")
    image = np.full((32, 32, 3), (90, 100, 110), np.uint8)
    result = engine(image)
    np.testing.assert_array_equal(result.image, image)
    assert result.kernel[2, 2] == 1 and [w.partition(":")[0] for w in result.warnings] == ["W_NO_INFORMATION"]
