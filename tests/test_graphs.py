"""Steps from a device table and a counter: nothing in them waits for the device, and they are those of the host."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastem.em import HQS, EdgeEM, Known
from fastem.guidance import DPS, PiGDM, PosteriorMean, default_r2
from fastem.models import ErrorSpectrum, NaturalConfig, NaturalPrior, TiledEps, UNet, UNetConfig, UNetEps
from fastem.models.eps import DenoiserEps
from fastem.models.kernel_denoiser import KernelDenoiser
from fastem.mstep import L2, PnP
from fastem.operators import Canvas, Observation
from fastem.ops import native, use_backend
from fastem.runtime import NoSync, StepGraphs, SyncError
from fastem.runtime.graphs import Program, Recording
from fastem.samplers import DDPM, Eager, Phase, PhiloxNoise, Renoise, StepBody, StepConstants, sample
from fastem.schedules import Schedule

SIZE, KSIZE = (24, 20), (5, 4)
GUIDANCES = {"mean": PosteriorMean(2.0), "pigdm": PiGDM(), "pigdm-released": PiGDM("released"), "dps": DPS()}
CANVASES = {"circular": None, "canvas": Canvas(*SIZE, (18, 15))}


def natural(dtype=torch.float32):
    torch.manual_seed(0)
    net = NaturalPrior(NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8))
    for parameter in net.parameters():  # layers that start at zero would hide the network
        torch.nn.init.normal_(parameter, std=0.1)
    return DenoiserEps(net.requires_grad_(False)).to(dtype)


def unet():
    torch.manual_seed(0)
    config = UNetConfig(widths=(32, 64), base=32, attention_levels=(1,), num_head_channels=32)
    net = UNet(config).requires_grad_(False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return UNetEps(net)


def kernels(batch, seed=0, dtype=torch.float32):
    k = torch.rand(batch, 1, *KSIZE, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return k / k.sum((-2, -1), keepdim=True)


def estimators(k):
    denoiser = KernelDenoiser().requires_grad_(False).to(k.dtype)
    return {
        "known": Known(k),
        "edges": EdgeEM(k, sigma_on=0.4, num_iters=3),
        "hqs": HQS(PnP(denoiser), KSIZE, num_iters=2, r2_ridge=True),
        "hqs-released": HQS(PnP(denoiser), KSIZE, num_iters=2, compat="released"),
        "hqs-l2": HQS(L2(0.1), KSIZE, num_iters=2),
    }


PAIRS = [  # every guidance and every estimator
    ("mean", "edges"), ("mean", "known"), ("pigdm", "hqs"), ("pigdm", "edges"), ("pigdm-released", "hqs-released"),
    ("dps", "hqs-l2"), ("dps", "edges"),
]  # fmt: skip


def observation(seed=0, canvas=None, dtype=torch.float32):
    y = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Observation.of(y, torch.tensor([0.02, 0.05]), canvas)


def spectrum(sigma_t):
    """An error as networks make it: the noise at low frequencies, less at high ones."""
    return ErrorSpectrum(sigma_t**2, 0.1, 2.0)


def schedule_of(guidance, steps=4):
    if guidance.jacobian:
        return Schedule.linear().respace(steps), DDPM(), spectrum
    return Schedule.karras(steps, 1.0), Renoise(), default_r2


def draw(
    execute, model, guidance, name, canvas=None, seed=0, steps=4, dtype=torch.float32, vjp_down_to=0.0, run=0,
    counted=True,
):  # fmt: skip
    schedule, rule, r2 = schedule_of(guidance, steps)
    seen = []
    noise = PhiloxNoise(torch.tensor([seed, 7]), 2, (3, *SIZE), run)
    x_start = noise.start().to(dtype)
    drawn = sample(
        model, observation(seed, canvas, dtype), estimators(kernels(2, seed, dtype))[name], guidance, schedule,
        noise=noise if counted and dtype is torch.float32 else Cast(noise, dtype),
        rule=rule, r2=r2, x_start=x_start, execute=execute, vjp_down_to=vjp_down_to,
        on_step=lambda step, x0_hat, k: seen.append((x0_hat.clone(), k.clone())),
    )  # fmt: skip
    return [drawn.x, drawn.kernel, *(t for pair in seen for t in pair)]


class Cast:
    def __init__(self, noise, dtype):
        self.noise, self.dtype = noise, dtype

    def step(self, index):
        return self.noise.step(index).to(self.dtype)


def assert_near(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


# ---------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize("guidance, name", PAIRS, ids=str)
def test_table_and_counter_give_the_steps_of_the_host(guidance, name):
    """On plain torch to the bit: the numbers of the table are float64, as those of the host."""
    model, guidance = natural(), GUIDANCES[guidance]
    with use_backend("reference"):
        expected = draw(Eager, model, guidance, name, CANVASES["canvas"])
        actual = draw(StepGraphs(), model, guidance, name, CANVASES["canvas"])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("guidance", [GUIDANCES["mean"], GUIDANCES["pigdm"]], ids=["mean", "pigdm"])
def test_table_and_counter_in_double(guidance):
    """Rounding aside there is no difference: in float64 nothing of it could hide."""
    model = natural(torch.float64)
    expected = draw(Eager, model, guidance, "hqs", dtype=torch.float64)
    assert_near(draw(StepGraphs(), model, guidance, "hqs", dtype=torch.float64), expected, 1e-14)


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_table_and_counter_beside_native_kernels(guidance, native_backend):
    """The kernels take numbers, the table goes through plain torch: last bits of float32, which four steps enlarge."""
    model = natural()
    expected = draw(Eager, model, guidance, "edges", CANVASES["canvas"])
    assert_near(draw(StepGraphs(), model, guidance, "edges", CANVASES["canvas"]), expected, 2e-4)


def test_a_recording_serves_the_next_run_of_its_shape():
    """Another image, kernel, noise and number of steps: what differs comes from buffers, not from the recording."""
    model, graphs, guidance = natural(), StepGraphs(), GUIDANCES["mean"]
    with use_backend("reference"):
        for seed, steps in ((0, 4), (1, 6), (0, 4)):
            expected = draw(Eager, model, guidance, "edges", seed=seed, steps=steps)
            actual = draw(graphs, model, guidance, "edges", seed=seed, steps=steps)
            assert len(graphs) == 1 and all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
        draw(graphs, TiledEps(model, 16, 4), guidance, "edges")
        draw(graphs, TiledEps(model, 16, 4), guidance, "edges")  # made anew, and yet the same network
    assert len(graphs) == 2


def test_wrong_rows_would_show():
    """Negative control: a counter that stands still."""
    with use_backend("reference"):
        expected = draw(Eager, natural(), GUIDANCES["mean"], "known")
        graphs = StepGraphs()

        def stuck(*args):
            recording = graphs(*args)
            step = recording.step
            recording.step = lambda program: (step(program), recording._row.zero_())
            return recording

        assert not torch.equal(draw(stuck, natural(), GUIDANCES["mean"], "known")[0], expected[0])


@pytest.mark.parametrize("counted", [True, False], ids=["in the step", "from a buffer"])
def test_noise_of_a_recorded_step_is_that_of_the_host(counted):
    """To the bit, for every stream (an outer iteration of Diffusion EM has its own) and seed, on one recording."""
    model, graphs = natural(), StepGraphs()
    with use_backend("reference"):
        seen = []
        for run, seed in ((0, 0), (1, 0), (0, 3), (0, 0)):
            options = {"run": run, "seed": seed}
            expected = draw(Eager, model, GUIDANCES["mean"], "known", **options)
            actual = draw(graphs, model, GUIDANCES["mean"], "known", counted=counted, **options)
            assert len(graphs) == 1 and all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
            seen.append(actual[0])
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_a_step_is_one_launch():
    """Beside the recorded program, only the first step of a run does anything at all."""
    made = recording(natural(), GUIDANCES["mean"], "edges", None)
    phase, noise = Phase(True, False), PhiloxNoise(torch.tensor([1, 2]), 2, (3, *SIZE))
    made._programs = {Program(phase, draws): lambda: None for draws in (True, False)}
    launched = []
    for row, draw in enumerate([noise.draw(3), noise.draw(2), noise.draw(1), None]):
        with Launches() as launches:
            made.advance(row, draw, phase)
            assert made.kernel.shape[-2:] == KSIZE and made.x0_hat.shape[-2:] == SIZE  # what a caller is shown
        launched.append(launches.names)
    assert launched == [["aten::copy_", "aten::fill_"], [], [], []]
    with Launches() as launches:
        made.advance(4, lambda: noise.step(0), phase)
    assert launches.names  # noise of another kind goes through a buffer


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_recordings_are_bounded_and_freed():
    graphs, model, body = StepGraphs(capacity=2), natural(), {}
    for height in (8, 16, 24):
        o = Observation.of(torch.rand(1, 3, height, 8), 0.1)
        body[height] = graphs(
            StepBody(model, Known(kernels(1)), PosteriorMean()), o, Known(kernels(1)).start(o),
            torch.zeros(1, 1, 3, height, 8), [StepConstants(*[0.5] * len(StepConstants._fields))],
        )  # fmt: skip
    assert len(graphs) == 2
    graphs.release()
    assert len(graphs) == 0
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        StepGraphs(0)


def test_without_the_vjp_the_jacobian_is_its_limit():
    """At small noise x0_hat is x_t / sqrt(alpha_bar) and its clamp: dropping the backward pass changes little there."""
    model, guidance = natural(), GUIDANCES["pigdm"]
    with use_backend("reference"):
        exact = draw(Eager, model, guidance, "known", steps=20)[0]
        late = draw(Eager, model, guidance, "known", steps=20, vjp_down_to=0.1)[0]
        never = draw(Eager, model, guidance, "known", steps=20, vjp_down_to=1e9)[0]
    assert not torch.equal(late, exact)
    assert (late - exact).abs().mean() < (never - exact).abs().mean()


# ------------------------------------------------------------------------------------------------ no waiting


def recording(model, guidance, name, canvas, device="cpu"):
    o = Observation(torch.rand(2, 3, *SIZE, device=device), torch.full((2,), 0.05, device=device), canvas)
    estimator = estimators(torch.full((2, 1, *KSIZE), 1 / 20, device=device))[name]
    if name.startswith("hqs") and isinstance(estimator.prior, PnP):
        estimator.prior.denoiser.to(device)
    x_t = torch.zeros(2, 2, 3, *SIZE, device=device)
    schedule, rule, r2 = schedule_of(guidance)
    table = [StepConstants.of(step, guidance, rule, r2) for step in schedule.reverse()]
    made = Recording(StepBody(model, estimator, guidance), o, estimator.start(o), x_t)
    made.load(o, estimator.start(o), x_t, table)
    return made


@pytest.mark.parametrize("backend_name", ["reference", "native"])
@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("guidance, name", PAIRS, ids=str)
def test_a_step_reads_no_value(guidance, name, canvas, backend_name):
    if backend_name == "native" and not native.available():
        pytest.skip(native.why_not())
    guidance = GUIDANCES[guidance]
    with use_backend(backend_name):
        made = recording(natural(), guidance, name, canvas)
        for phase, draws in ((Phase(True, guidance.jacobian), True), (Phase(False, False), False)):
            made.step(Program(phase, draws))  # what is made once is made here
            with NoSync():
                made.step(Program(phase, draws))


@pytest.mark.parametrize(
    "network, guidance, name",
    [
        (natural, "mean", "edges"), (unet, "pigdm", "hqs"), (lambda: TiledEps(natural(), 16, 4), "dps", "hqs-released"),
    ],
    ids=["natural", "unet", "tiles"],
)  # fmt: skip
def test_a_step_stays_on_its_device(network, guidance, name):
    """On torch's meta device, which is not the host: a copy from or to it shows on any machine."""
    guidance = GUIDANCES[guidance]
    with use_backend("reference"):
        made = recording(network().to("meta"), guidance, name, CANVASES["canvas"], "meta")
        program = Program(Phase(True, guidance.jacobian), draws=True)
        made.step(program)
        with NoSync():
            made.step(program)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(),
        lambda x: float(x[0]), lambda x: torch.tensor([1.0, 2.0]) * x, lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_waiting_is_found(wait):
    x = torch.rand(2)
    with pytest.raises(SyncError, match="inside the step"), NoSync():
        wait(x)


@pytest.mark.parametrize("copy", [lambda x: x + torch.ones(2).to(x.device), lambda x: x.copy_(torch.ones(2))])
def test_copies_are_found(copy):
    x = torch.empty(2, device="meta")
    with pytest.raises(SyncError, match="copies between them"), NoSync():
        copy(x)
