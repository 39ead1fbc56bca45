"""Every op on every backend against its specification in double precision, and what must hold for any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastem import ops
from fastem.ops import Backend, native, reference, use_backend

if native.available() or not torch.cuda.is_available():
    DEVICE = "cpu"  # tests/test_cuda.py has the CUDA side
else:
    DEVICE = "cuda"
TOLERANCE = 2e-6  # largest difference over largest value
LOOSER = {"simplex_least_squares": 1e-5, "hqs_chain": 1e-5}  # many rounds of rounding
LOOSER_REFERENCE = {"convolve_support": 5e-6, "recentre": 5e-6}  # plain torch in single precision is no better
SIZES = [(1, 1), (2, 7), (8, 8), (33, 31), (16, 17)]
TWINS = ("philox_normal", "predict_x0", "spectral_sums", "step_update", "wiener_guidance")


def uniform(*shape, seed=0, low=-1.0, high=1.0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def half_spectrum(*shape, seed=0):
    return torch.fft.rfft2(uniform(*shape, seed=seed, low=0.0))


def kernels(batch, h, w, seed=0):
    k = uniform(batch, 1, h, w, seed=seed, low=0.0) ** 4 + 1e-6
    return k / k.sum((-2, -1), keepdim=True)


def autocorrelation(batch, h, w, seed=0):
    """(B, 1, 2h-1, 2w-1) of a random map: a positive semi-definite operator."""
    F = torch.fft.rfft2(uniform(batch, 1, h, w, seed=seed), s=(2 * h - 1, 2 * w - 1))
    g = torch.fft.irfft2(F.abs() ** 2, s=(2 * h - 1, 2 * w - 1))
    return reference.crop_support(g, 2 * h - 1, 2 * w - 1) / (h * w)


def chain(widths=(8, 24, 8), seed=0):
    """Weights, biases (one missing) and scale of a denoiser that keeps some mass of any kernel."""
    sides = [2, *widths, 1]
    weights = [uniform(o, i, 3, 3, seed=seed + o + i) / (2 * i**0.5) for i, o in zip(sides, sides[1:], strict=False)]
    biases = [uniform(o, seed=seed + o, low=0.0) * 0.2 for o in sides[1:]]
    return weights, [*biases[:1], None, *biases[2:]], 2.0


def double(value):
    """The same arguments in double precision."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.int64:
            return value
        return value.to(torch.complex128 if value.is_complex() else torch.float64)
    return type(value)(map(double, value)) if isinstance(value, list | tuple) else value


def arguments(op, h, w, batch=2):
    """Arguments of `op` for maps of this size, in single precision."""
    n, chan = 3, 3
    k, g = kernels(batch, h, w, seed=1), autocorrelation(batch, h, w, seed=2)
    x = uniform(batch, n, chan, h, w, seed=3, low=-2, high=2)
    noise_std = torch.linspace(0.01, 0.05, batch)
    scalars = torch.linspace(0.1, 0.4, batch)
    return {
        "spectral_sums": lambda: (half_spectrum(batch, n, chan, h, w), half_spectrum(batch, chan, h, w, seed=1)),
        "wiener_guidance": lambda: (
            half_spectrum(batch, n, chan, h, w),
            half_spectrum(batch, chan, h, w, seed=1),
            half_spectrum(batch, 1, h, w, seed=2) / (h * w),
            scalars,
            scalars.flip(0),
        ),
        "psf_to_otf": lambda: (k, (h + 6, w + 3)),
        "convolve_support": lambda: (g, k),
        "project_kernel": lambda: (k - 0.5 * k.mean(),),
        "project_simplex": lambda: (k - 0.5 * k.mean(),),
        "simplex_least_squares": lambda: (g, uniform(batch, 1, h, w, seed=5), k, 6),
        "denoise_chain": lambda: (k, noise_std, *chain()),
        "hqs_chain": lambda: (k.flip(0), 0.2 * g, k, noise_std, *chain(), 4),
        "recentre": lambda: (k,),
        "predict_x0": lambda: (x, x.flip(-1), 0.3),
        "step_update": lambda: (x, x.flip(-1).abs() / 2, x.flip(-2), x.flip(-3), 0.3, 0.6, 0.1, 0.02),
        "philox_normal": lambda: (torch.tensor([7, -5][:batch]), n, (chan, h, w), 3, 5),
    }[op]()


