import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastem import io
from fastem.models import ErrorSpectrum, NaturalPrior, load_kernel_denoiser, load_model, read_checkpoint, save_natural
from fastem.models.kernel_denoiser import FDnCNN, KernelDenoiserConfig
from fastem.models.natural import SIZES, NaturalConfig
from fastem.ops import reference
from fastem.synth import motion_kernel
from fastem.training import BandBalance, Ema, ImagePool, TrainConfig, Trainer, train_image_prior, train_kernel_denoiser
from fastem.training.image_prior import name_of
from fastem.training.kernel_denoiser import (
    FIRST_SEED,
    HIGHEST,
    LOWEST,
    KernelPool,
    clean_change,
    estimation_errors,
    mstep_outputs,
    perturb,
    sample_noise_std,
)
from fastem.training.validation import (
    denoising_psnr,
    fit_spectrum,
    measure_r2,
    radial_spectrum,
    size_invariance,
    validate,
)

QUICK = TrainConfig(minutes=5, cooldown=0, batch_size=4, patch=16, warmup=2, ema_halflife=3, max_steps=4)
TINY_PRIOR = NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8)
TINY_CHAIN = KernelDenoiserConfig(width=4, num_layers=3)


@pytest.fixture(autouse=True)
def quick_card(monkeypatch):
    monkeypatch.setattr("fastem.training.kernel_denoiser.MEASURED", [(17, 3.16e-3)])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def state_of(path):
    return torch.load(path / "training.pt", weights_only=True)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------- resuming


def check_resume(train, folder):
    """4 steps in one go, and 2 + 2 in two calls: the same bits in weights, optimiser, average and generator."""
    whole = train(folder / "whole", QUICK)
    train(folder / "parts", replace(QUICK, max_steps=2))
    assert state_of(folder / "parts")["step"] == 2
    torch.manual_seed(99)  # what happened in between must not matter
    resumed = train(folder / "parts", QUICK)
    a, b = state_of(folder / "whole"), state_of(folder / "parts")
    for name in ("model", "optimizer", "ema", "rng", "bands", "step"):
        assert equal(a[name], b[name]), name
    assert equal(dict(whole.state_dict()), dict(resumed.state_dict()))
    other = train(folder / "other", replace(QUICK, seed=1))  # negative control: the comparison can fail
    assert not equal(dict(whole.state_dict()), dict(other.state_dict()))


def test_image_prior_resumes_bit_for_bit(tmp_path, photos):
    check_resume(lambda out, config: train_image_prior([photos], out, config, TINY_PRIOR), tmp_path)


def test_kernel_denoiser_resumes_bit_for_bit(tmp_path):
    check_resume(lambda out, config: train_kernel_denoiser(out, config, TINY_CHAIN, num_kernels=30), tmp_path)


def quadratic(model, generator, balance):
    target = torch.randn(2, 3, generator=generator)
    return (model(target) - target).square().mean()


def trainer(path, **changes):
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 3), replace(QUICK, **changes), path / "training.pt")


def test_time_ends_a_run(tmp_path):
    run = trainer(tmp_path, minutes=0.005, max_steps=None)
    list(run.run(quadratic))
    assert run.step > 1 and state_of(tmp_path)["step"] == run.step
    assert 0.2 < run.seconds < 3


def test_cooldown_brings_the_rate_to_rest(tmp_path):
    run = trainer(tmp_path, minutes=0.01, cooldown=0.01, max_steps=None, warmup=1)
    list(run.run(quadratic))
    assert run.optimizer.param_groups[0]["lr"] < 0.05 * QUICK.lr


def test_warm_up(tmp_path):
    run = trainer(tmp_path, warmup=8)
    list(run.run(quadratic))
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(QUICK.lr * 4 / 8)


def test_stop_ends_after_the_step_and_saves(tmp_path):
    run = trainer(tmp_path, max_steps=None)
    list(run.run(quadratic, stop=lambda: run.step == 3))
    assert run.step == 3 and state_of(tmp_path)["step"] == 3


