"""The fused prior against the original in double precision: image and gradient, batches, threads, lives of buffers."""

from __future__ import annotations

import copy
import gc
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from fastem.models.fused import FusedNaturalPrior
from fastem.models.natural import NaturalConfig, NaturalPrior
from fastem.ops import Backend, native, use_backend

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())


def prior(**config) -> NaturalPrior:
    """Random weights, also where training starts at zero: every path carries signal."""
    torch.manual_seed(0)
    net = NaturalPrior(NaturalConfig(**config))
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return net.requires_grad_(False)


SMALL = dict(widths=(16, 24, 32), num_blocks=1, embedding=16)


def problem(n: int, height: int, width: int, sigma: float = 0.5, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    x, v = (torch.randn(n, channels, height, width, generator=generator) for _ in range(2))
    return x, sigma * torch.linspace(1, 2, n), v


def value_and_pull_back(net: nn.Module, x: Tensor, sigma: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    denoised = net(x, sigma)
    (pulled,) = torch.autograd.grad(denoised, x, v)
    return denoised.detach(), pulled


@needs_native
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("n, height, width", [(1, 64, 64), (2, 37, 61), (3, 1, 5), (1, 8, 90)])
def test_matches_the_prior_in_double(n, height, width, sigma):
    """At most twice the error of the prior in float32, or 2e-6 of the largest value."""
    net, inputs = prior(), problem(n, height, width, sigma)
    truth = value_and_pull_back(copy.deepcopy(net).double(), *(t.double() for t in inputs))
    plain, fused = value_and_pull_back(net, *inputs), value_and_pull_back(FusedNaturalPrior(net), *inputs)
    for actual, eager, expected in zip(fused, plain, truth, strict=True):
        error, allowed = ((t.double() - expected).abs().max() / expected.abs().max() for t in (actual, eager))
        assert error <= max(2 * allowed, 2e-6), f"relative error {error:.1e}, eager {allowed:.1e}"


@needs_native
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dict(SMALL, widths=(12,)),
        dict(SMALL, widths=(12, 20), unshuffle=1, channels=1),
        dict(SMALL, num_blocks=3, unshuffle=4),
    ],
    ids=str,
)
def test_other_configurations(config):
    net = prior(**config)
    x, sigma, v = problem(2, 21, 30, channels=net.config.channels)
    for actual, expected in zip(
        value_and_pull_back(FusedNaturalPrior(net), x, sigma, v), value_and_pull_back(net, x, sigma, v), strict=True
    ):
        assert (actual - expected).abs().max() < 5e-6 * expected.abs().max()


@needs_native
def test_bits_do_not_depend_on_the_batch_or_the_threads():
    fused, (x, sigma, v) = FusedNaturalPrior(prior()), problem(3, 44, 52)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [value_and_pull_back(fused, x[i : i + 1], sigma[i : i + 1], v[i : i + 1]) for i in range(3)]
        torch.set_num_threads(3)
        together = value_and_pull_back(fused, x, sigma, v)
    finally:
        torch.set_num_threads(threads)
    for batched, rows in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(batched, torch.cat(rows))


@needs_native
def test_same_bits_with_and_without_grad():
    fused, (x, sigma, v) = FusedNaturalPrior(prior(**SMALL)), problem(1, 16, 24)
    expected, _ = value_and_pull_back(fused, x, sigma, v)
    with torch.inference_mode():
        assert torch.equal(fused(x, sigma), expected)
    with torch.no_grad():
        assert torch.equal(fused(x.clone().requires_grad_(), sigma), expected)
    assert torch.equal(fused(x.contiguous(memory_format=torch.channels_last), sigma[:1]), expected)
    assert torch.equal(fused(x, sigma), expected)


@needs_native
def test_several_graphs_at_once():
    """Buffers that a graph still needs are not handed out again; those of a dead graph are."""
    fused, (x, sigma, v) = FusedNaturalPrior(prior(**SMALL)), problem(1, 24, 16)
    inputs = [(x + i).requires_grad_() for i in range(3)]
    expected = [value_and_pull_back(fused, x + i, sigma, v)[1] for i in range(3)]
    outputs = [fused(x_i, sigma) for x_i in inputs]
    for i in (1, 0, 2):
        (first,) = torch.autograd.grad(outputs[i], inputs[i], v, retain_graph=True)
        (again,) = torch.autograd.grad(outputs[i], inputs[i], v)
        assert torch.equal(first, expected[i]) and torch.equal(again, expected[i])
    del outputs
    gc.collect()
    assert len(fused._pool) == 4  # the slopes of three graphs, and a workspace
    value_and_pull_back(fused, x, sigma, v)
    assert len(fused._pool) == 4


@needs_native
def test_threads_share_a_model():
    fused = FusedNaturalPrior(prior(**SMALL))
    problems = [problem(1, 16 + 8 * (i % 2), 24, 0.1 + i) for i in range(8)]
    expected = [value_and_pull_back(fused, *p) for p in problems]
    fused.release()
    with ThreadPoolExecutor(4) as executor:
        actual = list(executor.map(lambda p: value_and_pull_back(fused, *p), problems))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a[0], e[0]) and torch.equal(a[1], e[1])


@needs_native
def test_changed_weights_are_noticed():
    net, (x, sigma, _) = prior(**SMALL), problem(1, 16, 16)
    fused = FusedNaturalPrior(net)
    before = fused(x, sigma)
    net.middle[0].conv1.weight.mul_(1.5)
    net.embed[0].bias.add_(1.0)
    after = fused(x, sigma)
    assert not torch.equal(before, after)
    assert torch.allclose(after, net(x, sigma), atol=2e-5)
    fused.load_state_dict(FusedNaturalPrior(prior(**SMALL)).state_dict())
    assert torch.equal(fused(x, sigma), before)


@needs_native
def test_copies_and_pickles_start_empty():
    fused, (x, sigma, _) = FusedNaturalPrior(prior(**SMALL)), problem(1, 16, 16)
    expected = fused(x, sigma)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for clone in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert clone._network is None and len(clone._pool) == 0
        assert torch.equal(clone(x, sigma), expected)


@needs_native
def test_gradient_of_the_gradient_is_refused():
    fused, (x, sigma, v) = FusedNaturalPrior(prior(**SMALL)), problem(1, 16, 16)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph=True .* fused\.prior"):
        torch.autograd.grad(fused(x, sigma), x, v, create_graph=True)


def test_elsewhere_it_is_the_prior():
    net, (x, sigma, _) = prior(**SMALL), problem(2, 13, 18)
    fused = FusedNaturalPrior(net)
    with use_backend(Backend.REFERENCE):
        assert torch.equal(fused(x, sigma), net(x, sigma))
    double = copy.deepcopy(net).double()
    assert torch.equal(FusedNaturalPrior(double)(x.double(), sigma.double()), double(x.double(), sigma.double()))
    net.requires_grad_(True)  # fine-tuning: gradients reach the weights and sigma
    fused(x, sigma.requires_grad_()).sum().backward()
    assert sigma.grad is not None and all(p.grad is not None for p in net.parameters())


def test_needs_blocks():
    with pytest.raises(ValueError, match="every level needs a residual block"):
        FusedNaturalPrior(NaturalPrior(NaturalConfig(num_blocks=0)))
