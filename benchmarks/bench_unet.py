"""The bundled prior by fused native convolutions against eager torch: `python benchmarks/bench_unet.py`.

One process. Both see the same weights and image and the calls alternate, so that what else runs on the machine slows
both. Eager is measured plain and with channels-last weights and image; the ratio is to the faster one, of medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastem.models.fused import FusedNaturalPrior
from fastem.models.natural import NaturalPrior
from fastem.ops import native


def networks() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The same random weights three times; those that start at zero get a little noise."""
    torch.manual_seed(0)
    net = NaturalPrior().requires_grad_(False).eval()
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    return {
        "eager": net,
        "eager, channels last": lambda x, sigma: last(x.contiguous(memory_format=torch.channels_last), sigma),
        "fused": FusedNaturalPrior(net),
    }


def forward(net: Callable, x: Tensor, sigma: Tensor, v: Tensor) -> None:
    with torch.no_grad():
        net(x, sigma)


def forward_and_vjp(net: Callable, x: Tensor, sigma: Tensor, v: Tensor) -> None:
    x = x.detach().requires_grad_()
    torch.autograd.grad(net(x, sigma), x, v)


TASKS = {"forward": forward, "forward + VJP": forward_and_vjp}


def problem(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    x, v = torch.randn(2, batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x, torch.full((batch,), 0.5), v


def alternate(
    functions: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every call, one call of each per round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if round_:
                times[name].append(clock() - start)
    return times


def pytest_generate_tests(metafunc) -> None:
    if "task" in metafunc.fixturenames:
        metafunc.parametrize("name", ["eager", "eager, channels last", "fused"])
        metafunc.parametrize("task", list(TASKS))


def test_unet(benchmark, task: str, name: str) -> None:
    """For pytest-benchmark: `pytest benchmarks/bench_unet.py --benchmark-group-by=group`."""
    benchmark.group = f"unet, {task}"
    benchmark(TASKS[task], networks()[name], *problem(1, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of the process: for a machine that is shared"
    )
    args = parser.parse_args()

    clock = time.process_time if args.cpu_time else time.perf_counter
    shape = f"{args.batch} x 3 x {args.size} x {args.size}"
    print(f"{shape}, float32, {'CPU' if args.cpu_time else 'wall'} ms: median (fastest)")
    print(f"torch {torch.__version__}; {native.build_info()}")
    inputs, nets = problem(args.batch, args.size), networks()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for task, function in TASKS.items():
            calls = {name: lambda net=net, function=function: function(net, *inputs) for name, net in nets.items()}
            times = alternate(calls, args.rounds, clock)
            medians = {name: statistics.median(values) for name, values in times.items()}
            shown = "  ".join(f"{name} {1e3 * medians[name]:.0f} ({1e3 * min(times[name]):.0f})" for name in nets)
            best = min(medians[name] for name in nets if name != "fused")
            print(f"{threads} threads, {task}: {shown}  ratio {best / medians['fused']:.2f}", flush=True)


if __name__ == "__main__":
    main()
