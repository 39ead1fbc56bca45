"""The one gate for weights: files in, frozen networks out, and nothing in between is trusted.

A weights file is hostile until shown otherwise: no code in it runs, its size bounds the memory it takes, and
only dense, finite float tensors with the names and shapes of the network come through.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import pickletools
import zipfile
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import BinaryIO, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fastem.io import atomic_write
from fastem.models.eps import DenoiserEps, EpsModel, UNetEps
from fastem.models.natural import NaturalConfig, NaturalPrior
from fastem.models.unet import UNet, UNetConfig

MAX_BYTES = 4 << 30
MAX_NAMES, MAX_NAME = 20_000, 200  # tensors in a file, characters of a name
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SUFFIXES = (".safetensors", ".pt", ".pth")
NATURAL, UNET = PRIORS = ("fastem-natural-1", "fastem-unet-1")  # values of "format" in the metadata
PIN = "content_sha256"  # metadata entry of our own files: hash of everything else in them

# A state dict needs these and nothing more. Checked before torch's own weights_only list, which is longer.
PICKLE_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
PICKLE_GLOBALS |= {f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double")}
OTHER_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
MAX_PICKLE = 16 << 20  # names and shapes; the numbers are separate members


class CheckpointError(ValueError):
    """Weights that cannot or must not be used. One line: what, given, allowed, what to do."""

    code = "E_CHECKPOINT"


class Checkpoint(NamedTuple):
    """State dict of CPU tensors as stored, metadata (decoded where fastem wrote it), sha256 of the file."""

    state_dict: dict[str, Tensor]
    metadata: dict
    sha256: str


# --- reading --------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, *, max_bytes: int = MAX_BYTES, trust_on_first_use: bool = False) -> Checkpoint:
    """Reads a `.safetensors`, `.pt` or `.pth` state dict.

    The sha256 pinned beside the file, `{"sha256": "..."}` in `<file name>.json`, is checked first; files written
    by `save_safetensors` carry a pin of their own. With `trust_on_first_use` a missing `.json` is written.

    Raises:
        CheckpointError: for whatever is wrong with the file.
    """
    path = Path(path)
    try:
        if not path.is_file():  # also false for devices and pipes, which must not be opened
            raise CheckpointError("no such file")
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"weights are {', '.join(SUFFIXES)} files, got suffix {_quoted(path.suffix)}")
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{size} bytes are more than the {max_bytes} allowed; raise max_bytes to load it")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            pinned = _check_sidecar(path, sha256)
            if path.suffix == ".safetensors":
                state_dict, metadata = _read_safetensors(path)
            else:
                state_dict, metadata = _read_torch(file, size), {}
        check_tensors(state_dict)
        if str(metadata.get("format", "")).startswith("fastem-"):
            metadata = _check_content(state_dict, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{_quoted(path)}: {error}") from error
    except Exception as error:  # the parsers of hostile files raise nearly anything
        raise CheckpointError(f"{_quoted(path)}: cannot be read ({_one_line(error)}); {_REPLACE}") from error
    if trust_on_first_use and not pinned:
        with atomic_write(_sidecar(path)) as file:
            file.write(json.dumps({"sha256": sha256}).encode())
    return Checkpoint(state_dict, metadata, sha256)


_REPLACE = "the file is damaged or no state dict: get it again from its source"


def _read_torch(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """State dict of a zip written by `torch.save`, after a look at its members and at its pickle."""
    file.seek(0)
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            "not a zip archive: truncated, or written before torch 1.6; if you trust it, convert it by "
            "torch.save(torch.load(old, weights_only=True), new)"
        )
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError("has compressed members, which can expand without bound; re-save it with torch.save")
        if sum(member.file_size for member in members) > size:
            raise CheckpointError(f"members claim more than the {size} bytes of the file; {_REPLACE}")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].filename.split("/")[1:] != ["data.pkl"]:
            raise CheckpointError("its members are not those of torch.save; save the state dict alone with it")
        if pickles[0].file_size > MAX_PICKLE:
            raise CheckpointError(f"its pickle of {pickles[0].file_size} bytes is larger than the {MAX_PICKLE} allowed")
        _check_pickle(archive.read(pickles[0]))
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_pickle(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        refused = argument if opcode.name == "GLOBAL" and argument not in PICKLE_GLOBALS else None
        if opcode.name in OTHER_CALLS:
            refused = opcode.name
        if refused:
            raise CheckpointError(
                f"its pickle wants {_quoted(refused)}, which a state dict of float tensors does not need; nothing was "
                "run; if you trust it, save its state dict alone: torch.save(model.state_dict(), path)"
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def check_tensors(state_dict: Mapping[str, Tensor], *, own_storage: bool = True) -> None:
    """Raises `CheckpointError` unless every entry is a dense, finite float tensor that owns exactly its storage."""
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise CheckpointError("not a state dict: a dictionary from names to tensors is needed")
    if len(state_dict) > MAX_NAMES:
        raise CheckpointError(f"{len(state_dict)} tensors are more than the {MAX_NAMES} allowed")
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise CheckpointError(f"tensor names are strings of at most {MAX_NAME} characters, got {_quoted(name)}")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{_quoted(name)} is a {type(tensor).__name__}, not a tensor: save the state dict alone, "
                "torch.save(model.state_dict(), path)"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise CheckpointError(f"{_quoted(name)} is sparse, quantised or without data; only dense ones are allowed")
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{_quoted(name)} is {tensor.dtype}; allowed are {', '.join(map(str, FLOATS))}")
        stored = tensor.untyped_storage().nbytes()
        if own_storage and not (tensor.is_contiguous() and stored == tensor.numel() * tensor.element_size()):
            raise CheckpointError(
                f"{_quoted(name)} of shape {tuple(tensor.shape)} does not fill its storage of {stored} bytes exactly; "
                "re-save it with contiguous clones of the tensors"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{_quoted(name)} holds NaN or infinity; {_REPLACE}")


# --- pins -----------------------------------------------------------------------------------------------------


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _check_sidecar(path: Path, sha256: str) -> bool:
    """Whether a `.json` beside the file pins it; raises if it pins something else."""
    sidecar = _sidecar(path)
    if not sidecar.exists():
        return False
    try:
        pinned = json.loads(sidecar.read_bytes())["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f'{_quoted(sidecar.name)} beside it holds no {{"sha256": "..."}}; repair or remove it'
        raise CheckpointError(reason) from error
    if pinned != sha256:
        raise CheckpointError(
            f"sha256 is {sha256}, but {_quoted(sidecar.name)} pins {_quoted(pinned)}: the file was changed or damaged; "
            "get it again, or remove the pin if the change was meant"
        )
    return True


def content_sha256(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Hash of names, dtypes, shapes, numbers and metadata, whatever the order in the file."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_content(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict:
    rest = {name: value for name, value in metadata.items() if name != PIN}
    if content_sha256(state_dict, rest) != metadata.get(PIN):
        raise CheckpointError(f"content does not match the hash in its metadata: {_REPLACE}")
    return {name: value if name == "format" else json.loads(value) for name, value in rest.items()}


# --- writing --------------------------------------------------------------------------------------------------


def save_safetensors(path: str | Path, state_dict: Mapping[str, Tensor], *, format: str, config: dict, **extra) -> None:
    """Writes weights with what is needed to rebuild the network, and a pin over all of it, atomically.

    Args:
        format: "fastem-..."; tells loaders what `config` describes.
        config: JSON-able, stored as metadata like every entry of `extra` (such as `r2` and `card`).
    """
    if not format.startswith("fastem-"):
        raise ValueError(f'format must start with "fastem-", got {format!r}: other files carry no pin')
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    check_tensors(tensors)
    metadata = {"format": format} | {name: json.dumps(value) for name, value in {"config": config, **extra}.items()}
    metadata[PIN] = content_sha256(tensors, metadata)
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def save_natural(
    path: str | Path, model: NaturalPrior, *, r2: list[list[float]] | None, card: dict | str, dtype=torch.float16
) -> None:
    """Writes the natural-image prior for `load_model`.

    Args:
        r2: measured `[sigma, mean squared error]` in [-1, 1] units, sigma ascending; see `EpsModel.r2`.
        card: the model card: data, licence, recipe, measured quality.
        dtype: of the stored weights; loading makes float32 of them.
    """
    DenoiserEps(model, r2=r2)  # refuses a table that could not be loaded
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_safetensors(path, weights, format=NATURAL, config=model.config.to_dict(), r2=r2, card=card)


# --- building networks ----------------------------------------------------------------------------------------


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Copies `state_dict` into `module`, names and shapes equal to the last one; frozen, in eval mode.

    A module on the meta device is given memory (on the CPU) only after the comparison.

    Raises:
        CheckpointError: listing the first 10 missing, unexpected and mis-shaped tensors, and near names.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state_dict]
    unexpected = [name for name in state_dict if name not in wanted]
    mis_shaped = [
        f"{_quoted(name)} {tuple(state_dict[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state_dict and state_dict[name].shape != wanted[name].shape
    ]
    if missing or unexpected or mis_shaped:
        near = [_quoted(name) + _hint(name, unexpected) for name in missing[:10]]
        lists = {"missing": (missing, near), "unexpected": (unexpected, [_quoted(n) for n in unexpected[:10]])}
        lists["mis-shaped"] = (mis_shaped, mis_shaped[:10])
        table = "; ".join(
            f"{len(names)} {kind}: {', '.join(shown)}{', ...' if len(names) > 10 else ''}"
            for kind, (names, shown) in lists.items()
            if names
        )
        raise CheckpointError(f"weights do not fit {type(module).__name__}: {table}; are they of another architecture?")
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device="cpu")
    module.load_state_dict(state_dict)
    return module.eval().requires_grad_(False)


def unet_from_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    new_attention_order: bool = False,
    image_size: int | None = None,
) -> UNet:
    """The raw U-Net of a guided-diffusion state dict, all output channels, float32, frozen.

    Widths, blocks, attention, kind of resampling and conditioning, and channels are read off the tensors; heads and
    their order leave no trace there: see `UNetConfig.from_state_dict`.

    Raises:
        CheckpointError: the tensors are not those of such a network.
    """
    check_tensors(state_dict, own_storage=False)
    try:
        config = UNetConfig.from_state_dict(
            state_dict,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            new_attention_order=new_attention_order,
            image_size=image_size,
        )
    except KeyError as error:
        name = str(error.args[0])
        raise CheckpointError(f"1 missing: {_quoted(name)}{_hint(name, state_dict)}, not a whole ADM U-Net") from error
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"not an ADM U-Net: {_one_line(error)}") from error
    return _build_unet(state_dict, config)


def _build_unet(state_dict: Mapping[str, Tensor], config: UNetConfig) -> UNet:
    try:
        with torch.device("meta"):  # no memory and no initialisation for what is overwritten
            net = UNet(config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"not an ADM U-Net: {_one_line(error)}") from error
    return load_strict(net, state_dict)


def _natural_config(state_dict: Mapping[str, Tensor]) -> NaturalConfig:
    """The configuration of a bare state dict, for images of 3 channels."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    levels = sum(name.startswith("down.") and name.endswith(".weight") for name in shapes)
    return NaturalConfig(
        widths=(shapes["conv_in.weight"][0], *(shapes[f"down.{i}.weight"][0] for i in range(levels))),
        num_blocks=sum(name.startswith("middle.") and name.endswith(".conv1.weight") for name in shapes),
        unshuffle=math.isqrt(shapes["conv_in.weight"][1] // 3),
        embedding=shapes["embed.0.weight"][0],
    )


def _build_natural(state_dict: Mapping[str, Tensor], config: dict | None) -> NaturalPrior:
    try:
        net = NaturalPrior(NaturalConfig.from_dict(config) if config is not None else _natural_config(state_dict))
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"not a natural-image prior: {_one_line(error)}") from error
    return load_strict(net, state_dict)


