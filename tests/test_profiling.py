"""The profiler: counts against known ones, attribution against planted kernels, and a record of a real run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity

from fastem import ops, profiling, ranges
from fastem.cli.main import run as run_program
from fastem.models import NaturalConfig, NaturalPrior, load_kernel_denoiser, save_natural
from fastem.models.fused import FusedNaturalPrior
from fastem.ops import native
from fastem.profiling import Cost, CostCounter, Roofline, Workload

CPU = torch.device("cpu")


def counted(function) -> dict[str, Cost]:
    """Costs by operation of one call, as one step of one stage."""
    counter = CostCounter(CPU)
    with ranges.listening(counter.listener), counter, ranges.stage(ranges.STEP):
        function()
    return {name: cost for (_, name), cost in counter.costs.items()}


def total_flops(function) -> float:
    return sum(cost.flops for cost in counted(function).values())


# ------------------------------------------------------------------------------------------------ counts


def test_operands_count_once_and_broadcast_dimensions_too():
    x, row = torch.randn(8, 16), torch.randn(16)
    (cost,) = counted(lambda: x + row.expand(8, 16)).values()
    assert (cost.calls, cost.flops, cost.dtype) == (1, 0, "float32")
    assert cost.nbytes == 4 * (8 * 16 + 16 + 8 * 16)
    in_place = counted(lambda: x.mul_(2))["aten::mul_"]
    assert in_place.nbytes == 4 * 8 * 16  # result and argument are one
    assert counted(lambda: x.view(16, 8).t()) == {}  # nothing is moved


def test_flops_of_products_and_convolutions():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    assert total_flops(lambda: a @ b) == 2 * 5 * 7 * 3
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(8, 4, 3, 3)
    forward = 2 * 2 * 8 * 36 * 4 * 9
    assert total_flops(lambda: F.conv2d(x, w, padding=1)) == forward
    assert total_flops(lambda: torch.autograd.grad(F.conv2d(x, w, padding=1).sum(), x)) == 2 * forward


def test_flops_of_transforms():
    x, z = torch.randn(3, 8, 16), torch.randn(3, 8, 16, dtype=torch.complex64)
    assert total_flops(lambda: torch.fft.fft2(z)) == 5 * 3 * 128 * math.log2(128)
    assert total_flops(lambda: torch.fft.rfft2(x)) == 2.5 * 3 * 128 * math.log2(128)
    assert total_flops(lambda: torch.fft.irfft2(torch.fft.rfft2(x), s=(8, 16))) == 5 * 3 * 128 * math.log2(128)


@pytest.mark.skipif(not native.available(), reason="compares the native operations with plain torch")
def test_native_operations_count_as_what_they_replace():
    k, g = torch.rand(2, 1, 5, 7), torch.rand(2, 1, 9, 13)
    chain, noise_std = load_kernel_denoiser("kernel").as_chain(), torch.full((2,), 0.01)
    net = NaturalPrior(NaturalConfig(widths=(8, 16), num_blocks=1)).requires_grad_(False)
    fused, x = FusedNaturalPrior(net), torch.randn(1, 3, 16, 24)
    calls = {
        "support": (lambda: ops.convolve_support(g, k), 0),
        "chain": (lambda: ops.denoise_chain(k, noise_std, *chain), 0),
        "hqs": (lambda: ops.hqs_chain(k, g, k, noise_std, *chain, 3), 0),
        "least squares": (lambda: ops.simplex_least_squares(g, k, k, 4), 0),
        "network": (lambda: fused(x, torch.tensor([0.5])), 0.02),  # the native one folds biases and small layers
    }
    for name, (call, tolerance) in calls.items():
        count = {}
        for backend in ("native", "reference"):
            with ops.use_backend(backend), torch.no_grad():
                count[backend] = total_flops(call)
        assert count["native"] > 0
        assert count["native"] == pytest.approx(count["reference"], rel=tolerance), name


def test_costs_belong_to_the_innermost_stage_and_step():
    counter, x = CostCounter(CPU), torch.randn(4)
    with ranges.listening(counter.listener), counter:
        x + x  # outside of steps
        for i in ranges.each(ranges.STEP, range(3)):
            if i != 1:
                with ranges.stage("x0"):
                    x * x
            x - x
    product = counter.costs.pop(("step/x0", "aten::mul"))
    assert product.calls == 2 and len(product.seconds) == 3 and product.seconds[1] == 0
    assert [(key, cost.calls) for key, cost in counter.costs.items()] == [(("step", "aten::sub"), 3)]


def test_roofline_is_the_longer_of_arithmetic_and_traffic():
    roofline = Roofline(copy_gb_s=10, tflop_s={"float32": 0.1, "float16": 0.2})
    assert roofline.floor_seconds(1e11, 1e9, "float32") == pytest.approx(1.0)
    assert roofline.floor_seconds(1e11, 1e9, "float16") == pytest.approx(0.5)
    assert roofline.floor_seconds(1e9, 1e10, "float32") == pytest.approx(1.0)
    measured = profiling.measure_roofline(CPU, quick=True)
    assert measured.copy_gb_s > 0 and measured.tflop_s["float32"] > 0


# ------------------------------------------------------------------------------------------------ kernels of a GPU


def test_kernels_go_to_the_stage_and_operation_that_launched_them():
    x = torch.randn(1, 2, 8, 8)
    with ranges.listening(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in ranges.each(ranges.STEP, range(2)):
            with ranges.stage("unet_fwd"):
                F.conv2d(x, torch.randn(2, 2, 3, 3))
            with ranges.stage("update"):
                x * x
        x * x  # after the last step
    events = prof.events()
    for event in events:
        if event.name in ("aten::_convolution", "aten::mul", "step/update"):
            event.append_kernel(f"kernel of {event.name}", 0, 10)  # microseconds
    found = profiling.kernel_times(events, {"aten::convolution", "aten::mul"})
    microseconds = {key: (1e6 * seconds, calls) for key, (seconds, calls) in found.items()}
    assert microseconds["step/unet_fwd", "aten::convolution"] == pytest.approx((10, 1))  # launched deeper inside
    assert microseconds["step/update", "aten::mul"] == pytest.approx((10, 1))
    assert microseconds["step/update", "kernel of step/update"] == pytest.approx((10, 1))  # by no operation
    assert len(found) == 3


def event(name, start, end, *, cuda=False):
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device, time_range=time_range)


def test_idle_and_waits():
    events = [
        event("step", 0, 50), event("step", 50, 100), event("step/x0", 1, 99, cuda=True),  # a range, no kernel
        event("gemm", 10, 30, cuda=True), event("add", 20, 40, cuda=True), event("gemm", 60, 90, cuda=True),
        event("cudaLaunchKernel", 9, 10), event("cudaStreamSynchronize", 45, 46),
        event("cudaDeviceSynchronize", 120, 130),  # after the last step
    ]  # fmt: skip
    activity = profiling.device_activity(events, steps=2)
    assert activity["gpu_idle_percent"] == pytest.approx(100 * 20 / 80)
    assert activity["syncs_per_step"] == 0.5
    assert [(row["name"], row["ms_per_step"], row["calls_per_step"]) for row in activity["gpu_kernels"]] == [
        ("gemm", pytest.approx(0.025), 1.0),
        ("add", pytest.approx(0.01), 0.5),
    ]


# ------------------------------------------------------------------------------------------------ the record


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Options of a workload that takes milliseconds."""
    path = tmp_path_factory.mktemp("prior") / "small.safetensors"
    torch.manual_seed(0)
    save_natural(path, NaturalPrior(NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8)), r2=None, card={})
    return {"size": (24, 32), "kernel_size": 7, "prior": str(path), "steps": 2, "device": "cpu"}


