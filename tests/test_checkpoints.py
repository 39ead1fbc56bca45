"""The weights gate: hostile, damaged and mismatched files end in one CheckpointError, and nothing in them runs."""

from __future__ import annotations

import builtins
import hashlib
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from functools import partial
from importlib import resources

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fastem.models import (
    CheckpointError,
    DenoiserEps,
    NaturalConfig,
    NaturalPrior,
    UNet,
    UNetConfig,
    UNetEps,
    bundled_models,
    checkpoints,
    load_model,
    read_checkpoint,
    save_natural,
    save_safetensors,
    unet_from_state_dict,
)

SUFFIXES = [".pt", ".pth", ".safetensors"]
R2 = [[0.05, 4e-4], [0.5, 1e-2], [5.0, 0.1]]


def randomised(net):
    """Weights that float16 stores exactly, none of them zero."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data = (0.1 * torch.randn_like(parameter)).half().float()
    return net


@pytest.fixture(scope="module")
def prior():
    return randomised(NaturalPrior(NaturalConfig(widths=(8, 12), num_blocks=1, embedding=8)))


@pytest.fixture(scope="module")
def unet():
    return randomised(UNet(UNetConfig((32, 32), 32, num_head_channels=16, attention_levels=(1,))))


def weights():
    return OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(4, dtype=torch.float16))


def torch_file(path, content, **options):
    torch.save(content, path, **options)
    return path


def refused(path, match=None, **options):
    """The message of the error: one line that names the file."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert caught.value.code == "E_CHECKPOINT" and "\n" not in message and path.name in message and len(message) < 3000
    return message


# --- what must work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_reads_state_dicts_and_records_their_hash(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(weights(), path) if suffix == ".safetensors" else torch.save(weights(), path)
    checkpoint = read_checkpoint(str(path))
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.state_dict.keys() == {"a", "b"} and checkpoint.metadata == {}
    assert all(torch.equal(checkpoint.state_dict[name], tensor) for name, tensor in weights().items())


def test_parameters_and_every_float_dtype_load(tmp_path):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    content = {str(dtype): nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes}
    assert len(read_checkpoint(torch_file(tmp_path / "w.pt", content)).state_dict) == 4


def test_natural_prior_round_trip(tmp_path, prior):
    path = tmp_path / "mine.safetensors"
    save_natural(path, prior, r2=R2, card={"data": "none", "licence": "MIT"})
    checkpoint = read_checkpoint(path)
    assert checkpoint.metadata["card"]["licence"] == "MIT" and checkpoint.metadata["r2"] == R2
    assert {tensor.dtype for tensor in checkpoint.state_dict.values()} == {torch.float16}

    model = load_model(path)
    assert isinstance(model, DenoiserEps) and model.channels == 3
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.denoiser.config == prior.config and model.sha256 == checkpoint.sha256
    assert model.r2(0.5) == pytest.approx(1e-2)
    x = torch.randn(2, 3, 9, 10)
    with torch.no_grad():
        expected = DenoiserEps(prior)(x, 50)
    eps = model(x, 50)
    assert not eps.requires_grad
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-5)  # fused convolutions round differently
    assert torch.equal(load_model(prior.state_dict())(x, 50), eps)  # the architecture shows in the shapes


def test_unet_round_trips(tmp_path, unet):
    x = torch.randn(1, 3, 8, 12)
    expected = unet(x, 50.0)[:, :3].detach()
    torch.save({name: tensor.half() for name, tensor in unet.state_dict().items()}, tmp_path / "half.pt")
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    config = unet.config.to_dict()
    save_safetensors(tmp_path / "u.safetensors", unet.state_dict(), format="fastem-unet-1", config=config)
    save_file(unet.state_dict(), tmp_path / "foreign.safetensors", {"format": "pt", "config": "?", "r2": "?"})
    heads = dict(num_head_channels=16)
    for source, options in [
        ("unet.pt", heads),
        ("foreign.safetensors", heads),
        ("u.safetensors", {}),
        ("half.pt", heads),
    ]:
        model = load_model(tmp_path / source, **options)
        assert isinstance(model, UNetEps) and model.channels == 3
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.allclose(model(x, 50.0), expected, rtol=1e-5, atol=1e-6)  # not the rounding of other weights
    assert torch.allclose(load_model(unet.state_dict(), **heads)(x, 50.0), expected, rtol=1e-5, atol=1e-6)
    assert load_model(unet.state_dict(), torso_dtype=torch.bfloat16, **heads).net.torso_dtype == torch.bfloat16


