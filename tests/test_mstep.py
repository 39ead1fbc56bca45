"""The M-step against the plain loop of full-size FFTs, its options, and the separation of images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastem import ops
from fastem.models import load_kernel_denoiser
from fastem.mstep import L1, L2, PnP, mstep, mstep_from_sums
from fastem.operators import blur
from fastem.ops import Backend, use_backend

CASES = [  # image, kernel
    ((12, 12), (5, 5)), ((12, 12), (4, 4)), ((11, 14), (4, 5)), ((9, 16), (9, 3)), ((8, 8), (8, 8)), ((7, 10), (7, 10)),
    ((10, 13), (6, 13)), ((5, 5), (1, 1)),
]  # fmt: skip


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernels(batch, h, w, seed=1):
    k = uniform(batch, 1, h, w, seed=seed)
    return k / k.sum((-2, -1), keepdim=True)


def problem(batch, n, channels, size, ksize, seed=0):
    """y, x0_hat and the kernel to start from: estimates near a sharp image that was blurred and got noise."""
    x = uniform(batch, 1, channels, *size, seed=seed)
    y = blur(x[:, 0], kernels(batch, *ksize, seed=seed + 1))
    y = y + 0.02 * (uniform(batch, channels, *size, seed=seed + 2) - 0.5)
    return y, x + 0.1 * (uniform(batch, n, channels, *size, seed=seed + 3) - 0.5), kernels(batch, *ksize, seed=seed + 4)


def project(z):
    z = z.clamp(min=0)
    return z / z.sum((-2, -1), keepdim=True)


def plain(y, x0_hat, k, *, sigma, prior, beta, num_iters, compat="paper"):
    """Eq. (22)-(25) as they stand, one image at a time, with the kernel embedded in a map of the size of the image."""
    out = []
    for i in range(y.shape[0]):
        n, _, height, width = x0_hat[i].shape
        h, w = k.shape[-2:]
        X, Y = torch.fft.fft2(x0_hat[i]), torch.fft.fft2(y[i])
        cross, energy = (X.conj() * Y).sum(0), X.abs().square().sum(0)  # (C, H, W)
        weight = beta * float(sigma[i]) ** 2
        if compat == "paper":
            weight, cross, energy = n * weight, cross.sum(0, keepdim=True), energy.sum(0, keepdim=True)
        k_i = k[i, 0]
        for _ in range(num_iters):
            embedded = torch.zeros(height, width, dtype=y.dtype)
            embedded[:h, :w] = k_i
            K = torch.fft.fft2(embedded.roll((-(h // 2), -(w // 2)), (0, 1)))
            Z = (cross + weight * K) / (energy + weight)  # Eq. (24)
            z = torch.fft.ifft2(Z).real.mean(0).roll((h // 2, w // 2), (0, 1))[:h, :w]
            k_i = project(prior(project(z)[None, None], beta))[0, 0]  # Eq. (25)
        out.append(k_i)
    return torch.stack(out)[:, None]


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size, ksize", CASES, ids=str)
def test_restricted_loop_is_the_plain_loop(size, ksize, n, compat):
    y, x0_hat, k = problem(2, n, 3, size, ksize)
    options = dict(prior=L1(0.05), beta=50.0, num_iters=4, compat=compat)
    sigma = torch.tensor([0.05, 0.3], dtype=torch.float64)
    expected = plain(y, x0_hat, k, sigma=sigma, **options)
    actual = mstep(y, x0_hat, k, sigma=sigma, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert ksize == (1, 1) or (actual - k).abs().max() > 1e-3, "nothing moved"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_any_size(height, width, data):
    ksize = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    n, compat = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from(["paper", "released"]))
    y, x0_hat, k = problem(1, n, 1, (height, width), ksize, seed=height)
    options = dict(prior=L2(0.1), beta=100.0, num_iters=3, compat=compat)
    actual = mstep(y, x0_hat, k, sigma=0.1, **options)
    torch.testing.assert_close(actual, plain(y, x0_hat, k, sigma=[0.1], **options), rtol=0, atol=1e-12)
    assert actual.min() >= 0 and float(actual.sum()) == pytest.approx(1, abs=1e-12)


def test_paper_and_released_agree_for_one_gray_particle():
    y, x0_hat, k = problem(1, 1, 1, (12, 13), (5, 4))
    options = dict(sigma=0.1, prior=L2(0.0), beta=50.0, num_iters=3)
    paper, released = (mstep(y, x0_hat, k, compat=c, **options) for c in ("paper", "released"))
    torch.testing.assert_close(paper, released, rtol=0, atol=1e-14)
    y, x0_hat, k = problem(1, 2, 3, (12, 13), (5, 4))
    paper, released = (mstep(y, x0_hat, k, compat=c, **options) for c in ("paper", "released"))
    assert (paper - released).abs().max() > 1e-4


@pytest.mark.parametrize("n", [2, 5])
def test_identical_particles(n):
    """In the paper n copies count as one; the released program takes them for n measurements: sigma^2 / n."""
    y, x0_hat, k = problem(1, 1, 3, (12, 12), (5, 5))
    options = dict(prior=L1(0.05), beta=50.0, num_iters=4)
    copies = x0_hat.expand(-1, n, -1, -1, -1)
    one = mstep(y, x0_hat, k, sigma=0.2, **options)
    torch.testing.assert_close(mstep(y, copies, k, sigma=0.2, **options), one, rtol=0, atol=1e-13)
    many = mstep(y, copies, k, sigma=0.2, compat="released", **options)
    expected = mstep(y, x0_hat, k, sigma=0.2 / math.sqrt(n), compat="released", **options)
    torch.testing.assert_close(many, expected, rtol=0, atol=1e-13)
    assert (many - mstep(y, x0_hat, k, sigma=0.2, compat="released", **options)).abs().max() > 1e-4


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_uncertainty_of_the_image(compat):
    """Appendix D: r2 is what particles spread about x0_hat with variance r2 per pixel would add.

    A pair `x +- s delta` has the mean x and, with s^2 = H W r2, exactly the power spectrum of that spread.
    """
    y, x0_hat, k = problem(2, 1, 3, (9, 12), (4, 5))
    r2 = 0.03
    spread = torch.zeros_like(x0_hat)
    spread[..., 2, 3] = math.sqrt(9 * 12 * r2)
    pair = torch.cat([x0_hat + spread, x0_hat - spread], dim=1)
    options = dict(prior=L2(0.0), beta=50.0, num_iters=4, compat=compat)
    sigma = 0.2 if compat == "paper" else 0.2 * math.sqrt(2)  # the released program drops the factor n
    expected = mstep(y, pair, k, sigma=sigma, **options)
    actual = mstep(y, x0_hat, k, sigma=0.2, r2=r2, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert (actual - mstep(y, x0_hat, k, sigma=0.2, **options)).abs().max() > 1e-4
    particles = mstep(y, pair, k, sigma=0.2, r2=r2, **options)  # n > 1: r2 on top of the spread
    double = mstep(y, x0_hat, k, sigma=0.2 if compat == "paper" else 0.2 / math.sqrt(2), r2=2 * r2, **options)
    torch.testing.assert_close(particles, double, rtol=0, atol=1e-12)


def test_recovers_the_kernel_of_a_known_image():
    x, k_true = uniform(1, 1, 3, 24, 20), kernels(1, 5, 6, seed=7) ** 3
    k_true = k_true / k_true.sum()
    y = blur(x[:, 0], k_true)
    k = mstep(y, x, kernels(1, 5, 6), sigma=1e-3, prior=L2(0.0), beta=1e5, num_iters=30)
    torch.testing.assert_close(k, k_true, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------------------- priors


class Recorder(nn.Module):
    """A kernel denoiser that changes nothing and remembers the noise it was told."""

    def __init__(self):
        super().__init__()
        self.noise = []

    def forward(self, k, noise_std):
        self.noise.append(noise_std)
        return k


def test_pnp_tells_the_denoiser_its_noise():
    y, x0_hat, k = problem(1, 1, 1, (10, 10), (3, 3))
    denoiser = Recorder()
    options = dict(sigma=0.1, beta=400.0, num_iters=3)
    actual = mstep(y, x0_hat, k, prior=PnP(denoiser, lam=4.0), **options)
    assert denoiser.noise == [0.1, 0.1, 0.1]  # sqrt(lam / beta), Eq. (25)
    nothing = mstep(y, x0_hat, k, prior=PnP(denoiser, lam=0), **options)
    assert len(denoiser.noise) == 3 and torch.equal(actual, nothing)


@pytest.mark.parametrize("name", [Backend.REFERENCE, Backend.AUTO])
def test_fused_chain_is_the_loop(name):
    y, x0_hat, k = (t.float() for t in problem(2, 2, 3, (24, 24), (9, 9)))
    denoiser = load_kernel_denoiser("kernel")
    options = dict(sigma=torch.tensor([0.02, 0.05]), beta=1e5, num_iters=4)
    with use_backend(name), torch.no_grad():
        fused = mstep(y, x0_hat, k, prior=PnP(denoiser, lam=0.1), **options)
        loop = mstep(y, x0_hat, k, prior=lambda z, beta: denoiser(z, math.sqrt(0.1 / beta)), **options)
    assert (fused - loop).abs().max() < 1e-4 * loop.max()
    assert (fused - mstep(y, x0_hat, k, prior=L2(0.0), **options)).abs().max() > 1e-3, "the denoiser did nothing"


def test_l1_and_l2():
    z = torch.tensor([[[[-0.1, 0.1, 0.25, 0.6]]]], dtype=torch.float64)
    torch.testing.assert_close(L1(2.0)(z, 10.0), torch.tensor([[[[0, 0, 0.05, 0.4]]]], dtype=torch.float64))
    proximal = L2(2.0)(z, 10.0)  # argmin lam p^2 + beta / 2 (p - z)^2
    torch.testing.assert_close(2 * 2.0 * proximal + 10.0 * (proximal - z), torch.zeros_like(z), rtol=0, atol=1e-14)
    y, x0_hat, k = problem(1, 1, 1, (12, 12), (5, 5))
    options = dict(sigma=0.1, beta=50.0, num_iters=4)
    none, l2, l1 = (mstep(y, x0_hat, k, prior=p, **options) for p in (L2(0.0), L2(7.0), L1(1.0)))
    torch.testing.assert_close(l2, none, rtol=0, atol=1e-13)  # undone by the division by the sum
    assert (l1 == 0).sum() > (none == 0).sum()


@pytest.mark.parametrize("solver", ["hqs", "admm"])
@pytest.mark.parametrize("prior", [L1(0.3), L2(1.0), PnP(Recorder())], ids=["l1", "l2", "pnp"])
def test_result_is_on_the_simplex(solver, prior):
    y, x0_hat, k = problem(3, 2, 3, (12, 11), (4, 5))
    out = mstep(y, x0_hat, k, sigma=0.1, prior=prior, beta=50.0, num_iters=3, solver=solver)
    assert out.shape == k.shape and out.min() >= 0
    torch.testing.assert_close(out.sum((-2, -1)), torch.ones(3, 1, dtype=out.dtype), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_each_image_has_its_own_sigma(dtype, limit):
    y, x0_hat, k = (t.to(dtype) for t in problem(2, 3, 3, (12, 12), (5, 4)))
    sigma = torch.tensor([0.05, 2.0], dtype=dtype)
    options = dict(prior=L1(0.05), beta=50.0, num_iters=4)
    both = mstep(y, x0_hat, k, sigma=sigma, **options)
    for i in range(2):
        own = mstep(y[i : i + 1], x0_hat[i : i + 1], k[i : i + 1], sigma=float(sigma[i]), **options)
        torch.testing.assert_close(both[i : i + 1], own, rtol=0, atol=limit)
    assert (mstep(y, x0_hat, k, sigma=0.05, **options)[1] - both[1]).abs().max() > 1e-3


def together(parts):
    return [torch.cat(t) for t in zip(*parts, strict=True)]


@pytest.mark.parametrize("size, ksize", [((16, 16), (5, 5)), ((15, 18), (4, 7))], ids=str)
@pytest.mark.parametrize("name", ["reference", "native"])
def test_an_image_does_not_see_its_company(name, size, ksize, request):
    """Bit for bit, next to three other images of the batch, first or last; sums over the batch would show at once."""
    if name == "native":
        request.getfixturevalue("native_backend")
    mine = [t.float() for t in problem(1, 2, 3, size, ksize)]
    others = [[t.float() for t in problem(1, 2, 3, size, ksize, seed=seed)] for seed in (10, 20)]
    others.append([torch.full_like(mine[0], 1e3), torch.full_like(mine[1], -7.0), mine[2]])
    prior = PnP(load_kernel_denoiser("kernel"), lam=0.1)
    options = dict(prior=prior, beta=1e4, num_iters=3)

    def first(other, sigma):
        return mstep(*together([mine, other]), sigma=torch.tensor([0.05, sigma]), **options)[0]

    def last(other, sigma):
        return mstep(*together([other, mine]), sigma=torch.tensor([sigma, 0.05]), **options)[1]

    def mixed(other):
        """What the released program does: sums over the batch."""
        y, x0_hat, k = together([mine, other])
        sums = ops.spectral_sums(torch.fft.rfft2(x0_hat), torch.fft.rfft2(y))
        sums = [s.sum(0, keepdim=True).expand_as(s) for s in sums]
        return mstep_from_sums(*sums, k, size=size, count=6, particles=2, sigma=0.05, compat="paper", **options)[0]

    with use_backend(name):
        results = [first(other, sigma) for other in others for sigma in (0.05, 0.3)]
        results += [last(other, sigma) for other in others for sigma in (0.05, 0.3)]
        assert all(torch.equal(results[0], r) for r in results[1:])
        assert not torch.equal(mixed(others[0]), mixed(others[1]))


# -------------------------------------------------------------------------------------------------- errors


def test_errors():
    y, x0_hat, k = problem(2, 3, 3, (8, 9), (4, 5))
    options = dict(sigma=0.1, prior=L2(0.0))
    wrong = [
        ((y[0], x0_hat, k), r"y must be \(B, C, H, W\)"),
        ((y, x0_hat[:, 0], k), r"got \(2, 3, 8, 9\) and \(2, 3, 8, 9\)"),
        ((y, x0_hat[:1], k), "of the same images"),
        ((y, x0_hat[..., :-1], k), "of the same images"),
        ((y, x0_hat, k[:1]), "one kernel per image"),
        ((y, x0_hat, k[:, 0]), r"k must be \(B, 1, h, w\) with B = 2"),
        ((y, x0_hat, kernels(2, 9, 3)), "kernel 9x3 is larger than the image 8x9"),
    ]
    for args, message in wrong:
        with pytest.raises(ValueError, match=message):
            mstep(*args, **options)
    with pytest.raises(ValueError, match="compat must be 'paper' or 'released', got 'exact'"):
        mstep(y, x0_hat, k, compat="exact", **options)
    with pytest.raises(ValueError, match="solver must be 'hqs' or 'admm', got 'cg'"):
        mstep(y, x0_hat, k, solver="cg", **options)