def test_checkpoints_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("fastem.training.core.time.monotonic", iter(range(0, 10**6, 61)).__next__)
    run = trainer(tmp_path, minutes=1e6, max_steps=None, checkpoint_minutes=1)
    records = run.run(quadratic)
    assert [next(records)["step"] for _ in range(3)] == [1, 2, 3]
    assert state_of(tmp_path)["step"] == 2  # the third step is told before it is saved


def test_a_diverged_loss_keeps_the_last_good_state(tmp_path):
    list(trainer(tmp_path).run(quadratic))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4; resume from"):
        list(trainer(tmp_path, max_steps=9).run(lambda model, generator, balance: model.weight.sum() * torch.nan))
    state = state_of(tmp_path)
    assert state["step"] == 4 and all(p.isfinite().all() for p in state["ema"])


# ---------------------------------------------------------------------------------------------------- parts


def test_average_has_the_half_life_it_says():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, halflife=5)
    nn.init.ones_(model.weight)
    for step in range(10**4, 10**4 + 5):
        ema.update(model, step)
    assert ema.params[0].item() == pytest.approx(0.5)
    ema.copy_to(model)
    assert model.weight.item() == pytest.approx(0.5)


def test_average_forgets_the_start():
    """Early in a run the half-life is a tenth of the steps so far."""
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, halflife=1000)
    nn.init.constant_(model.weight, 7.0)
    for step in range(1, 60):
        ema.update(model, step)
    assert ema.params[0].item() == pytest.approx(7, abs=1e-3)


def test_balance_makes_noise_levels_equal():
    balance = BandBalance("cpu", 1e-3, 1.0)
    sigma = torch.tensor([2e-3, 0.5]).repeat(16)
    loss = torch.where(sigma > 0.1, 100.0, 0.01)
    for _ in range(50):
        balance(loss, sigma)
    assert balance(loss[:1], sigma[:1]).item() == pytest.approx(1, rel=0.05)
    assert balance(loss[1:2], sigma[1:2]).item() == pytest.approx(1, rel=0.05)


def test_image_pool_crops_are_image_content():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    pool = ImagePool([image], patch=8)
    crops = pool.sample(64, torch.Generator().manual_seed(0))
    assert crops.shape == (64, 3, 8, 8) and crops.min() >= -1 and crops.max() <= 1
    with pytest.raises(ValueError, match="no training image is at least 64 pixels"):
        ImagePool([image], patch=64)


def test_kernel_pool_draws_every_size_and_never_a_held_out_kernel():
    pool, generator = KernelPool(60), torch.Generator().manual_seed(0)
    sizes = {pool.sample(8, generator).shape[-1] for _ in range(120)}
    assert sizes == set(pool.kernels)
    k = pool.sample(8, generator)
    torch.testing.assert_close(k.sum(dim=(1, 2, 3)), torch.ones(len(k)))
    held_out = torch.from_numpy(np.stack([motion_kernel(33, seed) for seed in range(50)]))
    assert min((held_out - k).abs().amax(dim=(1, 2)).min() for k in pool.kernels[33]) > 1e-4
    assert FIRST_SEED > 2**31


def test_noise_levels_have_half_their_mass_where_m_steps_are():
    std = sample_noise_std(20_000, torch.Generator().manual_seed(0))
    assert LOWEST <= std.min() and std.max() <= HIGHEST * 1.0001
    assert 0.5 < ((std > 1e-3) & (std < 1e-2)).float().mean() < 0.75


def test_perturbed_kernels_carry_the_std_they_are_given():
    k = torch.from_numpy(np.stack([motion_kernel(33, s) for s in range(60)]))[:, None]
    noisy, std = perturb(k, torch.full((60,), 0.003), torch.Generator().manual_seed(0))
    torch.testing.assert_close(std, (noisy - k).square().mean(dim=(1, 2, 3)).sqrt())
    assert std.max() < 0.0035 and std.median() > 0.002
    clipped = (noisy.amin(dim=(1, 2, 3)) >= 0).float().mean()
    assert 0.3 < clipped < 0.7


