"""Where the time of a sampling step goes: per stage and per kernel, against what this device can do.

The same few steps run once for each instrument, so that none slows another: a clock around the stages (`ranges`); a
dispatch mode around every operation, for bytes, FLOPs and, on the CPU, time; torch.profiler for the kernels of a GPU
and for traces. The peaks they are held against are measured on the same device.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from fastem import env, ranges, runtime
from fastem.em import HQS, EdgeEM, delta_kernel
from fastem.engine import INFLATION, SIGMA_MAX, SIGMA_MIN
from fastem.guidance import DPS, PiGDM, PosteriorMean, default_r2
from fastem.models import EpsModel, UNet, UNetConfig, UNetEps, load_kernel_denoiser, load_model
from fastem.models.frozen import Conv
from fastem.models.unet import GroupNorm32, ResBlock, batch_times
from fastem.mstep import PnP
from fastem.operators import Observation, blur
from fastem.ops import native
from fastem.ops.backend import use_backend
from fastem.samplers import DDPM, Eager, PhiloxNoise, Renoise, sample
from fastem.schedules import Schedule
from fastem.synth import motion_kernel

FORMAT = 1  # of the records
SIGMA = 5 / 255
RANDOM = {  # networks by configuration alone: what they cost does not depend on their weights
    "ffhq-random": UNetConfig(widths=(128, 128, 256, 256, 512, 512), base=128, attention_levels=(4,)),
    "small-random": UNetConfig(widths=(32, 64, 128), base=32, attention_levels=(2,), num_head_channels=32),
}
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Workload:
    """What is run: steps of Fast EM on a synthetic photo.

    `prior` is what `load_model` takes, or `ffhq-random` / `small-random`: U-Nets of random weights, for any size.
    """

    size: tuple[int, int] = (256, 256)
    batch: int = 1
    particles: int = 1
    kernel_size: int = 33
    guidance: str = "mean"  # mean, pigdm, dps
    m_step: str = "hqs"  # hqs, edges
    steps: int = 5
    prior: str = "natural"
    device: str = "auto"
    backend: str = "auto"
    dtype: str = "float32"  # of the blocks of a U-Net
    channels_last: bool = False
    compile: bool = False  # the network by torch.compile, max-autotune: the peer that kernels of our own must beat
    graphs: bool = False  # steps as replays of CUDA graphs, as the engine runs them on a GPU


# ------------------------------------------------------------------------------------------------ the work


def random_unet(config: UNetConfig, seed: int = 0) -> UNet:
    """A frozen U-Net of random weights; those that start at zero, and with them all gradients, get a little noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet(config)
        for parameter in net.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return net.requires_grad_(False).eval()


class CompiledUNet(UNetEps):
    """The peer that our own kernels must beat: the same network in plain torch by torch.compile, max-autotune.

    Nothing in it chooses a backend, which would break its graph, and the time step is a tensor, so that all steps share
    one compilation.
    """

    def __init__(self, model: UNetEps, **options) -> None:
        super().__init__(model.net)
        for module in self.net.modules():
            if isinstance(module, GroupNorm32):
                module.then_silu = MethodType(_plain_norm_silu, module)
            if isinstance(module, ResBlock | UNet):
                module.fuse = False
            if isinstance(module, Conv):
                module.forward = MethodType(_plain_conv, module)
        self.net.compile(**(options or {"mode": "max-autotune"}))

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        return super().forward(x_t, batch_times(t, x_t))


def _plain_norm_silu(self: GroupNorm32, x: Tensor, film: tuple | None = None, skip: Tensor | None = None) -> Tensor:
    h = self(x if skip is None else torch.cat([x, skip], dim=1))
    if film is not None:
        scale, shift = (v[..., None, None].to(h.dtype) for v in film)
        h = torch.addcmul(shift, h, 1 + scale)
    return nn.functional.silu(h)


def _plain_conv(self: Conv, x: Tensor, n_out: int | None = None) -> Tensor:
    return nn.functional.conv2d(x, self.weight[:n_out], self.bias[:n_out], padding=self.padding)


