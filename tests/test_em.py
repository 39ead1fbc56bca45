"""The kernel estimators, each asked by hand for one step, and the outer loop of Diffusion EM."""

from __future__ import annotations

import pytest
import torch

from fastem import ops
from fastem.em import (
    HQS,
    EdgeEM,
    Known,
    delta_kernel,
    denoise_observation,
    diffusion_em,
    gradient_sums,
    noise_level,
    place_between,
    stein_risk,
)
from fastem.guidance import PosteriorMean
from fastem.initial import difference_spectra
from fastem.metrics import kernel_correlation
from fastem.models import GaussianEps
from fastem.mstep import L2, mstep
from fastem.operators import Canvas, Observation, blur
from fastem.samplers import PhiloxNoise, sample
from fastem.schedules import Schedule
from fastem.synth import motion_kernel

EARLY, LATE = Schedule.karras(10, 1.0).step(9), Schedule.karras(10, 1.0).step(0)


def picture(batch, height=32, width=32, seed=0):
    """`(B, 3, H, W)`: blocks of 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, -(-height // 4), -(-width // 4), generator=generator)
    return coarse.repeat_interleave(4, -2).repeat_interleave(4, -1)[..., :height, :width].contiguous()


def kernels(batch, size=7):
    return torch.stack([torch.from_numpy(motion_kernel(size, seed)) for seed in range(1, batch + 1)])[:, None]


def spectrum(x):
    """Particles of one image each: `(B, 1, C, H, W')`."""
    return torch.fft.rfft2(x)[:, None]


@pytest.mark.parametrize("size", [(1, 1), (4, 5), (7, 2)], ids=str)
def test_delta_kernel(size):
    x = picture(2)
    torch.testing.assert_close(blur(x, delta_kernel(2, size)), x, rtol=0, atol=1e-6)


def test_a_known_kernel_stays():
    k, observation = kernels(1), Observation.of(picture(3), 0.01)
    estimator = Known(k)
    state = estimator.start(observation)
    assert torch.equal(state.k, k.expand(3, 1, 7, 7))
    assert estimator.update(state, spectrum(observation.y), observation, 0.1) is state


def test_hqs_starts_without_blur_and_is_the_mstep():
    x, k = picture(2), kernels(2)
    observation = Observation.of(blur(x, k), 0.01)
    estimator = HQS(L2(0.0), (7, 7), beta=1e4, num_iters=3)
    state = estimator.start(observation)
    assert torch.equal(state.k, delta_kernel(2, (7, 7)))
    for _ in range(2):  # warm: the second starts at the first
        one = mstep(observation.y, x[:, None], state.k, sigma=0.01, prior=L2(0.0), beta=1e4, num_iters=3)
        state = estimator.update(state, spectrum(x), observation, 0.1)
        torch.testing.assert_close(state.k, ops.recentre(one), rtol=0, atol=1e-6)


def test_hqs_takes_the_uncertainty_of_the_image_on_request():
    x, k = picture(1), kernels(1)
    observation = Observation.of(blur(x, k), 0.01)
    for compat in ("paper", "released"):
        plain = HQS(L2(0.0), (7, 7), compat=compat)
        ridge = HQS(L2(0.0), (7, 7), compat=compat, r2_ridge=True)
        start = plain.start(observation)
        update = [e.update(start, spectrum(x), observation, 0.02).k for e in (plain, ridge)]
        expected = mstep(observation.y, x[:, None], start.k, sigma=0.01, prior=L2(0.0), compat=compat, r2=0.02)
        torch.testing.assert_close(update[1], ops.recentre(expected), rtol=0, atol=1e-6)
        assert (update[0] - update[1]).abs().max() > 1e-4


def test_a_map_without_mass_keeps_the_kernel_of_that_image_only():
    x, k = picture(2), kernels(2)
    observation = Observation.of(blur(x, k), 0.01)

    def nothing_left(z, beta):
        return torch.cat([torch.zeros_like(z[:1]), z[1:]])

    estimator = HQS(nothing_left, (7, 7))
    state = estimator.update(estimator.start(observation), spectrum(x), observation, 0.1)
    assert torch.equal(state.k[0], delta_kernel(1, (7, 7))[0])
    assert kernel_correlation(state.k[1, 0], k[1, 0]) > 0.95


def test_edge_em_rests_while_the_noise_is_high():
    x, k = picture(2), kernels(2)
    observation, estimator = Observation.of(blur(x, k), 0.01), EdgeEM(delta_kernel(2, (7, 7)))
    start = estimator.start(observation)
    assert EARLY.sigma_t > estimator.sigma_on > LATE.sigma_t
    assert estimator.rests(EARLY) and not estimator.rests(LATE)
    assert not torch.equal(estimator.update(start, spectrum(x), observation, 1e-4).k, start.k)


@pytest.mark.parametrize("canvas", [None, Canvas(48, 48, (37, 35))], ids=["circular", "canvas"])
def test_edge_em_finds_the_kernel_of_a_sharp_image(canvas):
    x, k = picture(2, 48, 48), kernels(2)
    y = blur(x, k)
    if canvas is not None:
        y = canvas.extend(canvas.crop(y))
    observation = Observation.of(y, 0.01, canvas)
    estimator = EdgeEM(delta_kernel(2, (7, 7)), num_iters=100, ridge=0.01)
    state = estimator.update(estimator.start(observation), spectrum(x), observation, 1e-6)
    assert state.k.min() >= 0
    torch.testing.assert_close(state.k.sum((-2, -1)), torch.ones(2, 1), rtol=0, atol=1e-5)
    for i in range(2):
        assert kernel_correlation(state.k[i, 0], k[i, 0]) > 0.9


def test_gradients_outside_the_photo_teach_nothing():
    """They are not in the energy; and where the kernel is right they leave nothing in y, so that it stays."""
    canvas, D = Canvas(32, 32, (24, 20)), difference_spectra((32, 32), spectrum(picture(1)))
    x, k = picture(1), kernels(1)
    elsewhere = x.clone()
    outside = canvas.inside((3, 4), x) == 0
    outside &= outside.roll(-1, 0) & outside.roll(-1, 1)  # forward differences look one pixel ahead
    outside &= outside.roll(1, 0) & outside.roll(1, 1)
    elsewhere[..., outside] = 7.0
    K = ops.psf_to_otf(k, (32, 32))
    inner, whole = [], []
    for image in (x, elsewhere):
        observation = Observation.of(canvas.extend(canvas.crop(blur(image, k))), 0.01, canvas)
        cross, energy = gradient_sums(spectrum(image), observation, K, D, (3, 4))
        torch.testing.assert_close(cross, K * energy, rtol=0, atol=2e-5 * float(cross.abs().max()))
        inner.append(energy)
        whole.append(gradient_sums(spectrum(image), Observation.of(observation.y, 0.01), K, D, (3, 4))[1])
    torch.testing.assert_close(*inner, rtol=0, atol=1e-3 * float(inner[0].abs().max()))
    assert (whole[0] - whole[1]).abs().max() > whole[0].abs().max()


@pytest.mark.parametrize("canvas", [None, Canvas(32, 32, (24, 20))], ids=["circular", "canvas"])
def test_only_the_strongest_edges_teach(canvas):
    """A tenth of the pixels that may teach; each particle chooses its own."""
    x = torch.stack([picture(1)[0], picture(2)[1]])[None]  # two particles of one image
    x = x + 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))  # no two gradients are alike
    observation = Observation.of(picture(1), 0.01, canvas)
    D = difference_spectra((32, 32), spectrum(x))
    nowhere = torch.zeros(1, 1, 32, 17)  # a kernel that explains nothing
    cross, energy = gradient_sums(torch.fft.rfft2(x), observation, nowhere, D, (3, 4), 0.1)
    inside, seen = (torch.ones(32, 32) if canvas is None else canvas.inside(b, x) for b in ((3, 4), (0, 0)))
    gray, y, expected = x.mean(dim=2), observation.y.mean(dim=1) * seen, 0
    gradients = torch.stack([gray.roll(-1, -2) - gray, gray.roll(-1, -1) - gray])
    strength = gradients.square().sum(dim=0) * inside
    for n in range(2):
        order = strength[0, n].flatten().argsort(descending=True)
        teaches = torch.zeros(32 * 32)
        teaches[order[: round(0.1 * int(inside.sum()))]] = 1
        g = torch.fft.rfft2(gradients[:, 0, n] * teaches.view(32, 32))
        gy = torch.fft.rfft2(torch.stack([y[0].roll(-1, -2) - y[0], y[0].roll(-1, -1) - y[0]]))
        expected = expected + torch.stack([(g.conj() * gy).sum(dim=0), (g.abs() ** 2).sum(dim=0).to(g)])
    for found, wanted in zip((cross[0, 0], energy[0, 0].to(cross)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_nothing_finite_keeps_the_kernel(native_backend):
    x, k = picture(2), kernels(2)
    observation, estimator = Observation.of(blur(x, k), 0.01), EdgeEM(k)
    X = spectrum(x)
    X[0] = torch.nan
    state = estimator.update(estimator.start(observation), X, observation, 1e-4)
    assert torch.equal(state.k[0], k[0]) and torch.isfinite(state.k).all() and not torch.equal(state.k[1], k[1])


@pytest.mark.parametrize("estimator", [EdgeEM(kernels(2)), HQS(L2(0.0), (7, 7))], ids=["edge", "hqs"])
@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_image_does_not_see_its_company(name, estimator, request):
    if name == "native":
        request.getfixturevalue("native_backend")
    mine, k = picture(1), kernels(1)

    def run(other, sigma):
        x = torch.cat([mine, other])
        observation = Observation.of(blur(x, k), torch.tensor([0.02, sigma]))
        return estimator.update(estimator.start(observation), spectrum(x), observation, 1e-3).k[0]

    with ops.use_backend(name):
        results = [run(picture(1, seed=s), sigma) for s in (1, 2) for sigma in (0.02, 0.3)] + [run(1e3 * mine, 0.02)]
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_denoising_at_the_level_of_each_image():
    """The oracle's estimate is the Wiener filter, which can be written down."""
    std, sigma = 0.3, torch.tensor([0.02, 0.1])
    model = GaussianEps(torch.zeros(3, 32, 32), std**2)
    y = 0.5 + 0.2 * (picture(2) - 0.5)
    shrunk = std**2 / (std**2 + (2 * sigma) ** 2)  # sigma counts double in [-1, 1]
    expected = 0.5 + shrunk.view(2, 1, 1, 1) * (y - 0.5)
    torch.testing.assert_close(denoise_observation(model, Observation.of(y, sigma)), expected, rtol=0, atol=1e-5)
    assert (denoise_observation(model, Observation.of(100 * y, sigma)) <= 1).all()