OPS = (
    "spectral_sums", "wiener_guidance", "psf_to_otf", "convolve_support", "project_kernel", "project_simplex",
    "simplex_least_squares", "denoise_chain", "hqs_chain", "recentre", "predict_x0", "step_update", "philox_normal",
)  # fmt: skip


def relative_error(actual, expected):
    """Largest difference over largest value, of the worst of several results."""
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        return max(map(relative_error, actual, expected))
    assert actual.shape == expected.shape
    return ((actual.to(expected.dtype) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_matches_spec(op, *args, tolerance=None):
    error = relative_error(getattr(ops, op)(*args), getattr(reference, op)(*double(args)))
    looser = LOOSER | LOOSER_REFERENCE if ops.current_backend() is not Backend.NATIVE else LOOSER
    limit = tolerance or looser.get(op, TOLERANCE)
    assert error < limit, f"{op}: relative error {error:.1e}, allowed {limit:.1e}"


# ------------------------------------------------------------------------------------------ against the spec


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_op_matches_spec(backend, op, size):
    if backend is Backend.TRITON and op not in TWINS:
        pytest.skip("has no Triton twin")
    assert_matches_spec(op, *arguments(op, *size))


@pytest.mark.parametrize("op", OPS)
def test_op_passes_opcheck(native_backend, op):
    torch.library.opcheck(getattr(torch.ops.fastem, op).default, arguments(op, 9, 5))


def test_step_update_philox_passes_opcheck(native_backend):
    x = uniform(2, 3, 1, 5, 4)
    args = (x, x / 2, None, torch.tensor([1, 2]), 0.3, 0.6, 0.1, 0.0, 4, 5)
    torch.library.opcheck(torch.ops.fastem.step_update_philox.default, args)
    numbers = list(torch.rand(4, dtype=torch.float64).unbind())
    torch.library.opcheck(
        torch.ops.fastem.step_update_philox.default, (*args, *numbers, torch.tensor([3]), torch.tensor(1))
    )
    torch.library.opcheck(torch.ops.fastem.step_update.default, (x, x / 2, x, None, 0, 0, 0, 0, *numbers))
    torch.library.opcheck(torch.ops.fastem.predict_x0.default, (x, x / 2, 0, numbers[0]))


def test_channels_may_be_kept_apart(backend):
    X, Y = half_spectrum(2, 3, 3, 9, 8), half_spectrum(2, 3, 9, 8, seed=1)
    assert_matches_spec("spectral_sums", X, Y, True)


def test_variance_of_each_frequency(backend):
    X, Y, K, sigma2, r2 = arguments("wiener_guidance", 9, 8)
    spectrum = uniform(9, 5, seed=4, low=0.01, high=0.5)
    assert_matches_spec("wiener_guidance", X, Y, K, sigma2, spectrum)
    expected = torch.cat([  # as one frequency after the other
        ops.wiener_guidance(*(z.flatten(-2)[..., None, f : f + 1] for z in (X, Y, K)), sigma2, r.view(1))
        for f, r in enumerate(spectrum.flatten())
    ], dim=-1)  # fmt: skip
    actual = ops.wiener_guidance(X, Y, K, sigma2, spectrum)
    assert torch.allclose(actual.flatten(-2), expected[..., 0, :], rtol=1e-6, atol=0)


def test_one_kernel_and_one_noise_level_may_serve_all_images(backend):
    X, Y, K, sigma2, r2 = arguments("wiener_guidance", 9, 8)
    spectrum = torch.linspace(0.1, 0.5, 45).view(9, 5)
    shared = ops.wiener_guidance(X, Y, K[:1], sigma2[:1], spectrum)
    K_, sigma2_ = (t[:1].expand_as(t).contiguous() for t in (K, sigma2))
    assert torch.equal(shared, ops.wiener_guidance(X, Y, K_, sigma2_, spectrum))
    shared = ops.wiener_guidance(X, Y, K[:1], sigma2[:1], r2[:1])
    repeated = ops.wiener_guidance(X, Y, *(t[:1].expand_as(t).contiguous() for t in (K, sigma2, r2)))
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("alpha_bar", [1.0, 0.5, 4e-5])
def test_predict_x0_is_accurate_where_noise_is_all(native_backend, alpha_bar):
    x = uniform(1, 1, 3, 17, 9, low=-2, high=2)
    assert_matches_spec("predict_x0", x, x + 1e-3 * x.flip(-1), alpha_bar, tolerance=3e-7)


def test_clamp_mask_includes_the_border(backend):
    x = torch.tensor([[-1.5, -1.0, -0.5, 1.0, 1.5]])
    x0_hat, mask = ops.predict_x0(x, torch.zeros_like(x), 1.0)
    assert x0_hat.tolist() == [[0.0, 0.0, 0.25, 1.0, 1.0]] and mask.tolist() == [[0, 1, 1, 1, 0]]


@pytest.mark.parametrize("terms", ["none", "noise", "guidance"])
def test_step_update_leaves_terms_out(backend, terms):
    x, x0, noise, guidance, c0, ct, std, gain = arguments("step_update", 5, 4)
    noise, std = (noise, std) if terms == "noise" else (None, 0.0)
    guidance, gain = (guidance, gain) if terms == "guidance" else (None, 0.0)
    assert_matches_spec("step_update", x, x0, noise, guidance, c0, ct, std, gain)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("std", [0.1, 0.0])
def test_step_update_philox_composes_its_parts(backend, shape, std):
    seeds = torch.tensor([1, 2**62])
    x, x0, guidance = (uniform(2, 3, *shape, seed=s) for s in range(3))
    fused = ops.step_update_philox(x, x0, guidance, seeds, 0.3, 0.6, std, 0.02, step=9, stream=1)
    noise = reference.philox_normal(seeds, 3, shape, 9, 1)
    expected = reference.step_update(*double((x, x0, noise, guidance)), 0.3, 0.6, std, 0.02)
    assert relative_error(fused, expected) < TOLERANCE


def test_numbers_and_step_may_be_tensors(backend):
    """As a recorded step reads them: from a row of a table, and the row from a counter."""
    seeds, table = (
        torch.tensor([1, 2**62]),
        torch.tensor([[0.3, 0.6, 0.1, 0.02, 0.7], [0.2, 0.5, 0.0, -0.1, 0.9]]).double(),
    )
    x, x0, noise, guidance = (uniform(2, 3, 5, 7, seed=s) for s in range(4))
    for row, stream in zip(torch.arange(2), torch.tensor([1, 3]), strict=True):
        *numbers, alpha_bar = table.index_select(0, row.view(1))[0].unbind()
        values = [n.item() for n in numbers]
        for actual, expected in (
            (ops.predict_x0(x, noise, alpha_bar), ops.predict_x0(x, noise, alpha_bar.item())),
            (ops.step_update(x, x0, noise, guidance, *numbers), ops.step_update(x, x0, noise, guidance, *values)),
            (
                ops.step_update_philox(x, x0, guidance, seeds, *numbers, step=row, stream=stream),
                ops.step_update_philox(x, x0, guidance, seeds, *values, step=row.item(), stream=stream.item()),
            ),
        ):
            actual, expected = (t if isinstance(t, tuple) else (t,) for t in (actual, expected))
            assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("widths", [(), (32, 32, 32, 32), (5, 24, 3), (48,)], ids=str)
def test_chains_of_other_widths(native_backend, widths):
    weights, biases, scale = chain(widths)
    args = (kernels(3, 11, 13), torch.tensor([0.01, 0.02, 0.0]), weights, biases[: len(weights)], scale)
    assert_matches_spec("denoise_chain", *args)


# ---------------------------------------------------------------------------------------------- group norm

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "last"])