def load_prior(workload: Workload, device: torch.device) -> EpsModel:
    """The prior of a workload on its device, in its dtype and layout.

    Raises:
        ValueError: for a dtype that is unknown, or that the prior has no blocks for.
        fastem.models.CheckpointError: if there is no such model.
    """
    if workload.dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {workload.dtype!r}")
    random = RANDOM.get(workload.prior)
    model: EpsModel = load_model(workload.prior) if random is None else UNetEps(random_unet(random))
    if (workload.dtype != "float32" or workload.compile) and not isinstance(model, UNetEps):
        asked = "compile" if workload.compile else f"dtype {workload.dtype}"
        raise ValueError(f"{asked} is for U-Nets such as ffhq-random, not for {workload.prior!r}")
    if workload.dtype != "float32":
        model.net.set_torso_dtype(getattr(torch, workload.dtype))
    layout = torch.channels_last if workload.channels_last else torch.preserve_format
    if workload.compile:
        model = CompiledUNet(model)
    return model.to(device, memory_format=layout).eval()


def problem(size: tuple[int, int], batch: int, kernel_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blurred random scenes `(B, 3, H, W)` with noise of 5 grey levels, and their kernels `(B, 1, h, w)`."""
    generator = torch.Generator().manual_seed(0)
    scene = torch.rand(batch, 3, *(max(n // 8, 1) for n in size), generator=generator)
    x = nn.functional.interpolate(scene, size=size, mode="bicubic").clamp(0, 1)
    k = torch.stack([torch.from_numpy(motion_kernel(kernel_size, seed))[None] for seed in range(batch)])
    y = blur(x[:, None], k)[:, 0] + SIGMA * torch.randn(x.shape, generator=generator)
    return y.to(device), k.to(device)


def prepare(workload: Workload) -> Callable[[int], None]:
    """A function that runs so many steps of the workload; networks and observation are ready.

    Raises:
        ValueError: for an option that cannot be.
    """
    device = runtime.resolve_device(workload.device)
    for name, allowed in (("guidance", ("mean", "pigdm", "dps")), ("m_step", ("hqs", "edges"))):
        if getattr(workload, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(workload, name)!r}")
    height, width = workload.size
    if min(height, width) < workload.kernel_size:
        raise ValueError(f"a kernel of {workload.kernel_size} pixels does not fit in {height} x {width} pixels")
    with torch.no_grad(), use_backend(workload.backend):
        y, _ = problem(workload.size, workload.batch, workload.kernel_size, device)
        observation = Observation.of(y, torch.full((workload.batch,), SIGMA, device=device))
        model = runtime.fit_to_size(load_prior(workload, device), workload.size)
        ksize = (workload.kernel_size, workload.kernel_size)
        if workload.m_step == "hqs":
            estimator = HQS(PnP(load_kernel_denoiser("kernel").to(device)), ksize)
        else:  # at every step, not only where the noise is low
            start = delta_kernel(workload.batch, ksize).to(device)
            estimator = EdgeEM(start, sigma_on=math.inf)
    seeds = torch.arange(workload.batch, dtype=torch.int64, device=device)
    noise = PhiloxNoise(seeds, workload.particles, tuple(y.shape[1:]))
    guidance = {"mean": PosteriorMean(INFLATION), "pigdm": PiGDM(), "dps": DPS()}[workload.guidance]
    r2 = model.error_spectrum if workload.guidance == "pigdm" else default_r2
    execute = runtime.StepGraphs() if workload.graphs else Eager

    def run(steps: int) -> None:
        if workload.guidance == "mean":
            schedule, rule = Schedule.karras(steps, SIGMA_MAX, SIGMA_MIN), Renoise()
        else:
            schedule, rule = Schedule.linear().respace(steps), DDPM()
        with use_backend(workload.backend):
            sample(
                model, observation, estimator, guidance, schedule, noise=noise, rule=rule, r2=r2, execute=execute
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


# ------------------------------------------------------------------------------------------------ what the device can


@dataclass(frozen=True)
class Roofline:
    """Measured peaks of a device with the threads torch uses now."""

    copy_gb_s: float  # read and written bytes of a copy that fits in no cache
    tflop_s: dict[str, float]  # by dtype: the better of a matrix product and a 3x3 convolution

    def floor_seconds(self, flops: float, nbytes: float, dtype: str) -> float:
        """The time below which this device cannot do it: the longer of arithmetic and traffic."""
        peak = self.tflop_s.get(dtype) or max(self.tflop_s.values())
        return max(flops / (1e12 * peak), nbytes / (1e9 * self.copy_gb_s))


def measure_roofline(device: torch.device, *, quick: bool = False) -> Roofline:
    """Copies and multiplies on the device, a second or two. `quick` takes small tensors: for tests of the program."""
    cuda = device.type == "cuda"
    megabytes, side, pixels = (1024, 8192, 256) if cuda else (128, 1024, 96)
    if quick:
        megabytes, side, pixels = 8, 128, 16
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:  # not zeros: some hardware is faster on them
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    source = random(megabytes * 2**18, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best_seconds(partial(target.copy_, source), device) / 1e9
    peaks = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if cuda else (torch.float32,):
        a, b = random(side, side, dtype=dtype), random(side, side, dtype=dtype)
        product = 2 * side**3 / _best_seconds(lambda a=a, b=b: a @ b, device)
        x = random(8 if cuda else 1, 128, pixels, pixels, dtype=dtype).to(memory_format=torch.channels_last)
        w = random(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        seconds = _best_seconds(lambda x=x, w=w: nn.functional.conv2d(x, w, padding=1), device)
        convolution = 2 * x.numel() * 128 * 9 / seconds
        peaks[str(dtype).removeprefix("torch.")] = max(product, convolution) / 1e12
    return Roofline(copy, peaks)


def _best_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    now, times = _now(device), []
    for _ in range(repeats + 2):
        _synchronise(device)
        start = now()
        function()
        _synchronise(device)
        times.append(now() - start)
    return min(times[2:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------ stages by the clock


class StageClock:
    """A listener of `ranges` that keeps the times of every stage: wall and CPU seconds, on a GPU device seconds too."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._events: dict[str, list[tuple]] = defaultdict(list)

    @contextmanager
    def __call__(self, path: str) -> Iterator[None]:
        events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) if self._cuda else ()
        if events:
            events[0].record()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._host[path].append((time.perf_counter() - wall, time.process_time() - cpu))
            if events:
                events[1].record()
                self._events[path].append(events)

    def stages(self, steps: int) -> dict[str, dict[str, float]]:
        """Milliseconds per step of each stage: its median, times how often a step has it."""
        result = {}
        for path, times in self._host.items():
            often = 1e3 * len(times) / steps
            wall, cpu = (often * statistics.median(column) for column in zip(*times, strict=True))
            result[path] = {"wall_ms": wall, "cpu_ms": cpu}
            if self._cuda:
                seconds = [1e-3 * start.elapsed_time(end) for start, end in self._events[path]]
                result[path]["device_ms"] = often * statistics.median(seconds)
        return result