def test_loading_leaves_the_given_state_dict_and_random_numbers_alone(unet, prior):
    before = torch.random.get_rng_state()
    load_model(prior.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)
    state_dict = unet.state_dict()
    load_model(state_dict, num_head_channels=16).net.out[2].bias.data.fill_(7)
    assert not (state_dict["out.2.bias"] == 7).any()


def test_bundled_names(tmp_path, prior, monkeypatch):
    (tmp_path / "weights").mkdir()
    save_natural(tmp_path / "weights" / "natural.safetensors", prior, r2=None, card="none")
    save_safetensors(tmp_path / "weights" / "other.safetensors", weights(), format="fastem-kernel-1", config={})
    monkeypatch.setattr(checkpoints.resources, "files", lambda package: tmp_path)
    assert bundled_models() == ["natural"]
    assert load_model("natural").r2(0.5) == pytest.approx(0.125)
    for name in ("natrual", "other"):
        with pytest.raises(CheckpointError, match=f"'{name}' for this use.*bundled: natural;"):
            load_model(name)
    with pytest.raises(CheckpointError, match="did you mean 'natural'"):
        load_model("natrual")


def test_the_bundled_prior_is_the_one_its_card_describes():
    model = load_model("natural")
    card = resources.files("fastem").joinpath("weights", "README.md").read_text(encoding="utf-8")
    assert model.sha256 in card
    assert len(model.r2_table) == 20


def test_the_bundled_prior_leaves_images_without_noise_alone():
    """Identity as sigma -> 0: what it changes is of the order of the noise it is told."""
    denoiser = load_model("natural").denoiser
    x = torch.nn.functional.interpolate(
        torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), scale_factor=8
    )
    for sigma in (1e-2, 1e-3, 1e-4):
        change = denoiser(2 * x - 1, torch.tensor([sigma])) - (2 * x - 1)
        assert change.square().mean().sqrt() < 2 * sigma
    assert (denoiser(2 * x - 1, torch.tensor([1.0])) - (2 * x - 1)).square().mean().sqrt() > 0.05  # it does denoise


def test_the_bundled_models_load():
    names = bundled_models()
    if not names:
        pytest.skip("no weights in this checkout")
    for name in names:
        assert load_model(name).channels == 3


# --- code -----------------------------------------------------------------------------------------------------