def test_estimation_noise_has_the_spectrum_of_least_squares():
    """Not white: neighbouring pixels of the error are correlated."""
    k = torch.from_numpy(np.stack([motion_kernel(33, s) for s in range(40)]))[:, None]
    for e in estimation_errors(k, torch.Generator().manual_seed(0)):
        assert e.shape == k.shape and e.isfinite().all()
        e = e / e.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        neighbours = (e[..., 1:] * e[..., :-1]).mean(dim=(1, 2, 3))
        assert neighbours.abs().median() > 0.1
    white = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    assert (white[..., 1:] * white[..., :-1]).mean(dim=(1, 2, 3)).abs().median() < 0.05


def test_m_step_outputs_are_kernels_between_start_and_truth():
    """On the simplex; with the true kernel as denoiser they come near it, with none at all less so."""
    k = torch.from_numpy(np.stack([motion_kernel(25, s) for s in range(24)]))[:, None]
    told = torch.full((24,), 3.16e-3)

    def error(denoiser):
        found = mstep_outputs(k, told, denoiser, torch.Generator().manual_seed(1))
        assert found.min() >= 0
        torch.testing.assert_close(found.sum(dim=(1, 2, 3)), torch.ones(24))
        return ((found - k).square().sum() / k.square().sum()).item()

    assert error(lambda z, told: k) < 0.5 * error(lambda z, told: z) < 0.5


def test_shares_of_the_kernels_are_shares(tmp_path):
    with pytest.raises(ValueError, match="at most 0.8 together, got clean 0.7, M-step 0.6"):
        train_kernel_denoiser(tmp_path, QUICK, TINY_CHAIN, clean_share=0.7, mstep_share=0.6)


def test_kernel_training_starts_from_given_weights(tmp_path):
    """With hardly any step the result is the bundled network; a resumed run keeps its own weights."""
    bundled = load_kernel_denoiser("kernel")
    config = replace(QUICK, max_steps=1, lr=1e-9)
    model = train_kernel_denoiser(tmp_path / "a", config, num_kernels=12, init="kernel")
    for name, weight in bundled.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0)
    assert model.config == bundled.config
    train_kernel_denoiser(tmp_path / "b", config, num_kernels=12)
    kept = train_kernel_denoiser(tmp_path / "b", config, num_kernels=12, init="kernel")
    assert not torch.allclose(kept.model[0].weight, bundled.model[0].weight, atol=1e-3)
    torch.save(FDnCNN().state_dict(), tmp_path / "published.pt")
    with pytest.raises(ValueError, match="has biases"):
        train_kernel_denoiser(tmp_path / "c", config, num_kernels=12, init=tmp_path / "published.pt")


def test_clean_kernels_teach_the_network_to_leave_them_alone(tmp_path):
    """Against the same run without them; levels are those of M-steps."""
    k = torch.from_numpy(np.stack([motion_kernel(33, s) for s in range(8)]))[:, None]
    config = replace(QUICK, max_steps=40, batch_size=8, lr=2e-3, ema_halflife=10)
    changes = []
    for share in (0.2, 0.0):
        options = {"clean_share": share, "mstep_share": share}
        model = train_kernel_denoiser(tmp_path / f"{share}", config, num_kernels=60, init="kernel", **options)
        changes.append(clean_change(model, k, 3.16e-3).mean().item())
    assert changes[0] < 0.7 * changes[1]