# ------------------------------------------------------------------------------------------------ bytes and FLOPs


@dataclass
class Cost:
    """Of one operation in one stage, summed over calls."""

    calls: int = 0
    flops: float = 0.0  # two per multiply-add of products, convolutions, attention, transforms; pointwise work is free
    nbytes: float = 0.0  # each operand once, as if caches held all of it within the operation and nothing between
    dtype: str = "float32"
    seconds: list[float] = field(default_factory=list)  # of each step, on the host


class CostCounter(TorchDispatchMode):
    """Calls, FLOPs, bytes and host time of everything dispatched within steps, by stage and operation.

    Use it as `with ranges.listening(counter.listener), counter:`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.costs: dict[tuple[str, str], Cost] = defaultdict(Cost)
        self._now, self._stage, self._steps = _now(device), "", 0

    @contextmanager
    def listener(self, path: str) -> Iterator[None]:
        before, self._stage = self._stage, path
        self._steps += path == ranges.STEP
        try:
            yield
        finally:
            self._stage = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = self._now()
        out = func(*args, **(kwargs or {}))
        seconds = self._now() - start
        name = func._schema.name
        if not self._stage:
            return out
        if not (func.is_view or name in _FREE):
            cost = self.costs[self._stage, name]
            operands = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            cost.calls += 1
            cost.seconds += [0.0] * (self._steps - len(cost.seconds))
            cost.seconds[-1] += seconds
            cost.flops += flops_of(func, args, kwargs or {}, out)
            cost.nbytes += sum(map(touched_bytes, operands.values()))
            dtypes = [t.dtype for t in operands.values() if t.dtype.is_floating_point]
            cost.dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else "float32"
        return out


_FREE = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view",
                                      "_reshape_alias", "resize_", "lift_fresh", "is_same_size")}  # fmt: skip


def touched_bytes(t: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: a broadcast dimension is there once."""
    distinct = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
    return distinct * t.element_size()