@pytest.mark.parametrize("compat, runs", [("paper", 4), ("released", 3)])
def test_diffusion_em(compat, runs):
    """Three rounds; the paper's reading draws once more, so that images and kernel belong together."""
    x, k = 0.5 + 0.2 * (picture(2) - 0.5), kernels(2)
    observation, model = Observation.of(blur(x, k), 0.02), GaussianEps(torch.zeros(3, 32, 32), 0.1**2)
    asked, rounds = [], []

    def noise(run):
        asked.append(run)
        return PhiloxNoise(torch.tensor([1, 2]), 2, (3, 32, 32), run)

    schedule, guidance, prior = Schedule.karras(4, 1.0), PosteriorMean(), L2(0.0)
    result = diffusion_em(
        model, observation, guidance, schedule, prior=prior, kernel_size=(7, 7), noise=noise, num_rounds=3, num_iters=2,
        compat=compat, on_round=lambda *args: rounds.append(args),
    )  # fmt: skip
    assert asked == list(range(runs)) and [r for r, _, _ in rounds] == [0, 1, 2]
    assert torch.equal(rounds[-1][2], result.kernel) and not torch.equal(rounds[0][2], rounds[1][2])
    first = sample(model, observation, Known(delta_kernel(2, (7, 7))), guidance, schedule, noise=noise(0)).x
    assert torch.equal(rounds[0][1].x, first)
    options = dict(sigma=0.02, prior=prior, num_iters=2, compat=compat)
    assert torch.equal(rounds[0][2], mstep(observation.y, rounds[0][1].images, delta_kernel(2, (7, 7)), **options))
    last = rounds[-1][1].x
    if compat == "paper":
        last = sample(model, observation, Known(result.kernel), guidance, schedule, noise=noise(3)).x
    assert torch.equal(result.x, last)