def norm(shape, n_skip=0, film=True, mean=0.0):
    """x, skip, weight, bias, scale, shift of a GroupNorm."""
    samples, chan, *size = shape
    channels = chan + n_skip
    x, skip = (uniform(samples, c, *size, seed=c, low=-2, high=2) + mean for c in (chan, n_skip))
    scale, shift = uniform(samples, 2 * channels, seed=2).chunk(2, dim=1) if film else (None, None)  # strided views
    return x, skip if n_skip else None, *(uniform(channels, seed=s) + 1 for s in (3, 4)), scale, shift


def assert_norm_matches_spec(layout, groups, x, skip, *rest, by=2.0):
    """Forward and backward through autograd; the error is at most `by` times that of plain torch, or 2e-6."""
    x, skip = (t if t is None else t.contiguous(memory_format=layout).requires_grad_() for t in (x, skip))
    grad = uniform(x.shape[0], len(rest[0]), *x.shape[2:], seed=9)

    def run(call, *inputs):
        y = call(*inputs)
        leaves = [t for t in inputs[:2] if t is not None]
        return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))

    def spec(*args):
        return reference.group_norm_silu(*args, groups, 1e-5)[0]

    def op(x, skip, *rest):
        return ops.group_norm_silu(x, *rest, groups=groups, skip=skip)

    wide = [t if t is None else t.detach().double() for t in (x, skip, *rest)]
    truth = run(spec, *(t if t is None or i > 1 else t.requires_grad_() for i, t in enumerate(wide)))
    plain = run(spec, x, skip, *rest)
    actual = run(op, x, skip, *rest)
    assert actual[0].is_contiguous(memory_format=layout)
    for a, p, t in zip(actual, plain, truth, strict=True):
        error, limit = relative_error(a, t), max(by * relative_error(p, t), TOLERANCE)
        assert error < limit, f"relative error {error:.1e}, allowed {limit:.1e}"


