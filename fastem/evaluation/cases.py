"""Where the images of a protocol come from: each source lists `Case`s, and a case loads its `Problem` when asked.

Files are found below the folder given with --data, in sorted order. Nothing is executed: pictures go through
`fastem.io`, arrays are read without pickles.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path

import numpy as np

from fastem import io, synth
from fastem.baselines import Problem
from fastem.evaluation.protocol import Protocol, ProtocolError, check_types, settings_of
from fastem.io import FastemError, InputError

BOUNDARIES = ("circular", "valid")
JPEG_BLOCK = 8  # pixels
DRAWN = 7_000_000  # seeds of the random kernels of evaluations start here, far from those of training and tests


@dataclass(frozen=True)
class Case:
    """One observation, the same for every method. `sigma` is in grey levels, None where it is not known."""

    source: str
    set: str  # the folder the image is from
    image: str
    family: str  # of the kernel, or the folder it is from
    kernel: str
    sigma: float | None
    boundary: str
    seed: int
    number: int  # of the image within its source
    load: Callable[[], Problem]

    @property
    def key(self) -> tuple[str, ...]:
        """What tells this case from every other one, as it stands in a CSV file."""
        sigma = "" if self.sigma is None else f"{self.sigma:g}"
        return (self.source, self.set, self.image, self.family, self.kernel, sigma, self.boundary, str(self.seed))


KEY = ("source", "set", "image", "family", "kernel", "sigma", "boundary", "seed")


def list_cases(protocol: Protocol, data: Path, limit: int | None = None) -> list[Case]:
    """All cases of a protocol, images outermost; with `limit` those of so many images per source, evenly spread.

    Raises:
        ProtocolError: if a setting is unknown, no image is found, or two cases cannot be told apart.
    """
    cases: list[Case] = []
    for number, entry in enumerate(protocol.cases):
        settings = {key: value for key, value in entry.items() if key != "source"}
        if entry["source"] not in SOURCES:
            raise ProtocolError(f"unknown source {entry['source']!r}; allowed are {', '.join(SOURCES)}")
        list_source = SOURCES[entry["source"]]
        allowed = settings_of(list_source)
        if unknown := sorted(set(settings) - set(allowed)):
            raise ProtocolError(
                f"source {entry['source']!r}: unknown key {unknown[0]!r}; allowed are {', '.join(allowed)}"
            )
        check_types(settings, allowed, f"source {entry['source']!r}")
        found = list(list_source(data, **settings))
        if not found:
            where = f"[[cases]] number {number + 1} of {protocol.name!r}"
            raise ProtocolError(f"{where} comes to nothing: no images in {data}, or an empty list")
        images = sorted({case.number for case in found})
        kept = set(spread(images, limit or len(images)))
        cases += [case for case in found if case.number in kept]
    key, count = Counter(case.key for case in cases).most_common(1)[0]
    if count > 1:
        raise ProtocolError(
            f"{count} cases of {protocol.name!r} have one name, {' '.join(part for part in key if part)}",
            "Rename a picture or its folder, or make two protocols",
        )
    return cases


def spread(items: list, count: int) -> list:
    """`count` of the items at equal distances, the first among them; all where there are fewer."""
    if count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


# ----------------------------------------------------------------------------------------------------------- sources


def named(read: Callable) -> Callable:
    """A function of a file, its first argument, whose failures name the file."""

    @wraps(read)
    def naming(file: Path, *rest):
        try:
            return read(file, *rest)
        except InputError as error:
            raise FastemError(error.code, f"{io.shown(file)}: {error.args[0]}", error.hint) from None
        except (ValueError, OSError) as error:
            raise ProtocolError(f"{io.shown(file)}: {error}") from None

    return naming


def synthetic(
    data: Path, images: list[str] = ("sharp", "faces"), kernels: list[str] = ("shake",), size: int = 33,
    sigma: list[float] = (5,), boundary: list[str] = ("circular",), seeds: list[int] = (0,), crop: int = 0,
) -> Iterator[Case]:  # fmt: skip
    """Sharp images blurred here. `kernels` are families of `fastem.synth`, or folders of .npy files (with a `/`).

    Image i gets kernel i of a family, or file i modulo their number of those that fit; noise and kernel depend on the
    image's number and the seed alone, so that they are the same at each sigma.
    """
    for edge in boundary:
        if edge not in BOUNDARIES:
            raise ProtocolError(f"unknown boundary {edge!r}; allowed are {', '.join(BOUNDARIES)}")
    files = [file for folder in images for file in picture_files(data / folder)]
    for number, file in enumerate(files):
        for seed in seeds:
            for family in kernels:
                name, kernel = _kernel(data, family, size, number, seed)
                for edge in boundary:
                    for level in sigma:
                        load = partial(_blurred, file, kernel, level / 255, edge, number + 1000 * seed, crop)
                        yield Case(
                            "synthetic", file.parent.name, file.stem, family.rstrip("/"), name, float(level), edge,
                            seed, number, load,
                        )  # fmt: skip


def _kernel(data: Path, family: str, size: int, number: int, seed: int) -> tuple[str, np.ndarray]:
    if not family.endswith("/"):
        drawn = DRAWN + 1000 * seed + number
        try:
            return f"{family}_{drawn}", synth.motion_kernel(size, drawn, family)
        except ValueError as error:
            raise ProtocolError(f"{error}; or a folder of .npy files, with a / at its end") from None
    given = [(f.stem, _read_kernel(f)) for f in sorted((data / family).glob("*.npy"))]
    given = [(name, k) for name, k in given if max(k.shape) <= size]
    if not given:
        raise ProtocolError(f"no kernel of up to {size} pixels in {data / family}")
    name, k = given[(number + seed) % len(given)]
    return name, synth.pad_kernel(k, size)


@named
def _read_kernel(file: Path) -> np.ndarray:
    return io.load_kernel(file)[0]


@named
def _blurred(file: Path, kernel: np.ndarray, sigma: float, boundary: str, seed: int, crop: int) -> Problem:
    x = _centre(_pixels(file), crop)
    y = synth.degrade(x, kernel, sigma, seed, boundary=boundary)
    if boundary == "valid":
        (height, width), (h, w) = x.shape[:2], kernel.shape
        x = x[h - 1 - h // 2 : height - h // 2, w - 1 - w // 2 : width - w // 2]
    return Problem(y, kernel.shape, sigma, boundary == "circular", kernel, x, seed)


def lai_pairs(data: Path, folder: str = "lai_pairs", kernels: str = "kernels", crop: int = 0) -> Iterator[Case]:
    """Sharp and blurred pairs of Lai et al. 2016 with their kernels; noise not known; the interior is scored."""
    for number, file in enumerate(sorted((data / folder).glob("*_kernel*_blurred.png"))):
        match = re.fullmatch(r"(.*)_kernel(\d+)_blurred", file.stem)
        if not match:
            raise ProtocolError(f"{io.shown(file)}: the name is not SCENE_kernelNUMBER_blurred.png")
        scene, index = match.groups()
        kernel, sharp = data / kernels / f"lai_{index}.npy", file.with_name(f"{scene}_sharp.png")
        load = partial(_load_pair, file, sharp, kernel, None, number, crop)
        yield Case("lai_pairs", folder, scene, "lai", kernel.stem, None, "valid", 0, number, load)


def gopro_pairs(data: Path, folder: str = "gopro_pairs", size: int = 33, crop: int = 0) -> Iterator[Case]:
    """Frames with real blur that varies over the image, and sharp ones; neither kernel nor noise is known."""
    for number, file in enumerate(sorted((data / folder).glob("*_blurred.png"))):
        sharp = file.with_name(file.name.replace("_blurred", "_sharp"))
        load = partial(_load_pair, file, sharp, None, size, number, crop)
        name = file.stem.removesuffix("_blurred")
        yield Case("gopro_pairs", folder, name, "real", "unknown", None, "valid", 0, number, load)


@named
def _load_pair(file: Path, sharp: Path, kernel: Path | None, size: int | None, number: int, crop: int) -> Problem:
    x, y = _centre(_pixels(sharp), crop), _centre(_pixels(file), crop)
    if x.shape != y.shape:
        raise ValueError(f"has {y.shape[1]} x {y.shape[0]} pixels, and {sharp.name} {x.shape[1]} x {x.shape[0]}")
    if kernel is None:
        return Problem(y, (size, size), x=x, seed=number, lossy=False)
    k = _read_kernel(kernel)
    return Problem(y, k.shape, kernel=k, x=x, seed=number, lossy=False, border=max(k.shape) // 2)


def fastdiffusionem(data: Path, folder: str = "fastdiffusionem", normalise: bool = True) -> Iterator[Case]:
    """The published samples as `.npz` with H, L, kernel and sigma. Their kernels do not sum to 1: with `normalise`, L
    and sigma are divided by the sum too, which is the same problem with a kernel that does."""
    for number, file in enumerate(sorted((data / folder).glob("sample*.npz"))):
        *_, k, sigma = _arrays(file)
        level = sigma / (float(k.sum()) if normalise else 1.0)
        load = partial(_load_published, file, normalise, number)
        name = file.stem
        yield Case("fastdiffusionem", folder, name, "fdem", name, round(255 * level, 2), "circular", 0, number, load)


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """H, L `(3, H, W)`, kernel and sigma; nothing is unpickled."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            x, y, k = (arrays[name].astype(np.float32) for name in ("H", "L", "kernel"))
            return x, y, k, float(arrays["sigma"])
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        raise ProtocolError(f"{io.shown(file)} is no .npz file of the numbers H, L, kernel and sigma") from None


