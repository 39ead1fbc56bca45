from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastem.models import CheckpointError, load_kernel_denoiser
from fastem.models.kernel_denoiser import FDnCNN, KernelDenoiser, KernelDenoiserConfig, save_kernel_denoiser
from fastem.ops import reference
from fastem.synth import motion_kernel
from fastem.training.kernel_denoiser import clean_change, denoising_gain

DATA = Path(__file__).parent / "data"
PUBLISHED = {
    "model.0.weight": (32, 2, 3, 3), "model.0.bias": (32,), "model.2.weight": (32, 32, 3, 3), "model.2.bias": (32,),
    "model.4.weight": (32, 32, 3, 3), "model.4.bias": (32,), "model.6.weight": (32, 32, 3, 3), "model.6.bias": (32,),
    "model.8.weight": (1, 32, 3, 3), "model.8.bias": (1,),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundled():
    return load_kernel_denoiser("kernel")


def kernels(size, seeds=range(20), family="shake"):
    return torch.from_numpy(np.stack([motion_kernel(size, seed, family) for seed in seeds]))[:, None]


def random_net(seed=0, width=8, num_layers=4):
    torch.manual_seed(seed)
    net = KernelDenoiser(KernelDenoiserConfig(width, num_layers))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------- properties


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), gain=st.floats(1e-3, 1e3), size=st.integers(3, 40))
def test_without_biases_the_denoiser_is_homogeneous(seed, gain, size):
    net = random_net(seed).double()
    k = torch.from_numpy(np.random.default_rng(seed).normal(0.01, 0.01, (2, 1, size, size)))
    std = torch.tensor([0.003, 0.01], dtype=torch.float64)
    torch.testing.assert_close(net(gain * k, gain * std), gain * net(k, std), rtol=1e-9, atol=1e-12 * gain)


def test_with_biases_it_is_not():
    torch.manual_seed(0)
    net = FDnCNN()
    k = kernels(17, range(1))
    assert not torch.allclose(net(2 * k, 0.02), 2 * net(k, 0.01), rtol=1e-2)


def test_it_starts_as_the_identity():
    k = torch.randn(3, 1, 9, 11)
    torch.testing.assert_close(KernelDenoiser()(k, 0.1), k)


@pytest.mark.parametrize("make", [KernelDenoiser, FDnCNN, random_net])
def test_the_chain_is_the_network(make):
    torch.manual_seed(1)
    net = make()
    k, std = kernels(17, range(3)), torch.tensor([0.001, 0.003, 0.01])
    weights, biases, scale = net.as_chain()
    assert len(weights) == len(biases) and not any(w.requires_grad for w in weights)
    torch.testing.assert_close(reference.denoise_chain(k, std, weights, biases, scale), net(k, std))


@pytest.mark.parametrize("size", [(17, 17), (65, 65), (8, 33), (1, 1)], ids=str)
def test_any_size_keeps_its_shape(bundled, size):
    assert bundled(torch.rand(2, 1, *size), 0.003).shape == (2, 1, *size)


def test_noise_std_is_a_number_or_one_per_kernel(bundled):
    k = kernels(17, range(3)) + 0.003 * torch.randn(3, 1, 17, 17)
    each = torch.tensor([0.001, 0.003, 0.01])
    together = bundled(k, each)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], bundled(k[i : i + 1], each[i].item()))
    assert not torch.allclose(together[0], bundled(k[:1], 0.01)[0])  # the level matters
    with pytest.raises(ValueError, match=r"a float or \(3,\)"):
        bundled(k, torch.rand(2))
    with pytest.raises(ValueError, match=r"kernels are \(B, 1, h, w\), got \(17, 17\)"):
        bundled(k[0, 0], 0.003)


# ------------------------------------------------------------------------------------------ bundled quality


