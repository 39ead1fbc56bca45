"""Networks as they run: sub-pixel up-sampling, tables of scales and shifts, bodies of 16 bits and their gradients."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastem import runtime
from fastem.engine import Deblurrer
from fastem.metrics import psnr
from fastem.models import NaturalConfig, NaturalPrior, UNet, UNetConfig, UNetEps, load_model
from fastem.models.eps import DenoiserEps, power_of_two
from fastem.models.unet import sub_pixel_weight
from fastem.synth import degrade, motion_kernel

TIMES = [0.0, 3.25, 500.0, 999.0]


def unet_model(dtype=torch.float64) -> UNetEps:
    torch.manual_seed(0)
    config = UNetConfig(widths=(32, 32, 64), base=32, attention_levels=(2,), num_head_channels=32)
    net = UNet(config)
    for parameter in net.parameters():  # the layers that start at zero would hide the rest
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, a=1)
    return UNetEps(net.requires_grad_(False)).to(dtype)


def natural_model() -> DenoiserEps:
    torch.manual_seed(0)
    net = NaturalPrior(NaturalConfig(widths=(16, 16), num_blocks=1, embedding=16))
    for parameter in net.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, a=1)
    return DenoiserEps(net.requires_grad_(False))


def vjp(model, x, t, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x, t), x, v)[0]


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# ----------------------------------------------------------------------------------------- the same operations


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 4)], ids=str)
def test_up_sampling_merges_into_the_convolution(size):
    w, x = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, *size, dtype=torch.float64)
    v = torch.randn(2, 3, 2 * size[0], 2 * size[1], dtype=torch.float64)

    def plain(x, _):
        return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), w, padding=1)

    weight = sub_pixel_weight(w)

    def merged(x, _, weight=weight):
        return F.conv_transpose2d(x, weight, stride=2, padding=1)

    assert relative_error(merged(x, 0), plain(x, 0)) < 1e-15
    assert relative_error(vjp(merged, x, 0, v), vjp(plain, x, 0, v)) < 1e-15
    turned = sub_pixel_weight(w.flip(2, 3))  # negative control
    assert relative_error(merged(x, 0, turned), plain(x, 0)) > 0.1


@pytest.mark.parametrize("on_device", [False, True], ids=["number", "0-dim tensor"])
def test_a_prepared_network_is_the_same(on_device):
    model, x = unet_model(), torch.randn(2, 3, 8, 16, dtype=torch.float64)
    v = torch.randn_like(x)
    expected = [(model(x, t), vjp(model, x, t, v)) for t in TIMES]
    program = model.program()
    model.prepare(TIMES[::-1])
    assert any(block.up_weight is not None for block in model.net._blocks()) and model.program() != program
    for t, (eps, grad) in zip(TIMES, expected, strict=True):
        t = torch.tensor(t, dtype=torch.float64) if on_device else t
        assert relative_error(model(x, t), eps) < 1e-12 and relative_error(vjp(model, x, t, v), grad) < 1e-12


def test_times_that_were_not_prepared():
    model, x = unet_model(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    expected = model(x, 7.5)
    model.prepare(TIMES)
    assert relative_error(model(x, 7.5), expected) < 1e-12  # computed
    assert relative_error(model(x, torch.tensor([7.5])), expected) < 1e-12
    assert model(x, torch.tensor(7.5)).isnan().all()  # nobody can look, and nothing wrong may pass


def test_prepared_tables_follow_schedule_and_weights():
    model, x = unet_model(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    model.prepare(TIMES)
    first = model.program()
    model.prepare([1.0, 2.0])
    assert model.program() != first
    model.prepare(TIMES)
    assert model.program() == first  # kept: what was recorded with it still holds
    for block in model.net._blocks():
        block.in_layers[2].weight.mul_(1.5)
        block.emb_layers[1].weight.mul_(1.5)
    model.prepare(TIMES)
    plain = copy.deepcopy(model).to(torch.float64)  # a move forgets what was prepared
    assert plain.net.prepared is None
    assert relative_error(model(x, 500.0), plain(x, 500.0)) < 1e-12


def test_variances_are_not_computed():
    net = UNet(UNetConfig(widths=(32,), base=32, num_head_channels=32)).requires_grad_(False)
    x = torch.randn(1, 3, 8, 8)
    torch.nn.init.normal_(net.out[2].weight)
    both = net(x, 5.0)
    assert both.shape[1] == 6
    assert relative_error(UNetEps(net)(x, 5.0), both[:, :3]) < 1e-5 and net(x, 5.0).shape[1] == 3


# --------------------------------------------------------------------------------------------------- 16 bits


def test_power_of_two():
    largest = torch.tensor([1.0, 1.99, 2.0, 3e-30, 5e20, 0.0, math.inf, math.nan, 1e-42])
    grad = largest.view(-1, 1, 1, 1) * torch.tensor([0.25, -1.0]).view(1, 1, 1, 2)
    scale = power_of_two(grad).flatten()
    assert torch.equal(scale.log2(), scale.log2().round())
    scaled = (largest * scale)[:5]
    assert (scaled >= 1).all() and (scaled < 2).all()
    assert (scale[5:] == 1).all()


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("make", [lambda: unet_model(torch.float32), natural_model], ids=["unet", "natural"])
def test_gradients_of_16_bits(make, dtype, tolerance, size):
    """Whatever the length of the cotangent, and of each image by itself."""
    model, t = make(), 300.0
    x = torch.randn(2, 3, 8, 16)
    v = size * torch.randn_like(x) * torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1)
    eps, grad = model(x, t), vjp(model, x, t, v)
    model.set_precision(dtype)
    assert relative_error(model(x, t), eps) < tolerance
    for actual, expected in zip(vjp(model, x, t, v), grad, strict=True):
        assert relative_error(actual, expected) < tolerance


def test_without_the_scale_float16_loses_the_gradient():
    model, x = unet_model(torch.float32), torch.randn(1, 3, 8, 16)
    v = 1e-9 * torch.randn_like(x)
    expected = vjp(model, x, 300.0, v)
    model.set_precision(torch.float16)
    assert relative_error(vjp(model.net, x, 300.0, v), expected) > 0.5


def test_precision_of_the_engine(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert runtime.resolve_precision("auto", cpu) == torch.float32
    assert runtime.resolve_precision("auto", gpu) == torch.float16
    assert runtime.resolve_precision("bf16", gpu) == torch.bfloat16
    with pytest.raises(ValueError, match="unknown precision 'int8'; allowed are auto, fp32, fp16, bf16"):
        runtime.resolve_precision("int8", gpu)
    monkeypatch.setattr("fastem.runtime.placement.has_native", lambda dtype: False)
    with pytest.raises(ValueError, match="this CPU does not compute in bf16; use precision fp32, or a GPU"):
        Deblurrer(natural_model(), device="cpu", precision="bf16")
    assert Deblurrer(natural_model(), device="cpu").config["precision"] == "fp32"


def test_restorations_of_16_bits_are_as_good(monkeypatch):
    """PSNR within 0.05 dB of float32; the network that was handed in keeps its bits."""
    monkeypatch.setattr("fastem.runtime.placement.has_native", lambda dtype: True)
    rng, k = np.random.default_rng(0), motion_kernel(5, 1)
    x = np.kron(rng.uniform(0.1, 0.9, (5, 6, 3)), np.ones((8, 8, 1))).astype(np.float32)
    y, model = degrade(x, k, 0.01, 0), load_model("natural")
    before = model.denoiser.prior.conv_in.weight
    found = {}
    for precision in ("fp32", "fp16", "bf16"):
        engine = Deblurrer(model, kernel_size=5, steps=6, boundary="circular", device="cpu", precision=precision)
        found[precision] = psnr(engine(y, sigma=0.01, kernel=k).image, x)
    assert found["fp32"] > psnr(y, x) + 3
    assert abs(found["fp16"] - found["fp32"]) < 0.05 and abs(found["bf16"] - found["fp32"]) < 0.05
    assert model.denoiser.prior.conv_in.weight is before and before.dtype == torch.float32