@LAYOUTS
@pytest.mark.parametrize("film", [True, False], ids=["film", "plain"])
@pytest.mark.parametrize(
    "shape, n_skip, groups",
    [((2, 6, 7, 5), 0, 3), ((1, 1, 3, 3), 0, 1), ((2, 4, 17, 31), 5, 3), ((1, 130, 5, 4), 14, 8)], ids=str
)  # fmt: skip
def test_group_norm_silu_matches_spec(backend, layout, film, shape, n_skip, groups):
    assert_norm_matches_spec(layout, groups, *norm(shape, n_skip, film))


@LAYOUTS
def test_group_norm_silu_of_a_mean_far_larger_than_the_spread(native_backend, layout):
    """Squares summed without a centre would leave nothing: 1e4 against a spread of 1."""
    assert_norm_matches_spec(layout, 4, *norm((1, 8, 64, 96), mean=1e4))


@LAYOUTS
@pytest.mark.parametrize("n_skip", [0, 8])
def test_group_norm_silu_passes_opcheck(native_backend, layout, n_skip):
    x, skip, *rest = norm((2, 8, 5, 4), n_skip)
    x = x.contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.fastem.group_norm_silu.default, (x, skip, *rest, 4, 1e-5))
    y, mean, rstd = torch.ops.fastem.group_norm_silu(x, skip, *rest, 4, 1e-5)
    torch.library.opcheck(torch.ops.fastem.group_norm_silu_backward.default, (y, x, skip, mean, rstd, *rest, 4))


@LAYOUTS
def test_group_norm_silu_of_a_sample_depends_on_nothing_else(native_backend, threads, layout):
    x, skip, weight, bias, scale, shift = norm((3, 24, 48, 52), 8)
    x = x.contiguous(memory_format=layout)
    together = ops.group_norm_silu(x, weight, bias, scale, shift, groups=4, skip=skip)
    one = slice(1, 2)
    alone = ops.group_norm_silu(x[one], weight, bias, scale[one], shift[one], groups=4, skip=skip[one])
    assert torch.equal(together[one], alone)
    torch.set_num_threads(3 - threads)  # the fixture puts it back
    assert torch.equal(together, ops.group_norm_silu(x, weight, bias, scale, shift, groups=4, skip=skip))


