"""Guidance and the sampling loop: gradients against autograd, samples against a posterior known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastem import guidance as guidance_module
from fastem import ops
from fastem.em import Known
from fastem.guidance import DPS, PiGDM, PosteriorMean, default_r2, pseudo_inverse, still_r2
from fastem.models import EpsModel, ErrorSpectrum, GaussianEps
from fastem.operators import Canvas, Observation, blur
from fastem.samplers import DDIM, DDPM, PhiloxNoise, PlugAndPlay, Renoise, StepConstants, evaluate, sample
from fastem.schedules import Schedule


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernels(batch, h, w, seed=1):
    k = uniform(batch, 1, h, w, seed=seed) ** 3
    return k / k.sum((-2, -1), keepdim=True)


class SmallNet(nn.Module):
    """Nonlinear, mixes pixels and channels, depends on t; double precision."""

    def __init__(self, channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("down", (5, channels, 3, 3)), ("up", (channels, 5, 3, 3))):
            self.register_buffer(name, 0.2 * torch.randn(*shape, generator=generator, dtype=torch.float64))

    def forward(self, x_t, t):
        h = nn.functional.conv2d(x_t, self.down, padding=1).tanh() + t / 1000
        return nn.functional.conv2d(h, self.up, padding=1)


# ------------------------------------------------------------------------------------------------ guidance


def whole_gradient(model, x_t, step, objective):
    """The gradient with respect to x_t of an objective of x0_hat in [0, 1], by autograd of everything."""
    x_t = x_t.clone().requires_grad_()
    eps = model(x_t.flatten(0, 1), step.t).view_as(x_t)
    x0_hat = (x_t - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)
    objective((x0_hat.clamp(-1, 1) + 1) / 2).sum().backward()
    return x_t.grad


@pytest.mark.parametrize("canvas", [None, Canvas(8, 10, (6, 7))], ids=["circular", "canvas"])
@pytest.mark.parametrize("guidance", [PiGDM(), DPS()], ids=["pigdm", "dps"])
@pytest.mark.parametrize("index", [3, 20])
def test_direction_through_the_network_is_the_gradient(guidance, index, canvas):
    step, r2, sigma = Schedule.linear().respace(100).step(index), 0.3, torch.tensor([0.05, 0.2], dtype=torch.float64)
    model, k, size = SmallNet(), kernels(2, 3, 4), (8, 10)
    observation = Observation.of(uniform(2, 3, *size), sigma, canvas)
    x_t = 2.4 * uniform(2, 2, 3, *size, seed=3) - 1.2  # some of x0_hat is clamped

    eps, pull = evaluate(model, x_t, step, with_vjp=True)
    x0_hat, mask = ops.predict_x0(x_t, eps, step.alpha_bar)
    assert 0.2 < mask.mean() < 0.98
    K = ops.psf_to_otf(k, size)
    v = guidance.direction(torch.fft.rfft2(x0_hat), K, observation, r2)
    actual = 0.5 * pull(v * mask)

    inside = 1 if canvas is None else canvas.inside((0, 0), observation.y)

    def objective(x):
        e = (observation.y[:, None] - blur(x, k)) * inside
        if isinstance(guidance, DPS):
            return -e.square().sum((2, 3, 4)).sqrt()  # per particle
        E = torch.fft.fft2(e)  # -1/2 e^T (r^2 H H^T + sigma^2)^-1 e
        power = torch.fft.fft2(blur_of_delta(k, size)).abs().square()[:, None]
        return -0.5 * (E.abs().square() / (r2 * power + sigma.view(-1, 1, 1, 1, 1) ** 2)).sum((2, 3, 4)) / (8 * 10)

    expected = whole_gradient(model, x_t, step, objective)
    if canvas is not None and isinstance(guidance, PiGDM):  # the margin is masked before the inverse, not after H^T
        expected = whole_gradient(model, x_t, step, lambda x: (x * v).sum((2, 3, 4)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    unmasked = 0.5 * evaluate(model, x_t, step, with_vjp=True)[1](v)
    assert (unmasked - expected).abs().max() > 1e-2 * expected.abs().max(), "the clamp made no difference"


def blur_of_delta(k, size):
    delta = torch.zeros(k.shape[0], 1, *size, dtype=k.dtype)
    delta[..., 0, 0] = 1
    return blur(delta, k)


def test_pseudo_inverse_against_a_dense_matrix(monkeypatch):
    """Eq. (17) with H as a matrix; on a canvas H has only the rows that were measured, and imputation tends to that."""
    size, r2, sigma = (4, 5), 0.2, torch.tensor([0.1, 0.3], dtype=torch.float64)
    k, x = kernels(2, 3, 2), uniform(2, 3, 1, *size, seed=4)
    y, usual = uniform(2, 1, *size, seed=5), guidance_module.IMPUTATIONS
    basis = torch.eye(20, dtype=torch.float64).view(20, 1, *size)
    for canvas in (None, Canvas(4, 5, (3, 3))):
        observation = Observation.of(y, sigma, canvas)
        inside = torch.ones(4, 5) if canvas is None else canvas.inside((0, 0), y)
        errors = {}
        for rounds in (0, usual, 600):
            monkeypatch.setattr(guidance_module, "IMPUTATIONS", rounds)
            V = pseudo_inverse(torch.fft.rfft2(x), ops.psf_to_otf(k, size), observation, sigma, r2)
            v = torch.fft.irfft2(V, s=size)
            errors[rounds] = 0.0
            for b in range(2):
                H = inside.reshape(20, 1) * blur(basis, k[b : b + 1]).view(20, 20).T
                for i in range(3):
                    e = inside.flatten() * y[b].flatten() - H @ x[b, i].flatten()
                    expected = H.T @ torch.linalg.solve(r2 * H @ H.T + sigma[b] ** 2 * torch.eye(20, dtype=x.dtype), e)
                    errors[rounds] += (v[b, i].flatten() - expected).norm().item()
        none, default, many = errors.values()
        assert many < 1e-9 and (default < 0.7 * none or canvas is None)


def test_posterior_mean_is_the_mean_of_a_product_of_gaussians():
    size, step, sigma = (4, 5), Schedule.karras(9, 1.0).step(4), 0.1
    guidance = PosteriorMean(inflation=2.0)
    r2 = guidance.r2(step, default_r2)
    assert r2 == default_r2(step.sigma_t) / 4  # [-1, 1] to [0, 1]
    k, x, y = kernels(1, 3, 2), uniform(1, 1, 1, *size), uniform(1, 1, *size, seed=2)
    M = guidance.mean(torch.fft.rfft2(x), ops.psf_to_otf(k, size), Observation.of(y, sigma), r2)
    H = blur(torch.eye(20, dtype=x.dtype).view(20, 1, *size), k).view(20, 20).T
    precision = torch.eye(20, dtype=x.dtype) / r2 + H.T @ H / (2 * sigma) ** 2  # sigma inflated
    expected = torch.linalg.solve(precision, x.flatten() / r2 + H.T @ y.flatten() / (2 * sigma) ** 2)
    torch.testing.assert_close(torch.fft.irfft2(M, s=size).flatten(), expected, rtol=0, atol=1e-12)


def test_directions_of_dps_have_no_length_to_divide_by_at_a_perfect_fit():
    size, k = (6, 6), kernels(1, 3, 3)
    x = uniform(1, 1, 1, *size)
    observation, K = Observation.of(blur(x[:, 0], k), 0.1), ops.psf_to_otf(k, size)
    X = torch.fft.rfft2(x)
    observation.__dict__["Y"] = K * X[:, 0]  # the residual is exactly 0
    v = DPS().direction(X, K, observation, 0.0)
    assert torch.equal(v, torch.zeros_like(v))


def test_released_weights():
    schedule = Schedule.linear().respace(100)
    guidance, last = PiGDM("released"), schedule.step(0)
    assert guidance.gain(last, default_r2) == 0  # no pull in the last step
    step = schedule.step(50)
    v = step.posterior_variance
    assert guidance.r2(step, default_r2) == v / (1 + v)
    assert guidance.gain(step, default_r2) == pytest.approx(0.5 * math.sqrt(step.alpha_bar) * v / (1 + v) ** 1.5)
    assert PiGDM().gain(step, default_r2) == pytest.approx(0.5 * step.beta / math.sqrt(1 - step.beta))  # Eq. (15)


# ---------------------------------------------------------------------------------------------------- rules


def test_plug_and_play_draws_no_noise():
    """Nothing is drawn, so nothing is needed that draws; and without a blur the image comes out as it went in."""
    schedule, y = Schedule.karras(5, 1.0), uniform(2, 3, 6, 6, seed=1)
    for step in schedule.reverse():
        assert PlugAndPlay().coefficients(step) == (math.sqrt(step.alpha_bar_prev), 0.0, 0.0)
    observation = Observation.of(y, torch.full((2,), 0.05, dtype=y.dtype))
    delta = torch.ones(1, 1, 1, 1, dtype=y.dtype)
    runs = [
        sample(
            GaussianEps(torch.zeros(3, 6, 6), 0.5**2), observation, Known(delta), PosteriorMean(), schedule, noise=None,
            rule=PlugAndPlay(), r2=still_r2, x_start=start,
        ).x
        for start in (2 * y[:, None] - 1, 2 * y[:, None] - 1)
    ]  # fmt: skip
    assert torch.equal(*runs) and still_r2(0.3) == 2.5 * default_r2(0.3)
    assert ((runs[0][:, 0] + 1) / 2 - y).abs().max() < 0.1  # no blur, little noise: y is the answer


def test_the_estimator_is_told_the_error_of_the_network_not_the_r2_of_the_guidance():
    told = []

    class Listener(Known):
        def rests(self, step):
            return False

        def update(self, state, X, observation, r2):
            told.append(r2)
            return state

    y, delta = uniform(1, 3, 6, 6, seed=1), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    observation, schedule = Observation.of(y, torch.full((1,), 0.05, dtype=y.dtype)), Schedule.karras(3, 1.0)
    for options in ({"error": lambda s: 0.01 * s}, {}):
        sample(
            GaussianEps(torch.zeros(3, 6, 6), 0.5**2), observation, Listener(delta), PosteriorMean(), schedule,
            noise=None, rule=PlugAndPlay(), x_start=2 * y[:, None] - 1, **options,
        )  # fmt: skip
    levels = [step.sigma_t for step in schedule.reverse()]
    assert told == pytest.approx([0.01 * s / 4 for s in levels] + [default_r2(s) / 4 for s in levels])


@pytest.mark.parametrize("schedule", [Schedule.linear().respace(50), Schedule.karras(15, 1)], ids=["linear", "karras"])
def test_rules_keep_the_noise_level(schedule):
    """From the true x_0, x_t must come out with mean sqrt(abar') x_0 and variance 1 - abar'."""
    for rule in (DDPM(), DDIM(0.0), DDIM(0.5), DDIM(1.0), Renoise(0.0), Renoise(0.3), Renoise(1.0)):
        for step in schedule.reverse():
            mean_x0, mean_xt, std = rule.coefficients(step)
            mean, variance = mean_x0 + mean_xt * math.sqrt(step.alpha_bar), mean_xt**2 * (1 - step.alpha_bar) + std**2
            assert mean == pytest.approx(math.sqrt(step.alpha_bar_prev), abs=1e-12)
            assert variance == pytest.approx(1 - step.alpha_bar_prev, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 10, 250, 1000])
def test_ddim_with_all_the_noise_is_ddpm(num_steps):
    for step in Schedule.linear().respace(num_steps).reverse():
        assert DDIM(1.0).coefficients(step) == pytest.approx(DDPM().coefficients(step), rel=1e-9, abs=1e-9)
    assert DDIM(0.0).coefficients(step)[2] == Renoise(0.0).coefficients(step)[2] == 0


# ---------------------------------------------------------------------------------------------------- noise


def test_noise_belongs_to_the_image():
    seeds, shape = torch.tensor([3, 7, 2**40]), (3, 5, 6)
    noise = PhiloxNoise(seeds, 4, shape)
    turned = PhiloxNoise(seeds.flip(0), 4, shape)
    alone = PhiloxNoise(seeds[1:2], 4, shape)
    for a, b, c in ((noise.start(), turned.start(), alone.start()), (noise.step(5), turned.step(5), alone.step(5))):
        assert a.shape == (3, 4, *shape)
        assert torch.equal(a.flip(0), b) and torch.equal(a[1:2], c)
    assert torch.equal(PhiloxNoise(seeds, 2, shape).step(5), noise.step(5)[:, :2])  # more particles, same first ones
    different = [noise.start(), noise.step(0), noise.step(5), PhiloxNoise(seeds, 4, shape, run=1).start()]
    different += [PhiloxNoise(seeds, 4, shape, run=1).step(5), noise.step(5).flip(1)]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert abs(float((a * b).mean())) < 0.1  # 1080 values
    assert abs(float(noise.step(1).std()) - 1) < 0.1


# ----------------------------------------------------------------------------------------- the Gaussian oracle

SIZE, STD = (16, 16), 0.2  # STD in [-1, 1]: 5 stds to the clamp; STD / 2 in image units


class Oracle:
    """White Gaussian images, a known circular blur, and the posterior in closed form."""

    def __init__(self, sigma, std=STD, particles=1, dtype=torch.float32):
        self.model, self.particles, self.dtype = GaussianEps(torch.zeros(1, *SIZE), std**2), particles, dtype
        self.k = kernels(1, 5, 4)
        x = 0.5 + std / 2 * torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = blur(x, self.k)
        y = y + sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        K, variance = ops.psf_to_otf(self.k, SIZE), (std / 2) ** 2
        gain = variance / (variance * K.abs() ** 2 + sigma**2)
        self.mean = 0.5 + torch.fft.irfft2(gain * K.conj() * torch.fft.rfft2(y - 0.5), s=SIZE)  # H 0.5 = 0.5
        K = torch.fft.fft2(blur_of_delta(self.k, SIZE))
        self.std = float((variance * sigma**2 / (variance * K.abs() ** 2 + sigma**2)).mean().sqrt())
        self.observation = Observation.of(y.to(dtype), sigma)

    def draw(self, guidance, schedule, *, noise=None, rule=DDPM(), r2=None, num=None):  # noqa: B008
        noise = noise or PhiloxNoise(torch.tensor([0]), self.particles, (1, *SIZE))
        return sample(
            self.model, self.observation, Known(self.k.to(self.dtype)), guidance, schedule, noise=noise, rule=rule,
            r2=r2 or self.model.r2,
        ).x  # fmt: skip

    def bias(self, x):
        """RMS error of the mean of the particles in posterior stds, less what their number explains; and their std."""
        images = (x[0].double() + 1) / 2
        error = (images.mean(0) - self.mean[0]).square().mean()
        spread = images.var(0).mean()
        return float((error - spread / len(images)).clamp(min=0).sqrt()) / self.std, float(spread.sqrt()) / self.std


def test_pigdm_samples_the_posterior():
    """Exact for a white prior with the right r_t^2, and far off with a wrong one: the test can fail."""
    oracle = Oracle(0.02, particles=100)
    schedule = Schedule.linear().respace(250)
    bias, spread = oracle.bias(oracle.draw(PiGDM(), schedule))
    assert bias < 0.1 and spread == pytest.approx(1, abs=0.1)  # the fixed-small variance is narrow
    for factor in (0.2, 5.0):
        wrong = oracle.draw(PiGDM(), schedule, r2=lambda sigma_t, f=factor: f * oracle.model.r2(sigma_t))
        assert oracle.bias(wrong)[0] > 0.2, factor
    ignored = oracle.draw(PiGDM(), schedule, r2=lambda sigma_t: 1e6)
    assert oracle.bias(ignored)[0] > 0.8  # hardly any pull: the prior


class Silent:
    """No noise at all: for a linear model the particle is the mean of all particles."""

    def __init__(self, dtype=torch.float64, size=SIZE):
        self.zeros = torch.zeros(1, 1, 1, *size, dtype=dtype)

    def start(self):
        return self.zeros

    def step(self, index):
        return self.zeros


def test_variances_of_white_priors():
    model = GaussianEps(torch.zeros(1, 4, 4), 0.5**2)
    for sigma_t in (1e-3, 0.1, 1.0, 50.0):
        assert default_r2(sigma_t) == pytest.approx(model.r2(sigma_t), rel=1e-12)
        flat = GaussianEps(torch.zeros(1, 4, 4), 1e9)  # a prior that knows nothing
        assert EpsModel(1).error_spectrum(sigma_t).peak == pytest.approx(flat.r2(sigma_t), rel=1e-5)


@pytest.mark.parametrize("guidance", [PosteriorMean(), PiGDM()], ids=["mean", "pigdm"])
def test_coloured_prior_needs_the_error_of_each_frequency(guidance):
    """The posterior mean of images whose power falls with the frequency: right with the spectrum, not with a number."""
    law, size = ErrorSpectrum(1.0, 0.1, 2.0), (16, 12)
    k, noise = kernels(1, 3, 3, seed=4), Silent(size=size)
    zero = Observation.of(torch.zeros(1, 1, *size, dtype=torch.float64), 0.02)
    power = torch.from_numpy(law.at(zero.log_frequency.exp().numpy()))[None] * 0.05
    model = GaussianEps(torch.zeros(1, *size, dtype=torch.float64), power)
    x = (model.sample(1, torch.Generator().manual_seed(0)) + 1) / 2
    y = blur(x, k) + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    observation, K = Observation.of(y, 0.02), ops.psf_to_otf(k, size)
    S = power / 4
    mean = torch.fft.irfft2(S * K.conj() / (S * K.abs() ** 2 + 0.02**2) * torch.fft.rfft2(y - 0.5), s=size) + 0.5

    def error(r2):
        drawn = sample(model, observation, Known(k), guidance, Schedule.linear().respace(200), noise=noise,
                       rule=DDIM() if not guidance.jacobian else DDPM(), r2=r2)  # fmt: skip
        return float(((drawn.x[:, 0] + 1) / 2 - mean).norm() / (mean - 0.5).norm())

    def exact(sigma_t):  # S sigma^2 / (S + sigma^2), of the same form
        gain = 0.05 / (0.05 + sigma_t**2)
        return ErrorSpectrum(gain * sigma_t**2, 0.1 * (1 / (1 - gain)) ** 0.5, 2.0)

    assert error(exact) < 0.1
    assert error(model.r2) > 2 * error(exact)


def test_spectrum_of_a_white_error_is_a_number():
    observation = Observation.of(uniform(1, 3, 16, 16), 0.05)
    model, k = GaussianEps(torch.zeros(3, 16, 16), 0.25), kernels(1, 3, 3).float()
    observation = Observation.of(observation.y.float(), 0.05)
    schedule, noise = Schedule.linear().respace(8), PhiloxNoise(torch.tensor([0]), 2, (3, 16, 16))
    runs = [
        sample(model, observation, Known(k), PiGDM(), schedule, noise=noise, r2=r2).x
        for r2 in (lambda s: s**2, lambda s: ErrorSpectrum(s**2), lambda s: ErrorSpectrum(s**2, 1e9))
    ]
    assert torch.equal(runs[0], runs[1]) and torch.allclose(runs[0], runs[2], atol=1e-4)


def test_variance_of_a_step_is_that_of_the_spectrum():
    observation, law = Observation.of(uniform(1, 3, 16, 13), 0.05), ErrorSpectrum(0.6, 0.1, 1.7)
    step = Schedule.linear().respace(8).step(4)
    c = StepConstants.of(step, PiGDM(), DDPM(), lambda sigma_t: law)
    frequency = torch.hypot(torch.fft.fftfreq(16, dtype=torch.float64)[:, None], torch.fft.rfftfreq(13))
    assert c.r2_map(observation).numpy() == pytest.approx(law.at(frequency.numpy()) / 4, rel=1e-6)


def test_spectrum_counts_by_its_peak_where_the_margin_was_not_measured():
    model, k = GaussianEps(torch.zeros(3, 16, 16), 0.25), kernels(1, 3, 3).float()
    schedule, noise = Schedule.linear().respace(8), PhiloxNoise(torch.tensor([0]), 2, (3, 16, 16))
    for canvas in (None, Canvas(16, 16, (12, 13))):
        observation = Observation.of(uniform(1, 3, 16, 16).float(), 0.05, canvas)
        runs = [
            sample(model, observation, Known(k), PiGDM(), schedule, noise=noise, r2=r2).x
            for r2 in (lambda s: s**2, lambda s: ErrorSpectrum(s**2, 0.1, 2.0))
        ]
        assert torch.equal(*runs) == (canvas is not None)


@pytest.mark.parametrize("rule", [DDPM(), DDIM(0.0), Renoise(0.5)], ids=["ddpm", "ddim", "renoise"])
@pytest.mark.parametrize("schedule", [Schedule.linear().respace(20), Schedule.karras(20, 50)], ids=["linear", "karras"])
def test_mean_of_posterior_mean_guidance(rule, schedule):
    """E[x_0 | x_t, y] is exact here, so every rule and any number of steps has the right mean."""
    oracle = Oracle(0.1, dtype=torch.float64)
    bias, _ = oracle.bias(oracle.draw(PosteriorMean(), schedule, noise=Silent(), rule=rule).repeat(1, 2, 1, 1, 1))
    assert bias < 0.03
    wrong = oracle.draw(PosteriorMean(), schedule, noise=Silent(), rule=rule, r2=lambda s: 5 * oracle.model.r2(s))
    assert oracle.bias(wrong.repeat(1, 2, 1, 1, 1))[0] > 0.1


def test_posterior_mean_guidance_samples_the_posterior():
    oracle = Oracle(0.1, particles=100)
    bias, spread = oracle.bias(oracle.draw(PosteriorMean(), Schedule.linear().respace(200)))
    assert bias < 0.1 and spread == pytest.approx(1, abs=0.1)  # the fixed-small variance is narrow


def test_default_r2_is_exact_for_the_prior_it_assumes():
    oracle = Oracle(0.1, std=0.5, dtype=torch.float64)
    x = oracle.draw(PosteriorMean(), Schedule.karras(20, 50.0), noise=Silent(), r2=default_r2)
    bias, _ = oracle.bias(x.repeat(1, 2, 1, 1, 1))
    assert bias < 0.1  # the clamp of x0_hat at 2 std is all that is left


# -------------------------------------------------------------------------------------------------- the loop


def test_the_loop_reports_each_step():
    oracle, seen = Oracle(0.1, particles=2), []
    result = sample(
        oracle.model, oracle.observation, Known(oracle.k.float()), PosteriorMean(), Schedule.karras(4, 1.0),
        noise=PhiloxNoise(torch.tensor([0]), 2, (1, *SIZE)), on_step=lambda *args: seen.append(args),
    )  # fmt: skip
    assert [step.index for step, _, _ in seen] == [3, 2, 1, 0]
    for _, x0_hat, k in seen:
        assert x0_hat.shape == (1, 2, 1, *SIZE) and 0 <= x0_hat.min() and x0_hat.max() <= 1
        assert torch.equal(k, oracle.k.float())
    assert result.x.shape == (1, 2, 1, *SIZE) and torch.equal(result.kernel, oracle.k.float())
    assert torch.equal(result.images, ((result.x + 1) / 2).clamp(0, 1))


def test_x_start_replaces_the_first_noise_only():
    oracle = Oracle(0.1, particles=1)
    noise = PhiloxNoise(torch.tensor([0]), 1, (1, *SIZE))
    args = (oracle.model, oracle.observation, Known(oracle.k.float()), PosteriorMean(), Schedule.karras(4, 1.0))
    plain = sample(*args, noise=noise).x
    assert torch.equal(sample(*args, noise=noise, x_start=noise.start()).x, plain)
    assert not torch.equal(sample(*args, noise=noise, x_start=torch.zeros_like(plain)).x, plain)


@pytest.mark.parametrize("guidance", [PiGDM(), PiGDM("released"), DPS(), DPS("released"), PosteriorMean()], ids=repr)
def test_the_network_is_all_that_autograd_records(guidance):
    """Nothing of a run keeps a graph, and a model without parameters needs none."""
    result = sample(
        SmallNet(), Observation.of(uniform(1, 3, 8, 8), 0.1), Known(kernels(1, 3, 3)), guidance,
        Schedule.linear().respace(5), noise=DoubleNoise((3, 8, 8)),
    )  # fmt: skip
    assert torch.isfinite(result.x).all() and not result.x.requires_grad and not result.kernel.requires_grad


class DoubleNoise(PhiloxNoise):
    """Philox noise in double precision."""

    def __init__(self, shape):
        super().__init__(torch.tensor([5]), 2, shape)

    def start(self):
        return super().start().double()

    def step(self, index):
        return super().step(index).double()