def flops_of(func, args: tuple, kwargs: dict, out: Any) -> float:
    """FLOPs of one call; 0 for what is bound by memory anyway."""
    known = flop_registry.get(func._overloadpacket)
    if known is not None:
        return known(*args, **kwargs, out_val=out)
    own = _FLOPS.get(func._schema.name)
    return 0.0 if own is None else float(own(args, out))


def _fft_flops(real: bool) -> Callable:
    def flops(args: tuple, out: Tensor) -> float:
        space = max(args[0], out, key=Tensor.numel) if real else args[0]
        side = [args[0].shape[d] if not real else max(args[0].shape[d], out.shape[d]) for d in args[1]]
        return (2.5 if real else 5) * space.numel() * math.log2(max(math.prod(side), 1))

    return flops


def _chain_flops(k: Tensor, weights: Iterable[Tensor]) -> float:
    return 2 * k.numel() * sum(w.numel() for w in weights)


def _support_flops(k: Tensor) -> float:
    return 2 * k.numel() * k.shape[-2] * k.shape[-1]


def _fused_conv_flops(args: tuple, out: Any) -> float:
    x, _, kind, n_out = args[:4]
    return 2 * x.numel() * n_out * (9, 1, 4, 1)[kind]  # 3x3; 2x2 of stride 2, at a quarter of the pixels; back; 1x1


_FLOPS: dict[str, Callable[[tuple, Any], float]] = {
    "aten::_fft_r2c": _fft_flops(real=True),
    "aten::_fft_c2r": _fft_flops(real=True),
    "aten::_fft_c2c": _fft_flops(real=False),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda a, _: sdpa_flop_count(
        a[0].shape, a[1].shape, a[2].shape
    ),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda a, _: (
        2.5 * sdpa_flop_count(a[1].shape, a[2].shape, a[3].shape)
    ),
    "fastem::fused_conv": _fused_conv_flops,
    "fastem::convolve_support": lambda a, _: _support_flops(a[1]),
    "fastem::simplex_least_squares": lambda a, _: a[3] * _support_flops(a[2]),
    "fastem::denoise_chain": lambda a, _: _chain_flops(a[0], a[2]),
    "fastem::hqs_chain": lambda a, _: a[7] * (_support_flops(a[2]) + _chain_flops(a[2], a[4])),
    "fastem::spectral_sums": lambda a, _: 12 * a[0].numel(),  # conj(X) Y and |X|^2, added up
    "fastem::wiener_guidance": lambda a, _: 16 * a[0].numel(),
    "fastem::psf_to_otf": lambda a, out: 5 * out.numel() * math.log2(2 * out.numel()),
}


# ------------------------------------------------------------------------------------------------ kernels