@named
def _load_published(file: Path, normalise: bool, number: int) -> Problem:
    x, y, k, sigma = _arrays(file)
    k = k.clip(min=0)
    gain = float(k.sum()) if normalise else 1.0
    x, y = (np.ascontiguousarray(a.transpose(1, 2, 0)) for a in (x, y / gain))
    return Problem(y, k.shape, sigma / gain, True, k / k.sum(), x, number)


def photos(
    data: Path, folder: str = "blurred_real", pattern: str = "*", size: int = 45, crop: int = 0
) -> Iterator[Case]:
    """Photographs that were blurred when they were taken: nothing is known but the photo."""
    files = [file for file in picture_files(data / folder) if file.match(pattern)]
    for number, file in enumerate(files):
        load = partial(_load_photo, file, size, number, crop)
        yield Case("photos", folder, file.stem, "real", "unknown", None, "valid", 0, number, load)


@named
def _load_photo(file: Path, size: int, number: int, crop: int) -> Problem:
    picture = io.read_image(file)
    y = _centre(_unit(picture), crop, JPEG_BLOCK if picture.lossy else 1)
    return Problem(y, (size, size), seed=number, lossy=picture.lossy, quantization=picture.quantization)


SOURCES: dict[str, Callable[..., Iterator[Case]]] = {
    "synthetic": synthetic, "lai_pairs": lai_pairs, "fastdiffusionem": fastdiffusionem, "gopro_pairs": gopro_pairs,
    "photos": photos,
}  # fmt: skip


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name."""
    if not folder.is_dir():
        raise ProtocolError(f"there is no folder {folder}; --data names the folder that holds it")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in io.IMAGE_SUFFIXES)


@named
def _pixels(file: Path) -> np.ndarray:
    return _unit(io.read_image(file))


def _unit(picture: io.Picture) -> np.ndarray:
    """`(H, W, 3)` float32 in [0, 1]."""
    pixels = picture.pixels
    x = pixels.astype(np.float32) / (np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1)
    return x if x.ndim == 3 else np.repeat(x[..., None], 3, axis=2)


def _centre(x: np.ndarray, crop: int, grid: int = 1) -> np.ndarray:
    """The middle `crop` x `crop` pixels, or what there is of them, from a multiple of `grid` on; 0 is all."""
    if not crop:
        return x
    top, left = (max((n - crop) // 2, 0) // grid * grid for n in x.shape[:2])
    return np.ascontiguousarray(x[top : top + crop, left : left + crop])
