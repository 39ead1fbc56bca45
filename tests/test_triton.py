"""The Triton twins against the specification in float64: on a GPU where there is one, else under the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from red_zones import guarded

from fastem.ops import reference

if importlib.util.find_spec("triton") is None:
    if "triton" in os.environ.get("FASTEM_REQUIRE", ""):
        raise ModuleNotFoundError("FASTEM_REQUIRE names triton, but it is not installed: pip install triton")
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated

import kernels_triton as kt  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = pytest.mark.parametrize("size", [(8, 8), (33, 31), (1, 1)], ids=str)  # (33, 31): fits no block
TOLERANCE = 2e-6
STEP, STREAM = 7, 1
SEEDS = torch.tensor([0, -5, 2**63 - 1, (1 << 40) + 3])


def half_spectrum(*shape, seed):
    *rows, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.fft.rfft2(torch.randn(*rows, height, width, generator=generator)).to(torch.complex64)


def uniform(*shape, seed, low=-1.0, high=1.0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def run(op, *args):
    """The Triton op on its device, every buffer between poison; results on the CPU."""
    out = guarded(op, *(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args))
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def truth(op, *args):
    """The specification in double precision."""
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return op(*(a.to(wide.get(a.dtype, a.dtype)) if isinstance(a, torch.Tensor) else a for a in args))


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("where", ["input", "left", "right"])
def test_red_zones_are_seen(where):
    """Negative control: what writes where it must not."""

    def wrong(x):
        out = torch.empty_like(x)
        at = {"input": (x, 0), "left": (out, -1), "right": (out, out.numel())}[where]
        at[0].as_strided((1,), (1,), at[0].storage_offset() + at[1]).fill_(1.0)
        return out

    with pytest.raises(AssertionError, match="written"):
        guarded(wrong, torch.zeros(5))


@SIZES
@pytest.mark.parametrize("batch, n, chan", [(1, 1, 1), (2, 3, 3)])
def test_wiener_guidance_matches_spec(size, batch, n, chan):
    X, Y = half_spectrum(batch, n, chan, *size, seed=0), half_spectrum(batch, chan, *size, seed=1)
    K = half_spectrum(batch, 1, *size, seed=2) / (size[0] * size[1])
    sigma2, r2 = uniform(batch, seed=3, low=1e-3, high=1e-2), uniform(batch, seed=4, low=0.1, high=0.6)
    args = (X, Y, K, sigma2, r2)
    assert_close(run(kt.wiener_guidance, *args), truth(reference.wiener_guidance, *args))


def test_wiener_guidance_broadcasts_the_kernel_over_images():
    X, Y, K = (half_spectrum(*s, 7, 5, seed=i) for i, s in enumerate([(2, 2, 3), (2, 3), (1, 1)]))
    sigma2, r2 = torch.tensor([1e-3]), torch.tensor([0.3, 0.5])
    expected = truth(reference.wiener_guidance, X, Y, K, sigma2, r2)
    assert_close(run(kt.wiener_guidance, X, Y, K, sigma2, r2), expected)


@SIZES
def test_wiener_guidance_with_a_variance_of_each_frequency(size):
    X, Y = half_spectrum(2, 3, 3, *size, seed=0), half_spectrum(2, 3, *size, seed=1)
    K = half_spectrum(2, 1, *size, seed=2) / (size[0] * size[1])
    for sigma2 in (torch.tensor([1e-3]), torch.tensor([1e-3, 2e-3])):
        args = (X, Y, K, sigma2, uniform(*K.shape[2:], seed=4, low=0.1, high=0.6))
        assert_close(run(kt.wiener_guidance, *args), truth(reference.wiener_guidance, *args))


@SIZES
@pytest.mark.parametrize("per_channel", [False, True])
def test_spectral_sums_match_spec(size, per_channel):
    X, Y = half_spectrum(2, 4, 3, *size, seed=0), half_spectrum(2, 3, *size, seed=1)
    expected = truth(reference.spectral_sums, X, Y, per_channel)
    for actual, sums in zip(run(kt.spectral_sums, X, Y, per_channel), expected, strict=True):
        assert_close(actual, sums)


def test_spectral_sums_never_mix_images():
    X, Y = half_spectrum(2, 3, 3, 9, 7, seed=0), half_spectrum(2, 3, 9, 7, seed=1)
    together = run(kt.spectral_sums, X, Y)
    X[1] *= 1e6
    for alone, both in zip(run(kt.spectral_sums, X, Y), together, strict=True):
        assert torch.equal(alone[0], both[0]) and not torch.equal(alone[1], both[1])


def test_predict_x0_matches_spec():
    x_t, eps = uniform(2, 3, 3, 33, 31, seed=0, low=-2, high=2), uniform(2, 3, 3, 33, 31, seed=1)
    x0_hat, mask = run(kt.predict_x0, x_t, eps, 0.6)
    expected, expected_mask = truth(reference.predict_x0, x_t, eps, 0.6)
    assert_close(x0_hat, expected)
    assert 0.2 < expected_mask.mean() < 0.9  # both sides of the clamp are exercised
    border = (expected - 0.5).abs() > 0.5 - 1e-6  # float32 may land on either side of the bound
    raw = (x_t.double() - 0.4**0.5 * eps) / 0.6**0.5
    assert torch.equal(mask[~border], expected_mask[~border].float())
    assert not mask[raw.abs() > 1 + 1e-6].any()


def test_predict_x0_lets_the_gradient_through_on_the_bound_and_passes_nan_on():
    x0_hat, mask = run(kt.predict_x0, torch.tensor([1.0, -1.0, 1.5, float("nan")]), torch.zeros(4), 1.0)
    assert mask.tolist() == [1, 1, 0, 0] and x0_hat[3].isnan()


@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("guided", [False, True])
def test_step_update_matches_spec(std, guided):
    x_t, x0_hat, noise, guidance = (uniform(2, 3, 3, 17, 19, seed=i) for i in range(4))
    args = (x_t, x0_hat, noise, guidance if guided else None, 0.4, 0.6, std, -0.7)
    assert_close(run(kt.step_update, *args), truth(reference.step_update, *args))


@pytest.mark.parametrize("guided", [False, True])
def test_step_update_with_its_own_noise(guided):
    x_t, x0_hat, guidance = (uniform(4, 3, 3, 17, 19, seed=i) for i in range(3))
    guidance = guidance if guided else None
    noise = reference.philox_normal(SEEDS, 3, (3, 17, 19), STEP, STREAM)
    expected = truth(reference.step_update, x_t, x0_hat, noise, guidance, 0.4, 0.6, 0.3, -0.7)
    actual = run(kt.step_update_philox, x_t, x0_hat, guidance, SEEDS, 0.4, 0.6, 0.3, -0.7, STEP, STREAM)
    assert_close(actual, expected)


def test_numbers_and_step_may_be_read_on_the_device():
    """As in a recorded step: the same bits as with numbers of the host."""
    x_t, x0_hat, noise, guidance = (uniform(4, 3, 3, 17, 19, seed=i) for i in range(4))
    for alpha_bar, *numbers in ((0.6, 0.4, 0.6, 0.3, -0.7), (4e-5, 0.1, 0.8, 0.0, 0.0)):
        given = torch.tensor(numbers, dtype=torch.float64).unbind()
        place, words = torch.tensor(alpha_bar, dtype=torch.float64), torch.tensor([STEP, STREAM]).unbind()
        for op, host, device in (
            (kt.predict_x0, (x_t, x0_hat, alpha_bar), (x_t, x0_hat, place)),
            (kt.step_update, (x_t, x0_hat, noise, guidance, *numbers), (x_t, x0_hat, noise, guidance, *given)),
            (
                kt.step_update_philox,
                (x_t, x0_hat, guidance, SEEDS, *numbers, STEP, STREAM),
                (x_t, x0_hat, guidance, SEEDS, *given, *words),
            ),
        ):
            expected, actual = run(op, *host), run(op, *device)
            both = (expected, actual) if isinstance(actual, tuple) else ((expected,), (actual,))
            assert all(map(torch.equal, *both))


@pytest.mark.parametrize("shape", [(3, 33, 31), (1, 1, 1), (5,)], ids=str)
def test_philox_normal_is_the_stream_of_the_spec(shape):
    actual = run(kt.philox_normal, SEEDS, 3, shape, STEP, STREAM)
    assert_close(actual, reference.philox_normal(SEEDS, 3, shape, STEP, STREAM).double())
    last = 2**32 - 1  # counters are unsigned
    actual = run(kt.philox_normal, SEEDS, 3, shape, last, last)
    assert_close(actual, reference.philox_normal(SEEDS, 3, shape, last, last).double())


def test_philox_integers_are_random123():
    """Known answers of Salmon et al.'s Random123, through the uniforms the normals are made of."""
    seeds = torch.zeros(1, dtype=torch.int64)
    z = run(kt.philox_normal, seeds, 1, (4,), 0, 0)[0, 0].double()
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])  # counter 0, key 0
    u = ((words >> 9).double() + 0.5) / 2**23
    radius = (z[0::2] ** 2 + z[1::2] ** 2).sqrt()
    turn = torch.atan2(z[1::2], z[0::2]) / (2 * torch.pi) % 1
    assert_close(radius, (-2 * u[0::2].log()).sqrt())
    assert_close(turn, u[1::2])


