"""The frozen blocks of the U-Net against the plain ones in double precision: values, gradients, bits, memory."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastem.models import UNet, UNetConfig
from fastem.models.frozen import Conv, Engine, fused_block
from fastem.models.unet import ResBlock, _double, _halve, _same
from fastem.ops import Backend, native, reference, use_backend

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

SMALL = dict(widths=(32, 64, 64), base=32, attention_levels=(2,), num_head_channels=32)
CONFIGS = {
    "small": SMALL,
    "added": dict(SMALL, scale_shift=False, num_blocks=2, attention_levels=()),
    "convs": dict(SMALL, resblock_updown=False, out_channels=3),
}


def network(**config) -> UNet:
    """Random weights, also where training starts at zero: every path carries signal."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**config))
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return net.requires_grad_(False).eval()


def problem(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    x, v = torch.randn(2, n, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    return x, v


def value_and_pull_back(net: nn.Module, x: Tensor, v: Tensor, t: float = 300.0) -> tuple[Tensor, Tensor]:
    """Frozen blocks of every size: by itself torch keeps the small ones."""
    with use_backend(Backend.NATIVE):
        return _value_and_pull_back(net, x, v, t)


def _value_and_pull_back(net: nn.Module, x: Tensor, v: Tensor, t: float = 300.0) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    eps = net(x, t)[:, :3]
    (pulled,) = torch.autograd.grad(eps, x, v)
    return eps.detach(), pulled


def plain(net: nn.Module, *args) -> tuple[Tensor, Tensor]:
    with use_backend(Backend.REFERENCE):
        return _value_and_pull_back(net, *args)


def errors(actual, expected) -> list[float]:
    """Relative, in the mean square."""
    return [float((a.double() - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True)]


def allowed_errors(run, net: nn.Module, inputs, truth) -> list[float]:
    """Twice those of plain torch in float32, in its default layout (the more exact one); 2.5 times without FMA."""
    bound = 2.5 if "generic" in native.build_info() else 2
    return [bound * error for error in errors(run(net, *inputs), truth)]


@pytest.fixture(params=["native", "torch"])
def convolutions(request, monkeypatch):
    """Both ways to run the 3x3 convolutions: on a GPU, and where Winograd does not pay, those of torch."""
    if request.param == "torch":
        monkeypatch.setattr(Conv, "pays", lambda *_: False)
    return request.param


@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("n, height, width", [(1, 64, 64), (2, 20, 36)])
def test_matches_the_plain_network_in_double(convolutions, config, n, height, width, prepared):
    """At most twice the error of the plain network in float32."""
    net, inputs = network(**CONFIGS[config]), problem(n, height, width)
    truth = plain(copy.deepcopy(net).double(), *(t.double() for t in inputs))
    allowed = allowed_errors(plain, net, inputs, truth)
    if prepared:
        net.prepare([300.0])
    actual = value_and_pull_back(net, *inputs)
    for error, bound in zip(errors(actual, truth), allowed, strict=True):
        assert error <= bound, f"relative error {error:.1e}, twice that of plain torch {bound:.1e}"
    net.output_blocks[0][0].skip_connection.weight[:, -1].mul_(0.99)  # one channel of a skip: the bound notices
    changed = errors(value_and_pull_back(net, *inputs), truth)
    assert all(error > 2 * bound for error, bound in zip(changed, allowed, strict=True))


@pytest.mark.parametrize("resample", [_same, _halve, _double], ids=lambda f: f.__name__)
@pytest.mark.parametrize("c_in, c_out", [(32, 64), (64, 32), (32, 32)])
def test_block(convolutions, resample, c_in, c_out):
    """Every kind of block alone, and fed with a pair where that exists."""
    torch.manual_seed(1)
    block = ResBlock(c_in, c_out, UNetConfig(widths=(32,), base=32), resample).requires_grad_(False)
    nn.init.normal_(block.out_layers[3].weight, std=0.05)
    x, emb = torch.randn(2, c_in, 12, 20), torch.randn(2, 128)

    def run(block: ResBlock, *maps: Tensor) -> list[Tensor]:
        maps = [m.clone().requires_grad_() for m in maps]
        out = block(maps[0], emb.to(maps[0].dtype), None, *maps[1:])
        return [out.detach(), *torch.autograd.grad(out, maps, torch.linspace(-1, 1, out.numel()).to(out).view_as(out))]

    double = copy.deepcopy(block).double()
    for cut in [c_in] + [24] * (resample is _same):
        maps = [x[:, :cut], x[:, cut:]][: 1 if cut == c_in else 2]
        with use_backend(Backend.REFERENCE):
            truth = run(double, *(m.double() for m in maps))
            allowed = allowed_errors(run, block, maps, truth)
        with use_backend(Backend.NATIVE):
            found = errors(run(block, *maps), truth)
        for error, bound in zip(found, allowed, strict=True):
            assert error <= bound


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("scale_shift", [True, False], ids=["film", "added"])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("resample", [_same, _halve, _double], ids=lambda f: f.__name__)
def test_blocks_of_other_types(resample, merged, scale_shift, dtype, tolerance):
    """With the norm of plain torch: in float64 no difference could hide, and bfloat16 is how a GPU runs them."""
    torch.manual_seed(2)
    block = ResBlock(64, 32, UNetConfig(widths=(32,), base=32, scale_shift=scale_shift), resample).requires_grad_(False)
    nn.init.normal_(block.out_layers[3].weight, std=0.05)
    block, emb = block.double(), torch.randn(2, 128, dtype=torch.float64)
    x, v = torch.randn(2, 2, 64, 8, 12, dtype=torch.float64)
    v = v[:, :32].repeat(1, 1, 2, 2)[..., : block.out_size(8, 12)[0], : block.out_size(8, 12)[1]]
    maps = [x] if resample is not _same else [x[:, :40], x[:, 40:]]

    def run(block: ResBlock, dtype: torch.dtype, engine: Engine | None) -> list[Tensor]:
        given = [m.to(dtype).requires_grad_() for m in maps]
        e = block.emb_layers(emb.to(block.emb_layers[1].weight.dtype))
        if engine is None:
            out = block.plain(torch.cat(given, dim=1), e)
        else:
            out = fused_block(block, given[0], e, given[1] if len(given) > 1 else None, engine)
        return [out.detach(), *torch.autograd.grad(out, given, v.to(out.dtype))]

    truth, narrow = run(block, torch.float64, None), copy.deepcopy(block)
    if dtype is torch.bfloat16:
        narrow.float()
        for module in narrow.modules():
            if isinstance(module, Conv):
                module.to(dtype)
    if merged:
        narrow.up_weight = narrow.merged_upsampling()
    actual = run(narrow, dtype, Engine(reference, native=False))
    assert all(a.dtype == dtype for a in actual) and max(errors(actual, truth)) < tolerance


class Written(TorchDispatchMode):
    """Names of the operations, and whether one joined maps."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.joined = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        self.joined |= func._schema.name == "aten::cat" and out.dim() == 4
        return out


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("meta", torch.float32)], ids=str)
def test_the_decoder_never_joins_its_maps(device, dtype):
    net, (x, v) = network(**SMALL).to(device), problem(1, 32, 32)
    with Written() as written:
        value_and_pull_back(net, x.to(device), v.to(device))
    assert not written.joined and "fastem::group_norm_silu_backward" in written.names
    assert ("fastem::fused_conv" in written.names) == (device == "cpu")
    with Written() as written:
        plain(net, x.to(device), v.to(device))
    assert written.joined


def test_layout_of_the_maps_on_the_way():
    """Channels last everywhere: nothing is turned round between two blocks."""
    net, (x, _) = network(**SMALL), problem(1, 32, 32)
    maps: list[Tensor] = []
    for block in net.modules():
        if isinstance(block, ResBlock):
            block.register_forward_hook(lambda _, __, out: maps.append(out))
    with use_backend(Backend.NATIVE):
        net(x, 300.0)
    assert len(maps) == len(net._blocks())
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_bits_do_not_depend_on_the_batch_the_threads_or_the_gradient():
    net, (x, v) = network(**dict(SMALL, attention_levels=())), problem(3, 32, 48)
    net.prepare([300.0])  # the products that embed the time are torch's
    for block in net.middle_block:
        if not isinstance(block, ResBlock):
            nn.init.zeros_(block.proj_out.weight)  # attention is torch's
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [value_and_pull_back(net, x[i : i + 1], v[i : i + 1]) for i in range(3)]
        torch.set_num_threads(3)
        together = value_and_pull_back(net, x, v)
        with torch.inference_mode(), use_backend(Backend.NATIVE):
            assert torch.equal(net(x, 300.0)[:, :3], together[0])
    finally:
        torch.set_num_threads(threads)
    for batched, rows in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(batched, torch.cat(rows))


def test_changed_weights_are_noticed_and_copies_start_empty():
    net, inputs = network(**SMALL), problem(1, 16, 16)
    before = value_and_pull_back(net, *inputs)
    clone = pickle.loads(pickle.dumps(net))
    assert not any(m._packed for m in clone.modules() if isinstance(m, Conv))
    assert all(torch.equal(a, b) for a, b in zip(value_and_pull_back(clone, *inputs), before, strict=True))
    net.middle_block[0].out_layers[3].weight.mul_(1.5)
    after = value_and_pull_back(net, *inputs)
    assert max(errors(after, before)) > 1e-3
    assert max(errors(after, plain(net, *inputs))) < 1e-5


def test_threads_share_a_network_and_graphs_live_side_by_side():
    net = network(**SMALL)
    inputs = [problem(1, 16 + 8 * (i % 2), 24) for i in range(6)]
    expected = [plain(net, *p) for p in inputs]
    with ThreadPoolExecutor(3) as executor:
        actual = list(executor.map(lambda p: value_and_pull_back(net, *p), inputs))
    assert max(max(errors(a, e)) for a, e in zip(actual, expected, strict=True)) < 1e-5
    x, v = (torch.cat(t) for t in zip(*inputs[::2], strict=True))
    leaves = [row.clone().requires_grad_() for row in x.split(1)]
    with use_backend(Backend.NATIVE):
        outputs = [net(leaf, 300.0)[:, :3] for leaf in leaves]
    for i in (1, 0, 2):
        (first,) = torch.autograd.grad(outputs[i], leaves[i], v[i : i + 1], retain_graph=True)
        (again,) = torch.autograd.grad(outputs[i], leaves[i], v[i : i + 1])
        assert torch.equal(first, again) and torch.equal(first, actual[2 * i][1])


def test_training_takes_the_plain_blocks():
    """Gradients reach the weights; the gradient of a gradient is refused where they are frozen."""
    net, (x, v) = network(**SMALL), problem(1, 16, 16)
    net.requires_grad_(True)
    (net(x, 300.0)[:, :3] * v).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.input_blocks.parameters())
    net.requires_grad_(False)
    x.requires_grad_()
    with use_backend(Backend.NATIVE):
        (grad,) = torch.autograd.grad(net(x, 300.0)[:, :3], x, v.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x)


def test_torch_keeps_what_is_too_small():
    """Without a choice of backend: large maps run fused, small ones by torch alone, and both agree."""
    net, (x, v) = network(**SMALL), problem(1, 64, 64)
    with Written() as large:
        found = _value_and_pull_back(net, x, v)
    assert max(errors(found, plain(net, x, v))) < 1e-5
    with Written() as small:
        _value_and_pull_back(net, x[..., :8, :8], v[..., :8, :8])
    assert "fastem::fused_conv" in large.names and "fastem::fused_conv" not in small.names
    assert small.names.count("aten::native_group_norm") > len(net._blocks())  # the norms of the blocks too


def test_small_maps_with_many_channels_are_torchs():
    assert not Conv(512, 512).pays(8, 8, 512, 512) and not Conv(512, 512).pays(16, 16, 512, 512)
    assert Conv(512, 512).pays(32, 32, 512, 512) and Conv(128, 128).pays(8, 8, 128, 128)
    assert not Conv(3, 32).pays(64, 64, 3, 32) and Conv(3, 32, 1).pays(4, 4, 3, 32)
