"""Options and fixtures of the pytest-benchmark groups: device, sizes, measured roofline, one way to time a call.

    pytest benchmarks --benchmark-only --device cpu --scale small --benchmark-json benchmarks/results/cpu-groups.json
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from fastem import profiling, ranges, runtime
from fastem.ops import native, use_backend

SCALES = {  # of the images and networks: for a smoke test, for a CPU, for a GPU
    "ci": {
        "size": 32, "kernel": 9, "particles": [1], "net": "small-random", "net_size": 32, "batches": [1], "steps": 2,
    },
    "small": {
        "size": 256, "kernel": 33, "particles": [1, 16], "net": "small-random", "net_size": 64, "batches": [1],
        "steps": 5,
    },
    "full": {
        "size": 256, "kernel": 33, "particles": [1, 4, 16], "net": "ffhq-random", "net_size": 256,
        "batches": [1, 4, 16], "steps": 100,
    },
}  # fmt: skip
ROTATED_BYTES = 160e6  # inputs of a GPU kernel rotate over this much, more than twice its L2 cache


def pytest_addoption(parser) -> None:
    group = parser.getgroup("fastem")
    group.addoption("--device", default="auto", help="auto, cpu, cuda")
    group.addoption("--scale", default="small", choices=list(SCALES), help="sizes: ci, small (CPU), full (GPU)")


@dataclass
class Bench:
    """What a benchmark needs to know of where it runs, and how it is timed."""

    device: torch.device
    sizes: dict
    roofline: profiling.Roofline
    fixture: object  # of pytest-benchmark
    quick: bool

    def __call__(
        self, group: str, call: Callable[..., object], inputs: Sequence[torch.Tensor] = (), *, rounds: int = 20,
        rotate: bool = True, count: bool = True, **facts,
    ) -> None:  # fmt: skip
        """Times `call(*inputs)`; bytes, FLOPs and the floor that follows from them go into the record.

        `rotate`: on a GPU every call of a round has inputs of its own, so that they are not in the cache. `count=False`
        for what a counter of operations would disturb: the floor is then 0.
        """
        counter = profiling.CostCounter(self.device)
        if count:
            with ranges.listening(counter.listener), counter, ranges.stage(ranges.STEP):
                call(*inputs)
        costs = list(counter.costs.values())
        floor = sum(self.roofline.floor_seconds(c.flops, c.nbytes, c.dtype) for c in costs)
        cuda = self.device.type == "cuda"
        size = sum(t.nbytes for t in inputs) or 1
        copies = max(3, min(64, int(ROTATED_BYTES / size))) if cuda and inputs and rotate else 1
        sets = [inputs, *(tuple(t.clone() for t in inputs) for _ in range(copies - 1))]

        def once() -> None:
            for given in sets:
                call(*given)
            if cuda:
                torch.cuda.synchronize(self.device)

        self.fixture.group = group
        self.fixture.extra_info.update(
            calls_per_round=len(sets), flops=sum(c.flops for c in costs), bytes=sum(c.nbytes for c in costs),
            floor_us=1e6 * floor, device=self.device.type, **facts,
        )  # fmt: skip
        rounds = 1 if self.quick else rounds if cuda else min(rounds, 5)
        self.fixture.pedantic(once, rounds=rounds, warmup_rounds=1)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    torch.set_num_threads(1)  # on the CPU: `make bench` times in CPU seconds, which are of all threads together
    return runtime.resolve_device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def roofline(request, device) -> profiling.Roofline:
    return profiling.measure_roofline(device, quick=request.config.getoption("--scale") == "ci")


@pytest.fixture
def bench(request, device, roofline, benchmark):
    name = request.config.getoption("--scale")
    with torch.no_grad():
        yield Bench(device, SCALES[name], roofline, benchmark, name == "ci")


@pytest.fixture
def backend(request, device):
    """The backend a benchmark is parametrised with, forced; what cannot run is skipped."""
    if request.param == "native" and not native.available():
        pytest.skip(native.why_not())
    if request.param == "native" and device.type == "cuda" and not native.has_cuda():
        pytest.skip("the extension was built without CUDA")
    with use_backend(request.param):
        yield request.param


def pytest_generate_tests(metafunc) -> None:
    sizes = SCALES[metafunc.config.getoption("--scale")]
    for name, values in (("n", sizes["particles"]), ("B", sizes["batches"])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", "native"], indirect=True)


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    where = runtime.resolve_device(config.getoption("--device"))
    output_json.update(machine_info={}, commit_info={})  # names of hosts and branches; ours says what matters
    output_json["fastem"] = {"kind": "groups", "device": where.type, "scale": config.getoption("--scale"),
                             "environment": profiling.environment(where)}  # fmt: skip