@pytest.mark.parametrize("family", ["shake", "randomwalk", "gp"])  # randomwalk kernels were never trained on
@pytest.mark.parametrize("noise_std", [1e-3, 3.16e-3, 1e-2])
def test_bundled_denoiser_gains_8_db(bundled, family, noise_std):
    gain = denoising_gain(bundled, kernels(33, family=family), noise_std)
    assert gain.mean() > 11.5 and gain.min() > 8


def test_bundled_denoiser_gains_8_db_at_the_published_setting_for_64(bundled):
    assert denoising_gain(bundled, kernels(64, range(6)), 1.41e-3).min() > 8


@pytest.mark.parametrize("size, noise_std", [(17, 3.16e-3), (33, 3.16e-3), (33, 1e-4), (64, 1.41e-3), (65, 3.16e-3)])
def test_bundled_denoiser_leaves_clean_kernels_alone(bundled, size, noise_std):
    """Idempotent on clean kernels, also when told a noise that they do not have."""
    assert clean_change(bundled, kernels(size, range(6)), noise_std).max() < 0.01


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)], ids=str)
def test_bundled_denoiser_prefers_no_direction(bundled, axes):
    k = kernels(33)
    k = k + 3.16e-3 * torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    out = bundled(k, 3.16e-3)
    mirrored = bundled(k.flip(axes), 3.16e-3).flip(axes)
    assert (out - mirrored).norm() < 0.2 * (out - k).norm()


# ------------------------------------------------------------------------------------------------- weights


def test_published_keys_and_shapes():
    assert {name: tuple(p.shape) for name, p in FDnCNN().state_dict().items()} == PUBLISHED
    assert sum(p.numel() for p in FDnCNN().parameters()) == 28_641


def test_parity_with_the_released_denoiser():
    data = np.load(DATA / "mstep.npz")
    state = {
        key.removeprefix("denoiser/"): torch.from_numpy(data[key]) for key in data if key.startswith("denoiser/model")
    }
    net = load_kernel_denoiser(state)
    assert isinstance(net, FDnCNN)
    planes, expected = (torch.from_numpy(data[f"denoiser_forward/{name}"]) for name in ("input", "output"))
    error = (net.model(planes) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    net = random_net(width=6, num_layers=3)
    path = tmp_path / f"k{suffix}"
    if suffix == ".pth":
        torch.save(net.state_dict(), path)
    else:
        save_kernel_denoiser(path, net, card="a test")
    loaded = load_kernel_denoiser(path)
    assert isinstance(loaded, KernelDenoiser) and loaded.config == net.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    k = kernels(9, range(2))
    assert torch.equal(loaded(k, 0.01), net(k, 0.01))


def test_scale_comes_from_the_file(tmp_path):
    net = KernelDenoiser(KernelDenoiserConfig(4, 3, scale=7.0))
    save_kernel_denoiser(tmp_path / "k.safetensors", net, card="a test")
    assert load_kernel_denoiser(tmp_path / "k.safetensors").as_chain()[2] == 7.0


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("model.8.bias"), "1 missing: 'model.8.bias'"),
        (
            lambda s: s.update({"model.2.weight": torch.zeros(32, 32, 5, 5)}),
            r"mis-shaped: 'model.2.weight' \(32, 32, 5, 5\)",
        ),
        (lambda s: s.update({"model.10.bias": torch.zeros(1)}), "1 unexpected: 'model.10.bias'"),
        (lambda s: s.update({"model.0.bias": torch.full((32,), torch.nan)}), "NaN"),
        (lambda s: s.pop("model.0.weight"), "not a kernel denoiser"),
        (lambda s: s.clear(), "not a state dict"),
    ],
)
def test_wrong_weights_are_refused(spoil, message):
    state = dict(FDnCNN().state_dict())
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        load_kernel_denoiser(state)


def test_unknown_name_lists_the_bundled_ones():
    with pytest.raises(CheckpointError, match="no bundled model 'kernal'.*did you mean 'kernel'"):
        load_kernel_denoiser("kernal")