@pytest.mark.parametrize(
    "options, stages",
    [
        ({"guidance": "dps", "batch": 2, "particles": 2}, list(ranges.STAGES)),
        ({"m_step": "edges", "graphs": True}, [name for name in ranges.STAGES if name != "unet_vjp"]),
        ({"backend": "reference", "channels_last": True}, [name for name in ranges.STAGES if name != "unet_vjp"]),
    ],
    ids=["with a backward pass", "edges", "plain torch"],
)
def test_record(small, options, stages, tmp_path):
    trace = tmp_path / "trace.json"
    record = profiling.profile(Workload(**small, **options), trace=trace, quick=True)
    assert json.loads(json.dumps(record)) == record
    assert [row["stage"] for row in record["stages"]] == stages
    assert 50 < sum(row["step_percent"] for row in record["stages"]) < 150  # medians of stages, of a noisy machine
    flops = {row["stage"]: row["flops"] for row in record["stages"]}
    assert flops["unet_fwd"] > 1e6 and flops["mstep"] > 1e4
    by_op = sum(row["flops"] for row in record["ops"] if row["stage"] == "unet_fwd")
    assert by_op == pytest.approx(flops["unet_fwd"])
    if "unet_vjp" in stages:  # the gradient with respect to the image alone costs as much as the network
        assert flops["unet_vjp"] == pytest.approx(flops["unet_fwd"], rel=0.05)
    assert record["step"]["host_reads_per_step"] == 0
    assert record["step"]["gpu_idle_percent"] is None and record["gpu_kernels"] == []
    assert bool(record["graphs"]) == options.get("graphs", False)  # on a CPU the same steps, as they come
    names = {entry.get("name") for entry in json.loads(trace.read_text())["traceEvents"]}
    assert {f"step/{name}" for name in stages} <= names