def load_model(
    source: str | Path | Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    new_attention_order: bool = False,
    image_size: int | None = None,
    torso_dtype: torch.dtype | None = None,
) -> EpsModel:
    """A diffusion prior as `eps = model(x_t, t)` (see `fastem.models.eps`), frozen, float32, in eval mode.

    Args:
        source: a bundled name (`bundled_models()`), a .safetensors, .pt or .pth file, or a state dict. Its tensors
            tell what it is: a guided-diffusion (ADM) U-Net or a natural-image prior.
        num_heads, num_head_channels, new_attention_order, image_size: of a U-Net, where its file does not say.
        torso_dtype: 16-bit blocks of a U-Net; see `UNet.set_torso_dtype`.

    Raises:
        CheckpointError: no such model, or its file is not fit for use.
    """
    if isinstance(source, Mapping):
        check_tensors(source, own_storage=False)
        state_dict, metadata, sha256, told = source, {}, None, "state dict"
    else:
        (state_dict, metadata, sha256), told = read_named(source, PRIORS), source
    kind, config, r2 = (metadata.get(name) for name in ("format", "config", "r2"))
    try:
        if kind == NATURAL or (kind is None and "conv_in.weight" in state_dict):
            model: EpsModel = DenoiserEps(_build_natural(state_dict, config), r2)
        elif kind == UNET:
            model = UNetEps(_build_unet(state_dict, UNetConfig.from_dict(config)), r2)
        elif any(name.startswith("input_blocks.") for name in state_dict):
            net = unet_from_state_dict(
                state_dict,
                num_heads=num_heads,
                num_head_channels=num_head_channels,
                new_attention_order=new_attention_order,
                image_size=image_size,
            )
            model = UNetEps(net)
        else:
            what = f"format {_quoted(kind)}" if kind else f"tensors such as {_quoted(next(iter(state_dict)))}"
            raise CheckpointError(
                f"{what} belong to no known prior; known are ADM U-Nets (input_blocks.0.0.weight, ...) and "
                "natural-image priors (conv_in.weight, ...)"
            )
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{_quoted(told)}: {_one_line(error)}") from error
    if torso_dtype is not None and isinstance(model, UNetEps):
        model.net.set_torso_dtype(torso_dtype)
    model.sha256 = sha256
    return model.to(device)