def norm(shape, n_skip, film, seed=0, mean=0.0):
    """x, skip, weight, bias, scale, shift of a GroupNorm."""
    samples, chan, *size = shape
    channels = chan + n_skip
    x, skip = (uniform(samples, c, *size, seed=seed + c, low=-2, high=2) + mean for c in (chan, n_skip))
    scale, shift = uniform(samples, 2 * channels, seed=2).chunk(2, dim=1) if film else (None, None)  # strided views
    return x, skip if n_skip else None, *(uniform(channels, seed=s) + 1 for s in (3, 4)), scale, shift


@pytest.mark.parametrize("shape, n_skip, groups", [((2, 6, 7, 5), 0, 3), ((1, 1, 1, 7), 0, 1), ((2, 4, 33, 31), 5, 3)])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0, 100])
def test_group_norm_silu_and_backward_match_spec(shape, n_skip, groups, film, layout, mean):
    x, skip, *rest = norm(shape, n_skip, film, mean=mean)
    x = x.contiguous(memory_format=layout)
    limit = TOLERANCE if mean == 0 else 1e-5  # x itself has so few digits of its difference from the mean
    out = run(kt.group_norm_silu, x, skip, *rest, groups, 1e-5)
    expected = truth(reference.group_norm_silu, x, skip, *rest, groups, 1e-5)
    assert out[0].is_contiguous(memory_format=layout)
    for actual, value in zip(out, expected, strict=True):
        assert_close(actual, value, limit)
    grad = uniform(*out[0].shape, seed=9)
    actual = run(kt.group_norm_silu_backward, grad, x, skip, *out[1:], *rest, groups)
    expected = truth(reference.group_norm_silu_backward, grad, x, skip, *expected[1:], *rest, groups)
    for one, value in zip(actual, expected, strict=True):
        if value.numel():
            assert_close(one, value, 3 * limit)


