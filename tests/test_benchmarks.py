"""The programs in benchmarks/: the cost model against what torch dispatches, and every script at a tiny size."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastem import ops, profiling
from fastem.models import NaturalConfig, NaturalPrior, UNet, UNetConfig, load_kernel_denoiser

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def one_thread():
    """Scripts set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script(name: str):
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------ the cost model


def dispatched(make, height: int, width: int, *, vjp: bool) -> int:
    """FLOPs that torch counts for one image; on the meta device nothing is computed."""
    with torch.device("meta"):
        net = make().requires_grad_(False)
        x, t = torch.empty(1, 3, height, width, requires_grad=vjp), torch.empty(1)
    with FlopCounterMode(display=False) as mode, torch.set_grad_enabled(vjp):
        y = net(x.clone(), t)
        if vjp:
            y.backward(torch.empty_like(y))
    return mode.get_total_flops()


def test_the_ffhq_network_costs_what_was_counted():
    cost = script("cost_model").unet(profiling.RANDOM["ffhq-random"], 256, 256)
    assert round(cost.forward / 1e9, 2) == 387.93
    assert round(cost.forward_and_vjp / 1e9, 2) == 776.26
    for vjp, flops in ((False, cost.forward), (True, cost.forward_and_vjp)):
        assert dispatched(lambda: UNet(profiling.RANDOM["ffhq-random"]), 256, 256, vjp=vjp) == flops


@pytest.mark.parametrize(
    "config",
    [
        profiling.RANDOM["small-random"],
        UNetConfig(widths=(32, 32, 64), base=32, num_blocks=2, attention_levels=(1, 2), num_head_channels=32),
        UNetConfig(widths=(32, 64), base=16, out_channels=3, scale_shift=False, resblock_updown=False, num_heads=2),
    ],
    ids=["small", "two blocks, attention twice", "plain convolutions change the resolution"],
)
def test_networks_of_any_configuration(config):
    cost = script("cost_model").unet(config, 32, 64)
    assert dispatched(lambda: UNet(config), 32, 64, vjp=False) == cost.forward
    if config.resblock_updown:
        assert dispatched(lambda: UNet(config), 32, 64, vjp=True) == cost.forward_and_vjp


@pytest.mark.parametrize(
    "config", [NaturalConfig(), NaturalConfig(widths=(8, 16), num_blocks=1)], ids=["bundled", "small"]
)
def test_the_natural_prior(config):
    cost = script("cost_model").natural(config, 64, 32)
    assert dispatched(lambda: NaturalPrior(config), 64, 32, vjp=False) == cost.forward
    assert dispatched(lambda: NaturalPrior(config), 64, 32, vjp=True) == cost.forward_and_vjp


@pytest.mark.parametrize("kernel", [9, 12])
def test_the_loop_of_the_m_step(kernel):
    chain = load_kernel_denoiser("kernel").as_chain()
    k, g = torch.rand(1, 1, kernel, kernel), torch.rand(1, 1, 2 * kernel - 1, 2 * kernel - 1)
    with ops.use_backend("reference"), FlopCounterMode(display=False) as mode, torch.no_grad():
        ops.hqs_chain(k, g, k, torch.tensor([0.01]), *chain, 3)
    assert mode.get_total_flops() == script("cost_model").mstep_chain(kernel, num_iters=3)
    assert round(script("cost_model").mstep_chain(33) / 1e9, 3) == 0.645


def test_a_wrong_configuration_is_noticed():
    config = UNetConfig(widths=(32, 64), base=32, num_head_channels=32)
    wrong = script("cost_model").unet(UNetConfig(widths=(32, 96), base=32, num_head_channels=32), 32, 32)
    assert dispatched(lambda: UNet(config), 32, 32, vjp=False) != wrong.forward
