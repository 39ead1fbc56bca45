"""The native convolutions against their specification in double precision; their bounds; their bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastem.ops import Backend, native, use_backend
from fastem.ops.conv import ConvKind, fused_conv, pack_adjoint, pack_conv, reference_conv, runs_native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

KINDS = list(ConvKind)
MODES = {  # which terms and which outputs; the ways the network uses
    "plain": ((), ("out",)),
    "enter": (("offset",), ("out", "silu", "slope")),
    "film": (("gain", "offset"), ("silu", "slope")),
    "residual": (("offset", "residual"), ("out", "silu")),
    "pull back": (("factor", "residual"), ("out",)),
    "everything": (("gain", "offset", "factor", "residual"), ("out", "silu", "slope")),
}
OUTPUTS = ("out", "silu", "slope")
Inputs = dict[str, Tensor]


def problem(kind: ConvKind, n: int, height: int, width: int, n_in: int, n_out: int, seed: int = 0) -> Inputs:
    """Inputs of every kind in float32; sizes are those of the input."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    side = {ConvKind.SAME: 3, ConvKind.POINT: 1}.get(kind, 2)
    taps = 1 if kind is ConvKind.UP else side**2
    weight = randn(*((n_in, n_out) if kind is ConvKind.UP else (n_out, n_in)), side, side) / (taps * n_in) ** 0.5
    scale = {ConvKind.DOWN: 0.5, ConvKind.UP: 2}.get(kind, 1)
    shape = (n, int(height * scale), int(width * scale), n_out)
    return dict(x=randn(n, height, width, n_in), weight=weight, gain=randn(n, n_out), offset=randn(1, n_out),
                factor=randn(*shape), residual=randn(*shape))  # fmt: skip


def run(p: Inputs, kind: ConvKind, terms: tuple[str, ...], wanted: tuple[str, ...] = OUTPUTS) -> Inputs:
    """The wanted outputs of the native op, each written over nan."""
    outputs = {name: torch.full_like(p["residual"], float("nan")) for name in wanted}
    fused_conv(p["x"], pack_conv(p["weight"], kind), **{name: p[name] for name in terms}, **outputs)
    return outputs


def spec(p: Inputs, kind: ConvKind, terms: tuple[str, ...], dtype: torch.dtype) -> Inputs:
    p = {name: t.to(dtype) for name, t in p.items()}
    results = reference_conv(p["x"], p["weight"], kind, **{name: p[name] for name in terms})
    return dict(zip(OUTPUTS, results, strict=True))


def check(p: Inputs, kind: ConvKind, terms: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """At most twice the error of plain torch in float32, or 2e-6 of the largest value (of t, where that is larger)."""
    actual = run(p, kind, terms, wanted)
    truth, plain = (spec(p, kind, terms, dtype) for dtype in (torch.float64, torch.float32))
    largest = truth["out"].abs().max()
    for name in wanted:
        error, plain_error = ((outputs[name].double() - truth[name]).abs().max() for outputs in (actual, plain))
        floor = 2e-6 * torch.maximum(largest, truth[name].abs().max())
        assert error <= torch.maximum(2 * plain_error, floor), f"{name}: {error:.1e}, plain {plain_error:.1e}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_in, n_out", [(12, 64), (64, 12), (48, 96), (96, 128), (128, 48), (5, 3)])
@pytest.mark.parametrize("mode", MODES)
def test_matches_spec(kind, n_in, n_out, mode):
    check(problem(kind, 3, 10, 22, n_in, n_out), kind, *MODES[mode])


