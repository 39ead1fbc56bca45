import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastem.synth import FAMILIES, apply_tilt, degrade, motion_kernel, pad_kernel, tilt_field, tilt_std

ELONGATION = {"shake": 2.5, "randomwalk": 4, "boracchi": 1.2, "gp": 1.8, "line": 4}  # least median length over width


def centre_of_mass(k):
    return [(k.astype(float) * axis).sum() for axis in np.indices(k.shape)]


# ------------------------------------------------------------------------------------------------- kernels


@settings(max_examples=120, deadline=None)
@given(size=st.integers(1, 70), seed=st.integers(0, 2**40), family=st.sampled_from(sorted(FAMILIES)))
def test_kernel_is_a_centred_distribution(size, seed, family):
    k = motion_kernel(size, seed, family)
    assert k.shape == (size, size) and k.dtype == np.float32
    assert np.isfinite(k).all() and (k >= 0).all()
    assert abs(k.sum(dtype=float) - 1) < 1e-5
    assert centre_of_mass(k) == pytest.approx([size // 2] * 2, abs=0.05)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"delta"}))
def test_seed_decides_the_kernel(family):
    assert np.array_equal(motion_kernel(33, 7, family), motion_kernel(33, 7, family))
    assert not np.array_equal(motion_kernel(33, 7, family), motion_kernel(33, 8, family))


@pytest.mark.parametrize("family", ELONGATION)
def test_motion_blurs_along_a_thin_path(family):
    """Median over seeds: longer than wide, and neither a point nor a full square."""
    ratios, areas = [], []
    for seed in range(40):
        k = motion_kernel(33, seed, family).astype(float)
        offsets = np.indices(k.shape).reshape(2, -1) - 16
        narrow, wide = np.linalg.eigvalsh((offsets * k.ravel()) @ offsets.T)
        ratios.append(np.sqrt(wide / narrow))
        areas.append(1 / (k**2).sum())  # pixels, were they all equal
    assert np.median(ratios) > ELONGATION[family]
    assert 4 < np.median(areas) < 120


def test_shake_has_the_statistics_of_real_kernels():
    """Sharpness of the three published test kernels, sum k^2 of 0.043 to 0.062, lies in the middle of ours."""
    energy = [float((motion_kernel(33, seed) ** 2).sum()) for seed in range(80)]
    low, middle, high = np.percentile(energy, [10, 50, 90])
    assert low < 0.043 and 0.03 < middle < 0.08 and high > 0.062


def test_delta_is_no_blur():
    k = motion_kernel(8, 0, "delta")
    assert k[4, 4] == 1 and k.sum() == 1


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_kernel_size_must_be_positive(size):
    with pytest.raises(ValueError, match="whole number of pixels"):
        motion_kernel(size, 0)


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(ValueError, match="'shaky'.*shake, randomwalk"):
        motion_kernel(33, 0, "shaky")


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), extra=st.integers(0, 5))
def test_padding_keeps_the_origin(h, w, extra):
    k = np.zeros((h, w))
    k[h // 2, w // 2] = 1
    size = max(h, w) + extra
    assert pad_kernel(k, size)[size // 2, size // 2] == 1


# --------------------------------------------------------------------------------------------- degradation


def slow_convolution(x, k, boundary):
    """The definition: y[p] = sum_q k[q] x[p - (q - origin)]."""
    (height, width), (h, w) = x.shape, k.shape
    y = np.zeros_like(x)
    for i in range(h):
        for j in range(w):
            y += k[i, j] * np.roll(x, (i - h // 2, j - w // 2), axis=(0, 1))
    if boundary == "valid":
        y = y[h - 1 - h // 2 : height - h // 2, w - 1 - w // 2 : width - w // 2]
    return y


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    data=st.data(),
    boundary=st.sampled_from(["circular", "valid"]),
)
def test_blur_is_a_true_convolution(size, data, boundary):
    ksize = [data.draw(st.integers(1, n)) for n in size]
    rng = np.random.default_rng(sum(size) + sum(ksize))
    x, k = rng.random(size), rng.random(ksize)
    k /= k.sum()
    expected = slow_convolution(x, k, boundary)
    actual = degrade(x, k, 0, 0, boundary)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    flipped = degrade(x, k[::-1, ::-1], 0, 0, boundary)  # negative control: a correlation is something else
    if min(size) > 2 and min(ksize) > 2:
        assert abs(flipped - expected).max() > 1e-3


def test_valid_pixels_do_not_depend_on_what_is_outside():
    rng = np.random.default_rng(0)
    scene, k = rng.random((40, 44)), motion_kernel(9, 3)
    window = degrade(scene[5:35, 6:38], k, 0, 0, "valid")
    whole = degrade(scene, k, 0, 0, "circular")[5:35, 6:38]
    np.testing.assert_allclose(window, whole[4:-4, 4:-4], atol=1e-6)
    assert abs(degrade(scene[5:35, 6:38], k, 0, 0, "circular") - whole).max() > 1e-3


def test_layouts_agree():
    x = np.random.default_rng(0).random((20, 24, 3)).astype(np.float32)
    k = motion_kernel(7, 1)
    y = degrade(x, k, 0.1, seed=4)
    tensor = torch.from_numpy(x).permute(2, 0, 1)
    assert torch.equal(degrade(tensor, k, 0.1, seed=4).permute(1, 2, 0), torch.from_numpy(y))
    batch = degrade(tensor[None], torch.from_numpy(k)[None, None], 0.1, seed=4)
    assert batch.shape == (1, 3, 20, 24) and torch.equal(batch[0].permute(1, 2, 0), torch.from_numpy(y))
    gray = degrade(x[..., 0], k, 0, 0)
    np.testing.assert_allclose(gray, degrade(x, k, 0, 0)[..., 0], atol=1e-7)


def test_each_image_of_a_batch_has_its_own_kernel():
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    k = np.stack([motion_kernel(5, 0), motion_kernel(5, 1)])[:, None]
    y = degrade(x, k, 0, 0)
    for i in range(2):
        assert torch.equal(y[i], degrade(x[i], k[i, 0], 0, 0))


def test_integers_are_divided_by_their_maximum():
    x = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)
    delta = motion_kernel(3, 0, "delta")
    np.testing.assert_allclose(degrade(x, delta, 0, 0), x / 255, atol=1e-6)
    np.testing.assert_allclose(degrade(x.astype(np.uint16) * 257, delta, 0, 0), x / 255, atol=1e-6)


def test_noise_has_the_std_it_says_and_follows_the_seed():
    x, delta = np.full((200, 200), 0.5), motion_kernel(3, 0, "delta")
    y = degrade(x, delta, 10 / 255, seed=1)
    assert (y - 0.5).std() == pytest.approx(10 / 255, rel=0.02)
    assert np.array_equal(y, degrade(x, delta, 10 / 255, seed=1))
    assert not np.array_equal(y, degrade(x, delta, 10 / 255, seed=2))
    assert degrade(np.ones((64, 64)), delta, 0.1, 0).max() > 1  # not clipped


@pytest.mark.parametrize(
    "image, kernel, sigma, message",
    [
        (np.zeros((9, 9)), np.full((3, 3), 0.2), 0, r"sums to 1, this one to 1.8.*kernel / kernel.sum"),
        (np.zeros((9, 9)), np.array([[1.5, -0.5]]), 0, "non-negative"),
        (np.zeros((9, 9)), np.array([[np.nan, 1]]), 0, "finite"),
        (np.zeros((2, 9)), np.full((3, 3), 1 / 9), 0, "larger than the image"),
        (np.zeros((9, 9)), np.ones((1, 1)), 5, "5 / 255"),
        (np.zeros((9, 9)), np.ones((1, 1)), -0.1, "image units"),
        (np.zeros((9, 9)), np.ones((1, 1)), float("nan"), "image units"),
        (np.full((9, 9), 200.0), np.ones((1, 1)), 0, "divide 8-bit values by 255"),
        (np.array([[0, np.inf]]), np.ones((1, 1)), 0, "1 values that are not finite"),
        (np.zeros((3, 9, 9)), np.ones((1, 1)), 0, r"use a tensor for \(C, H, W\)"),
        (np.zeros((9, 9)), np.ones(1), 0, r"a kernel is \(h, w\)"),
        (torch.zeros(9, 9), np.ones((1, 1)), 0, r"\(C, H, W\)"),
        (np.zeros((0, 9)), np.ones((1, 1)), 0, "empty"),
    ],
)
def test_unusable_input_is_explained(image, kernel, sigma, message):
    with pytest.raises(ValueError, match=message):
        degrade(image, kernel, sigma, 0)


def test_other_kinds_of_image_are_refused():
    with pytest.raises(TypeError, match="numpy.asarray"):
        degrade([[0.0]], np.ones((1, 1)), 0, 0)
    with pytest.raises(TypeError, match="int64"):
        degrade(np.zeros((4, 4), int), np.ones((1, 1)), 0, 0)
    with pytest.raises(ValueError, match="boundary must be"):
        degrade(np.zeros((4, 4)), np.ones((1, 1)), 0, 0, "same")


# -------------------------------------------------------------------------------------------------- turbulence


def test_tilt_has_the_std_it_says_in_the_middle_and_at_the_border():
    fields = np.stack([tilt_field((56, 40), seed, half=8) for seed in range(200)]).reshape(-1, 56, 40)
    expected, measured = tilt_std((56, 40), half=8), np.sqrt((fields.astype(float) ** 2).mean(0))
    assert expected[28, 20] == pytest.approx(0.54, abs=0.01)
    assert expected[0, 0] < 0.06 * expected[28, 20] and expected[0, 20] < 0.25 * expected[28, 20]  # falls to the corner
    for area in (np.s_[20:36, 16:24], np.s_[:1, 12:28], np.s_[-1:, 12:28], np.s_[16:40, :2], np.s_[4:8, 4:8]):
        rms = [np.sqrt((m[area] ** 2).mean()) for m in (measured, expected)]
        assert rms[0] == pytest.approx(rms[1], rel=0.08)
    assert abs(fields.mean()) < 0.01


def test_tilt_of_the_published_setting():
    """500 patches on 256 x 256: std 0.41 over the whole field, 0.55 in the middle, clipped at 2.5."""
    std = tilt_std(256)
    assert np.sqrt((std**2).mean()) == pytest.approx(0.4145, abs=5e-4)
    assert std[128, 128] == pytest.approx(0.55, abs=1e-3)
    assert np.array_equal(std, tilt_std(256, num_patches=500))
    field = tilt_field(256, 0)
    assert field.shape == (2, 256, 256) and field.dtype == np.float32 and abs(field).max() <= 2.5
    assert field.std() == pytest.approx(0.4145, rel=0.05)
    assert np.array_equal(field, tilt_field(256, 0)) and not np.array_equal(field, tilt_field(256, 1))


@pytest.mark.parametrize(
    "options", [{"half": 40}, {"num_patches": 0}, {"blur": 0}, {"limit": -1}, {"strength": (2, 1)}], ids=str
)
def test_impossible_tilt_is_refused(options):
    with pytest.raises(ValueError, match="tilt field|strength"):
        tilt_field(64, 0, **options)


def test_tilt_shows_the_point_it_says():
    """A whole-pixel tilt is a shift with zeros outside; half a pixel is the mean of two; any shape, nothing changed."""
    image = torch.rand(2, 3, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tilt = torch.zeros(1, 2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(apply_tilt(image, tilt), image)
    tilt[:, 0], tilt[:, 1] = 2, -1
    before = tilt.clone()
    expected = torch.zeros_like(image)
    expected[:, :, 1:, :-2] = image[:, :, :-1, 2:]
    torch.testing.assert_close(apply_tilt(image, tilt), expected)
    assert torch.equal(tilt, before)
    tilt[:, 0], tilt[:, 1] = 0.5, 0
    torch.testing.assert_close(apply_tilt(image, tilt)[..., :-1], (image[..., 1:] + image[..., :-1]) / 2)
    with pytest.raises(ValueError, match=r"got \(1, 2, 6, 8\)"):
        apply_tilt(image, tilt[..., :-1])


def test_tilt_has_a_gradient():
    tilt = torch.full((1, 2, 4, 4), 0.3, dtype=torch.float64, requires_grad=True)
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(apply_tilt, (image, tilt))
