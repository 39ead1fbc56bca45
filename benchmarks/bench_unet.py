"""A network as fastem runs it against eager torch: `python benchmarks/bench_unet.py [--net small-random --size 64]`.

One process. Both see the same weights and image and the calls alternate, so that what else runs on the machine slows
both. Eager is measured plain and with channels-last weights and image; the ratio is to the faster one, of medians.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import harness
import torch
from torch import Tensor, nn

from fastem import profiling
from fastem.models.fused import FusedNaturalPrior
from fastem.models.natural import NaturalPrior
from fastem.ops import native, use_backend

Net = Callable[[Tensor, Tensor], Tensor]


def natural() -> dict[str, Net]:
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
        "fastem": FusedNaturalPrior(net),
    }


def adm(name: str) -> dict[str, Net]:
    """A U-Net of guided diffusion with random weights: plain torch, and what the default backend makes of it."""
    net = profiling.random_unet(profiling.RANDOM[name])
    ours = copy.deepcopy(net)
    ours.prepare([500.0])  # as before every run
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)

    def plain(net: nn.Module) -> Net:
        def run(x: Tensor, sigma: Tensor) -> Tensor:
            with use_backend("reference"):
                return net(x, 500.0)[:, :3]

        return run

    return {
        "eager": plain(net),
        "eager, channels last": lambda x, _: plain(last)(x.contiguous(memory_format=torch.channels_last), _),
        "fastem": lambda x, _: ours(x, 500.0)[:, :3],
    }


def networks(name: str) -> dict[str, Net]:
    return natural() if name == "natural" else adm(name)


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--net", default="natural", choices=["natural", *profiling.RANDOM])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of the process: for a machine that is shared"
    )
    args = parser.parse_args(arguments)

    clock = harness.clock_of(torch.device("cpu"), args.cpu_time)
    shape = f"{args.net}, {args.batch} x 3 x {args.size} x {args.size}"
    print(f"{shape}, float32, {'CPU' if args.cpu_time else 'wall'} ms: median (fastest)")
    print(f"torch {torch.__version__}; {native.build_info()}")
    inputs, nets, rows = problem(args.batch, args.size), networks(args.net), []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for task, function in TASKS.items():
            calls = {name: partial(function, net, *inputs) for name, net in nets.items()}
            times = harness.alternate(calls, args.rounds, clock)
            best = min((name for name in nets if name != "fastem"), key=lambda name: statistics.median(times[name]))
            row = {"net": args.net, "size": args.size, "batch": args.batch, "threads": threads, "task": task}
            row |= harness.summary(times, best, "fastem")
            rows.append(row)
            shown = "  ".join(f"{name} {row['median_ms'][name]:.0f} ({row['fastest_ms'][name]:.0f})" for name in nets)
            print(f"{threads} threads, {task}: {shown}  ratio {row['ratio']:.2f}", flush=True)
    if args.json:
        harness.write(args.json, "unet", rows, clock="CPU" if args.cpu_time else "wall")


if __name__ == "__main__":
    main()