def test_group_norm_silu_is_torchs_and_its_formula_the_gradient():
    x, _, weight, bias, scale, shift = double(norm((2, 6, 4, 5)))
    h = torch.nn.functional.group_norm(x.requires_grad_(), 3, weight, bias)
    expected = torch.nn.functional.silu(h * (1 + scale[..., None, None]) + shift[..., None, None])
    y, mean, rstd = reference.group_norm_silu(x, None, weight, bias, scale, shift, 3, 1e-5)
    assert relative_error(y, expected) < 1e-14
    (gradient,) = torch.autograd.grad(expected, x, x.detach().flip(0))
    args = (x.detach().flip(0), x.detach(), None, mean.detach(), rstd.detach(), weight, bias, scale, shift, 3)
    assert relative_error(reference.group_norm_silu_backward(*args)[0], gradient) < 1e-13
    wrong = reference.group_norm_silu_backward(*args[:5], weight, bias, None, None, 3)[0]
    assert relative_error(wrong, gradient) > 0.01


def test_group_norm_silu_trains_in_plain_torch():
    x, _, weight, bias, scale, shift = norm((2, 6, 4, 5))
    weight.requires_grad_()
    with use_backend(Backend.AUTO):
        ops.group_norm_silu(x, weight, bias, scale, shift, groups=3).sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
def test_group_norm_silu_in_16_bits_rounds_once(dtype, limit):
    x, _, *rest = norm((1, 6, 9, 8))
    y = ops.group_norm_silu(x.to(dtype), *rest, groups=3)  # on a CPU in plain torch
    expected = reference.group_norm_silu(*double((x.to(dtype), None, *rest)), 3, 1e-5)[0]
    assert y.dtype is dtype and relative_error(y, expected) < limit + 1e-6


# ----------------------------------------------------------------------------------------------- any size

side = st.integers(1, 70)


@settings(max_examples=25, deadline=None)
@given(height=side, width=side, data=st.data())
def test_otf_of_any_kernel_that_fits(height, width, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    with use_backend(Backend.AUTO):
        assert_matches_spec("psf_to_otf", kernels(1, h, w), (height, width))


@settings(max_examples=25, deadline=None)
@given(h=side, w=side)
def test_support_ops_of_any_size(h, w):
    with use_backend(Backend.NATIVE if native.available() else Backend.AUTO):
        for op in ("convolve_support", "project_kernel", "project_simplex", "recentre"):
            assert_matches_spec(op, *arguments(op, h, w, batch=1))
        assert_matches_spec("convolve_support", uniform(1, 1, 2 * h - 1, 2 * w - 1, low=0.0), kernels(1, h, w))


@settings(max_examples=10, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), width=st.integers(1, 33))
def test_m_step_loops_of_any_size(h, w, width):
    weights, biases, scale = chain((width, 8))
    k, g, noise_std = kernels(1, h, w), autocorrelation(1, h, w), torch.tensor([0.02])
    assert_matches_spec("hqs_chain", k, 0.2 * g, k, noise_std, weights, biases, scale, 2)
    assert_matches_spec("simplex_least_squares", g, uniform(1, 1, h, w), k, 2)


@settings(max_examples=25, deadline=None)
@given(height=side, width=side, chan=st.integers(1, 4), n=st.integers(1, 5))
def test_spectral_ops_of_any_size(height, width, chan, n):
    X, Y = half_spectrum(1, n, chan, height, width), half_spectrum(1, chan, height, width, seed=1)
    K = half_spectrum(1, 1, height, width, seed=2) / (height * width)
    for per_channel in (False, True):
        assert_matches_spec("spectral_sums", X, Y, per_channel)
    assert_matches_spec("wiener_guidance", X, Y, K, torch.tensor([0.1]), torch.tensor([0.3]))