# --- bundled weights ------------------------------------------------------------------------------------------


def bundled_models(formats: Collection[str] = PRIORS) -> list[str]:
    """Names of the weights that come with the package, of the given formats."""
    folder, found = resources.files("fastem").joinpath("weights"), []
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.endswith(".safetensors"):
            with resources.as_file(entry) as path, safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") in formats:
                    found.append(entry.name.removesuffix(".safetensors"))
    return sorted(found)


def read_named(source: str | Path, formats: Collection[str]) -> Checkpoint:
    """`read_checkpoint` of a bundled name (of one of the formats) or of a path."""
    if isinstance(source, Path) or Path(source).suffix in SUFFIXES or Path(source).name != source:
        return read_checkpoint(source)
    names = bundled_models(formats)
    if source not in names:
        raise CheckpointError(
            f"no bundled model {_quoted(source)}{_hint(source, names)}; bundled: {', '.join(names) or 'none'}; "
            f"other weights are given as a path to a {', '.join(SUFFIXES)} file"
        )
    with resources.as_file(resources.files("fastem").joinpath("weights", f"{source}.safetensors")) as path:
        return read_checkpoint(path)


# --- words ----------------------------------------------------------------------------------------------------


def _quoted(text: object) -> str:
    """On one line, escaped, and not too long."""
    text = repr(str(text))
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}...'"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 2000 else f"{text[:2000]}..."


def _hint(name: str, candidates: Collection[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=1)
    return f" (did you mean {_quoted(near[0])}?)" if near else ""
