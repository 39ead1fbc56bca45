"""Training pictures from wherever they lie: folders, tar shards, image folders with splits and metadata."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fastem import io

HELD_OUT = 1 / 32  # share of the pictures that validate and never train
METADATA = "metadata.jsonl"
VALIDATION_SPLITS = ("validation", "valid", "val")  # folders beside train/

Pictures = list[tuple[str, np.ndarray]]  # name, (H, W, 3) uint8


def read_pictures(paths: Iterable[str | os.PathLike]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and `(H, W, 3)` uint8 pixels of every picture in the given files, folders and tar shards.

    - A folder is read with all folders in it, in the order of their names, tar shards too.
    - A folder that holds `train/` gives the pictures of that alone; other splits beside it stay unread.
    - A folder with a `metadata.jsonl` gives the pictures that its lines name (`"file_name"`, or keys that end so).
    - A tar shard gives its members with the suffix of a picture; labels and captions beside them are passed over.

    Names are relative to what was given. A picture that cannot be read is passed over with a Python warning.

    Raises:
        ValueError: if a shard or metadata is damaged: silence would lose many pictures.
    """
    for path in map(Path, paths):
        if path.is_dir():
            root = path / "train" if (path / "train").is_dir() else path
            for file in _files(root):
                yield from _read(file, file.relative_to(root).as_posix())
        else:
            yield from _read(path, path.name)


def _files(folder: Path) -> Iterator[Path]:
    if (folder / METADATA).is_file():
        yield from _named_in(folder / METADATA)
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        elif path.suffix.lower() in io.IMAGE_SUFFIXES | {".tar"}:
            yield path


def _named_in(metadata: Path) -> Iterator[Path]:
    """The files that a metadata.jsonl names, each once, none of them outside its folder."""
    seen = set()
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            names = [name for key, name in row.items() if key == "file_name" or key.endswith("_file_name")]
            files = [Path(os.path.normpath(name)) for name in names]
        except (ValueError, AttributeError, TypeError):
            raise ValueError(f'{io.shown(metadata)}, line {number}: not a JSON object with a "file_name"') from None
        if not files:
            raise ValueError(f'{io.shown(metadata)}, line {number}: no "file_name"; allowed are also keys that end so')
        for file in files:
            if file.is_absolute() or ".." in file.parts:
                raise ValueError(f"{io.shown(metadata)}, line {number}: {io.shown(file)} lies outside its folder")
            if file not in seen:
                seen.add(file)
                yield metadata.parent / file


def _read(path: Path, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if path.suffix.lower() == ".tar":
        yield from _read_shard(path)
        return
    try:
        yield name, rgb8(io.read_image(path).pixels)
    except io.InputError as error:
        _pass_over(io.shown(path), error)


def _read_shard(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with tarfile.open(path) as shard:
            for member in shard:
                if not member.isfile() or Path(member.name).suffix.lower() not in io.IMAGE_SUFFIXES:
                    continue
                told = f"{io.shown(path)}:{io.shown(member.name)}"
                if member.size > io.MAX_BYTES:
                    _pass_over(told, f"It has {member.size / 1e6:.0f} MB, allowed are {io.MAX_BYTES / 1e6:.0f}")
                    continue
                data = shard.extractfile(member).read()
                try:
                    yield member.name, rgb8(io.decode_image(data).pixels)
                except io.InputError as error:
                    _pass_over(told, error)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{io.shown(path)}: not a whole tar archive ({error}); get it again") from error


def _pass_over(name: str, why: object) -> None:
    warnings.warn(f"{name} is not used for training. {why}", stacklevel=4)


def rgb8(pixels: np.ndarray) -> np.ndarray:
    """`(H, W)` or `(H, W, 3)` of any image type -> `(H, W, 3)` uint8."""
    if pixels.dtype != np.uint8:
        top = 1.0 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
        pixels = (pixels / top * 255).clip(0, 255).round().astype(np.uint8)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def validation_split(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The validation folders that lie beside the `train/` of the given folders."""
    folders = [path for path in map(Path, paths) if (path / "train").is_dir()]
    return [folder / name for folder in folders for name in VALIDATION_SPLITS if (folder / name).is_dir()]


def hold_out(pictures: Pictures, share: float = HELD_OUT) -> tuple[Pictures, Pictures]:
    """`(to train on, to validate on)`: each picture is chosen by a hash of its name, whatever else is in the data.

    At least one validates, unless there is but one picture, which then does both.
    """
    if len(pictures) == 1:
        return pictures, pictures
    places = [int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8]) for name, _ in pictures]
    limit = max(share * 2**64, min(places, default=0) + 1)
    chosen = list(zip(pictures, places, strict=True))
    return [p for p, place in chosen if place >= limit], [p for p, place in chosen if place < limit]


def fingerprint(pixels: np.ndarray) -> str:
    """sha256 of shape and pixels: equal for copies of a picture, whatever their names and file formats."""
    return hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def without(pictures: Pictures, others: Pictures) -> Pictures:
    """The pictures that are not among the others, pixel by pixel; says how many were."""
    known = {fingerprint(pixels) for _, pixels in others}
    kept = [(name, pixels) for name, pixels in pictures if fingerprint(pixels) not in known]
    if len(kept) < len(pictures):
        warnings.warn(f"{len(pictures) - len(kept)} pictures validate and are not used for training", stacklevel=2)
    return kept