@settings(max_examples=25, deadline=None)
@given(h=side, w=side, seed=st.integers(0, 2**16), spread=st.floats(1e-3, 1e3))
def test_simplex_projection_is_a_projection(h, w, seed, spread):
    z = uniform(1, 1, h, w, seed=seed) * spread
    k = ops.project_simplex(z)
    assert k.min() >= 0 and abs(k.sum().item() - 1) < 1e-5
    assert relative_error(ops.project_simplex(k), k) < 1e-5
    tau = (z - k)[k > 0]  # one threshold for all positive values, not below the values it made zero
    assert tau.max() - tau.min() < 1e-6 * spread + 1e-6
    assert (z[k == 0] <= tau.max() + 1e-6 * spread + 1e-6).all()


# ----------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("op", [*OPS])
def test_results_do_not_depend_on_threads(native_backend, op):
    args = arguments(op, 33, 129)  # large enough to be divided
    results = []
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(getattr(ops, op)(*args))
    torch.set_num_threads(before)
    first, second = (r if isinstance(r, tuple) else (r,) for r in results)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("philox_normal", "predict_x0", "step_update")])
def test_an_image_does_not_depend_on_its_company(native_backend, threads, op):
    args = arguments(op, 17, 19)
    shared = op in ("denoise_chain", "hqs_chain")  # weights have no batch axis

    def alone(value, image):
        return value[image : image + 1] if isinstance(value, torch.Tensor) else value

    together = getattr(ops, op)(*args)
    for image in range(2):
        own = [value if shared and isinstance(value, list) else alone(value, image) for value in args]
        single = getattr(ops, op)(*own)
        for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (together, single)), strict=True):
            assert torch.equal(a[image], b[0])


def test_noise_does_not_depend_on_batch_or_order(backend):
    seeds = torch.tensor([3, -1, 2**40])
    noise = ops.philox_normal(seeds, 2, (3, 5), 1, 0)
    assert torch.equal(ops.philox_normal(seeds.flip(0), 2, (3, 5), 1, 0).flip(0), noise)
    assert torch.equal(ops.philox_normal(seeds[1:2], 1, (3, 5), 1, 0), noise[1:2, :1])
    assert not torch.equal(ops.philox_normal(seeds, 2, (3, 5), 2, 0), noise)
    assert not torch.equal(ops.philox_normal(seeds, 2, (3, 5), 1, 1), noise)


def test_counter_words_have_32_bits(native_backend):
    assert_matches_spec("philox_normal", torch.tensor([2**63 - 1]), 2, (9,), 2**32 - 1, 2**32 - 2)


def test_noise_is_standard_normal(native_backend):
    noise = ops.philox_normal(torch.tensor([1]), 1, (1 << 20,), 0, 0).flatten()
    assert abs(noise.mean()) < 4e-3 and abs(noise.std() - 1) < 4e-3
    assert abs((noise**4).mean() - 3) < 0.05 and abs((noise[:-1] * noise[1:]).mean()) < 4e-3


@pytest.mark.parametrize(
    "counter, key, answer",
    [  # Random123, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, answer):
    words = [torch.tensor([int(word, 16) for word in text.split()]) for text in (key, counter)]
    assert reference.philox4x32(*words).tolist() == [int(word, 16) for word in answer.split()]


# ------------------------------------------------------------------------------------------ what must differ


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (4, 5)], ids=str)
def test_conjugate_is_the_adjoint_and_flipping_is_not(backend, size):
    if backend is Backend.TRITON:
        pytest.skip("has no Triton twin")
    x, y, k = uniform(1, 1, 16, 18, seed=1), uniform(1, 1, 16, 18, seed=2), kernels(1, *size)

    def blur(image, otf):
        return torch.fft.irfft2(torch.fft.rfft2(image) * otf, s=(16, 18))

    K = ops.psf_to_otf(k, (16, 18))
    inner = (blur(x, K) * y).sum().item()
    assert abs((x * blur(y, K.conj())).sum().item() - inner) < 1e-4 * abs(inner)
    flipped = ops.psf_to_otf(k.flip(-2, -1), (16, 18))
    is_adjoint = relative_error(flipped, K.conj()) < 1e-5
    assert is_adjoint == (size[0] % 2 == 1 and size[1] % 2 == 1)