def kernel_times(events: Iterable, names: set[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """Device seconds (median over steps) and calls per step by stage and operation, from events of torch.profiler.

    Kernels count for the operation with one of `names` in which they were launched, the outermost; kernels launched
    in none (Triton) go by their own names.
    """
    events = [e for e in events if _is_host(e)]
    spans = _Spans(events)
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[0.0, 0] for _ in range(spans.steps)])
    for event in events:
        step, stage = spans.at(event.time_range.start)
        if not stage:
            continue
        op = _counted_ancestor(event, names)
        for kernel in event.kernels:
            row = found[stage, op.name if op else kernel.name][step]
            row[0] += 1e-6 * kernel.duration
            row[1] += 0 if op else 1
        if op is event:
            found[stage, op.name][step][1] += 1
    return {
        key: (statistics.median(seconds for seconds, _ in rows), sum(calls for _, calls in rows) / spans.steps)
        for key, rows in found.items()
    }


class _Spans:
    """The steps and stages of a profile on its time axis."""

    def __init__(self, events: Iterable) -> None:
        marks = [e for e in events if _is_stage(e.name)]
        self._spans = sorted((e.time_range.start, -e.time_range.end, e.name) for e in marks)
        self._starts = [start for start, _, _ in self._spans]
        self._step_starts = [start for start, _, name in self._spans if name == ranges.STEP]

    @property
    def steps(self) -> int:
        return len(self._step_starts)

    def at(self, when: float) -> tuple[int, str]:
        """Index of the step and path of the innermost stage open then, "" outside; in whatever thread it happened."""
        for i in range(bisect_right(self._starts, when) - 1, -1, -1):
            _, minus_end, name = self._spans[i]
            if when <= -minus_end:
                return bisect_right(self._step_starts, when) - 1, name
            if name == ranges.STEP:
                break
        return -1, ""


def _is_host(event) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def _is_stage(name: str) -> bool:
    return name == ranges.STEP or name.startswith(ranges.STEP + "/")


def _counted_ancestor(event, names: set[str]):
    """The outermost of the event and its callers that has one of the names."""
    found = None
    while event is not None:
        if event.name in names:
            found = event
        event = event.cpu_parent
    return found


def device_activity(events: Iterable, steps: int) -> dict[str, Any]:
    """What a GPU did during the steps: how much of the time it stood idle, waits per step, and its kernels by time."""
    events = list(events)
    busy, kernels = [], defaultdict(lambda: [0.0, 0])
    for event in events:
        if not _is_host(event) and not _is_stage(event.name):
            busy.append((event.time_range.start, event.time_range.end))
            kernels[event.name][0] += event.time_range.elapsed_us()
            kernels[event.name][1] += 1
    spans = _Spans(filter(_is_host, events))
    waits = sum(_is_host(e) and e.name in SYNCS and bool(spans.at(e.time_range.start)[1]) for e in events)
    return {
        "gpu_idle_percent": 100 * idle_fraction(busy) if busy else None,
        "syncs_per_step": waits / steps,
        "gpu_kernels": [
            {"name": name, "ms_per_step": 1e-3 * us / steps, "calls_per_step": calls / steps}
            for name, (us, calls) in sorted(kernels.items(), key=lambda item: -item[1][0])
        ],
    }


def idle_fraction(busy: list[tuple[float, float]]) -> float:
    """Part of the time from the first start to the last end in which none of the intervals is open."""
    covered, reached = 0.0, -math.inf
    for start, end in sorted(busy):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - min(start for start, _ in busy)
    return 1 - covered / whole if whole else 0.0


# ------------------------------------------------------------------------------------------------ the record