def test_kernel_training_writes_loadable_weights_and_lowers_the_loss(tmp_path):
    config = replace(QUICK, max_steps=80, batch_size=8, lr=3e-3, ema_halflife=20)
    model = train_kernel_denoiser(tmp_path, config, KernelDenoiserConfig(width=8, num_layers=3), num_kernels=60)
    loaded = load_kernel_denoiser(tmp_path / "kernel.safetensors")
    assert equal(dict(loaded.state_dict()), dict(model.state_dict()))
    k = torch.from_numpy(np.stack([motion_kernel(33, s) for s in range(8)]))[:, None]
    noise = 3.16e-3 * torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    before, after = noise.square().mean(), (loaded(k + noise, 3.16e-3) - k).square().mean()
    assert after < 0.5 * before


def test_image_training_writes_a_prior_with_its_error_table(tmp_path, photos):
    model = train_image_prior([photos], tmp_path, QUICK, TINY_PRIOR)
    loaded = load_model(tmp_path / "natural.safetensors")
    figures = json.loads((tmp_path / "validation.json").read_text())
    assert figures["pictures"] == 1 and figures["held_out"] and figures["patch"] == 36
    assert figures["psnr_db"]["5"] > figures["psnr_db"]["100"] and figures["r2"] == loaded.r2_table.tolist()
    card = read_checkpoint(tmp_path / "natural.safetensors").metadata["card"]
    assert card["data"] == "2 pictures from photos" and card["validation"]["psnr_db"] == figures["psnr_db"]
    x, sigma = torch.rand(1, 3, 16, 16) * 2 - 1, torch.tensor([0.5])
    torch.testing.assert_close(loaded.denoiser(x, sigma), model(x, sigma), atol=2e-3, rtol=2e-3)  # stored in 16 bits
    assert 0 < loaded.r2(0.01) < 0.01**2 * 1.1 and loaded.r2(100.0) > loaded.r2(0.1)
    assert loaded.error_spectrum(1.0).cutoff < loaded.error_spectrum(0.01).cutoff  # noise hides the fine first


def test_measured_spectrum_is_that_of_the_error():
    """Errors drawn with a known spectrum; white noise has none."""
    law, white = ErrorSpectrum(0.04, 0.1, 2.0), torch.randn(16, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    frequency = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(48))
    gain = torch.from_numpy(law.at(frequency.numpy())).sqrt()
    error = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=(64, 48))
    frequencies, variances = radial_spectrum(error)
    assert fit_spectrum(frequencies, variances.mean(axis=0), 0.04) == pytest.approx(law, rel=0.15)
    frequencies, variances = radial_spectrum(0.2 * white)
    variances = variances.mean(axis=0)
    assert variances == pytest.approx(0.04, rel=0.2) and (np.diff(frequencies) > 0).all() and frequencies[-1] < 0.71
    assert fit_spectrum(frequencies, variances, 0.04).at(0.3) > 0.03