def test_convolution_is_not_correlation(native_backend):
    g, k = uniform(1, 1, 9, 13), kernels(1, 5, 7)
    correlation = reference.convolve_support(g, k.flip(-2, -1))
    assert relative_error(ops.convolve_support(g, k), correlation.double()) > 0.01


def test_sums_never_mix_images(backend):
    X, Y = half_spectrum(2, 3, 3, 9, 8), half_spectrum(2, 3, 9, 8, seed=1)
    Sxy, Sxx = ops.spectral_sums(X, Y)
    mixed_xy, mixed_xx = reference.spectral_sums(X.flatten(0, 1)[None], Y[:1])  # as if both were particles of one image
    assert relative_error(Sxx[:1], mixed_xx) > 0.1 and relative_error(Sxy[:1], mixed_xy) > 0.1


def test_a_map_without_mass_is_nan_and_recentres_to_zero(backend):
    if backend is Backend.TRITON:
        pytest.skip("has no Triton twin")
    assert ops.project_kernel(-kernels(1, 3, 4)).isnan().all()
    for bad in (torch.zeros(1, 1, 5, 6), torch.full((1, 1, 5, 6), float("nan"))):
        assert torch.equal(ops.recentre(bad), torch.zeros(1, 1, 5, 6))


def test_the_m_step_may_recentre_its_result(native_backend):
    a, g, k, *rest = arguments("hqs_chain", 9, 8)
    moved = ops.hqs_chain(a, g, k, *rest, recentred=True)
    assert torch.equal(moved, ops.recentre(ops.hqs_chain(a, g, k, *rest)))
    expected = reference.recentre(reference.hqs_chain(*double((a, g, k, *rest))))
    assert relative_error(moved, expected) < 1e-5


def test_recentre_puts_the_centre_of_mass_in_the_middle(native_backend):
    k = torch.zeros(1, 1, 33, 33)
    k[..., 10:14, 18:22] = 1 / 16
    assert relative_error(reference.centre_of_mass(ops.recentre(k)), torch.tensor([[16.0, 16.0]]).double()) < 1e-3


# ------------------------------------------------------------------------------------------------- bad input

