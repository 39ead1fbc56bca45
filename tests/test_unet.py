"""The ADM U-Net: published numbers, published state dicts, dtypes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastem.models import UNet, UNetConfig, unet_from_state_dict
from fastem.models.unet import timestep_embedding

DATA = Path(__file__).parent / "data"
CASES = {  # what a state dict does not tell
    "c0": dict(num_head_channels=16),
    "c1": dict(num_heads=2, num_head_channels=-1),
    "c2": dict(num_heads=2, new_attention_order=True),
    "c3": dict(num_head_channels=16),
}
PUBLISHED = {  # widths, blocks, attention levels, in and out channels, parameters
    "ffhq": ((128, 128, 256, 256, 512, 512), 1, (4,), 3, 6, 93_563_910),
    "imagenet": ((256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5), 3, 6, 552_814_086),
    "kernel": ((64, 128, 192, 256), 1, (2,), 1, 2, 17_057_474),
    "tilt": ((64, 64, 128, 128, 256, 256), 1, (4,), 2, 4, 23_416_644),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "unet_forward.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def weights(golden, case):
    prefix = f"{case}/sd/"
    return {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}


def relative_error(actual, expected):
    return ((actual.detach() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient_match_released_program(golden, case):
    net = unet_from_state_dict(weights(golden, case), **CASES[case])
    x = golden[f"{case}/x"].requires_grad_()
    output = net(x, golden[f"{case}/timesteps"])
    (grad_x,) = torch.autograd.grad(output, x, golden[f"{case}/cotangent"])  # although the weights are frozen
    assert relative_error(output, golden[f"{case}/output"]) < 1e-5
    assert relative_error(grad_x, golden[f"{case}/grad_x"]) < 1e-5


@pytest.mark.parametrize("wrong", [dict(num_heads=4), dict(num_heads=2)], ids=["heads", "attention-order"])
def test_parity_notices_what_state_dicts_do_not_tell(golden, wrong):
    net = unet_from_state_dict(weights(golden, "c2"), **wrong)
    assert relative_error(net(golden["c2/x"], golden["c2/timesteps"]), golden["c2/output"]) > 1e-3


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding(golden, dim):
    embedding = timestep_embedding(golden["timestep_embedding/t"].float(), dim)
    assert relative_error(embedding, golden[f"timestep_embedding/dim{dim}"]) < 1e-6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_read_off_their_keys(name):
    with gzip.open(DATA / "checkpoint_keys.json.gz") as file:
        shapes = {key: tuple(shape) for key, shape in json.load(file)[name].items()}
    config = UNetConfig.from_state_dict({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    with torch.device("meta"):
        net = UNet(config)
    assert {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()} == shapes
    parameters = sum(parameter.numel() for parameter in net.parameters())
    channels = config.in_channels, config.out_channels
    assert (config.widths, config.num_blocks, config.attention_levels, *channels, parameters) == PUBLISHED[name]
    assert config.scale_shift and config.resblock_updown and config.num_head_channels == 64
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("resblock_updown", [True, False], ids=["resblock", "conv"])
@pytest.mark.parametrize("scale_shift", [True, False], ids=["scale-shift", "add"])
@pytest.mark.parametrize("widths, blocks, levels", [((32,), 1, ()), ((32, 64), 2, (0,)), ((32, 32, 64), 1, (1, 2))])
def test_any_architecture_round_trips_through_its_state_dict(widths, blocks, levels, scale_shift, resblock_updown):
    config = UNetConfig(
        widths, 32, 2, 5, blocks, levels, scale_shift, resblock_updown, num_heads=2, num_head_channels=None
    )
    if len(widths) == 1:  # without a change of resolution its kind does not show, nor matter
        config = UNetConfig(**{**config.to_dict(), "resblock_updown": True})
    net = UNet(config)
    for parameter in net.parameters():  # the last layers start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    net.requires_grad_(False)  # as loaded networks are: the same kernels run
    again = unet_from_state_dict(net.state_dict(), num_heads=2)
    assert again.config == config
    x = torch.randn(1, 2, 8, 12)
    assert net(x, 3).std() > 0 and torch.equal(net(x, 3), again(x, 3))


def test_time_may_be_a_number_a_batch_or_a_fraction(golden):
    net = unet_from_state_dict(weights(golden, "c0"), **CASES["c0"])
    x = golden["c0/x"]
    assert torch.equal(net(x, 7), net(x, torch.tensor([7, 7])))
    assert torch.equal(net(x, 7), net(x, torch.tensor(7.0)))
    between = net(x, 7.5)
    distance = relative_error(net(x, 8), net(x, 7))
    assert 0 < relative_error(between, net(x, 7)) < distance
    with pytest.raises(ValueError, match="one per image"):
        net(x, torch.tensor([1, 2, 3]))


def test_size_must_fit_the_stride(golden):
    net = unet_from_state_dict(weights(golden, "c0"), **CASES["c0"])
    with pytest.raises(ValueError, match="multiples of 2"):
        net(torch.zeros(1, 3, 15, 16), 0)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)], ids=str)
def test_16_bit_torso(golden, dtype, bound):
    net = unet_from_state_dict(weights(golden, "c0"), **CASES["c0"])
    x, t = golden["c0/x"], golden["c0/timesteps"]
    exact = net(x, t)
    output = net.set_torso_dtype(dtype)(x, t)
    assert output.dtype == torch.float32
    assert 0 < relative_error(output, exact) < bound
    for name in ("out.2.weight", "time_embed.0.weight", "middle_block.1.norm.weight"):
        assert net.state_dict()[name].dtype == torch.float32


def test_float64(golden):
    net = unet_from_state_dict(weights(golden, "c1"), **CASES["c1"])
    x, t = golden["c1/x"], golden["c1/timesteps"]
    assert relative_error(net.double()(x.double(), t), golden["c1/output"]) < 1e-5


def test_heads_must_be_told_where_64_does_not_divide(golden):
    with pytest.raises(ValueError, match="pass num_heads or num_head_channels"):
        unet_from_state_dict(weights(golden, "c0"))
    with pytest.raises(ValueError, match="does not divide into heads"):
        unet_from_state_dict(weights(golden, "c0"), num_heads=5)