def test_group_norm_over_many_chunks_is_that_of_a_sample_alone():
    x, _, *rest = norm((2, 2, 150, 140), 0, True)
    together = run(kt.group_norm_silu, x, None, *rest, 1, 1e-5)
    assert_close(together[0], truth(reference.group_norm_silu, x, None, *rest, 1, 1e-5)[0])
    weight, bias, scale, shift = rest
    alone = run(kt.group_norm_silu, x[1:], None, weight, bias, scale[1:], shift[1:], 1, 1e-5)
    assert all(torch.equal(a, t[1:]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2**-11), (torch.bfloat16, 2**-7)], ids=str)
def test_group_norm_silu_in_16_bits_rounds_once(dtype, tolerance):  # the interpreter cuts bfloat16 off: a whole unit
    x, skip, *rest = norm((1, 3, 9, 9), 1, True)
    x, skip = x.to(dtype), skip.to(dtype)
    actual = run(kt.group_norm_silu, x, skip, *rest, 2, 1e-5)[0]
    assert actual.dtype is dtype
    expected = truth(reference.group_norm_silu, x.float(), skip.float(), *rest, 2, 1e-5)[0]
    assert_close(actual.float(), expected, tolerance)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels_triton import network, spectral, step

def cubin(kernel, types, **constants):
    signature = {n: "constexpr" if n in constants else types[j] for j, n in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

p, i, f = "*fp32", "i32", "fp32"
for coloured in (False, True):
    cubin(spectral._wiener_guidance_kernel, [p] * 6 + [i] * 6, COLOURED=coloured, BLOCK=1024)
cubin(spectral._spectral_sums_kernel, [p] * 4 + [i] * 3, PER_CHANNEL=False, BLOCK=1024)
given = dict(ON_DEVICE=False, BLOCK=1024)
read = dict(ON_DEVICE=True, BLOCK=1024)
cubin(step._predict_x0_kernel, [p] * 4 + [None, i, f, f, f], alpha_bar_ptr=None, **given)
cubin(step._predict_x0_kernel, [p] * 4 + ["*fp64", i, f, f, f], **read)
update = [p, p, p, p, "*i64", p, i, i]
cubin(step._step_update_kernel, update + [f] * 4 + [i, "i64"], NOISE="philox", GUIDED=True, noise_ptr=None, **given)
numbers = ["*fp64"] * 4 + ["*i64"] * 2
cubin(step._step_update_kernel, update + numbers, NOISE="philox", GUIDED=True, noise_ptr=None, **read)
cubin(step._step_update_kernel, update + numbers, NOISE="tensor", GUIDED=True, seeds_ptr=None, **read)
b, tile = "*bf16", dict(PIXELS=256, CHANNELS=16, SKIP=True)
cubin(network._moments_kernel, [b, b, p, p] + [i] * 10, **tile)
cubin(network._combine_moments_kernel, [p] * 4 + [i] * 3 + [f], PIXELS=256, CHUNKS=64)
cubin(network._silu_kernel, [b] * 3 + [p] * 6 + [i] * 15, FILM=True, **tile)
for sums in (True, False):
    cubin(network._backward_kernel, [b] * 3 + [p] * 8 + [b] * 2 + [i] * 16, FILM=True, CHUNKS=64, SUMS=sums, **tile)
print("compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is built for Linux")
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(kt.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "compiled" in result.stdout, result.stderr