@pytest.mark.parametrize("canvas", [None, Canvas(80, 72, (64, 56))], ids=["periodic", "canvas"])
@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
def test_noise_level_is_that_of_the_residual_where_nothing_is_explained(canvas, factor):
    """From a wrong level and a kernel and an image with errors of their own; the plain residual is far off."""
    size, sigma = (80, 72), torch.tensor([0.02, 0.04], dtype=torch.float64)
    f = Observation.of(torch.zeros(1, 3, *size, dtype=torch.float64), 1.0).log_frequency.exp().clamp(min=1 / 80)
    g = torch.Generator().manual_seed(0)

    def draw(std):  # a 1 / f^2 spectrum
        white = torch.randn(2, 3, *size, generator=g, dtype=torch.float64)
        return std * torch.fft.irfft2(torch.fft.rfft2(white) / f / 8, s=size)

    x, k = 0.5 + draw(0.1), motion_kernel(13, 1)[None, None]
    k = torch.from_numpy(k).double()
    y = blur(x, k) + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=g, dtype=torch.float64)
    X, K = torch.fft.rfft2(x + draw(0.02))[:, None], ops.psf_to_otf(k, size)
    observation = Observation.of(y, factor * sigma, canvas)
    found = noise_level(observation, X, K)
    assert found.shape == (2,) and found == pytest.approx(sigma, rel=0.06)
    left = torch.fft.irfft2(observation.residual(X, K), s=size).square().mean(dim=(1, 2, 3, 4)).sqrt()
    assert not (left == pytest.approx(sigma, rel=0.06))
    assert noise_level(Observation.of(y, 0.1 * sigma, canvas), X, K).max() <= 0.2 * sigma.max() * (1 + 1e-9)


