"""The CUDA sources, run on the CPU by csrc/cuda/emulate, against the specification in float64.

This shows that the indexing, the shared memory and the barriers of the .cu files are right where there is no GPU.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import c_double, c_float, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from fastem.ops import reference

CSRC = Path(__file__).parents[1] / "csrc"
TOLERANCE = 2e-6
GUARD = 64  # poisoned elements on both sides of every result
KERNELS = pytest.mark.parametrize("size", [(5, 5), (33, 33), (4, 6), (1, 1), (7, 2), (9, 50)], ids=str)
FLAT = pytest.mark.parametrize("size", [(8, 8), (33, 31), (1, 1)], ids=str)
SEEDS = torch.tensor([0, -5, (1 << 40) + 3])

if not CSRC.is_dir() or shutil.which("g++") is None:
    pytest.skip("needs the C++ sources and g++", allow_module_level=True)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulate") / "emulated.so"
    sources = [*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cuda" / "emulate").glob("*.cpp")]
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-DFASTEM_CUDA", "-o", library, "-x", "c++"]
    includes = [f"-I{CSRC / 'cuda' / 'emulate'}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, *includes, *sources], check=True, env=os.environ | {"LC_ALL": "C"})
    loaded = ctypes.CDLL(str(library))
    for name in ("chain", "group_norm", "recentre", "simplex_least_squares"):
        getattr(loaded, f"{name}_scratch_floats").restype = c_int64
    return loaded


@pytest.fixture(autouse=True, params=[False, True], ids=["forward", "reverse"])
def device(cuda, request):
    """A small device whose threads run in one order, then in the other: a missing barrier shows in one of them."""
    use_device(cuda, reverse=request.param)


def use_device(cuda, *, n_sm=4, shared=100 << 10, reverse=False):
    cuda.emulate_device(n_sm, shared, int(reverse))


def random(*shape, seed=0, low=-1.0, high=1.0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def half_spectrum(*shape, seed=0):
    return torch.fft.rfft2(random(*shape, seed=seed)).to(torch.complex64)


def call(function, *args):
    """Calls with tensors as pointers, Python floats as C floats. Every buffer lies between poisoned guards: results are
    made so, see `result`, and inputs are copied there, so that a value read from outside shows in the results."""
    as_c = {int: c_int64, bool: c_int64, float: c_float}
    inputs, values = [], []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if arg.storage_offset() != GUARD:
                inputs.append((arg, arg := guarded(arg)))
            values.append(c_void_p(arg.data_ptr()))
            inputs.append((None, arg))
        else:
            values.append(as_c.get(type(arg), lambda v: v)(arg))
    status = function(*values)
    assert status == 0, f"CUDA status {status}"
    for original, tensor in inputs:
        assert original is None or torch.equal(original.nan_to_num(), tensor.nan_to_num()), "an input was written to"
        whole = tensor.new_empty(0).set_(tensor.untyped_storage())
        poison = torch.full_like(whole[:GUARD], _poison(tensor.dtype))
        for guard in (whole[:GUARD], whole[-GUARD:]):
            assert torch.equal(guard.nan_to_num(), poison.nan_to_num()), "written outside of a buffer"


def _poison(dtype):
    return -(1 << 55) if dtype == torch.int64 else torch.nan


def guarded(tensor):
    """A copy between poisoned guards."""
    assert tensor.is_contiguous()
    copy = result(*tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor)


def result(*shape, dtype=torch.float32):
    """A poisoned tensor between poisoned guards."""
    count = torch.Size(shape).numel()
    return torch.full((count + 2 * GUARD,), _poison(dtype), dtype=dtype)[GUARD : GUARD + count].view(shape)


def wide(*tensors):
    double = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return tuple(None if t is None else t.to(double.get(t.dtype, t.dtype)) for t in tensors)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error < tolerance, f"relative error {error:.1e}"


@FLAT
def test_wiener_guidance(cuda, size):
    X, Y, K = half_spectrum(2, 3, 3, *size), half_spectrum(2, 3, *size, seed=1), half_spectrum(2, 1, *size, seed=2)
    K /= size[0] * size[1]
    sigma2, r2 = random(2, low=1e-3, high=1e-2), random(2, low=0.1, high=0.6)
    for r2_ in (r2, random(*K.shape[-2:], low=0.1, high=0.6)):
        V = result(*X.shape, dtype=X.dtype)
        call(cuda.wiener_guidance, X, Y, K, sigma2, r2_, V, 2, 3, 3, K[0].numel(), int(r2_.dim() == 2))
        assert_close(V, reference.wiener_guidance(*wide(X, Y, K, sigma2, r2_)))


@FLAT
@pytest.mark.parametrize("per_channel", [False, True])
def test_spectral_sums(cuda, size, per_channel):
    X, Y = half_spectrum(2, 4, 3, *size), half_spectrum(2, 3, *size, seed=1)
    expected = reference.spectral_sums(*wide(X, Y), per_channel)
    Sxy, Sxx = result(*expected[0].shape, dtype=X.dtype), result(*expected[1].shape)
    call(cuda.spectral_sums, X, Y, Sxy, Sxx, 2, 4, 3, Y[0, 0].numel(), per_channel)
    assert_close(Sxy, expected[0])
    assert_close(Sxx, expected[1])


@pytest.mark.parametrize("count", [1, 7, 4096, 5001])
def test_predict_x0_and_step_update(cuda, count):
    x_t, eps = random(count, low=-2, high=2), random(count, seed=1)
    x0_hat, mask = result(count), result(count)
    call(cuda.predict_x0, x_t, eps, x0_hat, mask, c_double(0.6), None, count)
    expected, expected_mask = reference.predict_x0(*wide(x_t, eps), 0.6)
    assert_close(x0_hat, expected)
    assert (mask != expected_mask).sum() <= 1  # a value on the bound may round to either side
    noise, guidance = random(count, seed=2), random(count, seed=3)
    for given, std in ((noise, 0.3), (None, 0.0)):
        for guide in (guidance, None):
            out = result(count)
            call(cuda.step_update, x_t, x0_hat, given, guide, out, 0.4, 0.6, std, -0.7, None, count)
            assert_close(out, reference.step_update(*wide(x_t, x0_hat, noise, guide), 0.4, 0.6, std, -0.7))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 33, 31), (5,), (1,)], ids=str)
def test_philox(cuda, shape):
    noise = reference.philox_normal(SEEDS, 2, shape, 7, 1)
    z, count = result(*noise.shape), noise[0, 0].numel()
    call(cuda.philox_normal, SEEDS, z, 3, 2, count, 7, 1)
    assert_close(z, noise.double())
    x_t, x0_hat, guidance = (random(*noise.shape, seed=i) for i in range(3))
    for guide in (guidance, None):
        out = result(*noise.shape)
        numbers = (0.4, 0.6, 0.3, -0.7)
        call(cuda.step_update_philox, x_t, x0_hat, SEEDS, guide, out, *numbers, None, None, None, 3, 2, count, 7, 1)
        assert_close(out, reference.step_update(*wide(x_t, x0_hat, noise, guide), 0.4, 0.6, 0.3, -0.7))


def test_numbers_and_step_may_be_read_on_the_device(cuda):
    """As in a recorded step: one launch, and the values of another row at the next replay."""
    x_t, eps, guidance = (random(3, 2, 33, seed=i, low=-2, high=2) for i in range(3))
    wrong = (9.0, 9.0, 9.0, 9.0)
    x0_hat, mask, out, expected = (result(*x_t.shape) for _ in range(4))
    for alpha_bar, row, numbers in ((0.6, 7, [0.4, 0.6, 0.3, -0.7]), (4e-5, 8, [0.1, 0.8, 0.2, 0.0])):
        given = torch.tensor(numbers, dtype=torch.float64)
        step, run = torch.tensor([row]), torch.tensor([2 * row + 1])
        on_device = torch.tensor([alpha_bar], dtype=torch.float64)
        call(cuda.predict_x0, x_t, eps, x0_hat, mask, c_double(0.5), on_device, x_t.numel())
        call(cuda.predict_x0, x_t, eps, expected, mask, c_double(alpha_bar), None, x_t.numel())
        assert torch.equal(x0_hat, expected)
        sizes = (3, 2, 33)
        call(cuda.step_update_philox, x_t, x0_hat, SEEDS, guidance, out, *wrong, given, step, run, *sizes, 99, 98)
        words = (None, None, *sizes, row, 2 * row + 1)
        call(cuda.step_update_philox, x_t, x0_hat, SEEDS, guidance, expected, *numbers, None, *words)
        assert torch.equal(out, expected)
        call(cuda.step_update, x_t, x0_hat, eps, guidance, out, *wrong, given, x_t.numel())
        call(cuda.step_update, x_t, x0_hat, eps, guidance, expected, *numbers, None, x_t.numel())
        assert torch.equal(out, expected)


DTYPES = {torch.float32: (0, TOLERANCE), torch.float16: (1, 2**-11 + 1e-6), torch.bfloat16: (2, 2**-8 + 1e-6)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "samples, n_chan, n_skip, pixels, groups",
    [  # small maps, a block per group: in packs and not, odd and single pixels
        (2, 16, 0, 35, 2), (1, 7, 5, 33, 3), (2, 24, 8, 64, 4), (1, 1, 0, 9, 1),
        # large maps, in chunks: more channels than a tile, groups that straddle the two inputs, a short last chunk
        (2, 8, 0, 4099, 1), (1, 520, 24, 161, 4), (1, 264, 1, 67, 1), (2, 16, 8, 2049, 3),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("mean", [0, 30])
def test_group_norm_silu(cuda, dtype, samples, n_chan, n_skip, pixels, groups, mean, request):
    if "reverse" in request.node.name and mean:
        pytest.skip("one order of the threads is enough here")
    code, limit = DTYPES[dtype]
    limit *= 5 if mean and dtype is torch.float32 else 1  # x itself has so few digits of its difference from the mean
    channels = n_chan + n_skip
    x, skip = ((random(samples, pixels, 1, c, seed=c, low=-2, high=2) + mean).to(dtype) for c in (n_chan, n_skip))
    weight, bias = random(channels, seed=2), random(channels, seed=3)
    both = random(samples, 2 * channels, seed=4) if samples > 1 else None  # halves of one projection, or none
    scale, shift = (None, None) if both is None else both.chunk(2, dim=1)
    film = [None if t is None else c_void_p(t.data_ptr()) for t in (scale, shift)]
    scratch = result(cuda.group_norm_scratch_floats(*map(c_int64, (samples, n_chan, n_skip, pixels, groups))))
    y = result(samples, pixels, 1, channels, dtype=dtype)
    moments = result(samples, groups), result(samples, groups)
    sizes = (samples, n_chan, n_skip, pixels, groups)
    inputs = (x, skip if n_skip else None)
    call(cuda.group_norm_silu, *inputs, weight, bias, *film, 2 * channels, y, *moments, scratch, code, *sizes, 1e-5)
    plain = [None if t is None else t.permute(0, 3, 1, 2) for t in inputs]  # (N, C, pixels, 1)
    double = [*wide(*(None if t is None else t.float() for t in plain)), *wide(weight, bias, scale, shift)]
    expected = reference.group_norm_silu(*double, groups, 1e-5)
    assert_close(y.permute(0, 3, 1, 2).double(), expected[0], limit)
    assert (((moments[0] - expected[1]) * expected[2]).abs() < limit).all()  # of the mean, in standard deviations
    assert_close(moments[1], expected[2])

    grad = random(samples, pixels, 1, channels, seed=5).to(dtype)
    scratch.fill_(torch.nan)
    dx, dskip = result(*x.shape, dtype=dtype), result(*skip.shape, dtype=dtype) if n_skip else None
    call(cuda.group_norm_silu_backward, grad, *inputs, *moments, weight, bias, *film, 2 * channels, dx, dskip, scratch,
         code, *sizes)  # fmt: skip
    upstream = grad.permute(0, 3, 1, 2).double()
    expected = reference.group_norm_silu_backward(upstream, *double[:2], *expected[1:], *double[2:], groups)
    for actual, value in zip((dx, dskip), expected, strict=True):
        if value.numel():
            assert_close(actual.permute(0, 3, 1, 2).double(), value, 3 * limit)


@pytest.mark.parametrize("pixels", [33, 2049])
def test_group_norm_is_the_same_to_the_bit_in_any_company(cuda, pixels):
    x, weight, bias = random(3, pixels, 1, 16), random(16, seed=1), random(16, seed=2)

    def run(x):
        y, moments = result(*x.shape), (result(len(x), 2), result(len(x), 2))
        sizes = (len(x), 16, 0, pixels, 2)
        scratch = result(cuda.group_norm_scratch_floats(*map(c_int64, sizes)))
        call(cuda.group_norm_silu, x, None, weight, bias, None, None, 0, y, *moments, scratch, 0, *sizes, 1e-5)
        return y

    assert torch.equal(run(x)[1:2], run(x[1:2].clone()))


@pytest.mark.parametrize("image", [(64, 64), (33, 50), (70, 41)], ids=str)
@pytest.mark.parametrize("size", [(33, 33), (4, 6), (1, 1)], ids=str)
def test_psf_to_otf(cuda, size, image):
    k = random(2, 1, *size, low=0, high=1)
    k /= k.sum((-2, -1), keepdim=True)
    expected = reference.psf_to_otf(*wide(k), image)
    R, K = result(2, size[0], expected.shape[-1], dtype=torch.complex64), result(*expected.shape, dtype=torch.complex64)
    call(cuda.psf_to_otf, k, R, K, 2, *size, *image)
    assert_close(K, expected)


def affine(h, w, seed=0):
    """a, g and k of an M-step: g an autocorrelation, k a kernel."""
    signal = random(2, 1, 2 * h + 3, 2 * w + 3, seed=seed).double()
    G = torch.fft.rfft2(signal, s=(8 * h, 8 * w)).abs() ** 2
    g = reference.crop_support(torch.fft.irfft2(G, s=(8 * h, 8 * w)), 2 * h - 1, 2 * w - 1)
    g = (g / g.abs().sum((-2, -1), keepdim=True)).float().contiguous()
    k = random(2, 1, h, w, low=0, high=1, seed=seed + 1)
    return random(2, 1, h, w, low=-0.3, high=1, seed=seed + 2) / (h * w), g, k / k.sum((-2, -1), keepdim=True)


@KERNELS
def test_convolve_support(cuda, size):
    _, g, k = affine(*size)
    g += 0.1 * random(*g.shape) / g[0].numel()  # not symmetric: a flipped index shows
    z = result(*k.shape)
    call(cuda.convolve_support, g, k, z, 2, *size)
    assert_close(z, reference.convolve_support(*wide(g, k)))


@KERNELS
def test_projections(cuda, size):
    z = random(3, 1, *size, low=-0.5, high=1)
    k, nearest = result(*z.shape), result(*z.shape)
    z[0] = z[0].abs()  # at least one value is positive
    z[1:] = z[1:].abs().neg() + 2 * torch.nn.functional.one_hot(torch.tensor(0), z[0].numel()).view(1, *size)
    call(cuda.project_kernel, z, k, 3, *size)
    assert_close(k, reference.project_kernel(*wide(z)))
    z = random(3, 1, *size, low=-0.5, high=1, seed=4)
    call(cuda.project_simplex, z, nearest, 3, *size)
    assert_close(nearest, reference.project_simplex(*wide(z)))


def test_projections_of_nothing_and_of_nan_give_nan(cuda):
    z = torch.stack([-torch.ones(1, 4, 4), torch.ones(1, 4, 4)])
    z[1, 0, 2, 2] = torch.nan
    k, nearest = result(*z.shape), result(*z.shape)
    call(cuda.project_kernel, z, k, 2, 4, 4)
    call(cuda.project_simplex, z, nearest, 2, 4, 4)
    assert k.isnan().all()
    assert torch.equal(nearest[0], reference.project_simplex(z[:1])[0]) and nearest[1].isnan().any()


@pytest.mark.parametrize("shared", [100 << 10, 1 << 10], ids=["shared", "scratch"])
@pytest.mark.parametrize("size", [(5, 5), (11, 8), (1, 1)], ids=str)
def test_simplex_least_squares(cuda, size, shared, request):
    use_device(cuda, shared=shared, reverse="reverse" in request.node.name)
    b, g, k = affine(*size)
    out, scratch = result(*k.shape), result(cuda.simplex_least_squares_scratch_floats(2, *size))
    call(cuda.simplex_least_squares, g, b, k, out, scratch, 2, *size, 5)
    assert_close(out, reference.simplex_least_squares(*wide(g, b, k), 5))


@pytest.mark.parametrize("shared", [100 << 10, 1 << 9], ids=["shared", "scratch"])
@pytest.mark.parametrize("size", [(33, 33), (8, 9), (1, 1), (2, 2), (3, 1), (16, 5)], ids=str)
def test_recentre(cuda, size, shared, request):
    use_device(cuda, shared=shared, reverse="reverse" in request.node.name)
    k = random(3, 1, *size, low=0, high=1) ** 4
    k[1] = torch.nan
    k[2] = 0
    out, scratch = result(*k.shape), result(cuda.recentre_scratch_floats(3, *size))
    call(cuda.recentre, k, out, scratch, 3, *size)
    expected = reference.recentre(*wide(k))
    assert_close(out[:1], expected[:1])
    assert not out[1:].any()


class Chain:
    """A random denoiser chain, and the C arrays that describe it."""

    def __init__(self, widths, biased=True):
        self.widths = widths
        pairs = list(zip(widths[1:], widths[:-1], strict=True))
        self.weights = [random(o, i, 3, 3, seed=n) / (1.5 * i**0.5) for n, (o, i) in enumerate(pairs)]
        self.weights[-1] = self.weights[-1].abs()  # something is positive: no kernel without mass
        self.biases = [0.1 * random(o, seed=50 + n) if biased else None for n, (o, _) in enumerate(pairs)]
        self.scale = 50.0

    def run(self, cuda, a, g, k, noise_std, num_iters, recentred=False):
        count, size, layers = k.shape[0], k.shape[-2:], len(self.weights)
        widths = (c_int64 * len(self.widths))(*self.widths)
        pointers = [(c_void_p * layers)(*(t.data_ptr() if t is not None else None for t in ts))
                    for ts in (self.weights, self.biases)]  # fmt: skip
        scratch = cuda.chain_scratch_floats(c_int64(count), *map(c_int64, size), widths, c_int64(layers))
        out = result(*k.shape)
        call(cuda.hqs_chain, a, g, k, noise_std, out, result(scratch), count, *size, *pointers, widths, layers,
             self.scale, num_iters, recentred)  # fmt: skip
        return out

    def spec(self):
        return [w.double() for w in self.weights], [None if b is None else b.double() for b in self.biases], self.scale


NOISE = torch.tensor([0.003, 0.02])
CHAINS = {"narrow": [2, 5, 3, 1], "wide": [2, 32, 36, 1], "single": [2, 1]}


@pytest.mark.parametrize("size", [(5, 5), (1, 1), (13, 10), (4, 85)], ids=str)
@pytest.mark.parametrize("widths", CHAINS.values(), ids=CHAINS)
def test_denoise_chain(cuda, size, widths):
    chain, (_, _, k) = Chain(widths), affine(*size)
    assert_close(chain.run(cuda, None, None, k, NOISE, 1), reference.denoise_chain(*wide(k, NOISE), *chain.spec()))


@pytest.mark.parametrize("biased", [False, True])
def test_hqs_chain(cuda, biased):
    a, g, k = affine(13, 10)
    chain = Chain(CHAINS["wide"], biased)
    actual = chain.run(cuda, a, g, k, NOISE, 3)
    assert_close(actual, reference.hqs_chain(*wide(a, g, k, NOISE), *chain.spec(), 3))


@pytest.mark.parametrize("size", [(5, 5), (13, 10), (4, 85), (1, 1)], ids=str)
def test_hqs_chain_recentres_its_result(cuda, size):
    a, g, k = affine(*size)
    chain = Chain(CHAINS["narrow"])
    plain, moved = (chain.run(cuda, a, g, k, NOISE, 2, recentred) for recentred in (False, True))
    out, scratch = result(*k.shape), result(cuda.recentre_scratch_floats(2, *size))
    call(cuda.recentre, plain, out, scratch, 2, *size)
    assert_close(moved, out)
    assert_close(moved, reference.recentre(reference.hqs_chain(*wide(a, g, k, NOISE), *chain.spec(), 2)), 5e-6)


def test_hqs_chain_is_the_same_to_the_bit_on_any_device_and_in_any_company(cuda):
    """One block or a team of four per image, kernels and g in shared memory or not, images alone or together."""
    a, g, k = affine(7, 6)
    chain = Chain(CHAINS["narrow"])
    expected = chain.run(cuda, a, g, k, NOISE, 2)
    assert_close(expected, reference.hqs_chain(*wide(a, g, k, NOISE), *chain.spec(), 2))
    for n_sm, shared in ((1, 100 << 10), (3, 100 << 10), (8, 100 << 10), (8, 53 << 10)):
        use_device(cuda, n_sm=n_sm, shared=shared)
        assert torch.equal(chain.run(cuda, a, g, k, NOISE, 2), expected)
        assert torch.equal(chain.run(cuda, a[1:], g[1:], k[1:], NOISE[1:], 2), expected[1:])