def test_image_training_counts_what_it_computes(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("fastem.training.core.time.monotonic", iter(range(0, 10**6, 11)).__next__)
    told = []
    train_image_prior([photos], tmp_path, replace(QUICK, minutes=1e6, max_steps=1), TINY_PRIOR, report=told.append)
    flops = 3 * NaturalPrior(TINY_PRIOR).flops(16, 16)
    assert told[0]["tflops"] == pytest.approx(told[0]["samples_per_s"] * flops / 1e12)


def test_training_can_start_from_weights(tmp_path, photos):
    train_image_prior([photos], tmp_path / "first", QUICK, TINY_PRIOR)
    weights = tmp_path / "first" / "natural.safetensors"
    short = replace(QUICK, max_steps=1, lr=1e-9)
    model = train_image_prior([photos], tmp_path / "second", short, TINY_PRIOR, init=weights)
    for param, stored in zip(model.parameters(), load_model(weights).denoiser.prior.parameters(), strict=True):
        torch.testing.assert_close(param, stored, atol=1e-6, rtol=1e-6)
    train_image_prior([photos], tmp_path / "second", replace(short, max_steps=2), TINY_PRIOR, init=weights)  # goes on
    with pytest.raises(ValueError, match="a run to resume that did not start from .*leave out --init"):
        train_image_prior([photos], tmp_path / "first", short, TINY_PRIOR, init=weights)
    card = read_checkpoint(tmp_path / "second" / "natural.safetensors").metadata["card"]
    assert card["init"] == {"weights": weights.name, "sha256": load_model(weights).sha256}  # also after a resume
    with pytest.raises(ValueError, match="is another network.*widths=.8, 8.*--size"):
        train_image_prior([photos], tmp_path / "third", short, init=weights)


def test_both_sizes_are_what_they_say():
    assert NaturalConfig() == SIZES["natural"]
    with torch.device("meta"):
        large = NaturalPrior(SIZES["natural-large"])
    assert 9e6 < sum(p.numel() for p in large.parameters()) < 18e6
    with pytest.raises(ValueError, match="no weights of 'natural-large' are bundled: train them"):
        load_model("natural-large")


def test_large_size_learns_and_loads(tmp_path):
    model = NaturalPrior(SIZES["natural-large"])
    model(torch.zeros(1, 3, 16, 16), torch.ones(1)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    path = tmp_path / f"{name_of(model.config)}.safetensors"
    save_natural(path, model, r2=None, card="untrained")
    assert path.name == "natural-large.safetensors"
    assert load_model(path)(torch.zeros(1, 3, 24, 16), 500.0).shape == (1, 3, 24, 16)


@pytest.mark.parametrize("size", [(48, 48), (33, 50)], ids=str)
@pytest.mark.parametrize("config", [TINY_PRIOR, SIZES["natural"]], ids=["tiny", "natural"])
def test_operations_are_counted_right(config, size):
    model = NaturalPrior(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, *size), torch.ones(2)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.convolution] == 2 * model.flops(*size)
    assert counter.get_total_flops() == pytest.approx(6 * model.flops(*size), rel=0.08)  # no gradient of x


def test_scales_take_part_equally_often():
    """A copy of half the side has a quarter of the pixels, and must come up as often as the whole."""
    image = np.zeros((128, 128, 3), np.uint8)
    image[::2] = 255  # stripes, which averaging over two rows makes gray
    pool = ImagePool([image], 32, scales=(1.0, 0.5))
    crops = pool.sample(400, torch.Generator().manual_seed(0))
    whole = (crops.std(dim=(1, 2, 3)) > 0.5).float().mean()
    assert 0.4 < whole < 0.6  # by pixels alone it would be 0.8


def test_bfloat16_computes_all_but_the_output(tmp_path, photos):
    """What runs on GPUs, on a CPU: same path, same weights in float32, nearly the same training."""
    half = train_image_prior([photos], tmp_path / "half", QUICK, TINY_PRIOR, amp=True)
    full = train_image_prior([photos], tmp_path / "full", QUICK, TINY_PRIOR, amp=False)
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=3e-3, rtol=0.1)
    seen = {}
    for name, layer in half.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        assert half(torch.zeros(1, 3, 16, 16), torch.ones(1)).dtype == torch.float32
    assert seen.pop("conv_out") == torch.float32 and set(seen.values()) == {torch.bfloat16}


def test_network_compiles_into_one_graph():
    model = NaturalPrior(TINY_PRIOR)
    nn.init.normal_(model.conv_out.weight)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, sigma), model(x, sigma))


# ------------------------------------------------------------------------------------------------ validation


def shrink(x, sigma, v=0.3):
    """The best denoiser of white images of variance v."""
    return x * v / (v + sigma.view(-1, 1, 1, 1) ** 2)


def white(*shape):
    return 0.3**0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_r2_of_a_known_denoiser():
    """Shrinkage of white images of variance v leaves sigma^2 v / (sigma^2 + v)."""
    for sigma, mse, *_ in measure_r2(shrink, white(50, 3, 24, 24)):
        assert mse == pytest.approx(sigma**2 * 0.3 / (sigma**2 + 0.3), rel=0.03)