class Evil:
    """Unpickling this touches a file."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return builtins.open, (self.canary, "w")


class Subtle(Evil):
    """The same through `eval`, whose name scanners know, and a partial object, whose name they do not."""

    def __reduce__(self):
        return partial(builtins.eval, f"open({self.canary!r}, 'w')"), ()


class State(nn.Module):
    """Code that would run on restoring the state of an object."""

    def __setstate__(self, state):
        open(state["canary"], "w").close()


def stateful(canary):
    module = State()
    module.canary = str(canary)
    return module


PAYLOADS = {
    "zip": lambda path, canary: torch.save({"a": Evil(canary)}, path),
    "zip-beside-tensors": lambda path, canary: torch.save({**weights(), "c": Evil(canary)}, path),
    "zip-protocol-4": lambda path, canary: torch.save({"a": Evil(canary)}, path, pickle_protocol=4),
    "zip-partial": lambda path, canary: torch.save({"a": Subtle(canary)}, path),
    "zip-nested": lambda path, canary: torch.save({"state_dict": {"layer": [Evil(canary)]}}, path),
    "zip-key": lambda path, canary: torch.save({(Evil(canary), 1): torch.ones(1)}, path),
    "zip-module": lambda path, canary: torch.save(stateful(canary), path),
    "legacy": lambda path, canary: torch.save({"a": Evil(canary)}, path, _use_new_zipfile_serialization=False),
    "bare": lambda path, canary: path.write_bytes(pickle.dumps(Evil(canary))),
    "bare-protocol-0": lambda path, canary: path.write_bytes(pickle.dumps({"a": Evil(canary)}, protocol=0)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_a_file_does_not_run(tmp_path, payload, suffix):
    path, canary = tmp_path / f"evil{suffix}", tmp_path / "canary"
    PAYLOADS[payload](path, canary)
    refused(path)
    with pytest.raises(CheckpointError):
        load_model(path)
    assert not canary.exists()


@pytest.mark.parametrize("payload", ["zip", "zip-partial", "zip-module", "legacy"])
def test_the_payloads_are_live(tmp_path, payload):
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    PAYLOADS[payload](path, canary)
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_refused_names_are_told(tmp_path):
    message = refused(torch_file(tmp_path / "w.pt", {"a": Evil(tmp_path / "canary")}))
    assert "io open" in message or "builtins open" in message
    for harmless in (bytearray(3), torch.device("cpu"), complex(1, 2)):  # on torch's list, of no use to a state dict
        assert "does not need" in refused(torch_file(tmp_path / "w.pt", {"a": harmless}))


# --- sizes and kinds ------------------------------------------------------------------------------------------


def rewritten(source, target, change):
    """Copies a zip member by member through `change(info, data)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            info, data = change(info, old.read(info))
            new.writestr(info, data)
    return target


def test_deflated_members_are_refused(tmp_path):
    source = torch_file(tmp_path / "w.pt", {"a": torch.zeros(1_000_000)})

    def deflate(info, data):
        info.compress_type = zipfile.ZIP_DEFLATED
        return info, data

    bomb = rewritten(source, tmp_path / "bomb.pt", deflate)
    assert bomb.stat().st_size < 20_000 and torch.load(bomb, weights_only=True)["a"].numel() == 1_000_000
    refused(bomb, "compressed members")


def test_members_claiming_more_than_the_file_are_refused(tmp_path):
    data = bytearray(torch_file(tmp_path / "w.pt", weights()).read_bytes())
    entry = data.find(b"PK\x01\x02")  # central directory: compressed and full size at offset 20
    struct.pack_into("<II", data, entry + 20, 1 << 30, 1 << 30)
    (tmp_path / "w.pt").write_bytes(data)
    refused(tmp_path / "w.pt", "members claim more")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["data.pkl", "DATA.PKL", "data/0"])
def test_two_members_of_one_name_are_refused(tmp_path, twin):
    path = torch_file(tmp_path / "w.pt", weights())
    torch.save({"a": Evil(tmp_path / "canary")}, other := tmp_path / "other.pt")
    with zipfile.ZipFile(other) as source, zipfile.ZipFile(path, "a") as target:
        target.writestr(f"w/{twin}", source.read("other/data.pkl"))
    refused(path, "members are not those")


def test_file_size_is_bounded(tmp_path):
    path = torch_file(tmp_path / "w.pt", weights())
    refused(path, "more than the 100 allowed", max_bytes=100)


BAD_TENSORS = {
    "stride-0": lambda: torch.zeros(1).expand(10**6, 10**6),
    "view": lambda: torch.zeros(100)[:5],
    "transposed": lambda: torch.zeros(3, 4).t(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "int": lambda: torch.arange(3),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "nan": lambda: torch.tensor([1.0, float("nan")]),
    "infinity": lambda: torch.tensor([1.0, float("-inf")], dtype=torch.float16),
    "not a tensor": lambda: 3,
    "nested dict": lambda: weights(),
}


@pytest.mark.filterwarnings("ignore")  # "sparse CSR is in beta state"
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_must_be_dense_finite_floats(tmp_path, kind):
    refused(torch_file(tmp_path / "w.pt", {"good": torch.ones(2), "bad": BAD_TENSORS[kind]()}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "csr", "meta", "complex", "int", "nan", "not a tensor"])
def test_state_dicts_of_the_caller_pass_the_same_checks(kind):
    with pytest.raises(CheckpointError, match="'bad'"):
        load_model({"good": torch.ones(2), "bad": BAD_TENSORS[kind]()})


@pytest.mark.parametrize("content", [[1.0], 1.0, {}, {"n" * 500: 1.0}, {3: 1.0}], ids=str)
def test_only_a_dictionary_of_names(tmp_path, content):
    if isinstance(content, dict):
        content = {name: torch.tensor(value) for name, value in content.items()}
    refused(torch_file(tmp_path / "w.pt", content))


@pytest.mark.parametrize("kind", ["int", "bool", "nan", "complex", "float8"])
def test_safetensors_pass_the_same_checks(tmp_path, kind):
    save_file({"a": BAD_TENSORS[kind]()}, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", "'a'")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "torch.save")


def test_not_a_file(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt", "no such file")
    (tmp_path / "weights.bin").write_bytes(b"")
    refused(tmp_path / "weights.bin", "got suffix '.bin'")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "not a zip")
    with pytest.raises(CheckpointError, match=r"line\\nbreak") as caught:
        read_checkpoint(tmp_path / "line\nbreak.pt")
    assert "\n" not in str(caught.value)


# --- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(tmp_path, prior, suffix):
    path = tmp_path / f"w{suffix}"
    save_natural(path, prior, r2=R2, card="") if suffix == ".safetensors" else torch.save(prior.state_dict(), path)
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), len(whole) // 30), len(whole) - 1, len(whole) - 2]:
        path.write_bytes(whole[:cut])
        refused(path)


def flips(data, number, seed=0):
    rng = random.Random(seed)
    for _ in range(number):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def test_bit_flips_break_the_pin_inside_our_files(tmp_path, prior):
    path = tmp_path / "w.safetensors"
    save_natural(path, prior, r2=R2, card="card")
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for flipped in flips(whole, 100):
        path.write_bytes(flipped)
        refused(path)
    for flipped in flips(whole[:header], 100, seed=1):  # names, shapes, configuration, r2 and the pin itself
        path.write_bytes(flipped + whole[header:])
        with pytest.raises(CheckpointError):
            load_model(path)


def test_bit_flips_break_the_pin_beside_other_files(tmp_path, prior):
    path = torch_file(tmp_path / "w.pt", prior.state_dict())
    sha256 = read_checkpoint(path, trust_on_first_use=True).sha256
    assert json.loads((tmp_path / "w.pt.json").read_text()) == {"sha256": sha256}
    whole = path.read_bytes()
    for flipped in flips(whole, 100):
        path.write_bytes(flipped)
        refused(path, "pins")
    path.write_bytes(whole)
    assert read_checkpoint(path).sha256 == sha256


def test_a_pin_is_not_replaced_and_must_be_one(tmp_path):
    path = torch_file(tmp_path / "w.pt", weights())
    pin = tmp_path / "w.pt.json"
    for content in ('{"sha256": "abc"}', "{}", "[", "[" * 100_000, "\xff"):
        pin.write_text(content, encoding="latin-1")
        refused(path, trust_on_first_use=True)
        assert pin.read_text(encoding="latin-1") == content


def test_a_refused_file_is_not_pinned(tmp_path):
    path = torch_file(tmp_path / "w.pt", {"a": Evil(tmp_path / "canary")})
    refused(path, trust_on_first_use=True)
    assert not (tmp_path / "w.pt.json").exists()


@given(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]), st.binary(max_size=300), st.sampled_from(SUFFIXES))
@settings(max_examples=100, deadline=None)
def test_random_bytes(tmp_path_factory, magic, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"random{suffix}"
    path.write_bytes(magic + data)
    refused(path)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_mutated_pickles(tmp_path_factory, data):
    """Changed bytes in the pickle of a good file: it loads or is refused, and raises nothing else."""
    folder = tmp_path_factory.getbasetemp()
    source = torch_file(folder / "good.pt", weights())

    def mutate(info, content):
        if info.filename.endswith("data.pkl"):
            content = bytearray(content)
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        return info, bytes(content)

    try:
        read_checkpoint(rewritten(source, folder / "mutated.pt", mutate))
    except CheckpointError:
        pass


# --- the wrong network ----------------------------------------------------------------------------------------


def test_names_and_shapes_are_strict_and_near_names_are_told(unet):
    state_dict = dict(unet.state_dict())
    state_dict["out.2.bais"] = state_dict.pop("out.2.bias")
    state_dict["middle_block.0.in_layers.2.weight"] = torch.ones(32, 16, 3, 3)
    with pytest.raises(CheckpointError) as caught:
        load_model(state_dict, num_head_channels=16)
    message = str(caught.value)
    assert "1 missing: 'out.2.bias' (did you mean 'out.2.bais'?)" in message
    assert "1 unexpected: 'out.2.bais'" in message
    assert "1 mis-shaped: 'middle_block.0.in_layers.2.weight' (32, 16, 3, 3) instead of (32, 32, 3, 3)" in message


@pytest.mark.parametrize("name", ["time_embed.0.weight", "out.2.weight", "input_blocks.0.0.weight", "out.0.bias"])
def test_any_missing_tensor_is_named(unet, name):
    state_dict = {key: tensor for key, tensor in unet.state_dict().items() if key != name}
    with pytest.raises(CheckpointError, match=f"missing: '{name}'"):
        unet_from_state_dict(state_dict, num_head_channels=16)


def test_only_the_first_ten_are_listed(unet):
    state_dict = {key: tensor for key, tensor in unet.state_dict().items() if not key.startswith("middle_block")}
    with pytest.raises(CheckpointError, match=r"\d+ missing: ('[\w.]+', ){10}\.\.\.; are they"):
        unet_from_state_dict(state_dict, num_head_channels=16)


@pytest.mark.parametrize(
    "extra",
    [
        "input_blocks.999999999.0.weight",
        "output_blocks.4.0.in_layers.0.weight",
        "output_blocks.x.0.conv.weight",
        "label_emb.weight",
    ],
)
def test_blocks_that_form_no_unet(unet, extra):
    with pytest.raises(CheckpointError):
        unet_from_state_dict({**unet.state_dict(), extra: torch.ones(1)}, num_head_channels=16)


def test_foreign_networks_and_configurations(tmp_path, prior):
    with pytest.raises(CheckpointError, match="'module.conv.weight'.*no known prior"):
        load_model({"module.conv.weight": torch.ones(1)})
    path = tmp_path / "w.safetensors"
    config = prior.config.to_dict()
    changes = dict(widths=[8, 16]), dict(widths=[-1]), dict(widths="x"), dict(depth=3), dict(sigma_data="x")
    hostile = dict(num_blocks=10**9), dict(widths=[10**5, 10**5]), dict(embedding=1e300), dict(channels=float("nan"))
    for bad in (*({**config, **change} for change in (*changes, *hostile)), {}, [1], None):
        save_safetensors(path, prior.state_dict(), format="fastem-natural-1", config=bad)
        with pytest.raises(CheckpointError, match="w.safetensors"):
            load_model(path)
    save_safetensors(path, prior.state_dict(), format="fastem-natural-1", config=config, r2=[[1, 2], [0, 1]])
    with pytest.raises(CheckpointError, match="sigma ascending"):
        load_model(path)
    save_safetensors(path, prior.state_dict(), format="fastem-other-1", config=config)
    with pytest.raises(CheckpointError, match="'fastem-other-1' belong to no known prior"):
        load_model(path)


# --- writing --------------------------------------------------------------------------------------------------


def test_nothing_unfit_is_written(tmp_path, prior):
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match="NaN"):
        save_safetensors(path, {"a": torch.tensor([float("nan")])}, format="fastem-x-1", config={})
    with pytest.raises(ValueError, match="sigma ascending"):
        save_natural(path, prior, r2=[[1.0, 1.0], [0.5, 1.0]], card="")
    with pytest.raises(ValueError, match="must start with"):
        save_safetensors(path, weights(), format="pt", config={})
    assert not list(tmp_path.iterdir())


def test_files_are_the_same_for_the_same_weights(tmp_path, prior):
    for name in ("a.safetensors", "b.safetensors"):
        save_natural(tmp_path / name, prior, r2=R2, card="card")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