@pytest.mark.parametrize("channels", [8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256])
def test_error_of_3x3(channels):
    """On white noise, in the mean square: at most twice that of plain torch in its default layout."""
    p = problem(ConvKind.SAME, 1, 40, 40, channels, 48)
    truth = spec(p, ConvKind.SAME, (), torch.float64)["out"]
    x = p["x"].permute(0, 3, 1, 2).contiguous()
    plain = torch.nn.functional.conv2d(x, p["weight"], padding=1).permute(0, 2, 3, 1)
    error, plain_error = ((t - truth).norm() for t in (run(p, ConvKind.SAME, (), ("out",))["out"], plain))
    assert error <= 2 * plain_error, f"{error / plain_error:.2f} times that of plain torch"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_size(kind):
    step = 2 if kind is ConvKind.DOWN else 1
    for side in range(step, 71, step):
        height, width = side, 70 + step - side
        check(problem(kind, 1, height, width, 16, 24, seed=side), kind, *MODES["everything"])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_adjoint(kind):
    p = problem(kind, 2, 14, 34, 24, 20)
    forward = run(p, kind, (), ("out",))["out"].double()
    pulled = torch.empty_like(p["x"])
    fused_conv(p["residual"], pack_adjoint(p["weight"], kind), out=pulled)
    left, right = (forward * p["residual"].double()).sum(), (p["x"].double() * pulled.double()).sum()
    assert abs(left - right) < 1e-6 * forward.norm() * p["residual"].double().norm()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_in, n_out", [(12, 9), (64, 48)])
