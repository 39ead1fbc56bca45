"""The CUDA ops against the specification in float64. Runs where torch sees a GPU: `make gpu-test`."""

from __future__ import annotations

import os

import pytest
import torch
from red_zones import RedZones

from fastem.ops import backend, native, reference

if not torch.cuda.is_available():
    if "cuda" in os.environ.get("FASTEM_REQUIRE", ""):
        raise RuntimeError("FASTEM_REQUIRE names cuda, but torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)
if not native.has_cuda():
    raise RuntimeError(f"torch sees a GPU, but the extension has no CUDA. Build it with {backend.BUILD}")

DEVICE = torch.device("cuda")
TOLERANCE = 2e-6
SMALL = os.environ.get("FASTEM_SMALL") == "1"  # under a sanitizer, which is slow
SIZES = [(8, 8), (33, 31), (1, 1)] + [(256, 256)] * (not SMALL)
KERNELS = [(33, 33), (5, 5), (4, 6), (1, 1)] + [(64, 64), (7, 130), (129, 129)] * (not SMALL)
SEEDS = torch.tensor([0, -5, 2**63 - 1, (1 << 40) + 3])
WIDTHS = [2, 32, 32, 32, 32, 1]


def random(*shape, seed=0, low=-1.0, high=1.0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def half_spectrum(*shape, seed=0):
    return torch.fft.rfft2(random(*shape, seed=seed)).to(torch.complex64)


def convert(value, change):
    if isinstance(value, list):
        return [convert(v, change) for v in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def widen(t):
    return t.to({torch.float32: torch.float64, torch.complex64: torch.complex128}.get(t.dtype, t.dtype))


def on_gpu(op, *args):
    """The registered CUDA op itself: nothing can fall back. Inputs lie between poison, see `red_zones`."""
    with RedZones() as zones:
        out = getattr(torch.ops.fastem, op)(*convert(list(args), lambda t: zones.copy(t.to(DEVICE))))
    zones.check()
    return [t.cpu() for t in out] if isinstance(out, tuple | list) else [out.cpu()]


def assert_matches_spec(op, *args, tolerance=TOLERANCE):
    expected = getattr(reference, op)(*convert(list(args), widen))
    actual = on_gpu(op, *args)
    for a, e in zip(actual, expected if isinstance(expected, tuple) else [expected], strict=True):
        assert a.shape == e.shape
        error = (a - e).abs().max() / e.abs().max().clamp(min=1e-30)
        assert error < tolerance, f"{op}: relative error {error:.1e}"
    return actual


def affine(h, w, batch=2, seed=0):
    """a, g and k of an M-step: g an autocorrelation, k a kernel."""
    side = (4 * h, 4 * w)
    power = torch.fft.rfft2(random(batch, 1, 2 * h, 2 * w, seed=seed).double(), s=side).abs() ** 2
    g = reference.crop_support(torch.fft.irfft2(power, s=side), 2 * h - 1, 2 * w - 1)
    g = (g / g.abs().sum((-2, -1), keepdim=True)).float()
    k = random(batch, 1, h, w, low=0, high=1, seed=seed + 1)
    return random(batch, 1, h, w, low=-0.3, high=1, seed=seed + 2) / (h * w), g, k / k.sum((-2, -1), keepdim=True)


def chain(widths=WIDTHS):
    pairs = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [random(o, i, 3, 3, seed=n) / (1.5 * i**0.5) for n, (o, i) in enumerate(pairs)]
    weights[-1] = weights[-1].abs()  # something is positive: no kernel without mass
    return weights, [0.1 * random(o, seed=50 + n) for n, (o, _) in enumerate(pairs)], 50.0


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("batch, n", [(1, 1), (3, 4)])
def test_spectral_ops(size, batch, n):
    X, Y = half_spectrum(batch, n, 3, *size), half_spectrum(batch, 3, *size, seed=1)
    K = half_spectrum(batch, 1, *size, seed=2) / (size[0] * size[1])
    sigma2, r2 = random(batch, low=1e-3, high=1e-2), random(batch, low=0.1, high=0.6)
    assert_matches_spec("wiener_guidance", X, Y, K, sigma2, r2)
    assert_matches_spec("wiener_guidance", X, Y, K, sigma2, random(*K.shape[2:], low=0.1, high=0.6))
    for per_channel in (False, True):
        assert_matches_spec("spectral_sums", X, Y, per_channel)


@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_ops_on_the_support(size):
    a, g, k = affine(*size)
    assert_matches_spec("psf_to_otf", k, [max(size[0], 150), max(size[1], 256)])
    assert_matches_spec("convolve_support", random(*g.shape, low=0, high=1), k)  # no cancellation, not symmetric
    z = random(2, 1, *size, low=-0.5, high=1)
    assert_matches_spec("project_kernel", z + 0.5 * (z == z.amax((-2, -1), keepdim=True)))  # one value is positive
    assert_matches_spec("project_simplex", z)
    assert_matches_spec("recentre", k**4)
    assert_matches_spec("simplex_least_squares", g, a, k, 12)


def test_recentre_of_nothing_is_nothing():
    k = torch.stack([torch.zeros(1, 9, 9), torch.full((1, 9, 9), torch.nan)])
    (moved,) = on_gpu("recentre", k)
    assert not moved.any()


@pytest.mark.parametrize("size", KERNELS, ids=str)
def test_chains(size):
    a, g, k = affine(*size)
    noise_std = torch.tensor([0.003, 0.02])
    assert_matches_spec("denoise_chain", k, noise_std, *chain())
    num_iters = 10 if a[0].numel() <= 64 * 64 else 1
    for recentred in (False, True):  # 10 times 7 layers
        assert_matches_spec("hqs_chain", a, g, k, noise_std, *chain(), num_iters, recentred, tolerance=1e-5)


@pytest.mark.parametrize("widths", [[2, 1], [2, 5, 3, 1], [2, 64, 64, 1]], ids=str)
def test_chains_of_other_widths(widths):
    a, g, k = affine(21, 21)
    assert_matches_spec("hqs_chain", a, g, k, torch.tensor([0.003, 0.02]), *chain(widths), 3, tolerance=5e-6)


@pytest.mark.parametrize("batch", [2] if SMALL else [2, 20, 300])
def test_a_kernel_is_the_same_to_the_bit_in_any_company(batch):
    """From a team of blocks per image to several images per block."""
    a, g, k = affine(33, 33, batch=batch)
    noise_std = random(batch, low=0.001, high=0.02)
    (together,) = on_gpu("hqs_chain", a, g, k, noise_std, *chain(), 3)
    for i in (0, batch // 2, batch - 1):
        only = slice(i, i + 1)
        (alone,) = on_gpu("hqs_chain", a[only], g[only], k[only], noise_std[only], *chain(), 3)
        assert torch.equal(alone, together[only])


@pytest.mark.parametrize("shape", [(3, 33, 31), (5,)] + [(3, 256, 256)] * (not SMALL), ids=str)
def test_step_ops(shape):
    (noise,) = assert_matches_spec("philox_normal", SEEDS, 3, list(shape), 7, 1)
    x_t, other, guidance = (random(4, 3, *shape, seed=i) for i in range(3))
    x0_hat, mask = on_gpu("predict_x0", 2 * x_t, other, 0.6)
    expected, expected_mask = reference.predict_x0(2 * x_t.double(), other.double(), 0.6)
    assert (x0_hat - expected).abs().max() < TOLERANCE
    inside = (expected - 0.5).abs() < 0.5 - 1e-6  # float32 may land on either side of the bound
    assert torch.equal(mask[inside], expected_mask[inside].float()) and mask.mean() < 1
    for guide in (None, guidance):
        for std in (0.0, 0.3):
            factors = (0.4, 0.6, std, -0.7)
            expected = reference.step_update(*map(widen, (x_t, other, noise)), guide, *factors)
            (plain,) = assert_matches_spec("step_update", x_t, other, noise, guide, *factors)
            (fused,) = on_gpu("step_update_philox", x_t, other, guide, SEEDS, *factors, 7, 1)
            for actual in (plain, fused):
                assert (actual - expected).abs().max() / expected.abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype, limit", [(torch.float32, TOLERANCE), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(
    "shape, n_skip, groups",
    [((2, 6, 7, 5), 3, 3), ((1, 8, 3, 3), 0, 2), ((2, 512, 16, 16), 256, 32), ((1, 256, 64, 64), 128, 32)]
    + [((2, 128, 256, 256), 0, 32)] * (not SMALL),
    ids=str,
)  # fmt: skip
def test_group_norm_silu(shape, n_skip, groups, dtype, limit):
    channels = shape[1] + n_skip
    x, skip = (random(shape[0], c, *shape[2:], seed=c, low=-2, high=2).to(dtype) for c in (shape[1], n_skip))
    skip = skip if n_skip else None
    weight, bias = random(channels, seed=2) + 1, random(channels, seed=3)
    scale, shift = random(shape[0], 2 * channels, seed=4).chunk(2, dim=1)
    grad = random(shape[0], channels, *shape[2:], seed=5).to(dtype)
    rest = (weight, bias, scale, shift, groups)
    actual = on_gpu("group_norm_silu", x, skip, *rest, 1e-5)
    expected = reference.group_norm_silu(*(widen(t) if isinstance(t, torch.Tensor) else t for t in (x.float(), skip if
                                         skip is None else skip.float(), *rest)), 1e-5)  # fmt: skip
    assert (actual[0] - expected[0]).abs().max() / expected[0].abs().max() < limit + 1e-6
    assert actual[0].dtype is dtype
    gradients = on_gpu("group_norm_silu_backward", grad, x, skip, *actual[1:], *rest)
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in (grad, x, skip, *actual[1:], *rest)]
    for a, e in zip(gradients, reference.group_norm_silu_backward(*wide), strict=True):
        if e.numel():
            assert (a - e).abs().max() / e.abs().max() < 3 * limit
    again = on_gpu("group_norm_silu", x, skip, *rest, 1e-5)
    assert all(map(torch.equal, actual, again))


def test_one_recorded_step_serves_every_row_of_a_table():
    """The numbers of a step and its index are read on the device, at every replay."""
    table = torch.tensor([[0.3, 0.6, 0.1, 0.02], [0.2, 0.5, 0.3, -0.1]], dtype=torch.float64, device=DEVICE)
    row, seeds = torch.zeros(1, dtype=torch.int64, device=DEVICE), SEEDS[:2].to(DEVICE)
    stream = torch.zeros((), dtype=torch.int64, device=DEVICE)
    x, x0, guidance = (random(2, 3, 5, 7, seed=s).to(DEVICE) for s in range(3))

    def update():
        numbers = table.index_select(0, row)[0].unbind()
        return torch.ops.fastem.step_update_philox(x, x0, guidance, seeds, 0, 0, 0, 0, 0, 1, *numbers, row, stream)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = update()
    for i in range(2):
        row.fill_(i)
        stream.fill_(2 * i + 1)
        graph.replay()
        expected = torch.ops.fastem.step_update_philox(x, x0, guidance, seeds, *table[i].tolist(), i, 2 * i + 1)
        assert torch.equal(out, expected)


def test_the_m_step_can_be_captured_in_a_graph():
    """No allocation outside the pool, no synchronisation, no host copy; and a replay computes, it does not remember."""
    a, g, k = (t.to(DEVICE) for t in affine(33, 33))
    noise_std = torch.tensor([0.003, 0.02], device=DEVICE)
    weights, biases, scale = convert(list(chain()), lambda t: t.to(DEVICE))

    def m_step():
        out = torch.ops.fastem.hqs_chain(a, g, k, noise_std, weights, biases, scale, 3)
        out = torch.ops.fastem.simplex_least_squares(g, a, torch.ops.fastem.recentre(out).abs(), 3)
        return torch.ops.fastem.psf_to_otf(out, [64, 64])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        m_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = m_step()
    a.mul_(1.5)
    graph.replay()
    assert torch.equal(captured, m_step())


def test_tensors_of_two_devices_are_refused():
    _, g, k = affine(5, 5)
    with pytest.raises((ValueError, RuntimeError), match="(?i)device|is on"):
        torch.ops.fastem.convolve_support(g, k.to(DEVICE))


def test_work_goes_to_the_current_stream():
    _, g, k = (t.to(DEVICE) for t in affine(33, 33))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: work on another stream would read k too early
        later = k * 2
        z = torch.ops.fastem.convolve_support(g, later)
    stream.synchronize()
    assert torch.equal(z, torch.ops.fastem.convolve_support(g, k * 2))
