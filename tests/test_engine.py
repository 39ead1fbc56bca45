"""The engine: any input in its own type, any size, reproducible, images apart, and errors that say what to do."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from fastem import ops
from fastem.engine import (
    BLIND_SIGMA,
    EFFORTS,
    LOSSY_SIGMA,
    SHARP_WIDTH,
    SIGMA_FLOOR,
    STARTS,
    Deblurrer,
    NumericError,
    Request,
    looks_periodic,
    reblur_chi2,
)
from fastem.io import jpeg_quantization
from fastem.metrics import kernel_correlation, psnr, psnr_aligned
from fastem.models import EpsModel, GaussianEps, load_model
from fastem.operators import Canvas, blur
from fastem.samplers import Sample, sample
from fastem.synth import degrade, motion_kernel


@cache
def natural() -> EpsModel:
    return load_model("natural")


@cache
def quick(**options) -> Deblurrer:
    """An engine of few steps; engines of the same options are shared."""
    return Deblurrer(natural(), **{"kernel_size": 7, "steps": 2, "device": "cpu"} | options)


def edges(height, width, seed=0, channels=3):
    """`(H, W, C)` float32: random rectangles."""
    rng = np.random.default_rng(seed)
    x = np.full((height, width, channels), 0.5, np.float32)
    for _ in range(25):
        top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
        down, across = rng.integers(4, max(height // 2, 5)), rng.integers(4, max(width // 2, 5))
        x[top : top + down, left : left + across] = rng.uniform(0.05, 0.95, channels)
    return x


def blurred(height, width, seed=0, size=7, sigma=0.01):
    x, k = edges(height, width, seed), motion_kernel(size, seed)
    return x, k, degrade(x, k, sigma, seed).clip(0, 1)


def assert_sane(r, particles=1, kernel_size=(7, 7)):
    assert r.kernel.shape == kernel_size and r.kernel.dtype == np.float32
    assert (r.kernel >= 0).all() and r.kernel.sum() == pytest.approx(1, abs=1e-4)
    assert r.samples.shape[0] == particles and np.isfinite(r.samples).all()
    assert 0 <= r.samples.min() and r.samples.max() <= 1 and math.isfinite(r.reblur)


# ------------------------------------------------------------------------------------------- in and out


def as_type(y: np.ndarray, kind: str):
    levels = {"uint8": 255, "uint16": 65535}
    gray, of = y[..., 0], np.ascontiguousarray
    return {
        "uint8": lambda: np.round(y * 255).astype(np.uint8),
        "uint16": lambda: np.round(y * levels["uint16"]).astype(np.uint16),
        "float32": lambda: y,
        "float64": lambda: y.astype(np.float64),
        "gray (H, W)": lambda: of(gray),
        "gray (H, W, 1)": lambda: of(gray[..., None]),
        "uint8 gray": lambda: np.round(gray * 255).astype(np.uint8),
        "tensor": lambda: torch.from_numpy(y).permute(2, 0, 1),
        "tensor uint8": lambda: torch.from_numpy(np.round(y * 255).astype(np.uint8)).permute(2, 0, 1),
        "tensor (1, H, W)": lambda: torch.from_numpy(of(gray))[None],
        "tensor (H, W)": lambda: torch.from_numpy(of(gray)),
        "PIL RGB": lambda: Image.fromarray(np.round(y * 255).astype(np.uint8)),
        "PIL L": lambda: Image.fromarray(np.round(gray * 255).astype(np.uint8)),
    }[kind]()


def as_float(image) -> np.ndarray:
    """`(H, W, C)` in [0, 1]."""
    if isinstance(image, torch.Tensor):
        image = (image if image.dim() == 2 else image.permute(1, 2, 0)).numpy()
    image = np.asarray(image)
    scale = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    return np.atleast_3d(image).astype(np.float64) / scale


@pytest.mark.parametrize(
    "kind",
    ["uint8", "uint16", "float32", "float64", "gray (H, W)", "gray (H, W, 1)", "uint8 gray", "tensor", "tensor uint8",
     "tensor (1, H, W)", "tensor (H, W)", "PIL RGB", "PIL L"],
)  # fmt: skip
def test_what_goes_in_comes_out(kind):
    _, k, y = blurred(24, 29)
    image = as_type(y, kind)
    r = quick()(image, sigma=0.01, kernel=k)
    assert type(r.image) is type(image)
    if isinstance(image, Image.Image):
        assert r.image.mode == image.mode and r.image.size == image.size
    else:
        assert r.image.dtype == image.dtype and r.image.shape == image.shape
    assert r.samples.shape == (1, 24, 29, 3)
    expected = r.samples[0].mean(-1, keepdims=True) if as_float(image).shape[2] == 1 else r.samples[0]
    np.testing.assert_allclose(as_float(r.image), expected, atol=0.5 / 255 + 1e-6)
    assert not np.allclose(as_float(r.image), as_float(image), atol=2 / 255), "nothing was restored"


def test_types_of_the_same_pixels_agree():
    _, k, y = blurred(24, 29)
    eight = as_type(y, "uint8")
    results = [quick()(image, sigma=0.01, kernel=k).samples for image in (
        eight, eight / np.float32(255), torch.from_numpy(eight).permute(2, 0, 1), Image.fromarray(eight),
        (eight.astype(np.uint16) * 257),
    )]  # fmt: skip
    for samples in results[1:]:
        np.testing.assert_allclose(samples, results[0], atol=1e-5)


def test_a_file(tmp_path):
    _, k, y = blurred(24, 29)
    image = as_type(y, "uint8")
    Image.fromarray(image).save(tmp_path / "photo.png")
    r = quick()(tmp_path / "photo.png", sigma=0.01, kernel=k)
    assert np.array_equal(r.image, quick()(image, sigma=0.01, kernel=k).image)


@pytest.mark.parametrize(
    "size, kernel_size",
    [
        ((8, 8), 33), ((8, 70), 33), ((31, 9), 33), ((37, 70), 33), ((9, 31), (4, 11)),
        ((13, 13), (4, 11)), ((64, 33), 8),
    ],
    ids=str,
)  # fmt: skip
def test_any_size(size, kernel_size):
    """Also smaller than the kernel."""
    y = edges(*size, seed=1)
    engine = quick(kernel_size=kernel_size)
    r = engine(y, sigma=0.02)
    assert r.image.shape == y.shape
    assert_sane(r, kernel_size=engine.kernel_size)


@pytest.mark.parametrize("boundary", ["auto", "photo", "circular"])
def test_boundaries(boundary):
    _, k, y = blurred(40, 33)
    assert_sane(quick(boundary=boundary)(y, sigma=0.01))
    assert_sane(quick(boundary=boundary)(y, sigma=0.01, kernel=k))


def test_periodic_images_are_told_from_photos():
    wave = torch.sin(torch.arange(32) * 2 * math.pi / 32)
    assert looks_periodic((wave[:, None] + wave)[None, None])
    assert not looks_periodic(torch.linspace(0, 1, 32).expand(1, 1, 32, 32))
    assert not looks_periodic(torch.linspace(0, 1, 32)[:, None].expand(1, 1, 32, 32))


# ------------------------------------------------------------------------------------------ what it does


def test_blind_restoration():
    """Loose: a bundled prior of any quality should manage rectangles under a small blur."""
    x, k, y = blurred(80, 80, seed=1, size=9)
    r = Deblurrer(natural(), kernel_size=9, device="cpu")(y, sigma=0.01)
    assert_sane(r, kernel_size=(9, 9))
    assert psnr_aligned(r.image, x) > psnr(y, x) + 0.5
    delta = motion_kernel(9, 0, "delta")
    assert kernel_correlation(r.kernel, k) > max(0.8, kernel_correlation(delta, k))
    effort = EFFORTS["exact"]
    searches, rest = divmod(len(r.trace) - effort.steps, len(effort.inflations) * effort.search_steps)
    assert 1 <= searches <= len(STARTS) and rest == 0
    rounds = searches * len(effort.inflations) * list(range(effort.search_steps - 1, -1, -1))
    assert [t["index"] for t in r.trace] == rounds + list(range(effort.steps - 1, -1, -1))


def test_a_known_kernel_is_used_as_it_is():
    x, k, y = blurred(64, 64, seed=1)
    k = np.roll(k, 1, axis=0)  # not centred: nothing may recentre it
    y = degrade(x, k, 0.01, 0)
    for method in ("fast-em", "diffusion-em", "known"):
        r = quick(method=method, steps=15)(y, sigma=0.01, kernel=k)
        np.testing.assert_allclose(r.kernel, k, atol=1e-6)
        assert psnr(r.image, x) > psnr(y, x) + 0.5
    tensor = quick(steps=15)(y, sigma=0.01, kernel=torch.from_numpy(k))
    assert np.array_equal(tensor.image, quick(steps=15)(y, sigma=0.01, kernel=k).image)


@pytest.mark.parametrize("level", [0, 7, 255])
def test_a_constant_image_has_no_blur(level):
    image = np.full((20, 24, 3), level, np.uint8)
    r = quick(particles=2)(image)
    assert np.array_equal(r.image, image) and r.sigma == SIGMA_FLOOR and r.sigma_estimated
    assert r.kernel[3, 3] == 1 and r.kernel.sum() == 1
    assert r.samples.shape == (2, 20, 24, 3) and (r.std() == 0).all()
    assert [w.split(":")[0] for w in r.warnings] == ["W_NO_INFORMATION"]
    assert_sane(quick()(image, kernel=motion_kernel(7, 0)))  # with a kernel it is restored like any other


def test_nothing_to_deblur(monkeypatch):
    """A sharp image comes back denoised, with no blur; a blurred one, or one without the guard, is searched."""
    sharp = degrade(edges(96, 96, seed=3), np.ones((1, 1)), 0.02, 3)
    r = quick(guard=True)(sharp, sigma=0.02)
    assert r.kernel.max() == 1 and r.trace and any(w.startswith("W_NO_BLUR") for w in r.warnings)  # by its kernel
    for level in (0.03, 0.04):  # noise that is told too large must not turn the judgement round
        assert quick(guard=True)(sharp, sigma=level).kernel.max() == 1
    searched = quick(guard=False)(sharp, sigma=0.02)
    assert searched.kernel.max() < 1 and searched.trace
    assert psnr(r.image, edges(96, 96, seed=3)) > psnr(searched.image, edges(96, 96, seed=3)) + 1
    _, _, y = blurred(64, 64, seed=3, size=9)
    r = quick(guard=True, kernel_size=9)(y, sigma=0.01)
    assert r.kernel.max() < 1 and r.trace and not any(w.startswith("W_NO_BLUR") for w in r.warnings)
    monkeypatch.setattr("fastem.photo.edge_width", lambda image, sigma: SHARP_WIDTH - 0.1)
    r = quick(guard=True, kernel_size=9)(y, sigma=0.01)
    assert r.kernel.max() == 1 and r.trace == []  # such edges need no search


def test_a_kernel_with_a_high_peak_needs_more_proof(monkeypatch):
    """0.55: the photo lies a little nearer to its denoising than to its restoration, blurred."""
    _, _, y = blurred(48, 48, seed=3, size=5)
    monkeypatch.setattr("fastem.photo.edge_width", lambda image, sigma: SHARP_WIDTH + 0.1)
    monkeypatch.setattr(Deblurrer, "_place_of_photo", lambda self, model, y, *_: y.new_full((len(y),), 0.55))
    for peak, taken in ((1.1, True), (0.0, False)):
        monkeypatch.setattr("fastem.engine.PEAK", peak)
        r = quick(guard=True, kernel_size=5, steps=2)(y, sigma=0.01)
        assert (r.kernel.max() < 1) == taken


def test_the_guard_decides_for_each_image_of_a_batch():
    y = torch.stack([torch.from_numpy(v).permute(2, 0, 1) for v in (
        degrade(edges(64, 64, seed=3), np.ones((1, 1)), 0.01, 3).astype(np.float32), blurred(64, 64, seed=3, size=9)[2],
    )]).float()  # fmt: skip
    drawn, *_ = quick(kernel_size=9).restore(y, 0.01, torch.tensor([0, 0]))
    assert drawn.kernel[0].max() == 1 and drawn.kernel[1].max() < 1


def test_a_wrong_estimate_of_the_noise_is_corrected_by_em(monkeypatch):
    _, _, y = blurred(96, 96, seed=3, size=9, sigma=0.02)
    engine = quick(kernel_size=9, steps=6)
    monkeypatch.setattr("fastem.engine.noise.estimate_sigma", lambda image: 0.03)
    assert engine(y).sigma == pytest.approx(0.02, rel=0.15) and engine(y, sigma=0.03).sigma == 0.03
    assert engine(y, lossy=True).sigma == pytest.approx(0.02, rel=0.15)  # above what compression leaves
    monkeypatch.setattr("fastem.engine.noise.estimate_sigma", lambda image: 0.0202)
    assert engine(y).sigma == 0.0202  # where both agree the estimate stays
    monkeypatch.setattr("fastem.engine.noise.estimate_sigma", lambda image: 0.004)
    assert engine(y, lossy=True).sigma == 2 / 255  # an upper limit stays


def test_blur_in_linear_light():
    """With the true kernel: a blur of light is undone better as one."""
    x, k = edges(48, 48, seed=3), motion_kernel(9, 3)
    y = degrade(x**2.2, k, 0, 3).clip(0, 1) ** (1 / 2.2) + np.random.default_rng(0).normal(0, 0.01, x.shape)
    restored = {gamma: quick(steps=15, gamma=gamma)(y, sigma=0.01, kernel=k) for gamma in (1.0, 2.2)}
    assert psnr(restored[2.2].image, x) > psnr(restored[1.0].image, x) + 0.5
    both = quick(gamma="auto")(y, sigma=0.01, kernel=k)
    assert any(w.startswith("W_GAMMA") for w in both.warnings)


def test_lights_that_were_clipped():
    """With the true kernel: the streaks of small lights, clipped by the sensor, ring unless they count as unseen."""
    x, k = 0.75 * edges(64, 64, seed=3), motion_kernel(9, 3)
    for row, col in ((20, 20), (25, 45), (48, 30)):
        x[row : row + 3, col : col + 3] = 6
    noise = np.random.default_rng(0).normal(0, 0.01, x.shape).astype(np.float32)
    y, truth = (degrade(x, k, 0, 3).clip(0, 1) + noise).clip(0, 1), x.clip(0, 1)
    lights = torch.from_numpy((x > 1).any(-1)).float()[None, None]
    around = torch.nn.functional.max_pool2d(lights, 13, 1, 6)[0, 0].numpy() == 0  # where the lights themselves are not
    unseen, taken = (quick(steps=8, saturation=s)(y, sigma=0.01, kernel=k).image for s in (0.97, None))
    assert psnr(unseen[around], truth[around]) > psnr(taken[around], truth[around]) + 0.2


def test_varying(monkeypatch):
    """Where the residual is even the restoration is that with one kernel, to the bit; elsewhere the grid is given."""
    _, _, y = blurred(64, 64, seed=3, size=9)
    monkeypatch.setattr("fastem.photo.blur_varies", lambda residual: False)
    plain, varying = (quick(kernel_size=9, varying=v)(y, sigma=0.01) for v in (False, True))
    assert varying.kernels is None and np.array_equal(varying.image, plain.image)
    monkeypatch.setattr("fastem.photo.blur_varies", lambda residual: True)
    taken = quick(kernel_size=9, varying=True, guard=False)(y, sigma=0.01)
    assert taken.kernels.shape[2:] == (9, 9) and min(taken.kernels.shape[:2]) >= 2
    assert (taken.kernels >= 0).all() and np.allclose(taken.kernels.sum(axis=(2, 3)), 1, atol=1e-4)
    assert np.isfinite(taken.samples).all() and not np.array_equal(taken.image, plain.image)


def test_steps_of_a_varying_blur_are_not_recorded(monkeypatch):
    """A recorded step would hold the kernels of this image: what records sees only the steps with one kernel."""
    _, _, y = blurred(48, 48, seed=3, size=5)
    monkeypatch.setattr("fastem.photo.blur_varies", lambda residual: True)
    seen = {}
    for varying in (False, True):
        engine, calls = quick(kernel_size=5, steps=2, varying=varying, guard=False), []
        execute = engine.execute
        engine.execute = lambda *args, **kw: calls.append(1) or execute(*args, **kw)  # noqa: B023
        taken = engine(y, sigma=0.01)
        seen[varying] = len(calls)
    assert taken.kernels is not None and seen[False] == seen[True] > 0


def test_kernel_size_auto():
    _, _, y = blurred(96, 96, seed=3, size=9)
    r = quick(kernel_size="auto", guard=False)(y, sigma=0.01)
    assert r.kernel.shape[0] == r.kernel.shape[1] and 9 <= len(r.kernel) <= 29 and len(r.kernel) % 2
    assert quick(kernel_size="auto").config["kernel_size"] == "auto"
    assert quick(kernel_size="auto")(np.full((20, 20), 0.5, np.float32)).kernel.max() == 1


@pytest.mark.parametrize(
    "option, message",
    [({"gamma": 0.5}, "gamma is a number from 1 to 4"), ({"gamma": "dark"}, "'auto', got 'dark'"),
     ({"saturation": 2.0}, "saturation is a brightness"), ({"kernel_size": "large"}, "or 'auto', got 'large'"),
     ({"kernel_size": "auto", "m_step": "hqs"}, "need method 'fast-em' with the M-step 'edges'"),
     ({"varying": True, "gamma": 2.2}, "varying needs method"), ({"r2_term": True}, "add m_step 'hqs'")],
    ids=str,
)  # fmt: skip
def test_options_of_photos(option, message):
    with pytest.raises(ValueError, match=message):
        quick(**option)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_image_without_edges(name, request):
    """Not constant, but too smooth to fit a kernel to: there is still a result."""
    if name == "native":
        request.getfixturevalue("native_backend")
    wave = 0.5 + 0.005 * np.sin(np.arange(40) * np.pi / 20)
    assert_sane(quick(backend=name)(np.tile(wave, (40, 1)).astype(np.float32), sigma=0.01))


def test_sigma():
    _, k, y = blurred(48, 48, sigma=0.03)
    given, estimated = quick()(y, sigma=0.03, kernel=k), quick()(y, kernel=k)
    assert not given.sigma_estimated and given.sigma == 0.03
    assert estimated.sigma_estimated and estimated.sigma == pytest.approx(0.03, rel=0.3)
    silent = quick()(y, sigma=0, kernel=k)
    assert silent.sigma == SIGMA_FLOOR
    assert_sane(silent)
    assert any(w.startswith("W_SIGMA") for w in silent.warnings)  # the residual is far above the floor


def test_a_blind_run_counts_the_errors_of_its_kernel_as_noise():
    """At least two grey levels where the kernel is an estimate; a sharp image is denoised by what it has."""
    _, k, y = blurred(64, 64, seed=3, size=9, sigma=0.002)
    blind, given = quick(kernel_size=9)(y, sigma=0.002), quick(kernel_size=9)(y, sigma=0.002, kernel=k)
    assert blind.sigma == pytest.approx(BLIND_SIGMA) and given.sigma == 0.002
    assert not any(w.startswith("W_SIGMA") for w in blind.warnings) or blind.reblur > 2  # it is an upper limit
    assert quick(kernel_size=9)(y, sigma=0.03).sigma == 0.03
    sharp = degrade(edges(96, 96, seed=3), np.ones((1, 1)), 0.002, 3)
    r = quick(guard=True)(sharp, sigma=0.002)
    assert r.kernel.max() == 1 and r.sigma == 0.002
    assert quick(compat="released", guard=False)(y, sigma=0.002).sigma == 0.002


def test_estimates_of_lossy_photos_have_a_floor(tmp_path):
    """From the quantisation tables of a JPEG; two grey levels where there are none."""
    image = as_type(blurred(64, 64, sigma=0)[2], "uint8")
    Image.fromarray(image).save(tmp_path / "photo.jpg", quality=60)
    k = motion_kernel(7, 0)
    with Image.open(tmp_path / "photo.jpg") as opened:
        results = [quick()(photo, kernel=k) for photo in (opened, tmp_path / "photo.jpg")]
        table = jpeg_quantization(opened)
    results += [quick()(image, kernel=k, lossy=True), quick()(image, kernel=k, lossy=True, quantization=table)]
    for r in results:
        assert any(w.startswith("W_LOSSY") for w in r.warnings)
    floor = [r.sigma for r in results]
    assert floor[0] == floor[1] and floor[2] == LOSSY_SIGMA and floor[3] == pytest.approx(floor[0], rel=0.3)
    assert 2 / 255 < floor[0] < 10 / 255
    assert quick()(image, kernel=k).sigma < LOSSY_SIGMA  # pixels do not tell
    assert quick()(image, kernel=k, sigma=0.004, lossy=True).sigma == 0.004  # what was said stands


def test_chi2_is_one_for_the_truth():
    x, k, y = blurred(64, 64, sigma=0.02)
    images = torch.from_numpy(x).permute(2, 0, 1)[None]
    truth = Sample((2 * images - 1)[:, None], torch.from_numpy(k)[None, None])
    y = torch.from_numpy(degrade(x, k, 0.02, 0)).permute(2, 0, 1)[None]
    canvas = Canvas(64, 64, (64, 64))
    assert float(reblur_chi2(truth, y, canvas, torch.tensor([0.02]))) == pytest.approx(1, abs=0.05)
    assert float(reblur_chi2(truth, y, canvas, torch.tensor([0.04]))) == pytest.approx(0.25, abs=0.02)


def test_particles():
    _, k, y = blurred(24, 24)
    r = quick(particles=2, steps=4)(y, sigma=0.05, kernel=k)
    assert_sane(r, particles=2)
    assert r.samples.shape == (2, 24, 24, 3) and r.mean().shape == r.std().shape == (24, 24, 3)
    np.testing.assert_allclose(r.mean(), (r.samples[0] + r.samples[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(r.std(), abs(r.samples[0] - r.samples[1]) / 2, atol=1e-6)
    assert r.std().mean() > 1e-4
    np.testing.assert_allclose(r.image, r.mean(), atol=1e-6)
    one = quick(particles=2, steps=4, mode="sample")(y, sigma=0.05, kernel=k)
    assert any(np.array_equal(one.image, sample) for sample in one.samples)
    assert (quick(steps=4)(y, sigma=0.05, kernel=k).std() == 0).all()


def test_the_particle_that_is_shown_explains_the_photo_in_its_light():
    x, k = edges(32, 32, seed=1), motion_kernel(7, 1)
    y = (degrade(x**2.2, k, 0, 1).clip(0, 1) ** (1 / 2.2)).astype(np.float32)
    engine = quick(gamma=2.2, particles=4, mode="sample", guidance="mean", boundary="circular")
    for seed in range(3):
        r = engine(y, sigma=0.02, kernel=k, seed=seed)
        light = torch.from_numpy(r.samples).permute(0, 3, 1, 2) ** 2.2
        again = blur(light, torch.from_numpy(k / k.sum()).expand(4, 1, 7, 7)).clamp(min=0) ** (1 / 2.2)
        chi2 = (again - torch.from_numpy(y).permute(2, 0, 1)).square().mean(dim=(1, 2, 3)) / 0.02**2
        assert np.array_equal(r.image, r.samples[(chi2 - 1).abs().argmin()])


def test_the_kernel_of_the_released_program_is_its_own(monkeypatch):
    _, _, y = blurred(64, 64, seed=3, size=9)
    raw = []
    monkeypatch.setattr("fastem.engine.sample", lambda *a, **o: raw.append(sample(*a, **o)) or raw[-1])
    r = quick(kernel_size=9, steps=8, compat="released")(y, sigma=0.01)
    assert raw[-1].kernel.min() < 0  # recentring
    assert np.array_equal(r.kernel, ops.project_kernel(raw[-1].kernel)[0, 0].numpy())


@pytest.mark.parametrize("guidance", ["mean", "pigdm", "dps"])
@pytest.mark.parametrize("method", ["fast-em", "diffusion-em"])
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_every_combination_runs(method, guidance, compat):
    seen = []
    engine = quick(method=method, guidance=guidance, compat=compat, particles=2)
    r = engine(blurred(24, 24)[2], sigma=0.05, on_step=lambda done, total: seen.append((done, total)))
    assert_sane(r, particles=2)
    assert [done for done, _ in seen] == list(range(1, len(r.trace) + 1))
    assert all(done <= total for done, total in seen) and seen[-1] == (len(r.trace), len(r.trace))
    if method == "diffusion-em":
        assert len(seen) == (10 if compat == "released" else 11) * 2


# ------------------------------------------------------------------------------------------- reproducible


@pytest.mark.parametrize("guidance", ["mean", "pigdm"])
def test_seeds(guidance):
    y = blurred(32, 32)[2]
    a, b, c = (quick(guidance=guidance, steps=3)(y, sigma=0.02, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(a.image, b.image) and np.array_equal(a.kernel, b.kernel) and a.reblur == b.reblur
    assert not np.array_equal(a.image, c.image)


@pytest.mark.parametrize(
    "options",
    [{}, {"boundary": "auto"}, {"guidance": "pigdm"}, {"m_step": "hqs"}, {"compat": "released"},
     {"method": "diffusion-em", "steps": 1}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_image_does_not_see_its_company(name, options, request):
    """A whole run of two images, bit for bit whatever the second one, its noise or its seed is."""
    if name == "native":
        request.getfixturevalue("native_backend")
    engine = quick(**{"boundary": "circular"} | options, backend=name, particles=2, kernel_size=5)
    mine = torch.from_numpy(blurred(18, 15)[2]).permute(2, 0, 1)

    def run(seed, sigma, scale=1.0):
        other = scale * torch.from_numpy(blurred(18, 15, seed)[2]).permute(2, 0, 1)
        y, seeds = torch.stack([mine, other]), torch.tensor([4, seed])
        drawn, *_ = engine.restore(y, torch.tensor([0.02, sigma]), seeds)
        return drawn.x[0], drawn.kernel[0]

    x, k = run(1, 0.02)
    for company in ((2, 0.02), (1, 0.2), (3, 0.05, 0.8)):
        x_again, k_again = run(*company)
        assert torch.equal(x, x_again) and torch.equal(k, k_again), company


def test_sums_over_the_batch_would_show(monkeypatch):
    """Negative control of the test above: with the sums of the released program, company changes the kernel."""
    sums = ops.spectral_sums
    monkeypatch.setattr(ops, "spectral_sums", lambda *a, **o: tuple(s.sum(0, True).expand_as(s) for s in sums(*a, **o)))
    engine = quick(compat="released", steps=3, boundary="circular", particles=2)
    mine, *others = (torch.from_numpy(blurred(32, 32, s)[2]).permute(2, 0, 1) for s in (0, 1, 2))
    seeds = torch.tensor([4, 1])
    a, b = (engine.restore(torch.stack([mine, other]), 0.02, seeds)[0].kernel[0] for other in others)
    assert not torch.equal(a, b)


def test_map_keeps_the_order_and_the_failures():
    y = blurred(24, 24)[2]
    bad = np.full((24, 24, 3), np.nan, np.float32)
    results = list(quick().map([y, bad, y[:20]], sigma=0.02, seed=3))
    assert np.array_equal(results[0].image, quick()(y, sigma=0.02, seed=3).image)
    assert isinstance(results[1], ValueError) and results[2].image.shape == (20, 24, 3)


def test_map_restores_in_batches():
    """Mixed sizes, requests of their own, a constant image, a broken one: as one by one, but for the last bits."""
    images = [blurred(24, 24, seed)[2] for seed in range(3)] + [blurred(20, 24)[2], np.full((24, 24, 3), 7, np.uint8)]
    items = [Request(y, 0.02, seed) for seed, y in enumerate(images)]
    items.insert(2, Request(np.full((24, 24, 3), np.nan, np.float32)))
    done = list(quick(boundary="circular").map(items, batch_size=4))
    assert isinstance(done.pop(2), ValueError) and done[4].warnings
    for seed, (y, r) in enumerate(zip(images, done, strict=True)):
        alone = quick(boundary="circular")(y, sigma=0.02, seed=seed)
        assert r.image.shape == y.shape and r.sigma == alone.sigma
        np.testing.assert_allclose(r.samples, alone.samples, atol=1e-3)
        np.testing.assert_allclose(r.kernel, alone.kernel, atol=1e-3)


def test_the_company_in_a_batch_changes_no_bit():
    mine, *others = (Request(blurred(24, 24, seed)[2], 0.02, seed) for seed in range(4))
    engine, pairs = quick(boundary="circular"), ([mine, others[0]], [mine, others[1]])
    runs = [next(engine.map(items, batch_size=2)) for items in pairs]
    assert np.array_equal(runs[0].samples, runs[1].samples) and np.array_equal(runs[0].kernel, runs[1].kernel)


class Tight(EpsModel):
    """A network for which memory ends above so many pixels."""

    def __init__(self, pixels):
        super().__init__(3)
        self.inner, self.pixels, self.seen = natural(), pixels, []

    def forward(self, x_t, t):
        self.seen.append(tuple(x_t.shape))
        if x_t[:, 0].numel() > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(x_t, t)


def test_where_memory_ends_map_goes_on_with_less(monkeypatch):
    monkeypatch.setattr("fastem.engine.TIGHT_TILE", 16)
    images, k = [blurred(24, 24, seed)[2] for seed in range(3)], motion_kernel(5, 0)

    def run(pixels):
        engine = Deblurrer(Tight(pixels), kernel_size=5, steps=2, boundary="circular", device="cpu")
        with pytest.warns(RuntimeWarning, match="memory ended: images run in batches of at most"):
            return list(engine.map(images, batch_size=4, sigma=0.02, kernel=k)), engine.model.seen

    done, seen = run(2 * 24 * 24)  # two images fit
    assert all(np.isfinite(r.samples).all() for r in done) and seen[-1][0] <= 2
    done, seen = run(16 * 16)  # not even one, but a tile does
    assert all(np.isfinite(r.samples).all() for r in done) and seen[-1] == (1, 3, 16, 16)
    done, _ = run(100)  # nothing does
    assert [type(r) for r in done] == [torch.OutOfMemoryError] * 3


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "all", 5000])
def test_batch_sizes_that_do_not_exist(batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        next(quick().map([blurred(24, 24)[2]], batch_size=batch_size))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "blind"}, "unknown method 'blind'; allowed are fast-em, diffusion-em, known"),
        ({"guidance": "none"}, "unknown guidance 'none'; allowed are mean, pigdm, dps"),
        ({"compat": "exact"}, "unknown compat 'exact'; allowed are paper, released"),
        ({"boundary": "zero"}, "unknown boundary 'zero'; allowed are auto, photo, circular"),
        ({"preset": "fast"}, "unknown preset 'fast'; allowed are exact, turbo"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 1001}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"particles": 0}, "particles must be a whole number"),
        ({"particles": True}, "particles must be a whole number"),
        ({"kernel_size": 0}, "kernel_size must be a whole number"),
        ({"kernel_size": (5, 1000)}, "kernel_size must be a whole number"),
        ({"m_step": "em"}, "unknown m_step 'em'; allowed are edges, hqs"),
        ({"m_step": "edges", "compat": "released"}, "compat 'released' has the M-step 'hqs' only"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "meta"}, "device 'meta' is not supported"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Deblurrer(natural(), **options)


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="sees no GPU; use --device cpu"):
        Deblurrer(natural(), device="cuda")


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((7, 20, 3), np.uint8), "at least 8 pixels on each side, got 20x7"),
        (np.zeros((20, 20, 4), np.uint8), r"got (shape )?\(20, 20, 4\)"),
        (np.zeros((2, 20, 20, 3), np.uint8), r"got (shape )?\(2, 20, 20, 3\)"),
        (torch.zeros(20, 20, 3), r"\(C, H, W\) as a tensor; got (shape )?\(20, 20, 3\)"),
        (np.zeros((20, 20), np.int32), "uint8, uint16 or floating point in .0, 1., got int32"),
        (np.zeros((20, 20), bool), "got bool"),
        (np.full((20, 20), np.nan, np.float32), "NaN or infinite"),
        (np.full((20, 20), np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_images_that_cannot_be_used(image, message):
    with pytest.raises(ValueError, match=message):
        quick()(image)


def test_calls_that_cannot_be_answered():
    y = blurred(24, 24)[2]
    for sigma in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma must be a number >= 0 in image units"):
            quick()(y, sigma=sigma)
    with pytest.raises(ValueError, match="method 'known' needs the kernel"):
        quick(method="known")(y)
    for kernel in (np.zeros((3, 3)), np.full((3, 3), np.nan), np.ones((2, 3, 3)), -np.ones((3, 3))):
        with pytest.raises(ValueError, match=r"a kernel is \(h, w\), finite, >= 0 and of positive sum"):
            quick()(y, kernel=kernel)


class Broken(EpsModel):
    """A network that puts out nan."""

    def __init__(self):
        super().__init__(3)

    def forward(self, x_t, t):
        return torch.full_like(x_t, math.nan)


def test_a_result_that_is_not_finite_is_not_returned():
    engine = Deblurrer(Broken(), kernel_size=7, steps=2, device="cpu")
    with pytest.raises(NumericError, match="not finite"):
        engine(blurred(24, 24)[2], sigma=0.02, kernel=motion_kernel(7, 0))
    with pytest.raises(NumericError, match="not finite"):
        engine(blurred(24, 24)[2], sigma=0.02)
    assert [type(e) for e in engine.map([blurred(24, 24)[2]], sigma=0.02)] == [NumericError]


def test_presets():
    """Turbo takes fewer steps, for the kernel too."""
    exact, turbo = (Deblurrer(natural(), kernel_size=7, device="cpu", preset=p) for p in ("exact", "turbo"))
    assert (exact.steps, turbo.steps, quick(preset="turbo").steps) == (12, 10, 2)
    assert exact.config["preset"] == "exact" and turbo.config["preset"] == "turbo"
    y = blurred(32, 32)[2]
    r = turbo(y, sigma=0.01)
    assert_sane(r)
    effort = EFFORTS["turbo"]
    assert (len(r.trace) - effort.steps) % (len(effort.inflations) * effort.search_steps) == 0
    assert len(r.trace) < len(exact(y, sigma=0.01).trace)
    for options in ({"guidance": "pigdm"}, {"m_step": "hqs"}, {"method": "diffusion-em"}):
        with pytest.raises(ValueError, match="preset 'turbo' was measured for the default method"):
            Deblurrer(natural(), device="cpu", preset="turbo", **options)


def test_config_is_what_decides():
    engine = Deblurrer(natural(), kernel_size=(5, 9), guidance="dps", device="cpu")
    config = engine.config
    assert config["kernel_size"] == [5, 9] and config["steps"] == 1000 and config["guidance"] == "dps"
    assert config["prior_sha256"] == natural().sha256 and config["lam"] == 1.0
    assert Deblurrer(natural(), kernel_size=64, device="cpu").lam == 0.2
    assert Deblurrer(natural(), compat="released", device="cpu").guidance == "pigdm"
    assert Deblurrer(GaussianEps(torch.zeros(3, 8, 8), 1.0), device="cpu").config["prior"] == "GaussianEps"


# ------------------------------------------------------------------------------- what is refused, and what is kept


@pytest.mark.parametrize(
    "image, call, message",
    [
        (np.full((16, 16, 3), 200.0, np.float32), {}, "divide by 255"),
        (np.zeros((16, 16, 3), np.uint8), {"sigma": 5.0}, "divide by 255"),
        (np.zeros((16, 16, 3), np.uint8), {"seed": 2**63}, "64-bit"),
        (torch.zeros(3, 16, 16, dtype=torch.bfloat16), {}, "bfloat16"),
        (Image.new("RGBA", (16, 16)), {}, "alpha"),
        (np.zeros((16, 16, 3), np.uint8), {"kernel": -np.ones((3, 3))}, ">= 0"),
        (np.zeros((16, 16, 3), np.uint8), {"kernel": np.ones(3)}, r"\(h, w\)"),
    ],
)
def test_refused_images_and_calls(image, call, message):
    with pytest.raises(ValueError, match=message):
        quick()(image, **{"sigma": 0.02, **call})


@pytest.mark.parametrize("option", [{"kernel_size": (3, 3, 3)}, {"backend": "fast"}])
def test_refused_when_made(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        quick(**option)


def test_sixteen_bit_pil_stays_sixteen_bit():
    array = (edges(16, 20, seed=0)[..., 0] * 65535).astype(np.uint16)
    r = quick()(Image.fromarray(array), sigma=0.02, kernel=np.ones((1, 3)))
    assert r.image.mode == "I;16" and np.asarray(r.image).shape == array.shape
    assert r.kernel.shape == (1, 3) and r.kernel.sum() == pytest.approx(1)


def test_a_kernel_is_normalised():
    y = edges(24, 24, seed=0)
    k = motion_kernel(5, 0)
    one, two = (quick()(y, sigma=0.02, kernel=gain * k) for gain in (1, 2))
    assert np.allclose(one.image, two.image, atol=1e-5) and one.reblur == pytest.approx(two.reblur, rel=1e-3)