@pytest.mark.parametrize("size", [(2, 2), (6, 18), (30, 4)], ids=str)
def test_stays_inside_its_buffers(kind, n_in, n_out, size):
    """Nan around every input would reach an output; outputs are surrounded by values that must survive."""
    p = problem(kind, 2, *size, n_in, n_out)
    margin, sentinel = 512, 12345.0

    def between(t: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        buffer = torch.full((t.numel() + 2 * margin,), fill)
        view = buffer[margin : margin + t.numel()].view(t.shape)
        view.copy_(t)
        return view, buffer

    expected = run(p, kind, MODES["everything"][0])
    guarded = {name: between(t, float("nan"))[0] for name, t in p.items()}
    outputs = {name: between(torch.zeros_like(p["residual"]), sentinel) for name in OUTPUTS}
    terms = {name: guarded[name] for name in MODES["everything"][0]}
    views = {name: view for name, (view, _) in outputs.items()}
    fused_conv(guarded["x"], pack_conv(guarded["weight"], kind), **terms, **views)
    for name, (view, buffer) in outputs.items():
        assert torch.equal(view, expected[name])
        assert (buffer[:margin] == sentinel).all() and (buffer[-margin:] == sentinel).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bits_do_not_depend_on_the_batch_or_the_threads(kind):
    p = problem(kind, 5, 26, 38, 20, 40)
    terms, threads = MODES["everything"][0], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        images = [{k: t if k in ("weight", "offset") else t[i : i + 1] for k, t in p.items()} for i in range(5)]
        alone = [run(image, kind, terms) for image in images]
        torch.set_num_threads(3)
        together = run(p, kind, terms)
    finally:
        torch.set_num_threads(threads)
    for name in OUTPUTS:
        assert torch.equal(together[name], torch.cat([outputs[name] for outputs in alone]))


def test_outputs_may_replace_their_terms():
    p = problem(ConvKind.SAME, 1, 9, 11, 16, 16)
    expected = run(p, ConvKind.SAME, ("factor", "residual"), ("out", "silu"))
    terms = {name: p[name] for name in ("factor", "residual")}
    fused_conv(p["x"], pack_conv(p["weight"]), **terms, out=p["residual"], silu=p["factor"])
    assert torch.equal(p["residual"], expected["out"]) and torch.equal(p["factor"], expected["silu"])


def test_rows_of_gain_may_be_strided():
    p = problem(ConvKind.SAME, 3, 5, 6, 8, 16)
    expected = run(p, ConvKind.SAME, ("gain",), ("out",))["out"]
    p["gain"] = torch.cat([p["gain"], torch.full((3, 7), float("nan"))], dim=1)[:, :16]
    assert torch.equal(run(p, ConvKind.SAME, ("gain",), ("out",))["out"], expected)


def test_extreme_values():
    """silu saturates without overflow, and nan stays nan."""
    t = torch.tensor([0.0, -0.0, 50.0, -50.0, 1e4, -1e4, 3e38, -3e38, float("inf"), float("nan")]).repeat(2)[:16]
    out, silu, slope = (torch.empty(1, 1, 1, 16) for _ in range(3))
    zero = torch.zeros(1, 1, 1, 8)
    fused_conv(zero, pack_conv(torch.zeros(16, 8, 3, 3)), offset=t[None], out=out, silu=silu, slope=slope)
    expected = torch.nn.functional.silu(t.double())
    finite = expected.isfinite()
    assert torch.equal(out.flatten()[finite], t[finite])
    assert torch.allclose(silu.flatten()[finite].double(), expected[finite], rtol=1e-6, atol=1e-30)
    assert torch.equal(slope.flatten()[finite & (t > 40)], torch.ones_like(t)[finite & (t > 40)])
    assert silu.flatten()[t.isnan()].isnan().all() and slope.flatten()[t.isnan()].isnan().all()


def test_weights_of_both_layouts():
    """A channels-last or transposed weight is packed as its values, not as its memory."""
    p = problem(ConvKind.SAME, 1, 6, 7, 12, 20)
    expected = run(p, ConvKind.SAME, (), ("out",))["out"]
    p["weight"] = p["weight"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(p, ConvKind.SAME, (), ("out",))["out"], expected)


def test_says_what_is_wrong():
    p = problem(ConvKind.SAME, 2, 6, 8, 16, 24)
    x, conv, out = p["x"], pack_conv(p["weight"]), torch.empty(2, 6, 8, 24)
    with pytest.raises(ValueError, match=r"out must be \[2, 6, 8, 24\]"):
        fused_conv(x, conv, out=out[:1])
    with pytest.raises(ValueError, match="x must be contiguous"):
        fused_conv(x.transpose(1, 2), conv, out=out)
    with pytest.raises(TypeError, match="x must be float32"):
        fused_conv(x.double(), conv, out=out)
    with pytest.raises(ValueError, match="pack the weights with conv_pack"):
        fused_conv(torch.randn(2, 6, 8, 40), conv, out=out)
    with pytest.raises(ValueError, match=r"gain must be \(2 or 1, 24\)"):
        fused_conv(x, conv, gain=torch.ones(3, 24), out=out)
    with pytest.raises(ValueError, match="adjacent channels"):
        fused_conv(x, conv, gain=torch.ones(2, 1).expand(2, 24), out=out)
    with pytest.raises(ValueError, match="may not be the input"):
        fused_conv(x, pack_conv(torch.zeros(16, 16, 3, 3)), out=x)
    with pytest.raises(ValueError, match="even sizes, got 5 x 8"):
        fused_conv(torch.randn(1, 5, 8, 4), pack_conv(torch.randn(4, 4, 2, 2), ConvKind.DOWN), out=out)
    with pytest.raises(ValueError, match=r"weight must be \(.., .., 3, 3\)"):
        pack_conv(torch.randn(4, 4, 5, 5))
    with pytest.raises(RuntimeError, match="pack_adjoint"):
        fused_conv(x.requires_grad_(), conv, out=out)


def test_runs_native():
    x = torch.zeros(1, 1, 1, 1)
    with use_backend(Backend.AUTO):
        assert runs_native(x) and not runs_native(x.double()) and not runs_native(x.to("meta"))
    with use_backend(Backend.REFERENCE):
        assert not runs_native(x)
    with use_backend(Backend.TRITON):
        assert not runs_native(x)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    """This machine's choice is what the other tests see; the narrower ones run in a process of their own."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_conv as t\n"
        "for kind in t.KINDS: t.check(t.problem(kind, 2, 10, 14, 20, 40), kind, *t.MODES['everything'])\n"
    )
    arguments = [sys.executable, "-c", code, os.path.dirname(__file__)]
    done = subprocess.run(arguments, env={**os.environ, "FASTEM_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