def test_psnr_of_a_known_denoiser():
    sigma2 = (2 * 50 / 255) ** 2
    expected = 10 * np.log10(4 / (sigma2 * 0.3 / (sigma2 + 0.3)))
    assert denoising_psnr(shrink, white(20, 3, 32, 32), 50) == pytest.approx(expected, abs=0.05)


def test_size_invariance_tells_borders_from_the_rest():
    images = [white(3, 200, 100), white(3, 40, 300)]  # the second holds no two tiles
    same = size_invariance(shrink, images)
    assert same["images"] == 1 and same["plain"]["difference_db"] == same["interior"]["difference_db"] == 0

    def near_the_border(x, sigma):
        x = shrink(x, sigma)
        x[..., :4, :] = 0
        return x

    found = size_invariance(near_the_border, images)
    assert found["plain"]["difference_db"] > 0.1 and found["interior"]["difference_db"] == 0
    found = size_invariance(lambda x, sigma: shrink(x, sigma) * x.shape[-2] / 96, images)
    assert found["interior"]["difference_db"] < -1
    assert size_invariance(shrink, [white(3, 96, 100)]) is None


def test_validation_takes_the_patch_that_fits_all():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert validate(shrink, [pixels, pixels[:50]], 8, "cpu")["patch"] == 48
    assert validate(shrink, [pixels] * 2, 8, "cpu")["patch"] == 96


def test_image_training_reports_and_logs(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("fastem.training.core.time.monotonic", iter(range(0, 10**6, 11)).__next__)
    told = []
    train_image_prior(
        [photos], tmp_path / "out", replace(QUICK, minutes=1e6, max_steps=2), TINY_PRIOR, report=told.append
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert lines == told and [record["step"] for record in told] == [1, 2]


def test_a_state_file_that_does_not_fit_is_explained(tmp_path):
    train_kernel_denoiser(tmp_path, QUICK, TINY_CHAIN, num_kernels=12)
    with pytest.raises(ValueError, match="training.pt.*another network"):
        train_kernel_denoiser(tmp_path, QUICK, KernelDenoiserConfig(width=6, num_layers=3), num_kernels=12)
    (tmp_path / "training.pt").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match="training.pt"):
        train_kernel_denoiser(tmp_path, QUICK, TINY_CHAIN, num_kernels=12)


def test_reference_chain_is_what_was_trained(tmp_path):
    model = train_kernel_denoiser(tmp_path, QUICK, TINY_CHAIN, num_kernels=12)
    k = torch.from_numpy(motion_kernel(17, 0))[None, None]
    weights, biases, scale = model.as_chain()
    torch.testing.assert_close(reference.denoise_chain(k, torch.tensor([0.01]), weights, biases, scale), model(k, 0.01))


# ------------------------------------------------------------------------------------------ what ships


@pytest.fixture(scope="module")
def shipped():
    """The bundled prior, and the photo of examples/ as `(C, H, W)` in [-1, 1]."""
    photo = io.read_image(Path(__file__).parents[1] / "examples" / "blurred.jpg").pixels
    return load_model("natural").denoiser, torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 127.5 - 1


def test_bundled_prior_is_the_identity_where_there_is_no_noise(shipped):
    model, photo = shipped
    x = photo[None, :, :128, 128:256]
    with torch.no_grad():
        changes = [(model(x, torch.tensor([sigma])) - x).square().mean().sqrt().item() for sigma in (1e-3, 1e-4, 1e-5)]
    assert changes[0] < 1e-3 and changes[1] < 0.2 * changes[0] and changes[2] < 0.2 * changes[1]


def test_bundled_prior_does_as_well_on_large_images_as_on_small_ones(shipped):
    """Where neighbours are there: within 0.05 dB, 192 pixels against tiles of 96."""
    model, photo = shipped
    found = size_invariance(model, [photo[:, 96:288, 128:320]])
    assert abs(found["interior"]["difference_db"]) < 0.05
    assert 0 <= found["plain"]["difference_db"] < 1  # at the borders of tiles neighbours are missing
