"""Steps as CUDA graphs, and 16-bit networks, on a GPU: `make gpu-test`."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    if "cuda" in os.environ.get("FASTEM_REQUIRE", ""):
        raise RuntimeError("FASTEM_REQUIRE names cuda, but torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)

from fastem.em import HQS, EdgeEM, KernelState, Known  # noqa: E402
from fastem.engine import Deblurrer  # noqa: E402
from fastem.guidance import DPS, PiGDM, PosteriorMean, default_r2  # noqa: E402
from fastem.metrics import psnr  # noqa: E402
from fastem.models import ErrorSpectrum, UNet, UNetConfig, UNetEps, load_kernel_denoiser, load_model  # noqa: E402
from fastem.mstep import PnP  # noqa: E402
from fastem.operators import Canvas, Observation  # noqa: E402
from fastem.runtime import StepGraphs, Transfers  # noqa: E402
from fastem.samplers import DDPM, Eager, PhiloxNoise, Renoise, sample  # noqa: E402
from fastem.schedules import Schedule  # noqa: E402
from fastem.synth import degrade, motion_kernel  # noqa: E402

DEVICE = torch.device("cuda")
SIZE, KSIZE, B, N = (64, 56), (9, 9), 2, 2
CASES = {
    "mean-edges": (PosteriorMean(2.0), "edges"), "pigdm-hqs": (PiGDM(), "hqs"), "dps-known": (DPS(), "known"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def exact_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def model():
    return load_model("natural").to(DEVICE)


def estimator_of(name: str):
    k = torch.rand(B, 1, *KSIZE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    k = k / k.sum((-2, -1), keepdim=True)
    denoiser = load_kernel_denoiser("kernel", DEVICE)
    return {"edges": EdgeEM(k, sigma_on=0.4), "hqs": HQS(PnP(denoiser), KSIZE), "known": Known(k)}[name]


def spectrum(sigma_t):
    """An error as networks make it: the noise at low frequencies, less at high ones."""
    return ErrorSpectrum(sigma_t**2, 0.1, 2.0)


def draw(execute, model, guidance, estimator, seed=0, steps=6, on_step=None):
    y = torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    observation = Observation.of(y, torch.tensor([0.02, 0.05]), Canvas(*SIZE, (48, 45)))
    schedule, rule, r2 = Schedule.karras(steps, 1.0), Renoise(), default_r2
    if guidance.jacobian:
        schedule, rule, r2 = Schedule.linear().respace(steps), DDPM(), spectrum
    noise = PhiloxNoise(torch.tensor([seed, 7], device=DEVICE), N, (3, *SIZE))
    return sample(model, observation, estimator, guidance, schedule, noise=noise, rule=rule, r2=r2, execute=execute,
                  on_step=on_step)  # fmt: skip


@pytest.mark.parametrize("guidance, name", CASES.values(), ids=CASES)
def test_replays_are_the_steps(model, guidance, name):
    """Three runs of one recording, with other images, noise and numbers of steps."""
    graphs = StepGraphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a step could not be recorded
        for seed, steps in ((0, 6), (1, 9), (0, 6)):
            actual = draw(graphs, model, guidance, estimator_of(name), seed, steps)
            expected = draw(Eager, model, guidance, estimator_of(name), seed, steps)
            torch.testing.assert_close(actual.x, expected.x, rtol=0, atol=2e-3)
            torch.testing.assert_close(actual.kernel, expected.kernel, rtol=0, atol=1e-4)
    assert name != "known" or len(graphs) == 1


@pytest.mark.parametrize("guidance, name", CASES.values(), ids=CASES)
def test_no_step_waits_for_the_device(model, guidance, name):
    graphs, estimator = StepGraphs(), estimator_of(name)
    draw(graphs, model, guidance, estimator)  # records

    def forbid(*_):
        torch.cuda.set_sync_debug_mode("error")

    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            drawn = draw(graphs, model, guidance, estimator, on_step=forbid)  # from the second step on
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = [e.name for e in profile.events() if e.name == "cudaGraphLaunch"]
    waits = [e.name for e in profile.events() if "Synchronize" in e.name]
    assert torch.isfinite(drawn.x).all()
    assert len(waits) <= 3, waits  # of the start: the table, the kernels of the estimator
    assert len(launches) in (0, 6), launches  # 0: this profiler does not see the runtime
    graphs_at = [e.time_range.start for e in profile.events() if e.name == "cudaGraphLaunch"]
    others = [
        e.name for e in profile.events()
        if e.name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaMemsetAsync")
        and graphs_at and min(graphs_at) < e.time_range.start < max(graphs_at)
    ]  # fmt: skip
    assert not others, others  # a step is one launch: its noise is drawn inside


@dataclass(frozen=True)
class Reads(Known):
    """An estimator that looks at a value: it cannot be recorded."""

    def rests(self, step):
        return False

    def update(self, state, X, observation, r2):
        return KernelState(state.k if float(state.k.sum()) > 0 else state.k * 0)


def test_what_cannot_be_recorded_runs_step_by_step_and_says_so(model):
    k = estimator_of("known").k
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*reads a value") as caught:
        drawn = draw(StepGraphs(), model, PosteriorMean(), Reads(k))
    assert len(caught) == 1
    expected = draw(Eager, model, PosteriorMean(), Known(k))
    torch.testing.assert_close(drawn.x, expected.x, rtol=0, atol=2e-3)


def test_released_recordings_give_their_memory_back(model):
    draw(Eager, model, PosteriorMean(), estimator_of("known"))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphs = StepGraphs()
    draw(graphs, model, PosteriorMean(), estimator_of("known"))
    assert torch.cuda.memory_reserved() > before
    graphs.release()
    del graphs
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 2**21


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1e6], ids=str)
def test_gradients_of_16_bits(dtype, tolerance, size):
    """The natural prior's vector-Jacobian product against float32, for cotangents that float16 cannot hold."""
    exact, model = load_model("natural").to(DEVICE), load_model("natural").to(DEVICE)
    model.set_precision(dtype)
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    v = size * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def both(network):
        leaf = x.clone().requires_grad_()
        eps = network(leaf, 300.0)
        return eps.detach(), torch.autograd.grad(eps, leaf, v)[0]

    for actual, expected in zip(both(model), both(exact), strict=True):
        assert float((actual - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("last", [False, True], ids=["plain", "channels last"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)], ids=str
)
def test_frozen_blocks_of_a_unet(dtype, tolerance, last):
    """Values and gradients of the blocks as one function each, against plain torch in float64."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(widths=(64, 128, 128), base=64, attention_levels=(2,), num_head_channels=64))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    exact, model = UNetEps(net.requires_grad_(False)), UNetEps(copy.deepcopy(net))
    exact = exact.to(DEVICE).double()
    model.set_precision(dtype)
    model.to(DEVICE, memory_format=torch.channels_last if last else torch.preserve_format)
    model.prepare([300.0])
    x, v = torch.randn(2, 2, 3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)

    def both(network, dtype):
        leaf = x.to(dtype).requires_grad_()
        eps = network(leaf, 300.0)
        return eps.detach(), torch.autograd.grad(eps, leaf, v.to(dtype))[0]

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = both(model, torch.float32)
    assert any(e.name == "fastem::group_norm_silu_backward" for e in profile.events())
    for a, e in zip(actual, both(exact, torch.float64), strict=True):
        assert float((a - e).norm() / e.norm()) < tolerance


def test_steps_of_a_unet_are_recorded():
    """PiGDM in 16 bits: the backward pass of the frozen blocks inside the graph."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(widths=(64, 128), base=64, attention_levels=(1,), num_head_channels=64))
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    model = UNetEps(net.requires_grad_(False))
    model.set_precision(torch.float16)
    model.to(DEVICE, memory_format=torch.channels_last)
    model.prepare([step.t for step in Schedule.linear().respace(6).reverse()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a step could not be recorded
        actual = draw(StepGraphs(), model, PiGDM(), estimator_of("hqs"))
    expected = draw(Eager, model, PiGDM(), estimator_of("hqs"))
    torch.testing.assert_close(actual.x, expected.x, rtol=0, atol=2e-2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_restorations_of_16_bits_are_as_good(precision):
    """End to end through the engine, graphs included: PSNR within 0.05 dB of float32, and the batch as one by one."""
    rng, k = np.random.default_rng(0), motion_kernel(9, 1)
    x = np.kron(rng.uniform(0.1, 0.9, (8, 9, 3)), np.ones((8, 8, 1))).astype(np.float32)
    y = degrade(x, k, 0.01, 0)
    found = {}
    for name in ("fp32", precision):
        engine = Deblurrer(kernel_size=9, boundary="circular", device="cuda", precision=name)
        found[name] = psnr(engine(y, sigma=0.01, kernel=k).image, x)
        (first, second) = engine.map([y, y], batch_size=2, sigma=0.01, kernel=k)
        assert abs(psnr(first.image, x) - found[name]) < 0.02 and (first.image == second.image).all()
    assert abs(found[precision] - found["fp32"]) < 0.05


def test_transfers_overlap_and_change_nothing():
    """Images arrive and leave on streams of their own; the results are those of one call after another."""
    k = motion_kernel(9, 1)
    images = [np.random.default_rng(i).random((64, 56, 3), np.float32) for i in range(6)]
    engine = Deblurrer(kernel_size=9, boundary="circular", device="cuda", steps=3)
    alone = [next(iter(engine.map([y], batch_size=2, sigma=0.05, kernel=k))) for y in images]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a recording was spoilt by what other threads do
        fresh = Deblurrer(kernel_size=9, boundary="circular", device="cuda", steps=3)
        together = list(fresh.map(images, batch_size=2, sigma=0.05, kernel=k))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a.image, b.image, atol=2e-3)
        np.testing.assert_array_equal(a.kernel, b.kernel)


def test_copies_leave_the_computation_alone():
    """A copy to the host waits for what it copies, and what is computed next does not wait for the copy."""
    transfers = Transfers(DEVICE)
    sent = [transfers.send(torch.full((1 << 20,), float(i))) for i in range(8)]
    leaving = []
    for arriving in sent:
        x = arriving.get()
        for _ in range(20):
            x = x * 1.0 + 1.0
        leaving.append(transfers.fetch([x]))
        del x, arriving
    for i, each in enumerate(leaving):
        (host,) = each.get()
        assert host.is_pinned() and (host == i + 20.0).all()


def test_auto_batches_fill_the_memory():
    engine = Deblurrer(kernel_size=9, boundary="circular", device="cuda", steps=2)
    y = np.random.default_rng(0).random((64, 64, 3), np.float32)
    results = list(engine.map([y] * 5, sigma=0.05, kernel=motion_kernel(9, 1)))
    assert len(results) == 5 and all((r.image == results[0].image).all() for r in results[:4])