def profile(workload: Workload, *, trace: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Profiles a workload. See `docs/profiling.md` for what the figures mean.

    Args:
        workload: what is run.
        trace: where to put a Chrome trace of the profiled steps (chrome://tracing, ui.perfetto.dev).
        quick: small tensors for the roofline, which is then worth nothing: for tests.

    Returns:
        Plain JSON values: workload, environment, roofline, step, stages, ops, gpu_kernels; and where the workload asks
        for graphs the times of a step as a replay, in which there are no stages to tell apart.

    Raises:
        ValueError: for an option that cannot be.
    """
    device = runtime.resolve_device(workload.device)
    run, steps = prepare(replace(workload, graphs=False)), workload.steps
    _warm_up(run, device)
    roofline = measure_roofline(device, quick=quick)

    clock = StageClock(device)
    with ranges.listening(clock):
        run(steps)
    times = clock.stages(steps)
    peak = _peak_memory(device)

    counter = CostCounter(device)
    eager = run
    if workload.compile:  # compiled code hides its operations
        eager = prepare(replace(workload, compile=False, graphs=False))
    with ranges.listening(counter.listener), counter:
        eager(steps)

    cuda, activity = device.type == "cuda", {}
    kernels = {key: (_median_step(cost, steps), cost.calls / steps) for key, cost in counter.costs.items()}
    if cuda or trace is not None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        with ranges.listening(), torch.profiler.profile(activities=activities) as prof:
            run(steps)
        if trace is not None:
            _export(prof, trace)
        if cuda:
            kernels = kernel_times(prof.events(), {name for _, name in counter.costs})
            activity = device_activity(prof.events(), steps)
    host_reads = sum(c.calls for (_, name), c in counter.costs.items() if name == "aten::_local_scalar_dense")
    total, clock_name = times[ranges.STEP], _clock(device)
    return {
        "format": FORMAT,
        "workload": {**asdict(workload), "size": list(workload.size), "device": device.type},
        "environment": environment(device),
        "roofline": asdict(roofline),
        "clock": clock_name,
        "step": {
            **total,
            "steps_per_second": 1e3 / total["wall_ms"],
            "peak_memory_bytes": peak,
            "host_reads_per_step": host_reads / steps,
            "gpu_idle_percent": activity.get("gpu_idle_percent"),
            "syncs_per_step": activity.get("syncs_per_step"),
        },
        "graphs": _profile_graphs(workload, device) if workload.graphs else None,
        "stages": _stage_rows(times, clock_name, counter.costs, roofline, steps),
        "ops": _op_rows(kernels, counter.costs, roofline, steps),
        "gpu_kernels": activity.get("gpu_kernels", []),
    }


def _profile_graphs(workload: Workload, device: torch.device) -> dict[str, float | None]:
    """Times of a step as a replay, and on a GPU how idle that leaves it. Recording is part of the warm-up."""
    run, clock = prepare(workload), StageClock(device)
    _warm_up(run, device)
    with ranges.listening(clock):
        run(workload.steps)
    figures: dict[str, float | None] = dict(clock.stages(workload.steps)[ranges.STEP])
    figures |= {"gpu_idle_percent": None, "syncs_per_step": None}
    if device.type == "cuda":
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with ranges.listening(), torch.profiler.profile(activities=activities) as prof:
            run(workload.steps)
        activity = device_activity(prof.events(), workload.steps)
        figures |= {name: activity[name] for name in ("gpu_idle_percent", "syncs_per_step")}
    return figures


def run_only(workload: Workload) -> None:
    """The steps with their NVTX ranges, after a warm-up, and nothing else: what runs under Nsight Compute."""
    run = prepare(workload)
    _warm_up(run, runtime.resolve_device(workload.device))
    with ranges.listening():
        run(workload.steps)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the workload."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else env.cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": native.build_info(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32 if cuda else None,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32 if cuda else None,
        "cudnn_benchmark": torch.backends.cudnn.benchmark if cuda else None,
    }


def read_record(path: Path) -> dict[str, Any]:
    """What `fastem profile --json` wrote.

    Raises:
        ValueError: if there is no such file, or it is something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        record = None
    known = isinstance(record, dict) and record.get("format") == FORMAT
    if not (known and {"clock", "step", "stages"} <= record.keys()):
        raise ValueError(f"{path} is no record of this version; give a file that fastem profile --json wrote")
    return record


def compare(record: dict[str, Any], base: dict[str, Any]) -> list[dict[str, Any]]:
    """Milliseconds per step of each stage in the base and now, and base / now: above 1 is faster."""
    clock = record["clock"] if record["clock"] == base["clock"] else "wall_ms"
    now, then = ({row["stage"]: row[clock] for row in (r["step"] | {"stage": "step"}, *r["stages"])}
                 for r in (record, base))  # fmt: skip
    rows = []
    for name in [*then, *(name for name in now if name not in then)]:
        before, after = then.get(name), now.get(name)
        ratio = before / after if before and after else None
        rows.append({"stage": name, "clock": clock, "base_ms": before, "ms": after, "ratio": ratio})
    return rows


def ncu_command(stage: str, arguments: list[str], launches: int = 200) -> str:
    """The command line that has Nsight Compute look at the kernels of one stage of the same workload.

    Raises:
        ValueError: if there is no such stage.
    """
    if stage not in ranges.STAGES:
        raise ValueError(f"a stage is one of {', '.join(ranges.STAGES)}, got {stage!r}")
    return (
        f'ncu --nvtx --nvtx-include "{ranges.STEP}/{stage}/" --set full --clock-control none '
        f"--launch-count {launches} -o {stage} -f {Path(sys.executable).name} -m fastem profile --run-only "
        + " ".join(arguments)
    ).rstrip()


def _warm_up(run: Callable[[int], None], device: torch.device) -> None:
    run(2)
    if device.type == "cuda":
        run(2)  # plans and autotuning are done, memory is the allocator's
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: what torch allocated at most on a GPU; on the CPU the largest this process ever was."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _export(prof, path: Path) -> None:
    """The trace appears whole or not at all."""
    half = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        prof.export_chrome_trace(str(half))
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def _clock(device: torch.device) -> str:
    """Which time of a stage counts: of the device; of the process where one thread does all of it, since other programs
    cannot slow that; else wall time."""
    if device.type == "cuda":
        return "device_ms"
    return "cpu_ms" if torch.get_num_threads() == 1 else "wall_ms"


def _now(device: torch.device) -> Callable[[], float]:
    return time.process_time if _clock(device) == "cpu_ms" else time.perf_counter


def _efficiency(seconds: float, costs: list[Cost], roofline: Roofline) -> dict[str, float]:
    flops, nbytes = sum(c.flops for c in costs), sum(c.nbytes for c in costs)
    floor = sum(roofline.floor_seconds(c.flops, c.nbytes, c.dtype) for c in costs)
    speed = (nbytes / seconds / 1e9, flops / seconds / 1e12, 100 * floor / seconds) if seconds else (0.0, 0.0, 0.0)
    return {
        "flops": flops, "bytes": nbytes, "gb_s": speed[0], "tflop_s": speed[1], "roofline_percent": speed[2]
    }  # fmt: skip


def _stage_rows(times: dict, clock: str, costs: dict, roofline: Roofline, steps: int) -> list[dict]:
    rows = []
    for path, row in times.items():
        if path == ranges.STEP:
            continue
        spent = [_per_step(cost, steps) for (stage, _), cost in costs.items() if stage == path]
        share = 100 * row[clock] / times[ranges.STEP][clock]
        name = path.removeprefix(ranges.STEP + "/")
        efficiency = _efficiency(1e-3 * row[clock], spent, roofline)
        rows.append({"stage": name, **row, "step_percent": share, **efficiency})
    order = {name: i for i, name in enumerate(ranges.STAGES)}
    return sorted(rows, key=lambda row: order.get(row["stage"], len(order)))


def _op_rows(kernels: dict, costs: dict[tuple[str, str], Cost], roofline: Roofline, steps: int) -> list[dict]:
    rows = []
    for (stage, name), (seconds, calls) in kernels.items():
        cost = costs.get((stage, name))
        per_step = [_per_step(cost, steps)] if cost else []
        rows.append(
            {
                "stage": stage.removeprefix(ranges.STEP + "/"), "op": name, "ms": 1e3 * seconds,
                "calls": calls, **_efficiency(seconds, per_step, roofline),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: -row["ms"])


def _median_step(cost: Cost, steps: int) -> float:
    return statistics.median(cost.seconds + [0.0] * (steps - len(cost.seconds)))


def _per_step(cost: Cost, steps: int) -> Cost:
    return Cost(cost.calls, cost.flops / steps, cost.nbytes / steps, cost.dtype)