@pytest.mark.parametrize("gain", [0.0, 0.6, 1.0])
def test_stein_risk_is_the_error_against_the_image_without_noise(gain):
    """Of box means, mixed with y: their residual alone prefers the one that keeps all noise."""
    x, sigma = picture(2, 96, 96).double(), torch.tensor([0.1, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    y = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    probe = torch.randn(x.shape, generator=generator, dtype=torch.float64).sign()

    def explain(y):
        return gain * y + (1 - gain) * torch.nn.functional.avg_pool2d(y, 3, 1, 1)

    truth = ((explain(y) - x) / sigma.view(-1, 1, 1, 1)).square().mean(dim=(1, 2, 3))
    found, explained = stein_risk(explain, y, sigma, probe)
    assert torch.equal(explained, explain(y))
    assert found.shape == (2,) and found == pytest.approx(truth, rel=0.03, abs=0.03)


def test_place_between_is_where_the_image_without_noise_lies():
    """Between box means and y itself, and within what the noise allows; seen from the other side it is 1 minus that."""
    x, sigma = picture(2, 96, 96).double(), torch.tensor([0.1, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    y = x + sigma.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    probe = torch.randn(x.shape, generator=generator, dtype=torch.float64).sign()

    def explain(gain):
        return lambda y: gain * y + (1 - gain) * torch.nn.functional.avg_pool2d(y, 3, 1, 1)

    a, b = explain(0.2), explain(0.9)
    error, other, apart = ((e).square().mean(dim=(1, 2, 3)) for e in (a(y) - x, b(y) - x, a(y) - b(y)))
    truth = 0.5 + (error - other) / (2 * apart)
    place, deviation = place_between(a, b, y, sigma, probe)
    assert place.shape == deviation.shape == (2,) and (deviation < 0.02).all() and (truth[0] - truth[1]).abs() > 0.2
    assert ((place - truth).abs() < 4 * deviation).all()
    assert place_between(b, a, y, sigma, probe)[0] == pytest.approx(1 - place)
    assert place_between(a, a, y, sigma, probe)[0] == pytest.approx(0.5)
