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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastem.io import atomic_write
from fastem.models.eps import DenoiserEps, EpsModel, UNetEps
from fastem.models.fused import FusedNaturalPrior
from fastem.models.natural import SIZES, NaturalConfig, NaturalPrior
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
        check_tensors(state_dict, own_storage=path.suffix != ".safetensors")  # there the library lays them out
        if _is_ours(metadata):
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
        names = [member.filename.lower() for member in members]  # torch looks members up whatever their case
        pickles = [member for member, name in zip(members, names, strict=True) if name.endswith(".pkl")]
        twins = len(set(names)) < len(names)
        if twins or len(pickles) != 1 or pickles[0].filename.split("/")[1:] != ["data.pkl"]:
            raise CheckpointError("its members are not those of torch.save; save the state dict alone with it")
        if pickles[0].file_size > MAX_PICKLE:
            raise CheckpointError(f"its pickle of {pickles[0].file_size} bytes is larger than the {MAX_PICKLE} allowed")
        _check_pickle(archive.read(pickles[0]))
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_pickle(data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        refused = argument if opcode.name == "GLOBAL" and argument not in PICKLE_GLOBALS else None
        if opcode.name in OTHER_CALLS or (opcode.name == "PROTO" and argument != 2):  # torch.save writes protocol 2
            refused = f"{opcode.name} {argument or ''}".strip()
        if refused:
            raise CheckpointError(
                f"its pickle wants {_quoted(refused)}, which a state dict of float tensors does not need; nothing was "
                "run; if you trust it, save its state dict alone: torch.save(model.state_dict(), path)"
            )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


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


def _is_ours(metadata: Mapping[str, str]) -> bool:
    return metadata.get("format", "").startswith("fastem-")  # others write "pt" there, or nothing


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
    check_tensors(tensors, own_storage=False)
    metadata = {"format": format} | {name: json.dumps(value) for name, value in {"config": config, **extra}.items()}
    metadata[PIN] = content_sha256(tensors, metadata)
    with atomic_write(path) as file:
        file.write(_in_order(safetensors.torch.save(tensors, metadata)))


def _in_order(data: bytes) -> bytes:
    """The same safetensors file with its header sorted (the library orders metadata at random)."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def save_natural(
    path: str | Path, model: NaturalPrior, *, r2: list[list[float]] | None, card: dict | str, dtype=torch.float16
) -> None:
    """Writes the natural-image prior for `load_model`.

    Args:
        r2: measured `[sigma, mean squared error, cutoff, power]` in [-1, 1] units, sigma ascending; see `EpsModel.r2`
            and `ErrorSpectrum`.
        card: the model card: data, licence, recipe, measured quality.
        dtype: of the stored weights; loading makes float32 of them.
    """
    DenoiserEps(model, r2=r2)  # refuses a table that could not be loaded
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_safetensors(path, weights, format=NATURAL, config=model.config.to_dict(), r2=r2, card=card)


def save_unet(path: str | Path, net: UNet, *, card: dict | str, dtype=torch.float16, **extra) -> None:
    """Writes a U-Net that predicts eps for `load_model`; card and dtype as of `save_natural`, extra: more metadata."""
    UNetEps(net)  # refuses channels that could not be loaded
    weights = {name: tensor.to(dtype) for name, tensor in net.state_dict().items()}
    save_safetensors(path, weights, format=UNET, config=net.config.to_dict(), card=card, **extra)


# --- building networks ----------------------------------------------------------------------------------------


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Copies `state_dict` into `module`, names and shapes equal to the last one; frozen, in eval mode.

    Raises:
        CheckpointError: listing the first 10 missing, unexpected and mis-shaped tensors, and near names.
    """
    _check_fit(module, state_dict)
    module.load_state_dict(state_dict)
    return module.eval().requires_grad_(False)


def _check_fit(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state_dict]
    unexpected = [name for name in state_dict if name not in wanted]
    mis_shaped = [name for name in wanted if name in state_dict and state_dict[name].shape != wanted[name].shape]

    def listed(kind: str, names: list[str], tell) -> list[str]:
        shown = ", ".join(_quoted(name) + tell(name) for name in names[:10])
        return [f"{len(names)} {kind}: {shown}{', ...' if len(names) > 10 else ''}"] if names else []

    def shapes(name: str) -> str:
        return f" {tuple(state_dict[name].shape)} instead of {tuple(wanted[name].shape)}"

    table = listed("missing", missing, lambda name: _hint(name, unexpected))
    table += listed("unexpected", unexpected, lambda name: "")
    table += listed("mis-shaped", mis_shaped, shapes)
    if table:
        kind = type(module).__name__
        raise CheckpointError(f"weights do not fit {kind}: {'; '.join(table)}; are they of another architecture?")


def _build(network: type[nn.Module], config: UNetConfig | NaturalConfig, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The network with its weights; what a hostile configuration asks for is compared before memory is taken."""
    name = network.__name__
    for field, value in config.to_dict().items():
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (isinstance(number, int | float) and 0 <= number < 1e6):
                raise CheckpointError(f"not a {name}: {field} of its configuration is {_quoted(value)}")
    if config.num_blocks * len(config.widths) > len(state_dict):
        raise CheckpointError(f"not a {name}: its configuration has more blocks than the file has tensors")
    try:
        with torch.device("meta"):
            sketch = network(config)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"not a {name}: {_one_line(error)}") from error
    _check_fit(sketch, state_dict)
    if not list(sketch.buffers()):  # then nothing needs initialising: it takes long for large networks
        return load_strict(sketch.to_empty(device="cpu"), state_dict)
    with torch.random.fork_rng(devices=[]):  # loading weights leaves the caller's random numbers alone
        return load_strict(network(config), state_dict)


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
    return _build(UNet, config, state_dict)


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
    ours = _is_ours(metadata)
    kind, config, r2 = (metadata.get(name) if ours else None for name in ("format", "config", "r2"))
    try:
        if kind == NATURAL or (kind is None and "conv_in.weight" in state_dict):
            natural = NaturalConfig.from_dict(config) if kind else _natural_config(state_dict)
            model: EpsModel = DenoiserEps(FusedNaturalPrior(_build(NaturalPrior, natural, state_dict)), r2)
        elif kind == UNET:
            model = UNetEps(_build(UNet, UNetConfig.from_dict(config), state_dict), r2)
        elif kind is None and any(name.startswith("input_blocks.") for name in state_dict):
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
    return model.to(device).eval().requires_grad_(False)


# --- bundled weights ------------------------------------------------------------------------------------------


def _bundled_files() -> dict:
    folder = resources.files("fastem").joinpath("weights")
    files = folder.iterdir() if folder.is_dir() else ()
    return {file.name.removesuffix(".safetensors"): file for file in files if file.name.endswith(".safetensors")}


def bundled_models(formats: Collection[str] = PRIORS) -> list[str]:
    """Names of the weights that come with the package, of the given formats."""

    def format_of(file) -> str | None:
        with resources.as_file(file) as path:
            try:
                with safe_open(path, framework="pt") as weights:
                    return (weights.metadata() or {}).get("format")
            except SafetensorError:
                return None

    return sorted(name for name, file in _bundled_files().items() if format_of(file) in formats)


def read_named(source: str | Path, formats: Collection[str]) -> Checkpoint:
    """`read_checkpoint` of a bundled name (of one of the formats) or of a path."""
    if isinstance(source, Path) or Path(source).suffix in SUFFIXES or Path(source).name != source:
        return read_checkpoint(source)
    if file := _bundled_files().get(source):
        with resources.as_file(file) as path:
            checkpoint = read_checkpoint(path)
        if checkpoint.metadata.get("format") in formats:
            return checkpoint
    if source in SIZES and NATURAL in formats:
        raise CheckpointError(
            f"no weights of {_quoted(source)} are bundled: train them, fastem train image-prior PHOTOS --size {source} "
            f"-o run/, on a GPU best, and give run/{source}.safetensors"
        )
    names = bundled_models(formats)
    raise CheckpointError(
        f"no bundled model {_quoted(source)} for this use{_hint(source, names)}; bundled: "
        f"{', '.join(names) or 'none'}; other weights are given as a path to a {', '.join(SUFFIXES)} file"
    )


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
