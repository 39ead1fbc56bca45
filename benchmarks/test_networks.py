"""Blocks and networks, steps and whole restorations."""

from __future__ import annotations

import torch
from test_kernels import randn

from fastem import profiling
from fastem.models.unet import ResBlock, UNetConfig
from fastem.profiling import Workload

DTYPES = {"cpu": ["float32"], "cuda": ["float32", "float16"]}


def pytest_generate_tests(metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        name = metafunc.config.getoption("--device")
        cuda = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
        metafunc.parametrize("dtype", DTYPES["cuda" if cuda else "cpu"])
        if "engine" in metafunc.fixturenames:  # compiling takes minutes: on a GPU only
            metafunc.parametrize("engine", ["fastem", "compiled"] if cuda else ["fastem"])
    if "task" in metafunc.fixturenames:
        metafunc.parametrize("task", ["forward", "forward + VJP"])


def run(net, task: str):
    """`call(x, v)` for a network of x alone."""

    def forward(x, v):
        return net(x)

    def forward_and_vjp(x, v):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(net(x), x, v)

    return forward if task == "forward" else forward_and_vjp


def test_resblock(bench, B, task, dtype):
    """The residual block of the widest level, which is most of the FLOPs of the network."""
    size, width = bench.sizes["net_size"], 128
    torch.manual_seed(0)
    block = ResBlock(width, width, UNetConfig(widths=(width,), base=width)).requires_grad_(False)
    torch.nn.init.normal_(block.out_layers[3].weight, std=0.02)
    for module in block.modules():
        if isinstance(module, torch.nn.Conv2d):  # norms stay in float32
            module.to(getattr(torch, dtype))
    block, emb = block.to(bench.device, memory_format=torch.channels_last), randn(bench, B, 4 * width)
    x, v = (randn(bench, B, width, size, size).to(getattr(torch, dtype), memory_format=torch.channels_last)
            for _ in range(2))  # fmt: skip
    bench("resblock", run(lambda x: block(x, emb), task), (x, v), rotate=False, B=B, size=size, task=task,
          dtype=dtype)  # fmt: skip


def test_unet(bench, B, task, dtype, engine):
    """The network of the step, random weights: as fastem runs it, and plain torch by torch.compile."""
    size, name, cuda = bench.sizes["net_size"], bench.sizes["net"], bench.device.type == "cuda"
    workload = Workload(prior=name, dtype=dtype, channels_last=cuda, compile=engine == "compiled")
    model = profiling.load_prior(workload, bench.device)
    x, v = randn(bench, B, 3, size, size), randn(bench, B, 3, size, size)
    bench("unet", run(lambda x: model(x, 500.0), task), (x, v), rotate=False, count=engine != "compiled", B=B,
          size=size, task=task, dtype=dtype, net=name, engine=engine)  # fmt: skip


def test_step(bench, n, dtype, engine):
    """Steps of Fast EM PiGDM as the loop runs them, and with the network by torch.compile; the figures are for all."""
    sizes, steps, cuda = bench.sizes, min(bench.sizes["steps"], 5), bench.device.type == "cuda"
    call = profiling.prepare(Workload(
        size=(sizes["net_size"],) * 2, particles=n, kernel_size=sizes["kernel"], guidance="pigdm", prior=sizes["net"],
        device=str(bench.device), dtype=dtype, channels_last=cuda, compile=engine == "compiled",
        graphs=cuda and engine == "fastem",
    ))  # fmt: skip
    bench("step", lambda: call(steps), rounds=7, count=not cuda, steps=steps, n=n, size=sizes["net_size"],
          dtype=dtype, net=sizes["net"], engine=engine)  # fmt: skip


def test_e2e(bench, B, dtype):
    """All steps of Fast EM PiGDM for a batch of images, one particle each."""
    sizes, cuda = bench.sizes, bench.device.type == "cuda"
    call = profiling.prepare(Workload(
        size=(sizes["net_size"],) * 2, batch=B, kernel_size=sizes["kernel"], guidance="pigdm", prior=sizes["net"],
        device=str(bench.device), dtype=dtype, channels_last=cuda, graphs=cuda,
    ))  # fmt: skip
    bench("e2e", lambda: call(sizes["steps"]), rounds=3, count=not cuda, steps=sizes["steps"], B=B,
          size=sizes["net_size"], dtype=dtype, net=sizes["net"])  # fmt: skip