def test_random_networks_have_a_gradient():
    net = profiling.random_unet(profiling.RANDOM["small-random"])
    assert sum(p.numel() for p in net.parameters()) == 3_162_822
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x, 10.0).square().sum(), x)
    assert grad.abs().max() > 0


def test_the_compiled_peer_is_one_graph_and_the_same_network():
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph

    plain = profiling.load_prior(Workload(prior="small-random"), CPU)
    peer = profiling.CompiledUNet(profiling.load_prior(Workload(prior="small-random"), CPU), backend=capture)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for t in (10.0, 500.0, 999.0):
            assert torch.allclose(peer(x, t), plain(x, t), atol=1e-4)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="compile is for U-Nets"):
        profiling.load_prior(Workload(compile=True), CPU)


def test_compare(small, tmp_path):
    record = profiling.profile(Workload(**small), quick=True)
    rows = profiling.compare(record, record)
    assert [row["stage"] for row in rows] == ["step", *(row["stage"] for row in record["stages"])]
    assert all(row["ratio"] == 1 for row in rows)
    twice = {**record, "step": {name: 2 * (value or 0) for name, value in record["step"].items()}}
    assert profiling.compare(record, twice)[0]["ratio"] == 2
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert profiling.read_record(path) == record
    for wrong in ("", "[]", "{}", '{"format": 1}', json.dumps({**record, "format": 0})):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="no record of this version; give a file that fastem profile --json wrote"):
            profiling.read_record(path)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def program(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        code = run_program(["profile", *map(str, arguments)])
        return (int(code), *capfd.readouterr())

    return call


def test_program(program, small, monkeypatch, tmp_path):
    quick = profiling.measure_roofline
    monkeypatch.setattr(profiling, "measure_roofline", lambda device, quick_=True, **_: quick(device, quick=True))
    options = ("--size", "24x32", "--kernel-size", 7, "--prior", small["prior"], "--steps", 2, "--device", "cpu")
    code, out, err = program(*options, "--json", "base.json", "--top", 3)
    assert code == 0, err
    record = json.loads((tmp_path / "base.json").read_text())
    assert record["workload"]["size"] == [24, 32]
    for word in ("unet_fwd", "mstep", "update", "measured peaks", "peak memory", f"3 of {len(record['ops'])}"):
        assert word in out
    code, out, err = program(*options, "--json", "-", "--compare", "base.json")
    assert code == 0, err
    assert json.loads(out)["workload"] == record["workload"]
    assert "base / now" in err


def test_the_command_for_nsight_compute_repeats_the_workload(program):
    code, out, err = program("--ncu", "unet_vjp", "--size", "64", "--guidance", "pigdm", "--channels-last")
    assert code == 0, err
    assert '--nvtx-include "step/unet_vjp/"' in out
    assert out.strip().endswith("-m fastem profile --run-only --size 64x64 --guidance pigdm --channels-last")


def test_run_only_runs_and_says_nothing(program, small):
    code, out, err = program(
        "--run-only", "--size", "24x32", "--kernel-size", 7, "--prior", small["prior"], "--steps", 1, "--device", "cpu"
    )
    assert (code, out) == (0, ""), err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--ncu", "unet"], "a stage is one of unet_fwd"),
        (["--size", "7x64"], "at least 8x8"),
        (["--guidance", "none"], "mean, pigdm, dps"),
        (["--m-step", "none"], "hqs, edges"),
        (["--backend", "cuda"], "auto, reference, native, triton"),
        (["--dtype", "float16"], "for U-Nets such as ffhq-random"),
        (["--kernel-size", "65", "--size", "64"], "does not fit in 64 x 64"),
        (["--compare", "missing.json"], "No such file"),
        (["--trace", "missing/trace.json"], "no folder missing"),
    ],
)
def test_mistakes_are_told_in_one_line(program, arguments, told):
    code, out, err = program(*arguments)
    assert code == 2 and out == ""
    assert told in err and err.count("\n") == 1