X, Y, K = half_spectrum(2, 3, 3, 8, 8), half_spectrum(2, 3, 8, 8), half_spectrum(2, 1, 8, 8)
ONE, TWO, K5, G5 = torch.ones(1), torch.ones(2), kernels(2, 5, 5), autocorrelation(2, 5, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.spectral_sums(X, Y[:1]), "X must be"),
        (lambda: ops.spectral_sums(X.real, Y.real), "half spectra"),
        (lambda: ops.spectral_sums(X, Y.to(torch.complex128)), "one precision"),
        (lambda: ops.wiener_guidance(X, Y, K[..., 1:], TWO, TWO), "K must be"),
        (lambda: ops.wiener_guidance(X, Y, K, TWO[:, None], TWO), "sigma2 must be"),
        (lambda: ops.wiener_guidance(X, Y, K, TWO, TWO[:, None]), "r2 must be"),
        (lambda: ops.psf_to_otf(K5, (4, 9)), "must not be smaller"),
        (lambda: ops.psf_to_otf(K5[0], (9, 9)), "k must be kernels"),
        (lambda: ops.convolve_support(G5[..., 1:], K5), "g must be"),
        (lambda: ops.simplex_least_squares(G5, K5[:1], K5, 1), "b must have the shape"),
        (lambda: ops.simplex_least_squares(G5, K5, K5, -1), "num_iters must be"),
        (lambda: ops.denoise_chain(K5, TWO[:1], *chain()), "noise_std must be"),
        (lambda: ops.denoise_chain(K5, TWO, chain()[0], [None], 1.0), "a bias or None for each"),
        (lambda: ops.denoise_chain(K5, TWO, chain()[0][:-1], chain()[1][:-1], 1.0), "must have 1 output"),
        (lambda: ops.denoise_chain(K5, TWO, [uniform(1, 2, 5, 5)], [None], 1.0), "layer 0 must have weights"),
        (lambda: ops.hqs_chain(K5[:1], G5, K5, TWO, *chain(), 1), "a must have the shape"),
        (lambda: ops.predict_x0(K5, G5, 0.5), "eps must have the shape"),
        (lambda: ops.predict_x0(K5, K5, 0.0), "alpha_bar must be"),
        (lambda: ops.step_update(K5, K5, None, None, 1.0, 0.0, 0.1, 0.0), "needs noise"),
        (lambda: ops.step_update_philox(K5, K5, None, torch.tensor([1]), 1.0, 0.0, 0.1, 0.0, 0, 0), "for seeds"),
        (lambda: ops.philox_normal(TWO, 1, (3,), 0, 0), "seeds must be"),
        (lambda: ops.philox_normal(torch.tensor([1]), 1, (3,), -1, 0), "step and stream"),
        (lambda: ops.group_norm_silu(K5, ONE, ONE, groups=2), "do not divide"),
        (lambda: ops.group_norm_silu(K5, TWO, ONE, groups=1), "weight must be"),
        (lambda: ops.group_norm_silu(K5, ONE, ONE, TWO[:, None], groups=1), "or neither"),
        (lambda: ops.group_norm_silu(K5, ONE, ONE, TWO, TWO, groups=1), "scale must be"),
        (lambda: ops.group_norm_silu(K5, ONE, ONE, groups=1, skip=G5), "skip must be like x"),
        (lambda: ops.group_norm_silu(K5, ONE, ONE, groups=1, eps=-1), "eps must be"),
    ],
)
def test_wrong_shapes_are_refused(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.spectral_sums(X, Y[:, :2]),
        lambda f: f.wiener_guidance(X, Y, K[..., 1:], TWO, TWO),
        lambda f: f.psf_to_otf(K5, (4, 9)),
        lambda f: f.convolve_support(G5[..., 1:], K5),
        lambda f: f.simplex_least_squares(G5, K5[..., 1:], K5, 1),
        lambda f: f.denoise_chain(K5, TWO, chain()[0], [None], 1.0),
        lambda f: f.hqs_chain(K5[..., 1:], G5, K5, TWO, *chain(), 1),
        lambda f: f.predict_x0(K5, G5, 0.5),
        lambda f: f.step_update(K5, K5[:1], None, None, 1.0, 0.0, 0.0, 0.0),
        lambda f: f.step_update(K5, K5, None, None, 1.0, 0.0, 0.0, 0.0, ONE),
        lambda f: f.predict_x0(K5, K5, 0.5, ONE),
        lambda f: f.step_update_philox(K5, K5, None, torch.tensor([1]), 1.0, 0.0, 0.1, 0.0, 0, 0),
        lambda f: f.group_norm_silu(K5, None, TWO, ONE, None, None, 1, 1e-5),
        lambda f: f.group_norm_silu(K5, G5, TWO, TWO, None, None, 1, 1e-5),
        lambda f: f.group_norm_silu(K5, None, ONE, ONE, TWO, TWO, 1, 1e-5),
        lambda f: f.group_norm_silu(K5, None, ONE, ONE, None, None, 2, 1e-5),
        lambda f: f.group_norm_silu_backward(G5, K5, None, TWO[:, None], TWO[:, None], ONE, ONE, None, None, 1),
        lambda f: f.group_norm_silu_backward(K5, K5, None, TWO, TWO[:, None], ONE, ONE, None, None, 1),
    ],
)
def test_the_compiled_ops_do_not_read_out_of_bounds(native_backend, call):
    with pytest.raises(ValueError):
        call(torch.ops.fastem)
