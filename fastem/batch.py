"""Many files, one after the other: what to read, where to write, and one outcome for each.

Everything that can be known beforehand (no inputs, two inputs for one output, a folder that cannot be written) is found
by `plan_files` and raised before any work. After that nothing about one picture stops the others, and a result is
published whole: all its files are written under temporary names, then renamed, the JSON last.
"""

from __future__ import annotations

import hashlib
import io as bytes_io
import json
import math
import os
import stat
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastem import io
from fastem.engine import Deblurrer, Request
from fastem.env import versions
from fastem.io import FastemError, InputError, OutputError, Picture, shown
from fastem.ops.backend import select, use_backend
from fastem.runtime import ahead, is_out_of_memory
from fastem.synth import degrade, motion_kernel

MIN_SIDE = 8  # pixels
SUFFIXES = {  # what `save` may name -> the files it gives
    "image": (".png",),
    "kernel": (".kernel.npy", ".kernel.png"),
    "kernels": (".kernels.npy", ".kernels.png"),  # a grid of them, where the blur varies
    "mean": (".mean.png",),
    "std": (".std.png",),
    "sheet": (".sheet.png",),
    "json": (".json",),
}
DEFAULT_SAVE = ("image", "kernel", "kernels", "json")
SHEET_HEIGHT = 1024  # pixels; before/after sheets are reduced to it
LONGEST_NAME = 255  # bytes


class PlanError(FastemError):
    """The request as a whole cannot be carried out: contradictory names or folders."""


class NoInputError(FastemError):
    """There is nothing to work on."""


@dataclass(frozen=True)
class Item:
    """One input and the path that its outputs start with (`out/a` for `out/a.png`)."""

    source: Path
    stem: Path

    def outputs(self, save: Iterable[str]) -> dict[str, Path]:
        """Suffix -> path of all that may be written, in the order in which they are published."""
        return {suffix: self.stem.with_name(self.stem.name + suffix) for kind in save for suffix in SUFFIXES[kind]}


@dataclass(frozen=True)
class Plan:
    """Inputs in order, and what is written for each (`save` in the order of `SUFFIXES`, so that the JSON is last)."""

    items: list[Item]
    out: Path
    save: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one input; exactly one per item of the plan.

    Attributes:
        status: "done", "failed" or "skipped".
        outputs: the files there are, by suffix (".png", ".kernel.npy", ...).
        record: what the JSON holds.
        error: for a failure.
    """

    source: Path
    status: str
    outputs: dict[str, Path] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    error: FastemError | None = None

    @property
    def warnings(self) -> list[str]:
        return self.record.get("warnings", [])


Read = Outcome | tuple[Item, Picture]  # an input that was read, or what became of it already
Result = tuple[dict[str, bytes], dict]  # the encoded files by suffix, and the record
Work = Callable[[Iterable[Read]], Iterator[tuple[Read, Result | Exception | None]]]


# ------------------------------------------------------------------------------------------------------------ planning


def plan_files(
    paths: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    save: Collection[str] = DEFAULT_SAVE,
    name_by: str = "stem",
) -> Plan:
    """Finds the inputs, names the outputs, and makes sure that the folder `out` can be written.

    Args:
        paths: files, taken whatever their name, and folders, of which the regular files with the suffix of a picture
            are taken (sorted by name; not recursively, hidden ones not).
        out: output folder; made where it does not exist. Neither an input folder nor inside one.
        save: of "image", "kernel", "kernels" (only where the blur varies), "mean", "std", "sheet", "json".
        name_by: "stem" names the outputs of `a.jpg` `a.png`, ...; "full" `a.jpg.png`, ....

    Raises:
        NoInputError: if there is no input, or none that exists.
        PlanError: E_NAME_CLASH if two outputs, or an output and an input, share a name (on any file system: letter case
            and Unicode composition do not count); E_PATH if `out` lies in an input folder; E_OPTION.
        OutputError: if `out` cannot be made or written.
    """
    if unknown := sorted(set(save) - set(SUFFIXES)):
        raise PlanError("E_OPTION", f"cannot save {', '.join(unknown)}", f"Allowed are {', '.join(SUFFIXES)}")
    if not save:
        raise PlanError("E_OPTION", "nothing to save", f"Name some of {', '.join(SUFFIXES)}")
    if name_by not in ("stem", "full"):
        raise PlanError("E_OPTION", f"outputs cannot be named by {name_by!r}", "Allowed are stem and full")
    paths, out = [Path(path) for path in paths], Path(out)
    sources = list(dict.fromkeys(source for path in paths for source in _expand(path)))
    if not any(source.exists() for source in sources):
        given = ", ".join(shown(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise NoInputError("E_NO_INPUT", f"no pictures found in {given or 'an empty list'}")
    ordered = tuple(kind for kind in SUFFIXES if kind in save)
    items = [Item(source, out / (source.name if name_by == "full" else source.stem)) for source in sources]
    plan = Plan(items, out, ordered)
    _check_folders(paths, out)
    _check_names(plan)
    _make_writable(out)
    return plan


def _expand(path: Path) -> Iterator[Path]:
    """A file as it is; of a folder, its pictures, without those fastem wrote beside them. Nothing is opened."""
    if not path.is_dir():
        yield path
        return
    try:
        names = sorted(os.listdir(path), key=os.fsencode)
    except OSError as error:
        raise NoInputError("E_NO_INPUT", f"cannot list {shown(path)}: {error.strerror}") from None
    for name in names:
        entry = path / name
        if entry.suffix.lower() not in io.IMAGE_SUFFIXES or name.startswith(".") or _is_by_product(name, names):
            continue
        if _is_regular(entry):
            yield entry


BY_PRODUCTS = tuple(s for suffixes in SUFFIXES.values() for s in suffixes if s.endswith(".png") and s != ".png")


def _is_by_product(name: str, names: Collection[str]) -> bool:
    """Whether a file is the kernel, sheet or map of a picture in the same folder: `a.kernel.png` of `a.png`."""
    return any(name.endswith(suffix) and name.removesuffix(suffix) + ".png" in names for suffix in BY_PRODUCTS)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # vanished or unreadable: becomes a failed item, not a silent gap


def _check_folders(paths: list[Path], out: Path) -> None:
    real = out.resolve()
    for path in paths:
        if path.is_dir() and (path.resolve() == real or path.resolve() in real.parents):
            hint = "Choose a folder outside, so that results are not taken for inputs the next time"
            raise PlanError("E_PATH", f"the output folder {shown(out)} lies in the input folder {shown(path)}", hint)


def _check_names(plan: Plan) -> None:
    owners: dict[str, Path] = {}
    inputs = {_same(source.resolve()): source for source in (item.source for item in plan.items)}
    folder = plan.out.resolve()
    for item in plan.items:
        for path in item.outputs(plan.save).values():
            name = _same(folder / path.name)
            hint = "Rename one, or use --name-by full"
            if (other := owners.setdefault(name, item.source)) != item.source:
                both = f"{shown(other)} and {shown(item.source)}"
                raise PlanError("E_NAME_CLASH", f"{both} would both be written to {shown(path)}", hint)
            if name in inputs:
                message = f"the result of {shown(item.source)} would replace the input {shown(inputs[name])}"
                raise PlanError("E_NAME_CLASH", message, "Choose another output folder")


def _same(path: Path) -> str:
    """Equal for paths that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(path)).casefold())


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".fastem-{os.getpid()}.probe"
        with open(probe, "wb") as file:
            file.write(b"probe")
        probe.unlink()
    except OSError as error:
        hint = "Choose another folder with -o"
        raise OutputError("E_OUTPUT", f"cannot write to {shown(out)}: {error.strerror or error}", hint) from None


# ------------------------------------------------------------------------------------------------------------- working


def deblur_files(
    paths: Iterable[str | os.PathLike],
    engine: Callable[..., Any],
    out: str | os.PathLike,
    *,
    save: Collection[str] = DEFAULT_SAVE,
    name_by: str = "stem",
    **options: Any,
) -> Iterator[Outcome]:
    """Plans now (see `plan_files` for what that raises); the outcomes come one by one from `deblur_plan`."""
    return deblur_plan(plan_files(paths, out, save=save, name_by=name_by), engine, **options)


def deblur(image: Any, out: str | os.PathLike | None = None, **options: Any) -> Any:
    """One call for the impatient: restores with a fresh engine.

    Args:
        image: what `Deblurrer` takes. With `out`, a file or a folder of them.
        out: folder for the results, written as `fastem deblur` does.
        options: of `Deblurrer` and of its call (sigma, seed, kernel).

    Returns:
        The `Restoration`; with `out`, the list of `Outcome`, one per file.
    """
    call = {name: options.pop(name) for name in ("sigma", "seed", "kernel") if name in options}
    engine = Deblurrer(**options)
    return engine(image, **call) if out is None else list(deblur_files([image], engine, out, **call))


def deblur_plan(
    plan: Plan,
    engine: Callable[..., Any],
    *,
    sigma: float | None = None,
    seed: int = 0,
    kernel: np.ndarray | None = None,
    skip_existing: bool = False,
    max_pixels: int = io.MAX_PIXELS,
    max_bytes: int = io.MAX_BYTES,
    on_step: Callable[[Item, int, int], None] | None = None,
    batch_size: int | str = 1,
) -> Iterator[Outcome]:
    """Restores the pictures of a plan with a `fastem.engine.Deblurrer`.

    Args:
        sigma: std of the noise in image units (8-bit 5 is 5 / 255); None estimates it for each picture.
        seed: each picture is restored with a seed made from this one and its bytes, so the result depends neither on
            the order nor on the company.
        kernel: `(h, w)`, for a known blur.
        skip_existing: leave inputs alone whose JSON tells of the same bytes, configuration, seed, sigma and kernel.
        max_pixels, max_bytes: larger inputs fail with E_TOO_LARGE.
        on_step: called with (item, steps done, steps in all); of a batch, with its first item.
        batch_size: pictures of one size that are restored together; "auto" is 1 on a CPU and what fits on a GPU. Files
            are then read while others are restored (`Deblurrer.map`).

    Raises:
        OutputError: when a result cannot be written (disk full, folder gone). Earlier ones stay; this one is absent.
    """
    given = {
        "config": engine.config,
        "seed": seed,
        "sigma": None if sigma is None else sigma * 255,
        "kernel_sha256": None if kernel is None else _sha256(np.ascontiguousarray(kernel, np.float32).tobytes()),
    }
    running = _running(engine.config)

    def finished(picture: Picture, own_seed: int, result: Any, seconds: float) -> tuple[dict[str, bytes], dict]:
        files = _deblurred_files(plan.save, picture, result)
        record = {
            "config": engine.config,
            "seed": seed,
            "item_seed": own_seed,
            "sigma": _number(result.sigma * 255),  # grey levels
            "sigma_estimated": sigma is None,
            "kernel_size": list(result.kernel.shape),
            "kernel_given": kernel is not None,
            "varying": result.kernels is not None,  # whether kernels that vary were found and kept
            "kernel_grid": None if result.kernels is None else list(result.kernels.shape[:2]),  # rows, columns
            "reblur": _number(result.reblur),  # chi^2: about 1 where kernel, image and sigma explain the input
            "seconds": round(seconds, 3),
            **running,
            "warnings": [*picture.warnings, *result.warnings],
        }
        return files, record

    def restore(item: Item, picture: Picture) -> tuple[dict[str, bytes], dict]:
        start = time.monotonic()
        own_seed = item_seed(seed, picture.sha256)
        steps = {} if on_step is None else {"on_step": lambda done, total: on_step(item, done, total)}
        result = engine(
            picture.pixels, sigma=sigma, seed=own_seed, kernel=kernel, lossy=picture.lossy,
            quantization=picture.quantization, **steps,
        )  # fmt: skip
        return finished(picture, own_seed, result, time.monotonic() - start)

    def restore_together(entries: Iterable[Read]) -> Iterator[tuple[Read, Result | Exception | None]]:
        """The entries in order, each with what became of it; runs ahead of what it gives by a few batches."""
        begun: deque[Read] = deque()  # given to the engine, or between such
        start = time.monotonic()

        def requests() -> Iterator[Request]:
            for entry in entries:
                begun.append(entry)
                if not isinstance(entry, Outcome):
                    picture = entry[1]
                    own_seed = item_seed(seed, picture.sha256)
                    yield Request(picture.pixels, sigma, own_seed, picture.lossy, picture.quantization)

        def told(done: int, total: int) -> None:
            if on_step is not None:
                on_step(next(entry[0] for entry in begun if not isinstance(entry, Outcome)), done, total)

        for result in engine.map(requests(), batch_size=batch_size, kernel=kernel, on_step=told):
            while isinstance(begun[0], Outcome):
                yield begun.popleft(), None
            entry, seconds = begun.popleft(), time.monotonic() - start
            if not isinstance(result, Exception):
                picture = entry[1]
                result = finished(picture, item_seed(seed, picture.sha256), result, seconds)
            yield entry, result
            start = time.monotonic()
        for entry in begun:
            yield entry, None

    if batch_size == 1 or batch_size == "auto" and engine.config["device"] == "cpu":
        return _run(plan, _one_by_one(restore), given, skip_existing, max_pixels, max_bytes)
    return _run(plan, restore_together, given, skip_existing, max_pixels, max_bytes, threads=2)


def degrade_plan(
    plan: Plan,
    *,
    sigma: float,
    kernel: np.ndarray | None = None,
    kernel_size: int = 33,
    family: str = "shake",
    boundary: str = "circular",
    seed: int = 0,
    bits: int | None = None,
    max_pixels: int = io.MAX_PIXELS,
    max_bytes: int = io.MAX_BYTES,
) -> Iterator[Outcome]:
    """Blurs the pictures of a plan and adds noise: a test set whose kernels and noise are known.

    Args:
        sigma: std of the noise in image units, before clipping and rounding.
        kernel: the same for all; None draws one per picture (`motion_kernel(kernel_size, ..., family)`).
        boundary: "circular" or "valid", see `fastem.synth.degrade`.
        bits: 8 or 16 per channel; None keeps those of the input (float becomes 16).

    Raises: as `deblur_plan`.
    """

    def blur(item: Item, picture: Picture) -> tuple[dict[str, bytes], dict]:
        own_seed = item_seed(seed, picture.sha256)
        k = motion_kernel(kernel_size, own_seed, family) if kernel is None else kernel
        h, w = k.shape
        height, width = picture.pixels.shape[:2]
        if height < h + MIN_SIDE or width < w + MIN_SIDE:
            message = f"{width} x {height} pixels are too few for a kernel of {w} x {h}"
            raise InputError("E_TOO_SMALL", message, "Use a smaller --kernel-size")
        blurred = degrade(picture.pixels, k, sigma, own_seed, boundary)
        alpha = picture.alpha
        if alpha is not None and boundary == "valid":
            alpha = alpha[h - 1 - h // 2 : height - h // 2, w - 1 - w // 2 : width - w // 2]
        depth = bits or (8 if picture.pixels.dtype == np.uint8 else 16)
        stored = replace(
            picture,
            pixels=_quantised(blurred, depth),
            alpha=None if alpha is None else _quantised(_unit(alpha), depth),
        )
        files = _named(plan.save, image=lambda: io.encode_png(stored), kernel=k)
        record = {
            "seed": seed,
            "item_seed": own_seed,
            "sigma": _number(sigma * 255),  # grey levels
            "kernel_size": [h, w],
            "kernel_family": family if kernel is None else None,
            "boundary": boundary,
            "clipped": _number(np.mean((blurred < 0) | (blurred > 1))),  # share of the values
            "warnings": list(picture.warnings),
        }
        return files, record

    return _run(plan, _one_by_one(blur), {}, False, max_pixels, max_bytes)


def item_seed(seed: int, sha256: str) -> int:
    """The seed of one picture, 63 bits, from the user's seed and the content of the file."""
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _one_by_one(job: Callable[[Item, Picture], Result]) -> Work:
    def work(entries: Iterable[Read]) -> Iterator[tuple[Read, Result | Exception | None]]:
        for entry in entries:
            if isinstance(entry, Outcome):
                yield entry, None
                continue
            try:
                result = job(*entry)
            except Exception as error:
                result = error
            yield entry, result

    return work


def _run(
    plan: Plan,
    work: Work,
    given: dict,
    skip_existing: bool,
    max_pixels: int,
    max_bytes: int,
    threads: int = 0,
) -> Iterator[Outcome]:
    """Reads, works and publishes; `work` gives, in order, each entry that was read with its result.

    `given` is everything besides the input that decides a result; its hash tells finished work from other work.
    With `threads`, files are read ahead of the work.
    """
    request = _sha256(json.dumps(given, sort_keys=True).encode())

    def read(item: Item) -> Read:
        outputs = item.outputs(plan.save)
        try:
            _check_targets(outputs.values())
            picture = io.read_image(item.source, max_pixels=max_pixels, max_bytes=max_bytes)
            if skip_existing and _is_done(outputs, request, picture.sha256):
                return Outcome(item.source, "skipped", {s: path for s, path in outputs.items() if path.is_file()})
            height, width = picture.pixels.shape[:2]
            if min(height, width) < MIN_SIDE:
                message = f"{width} x {height} pixels; {MIN_SIDE} on each side is the least"
                raise InputError("E_TOO_SMALL", message)
        except Exception as error:
            return Outcome(item.source, "failed", error=_classified(error))
        return item, picture

    entries = ahead(plan.items, read, threads=threads, most=2 * threads) if threads else map(read, plan.items)
    for entry, result in work(entries):
        if isinstance(entry, Outcome):
            yield entry
            continue
        item, picture = entry
        if isinstance(result, Exception):
            yield Outcome(item.source, "failed", error=_classified(result))
            continue
        files, record = result
        outputs = item.outputs(plan.save)
        height, width = picture.pixels.shape[:2]
        record = {
            "input": {
                "name": shown(item.source.name),
                "sha256": picture.sha256,
                "format": picture.format,
                "width": width,
                "height": height,
                "channels": 1 if picture.pixels.ndim == 2 else 3,
                "bits": 8 * picture.pixels.dtype.itemsize,
                "alpha": picture.alpha is not None,
            },
            **record,
            "versions": versions(),
            "request": request,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "outputs": {
                suffix: {"name": shown(outputs[suffix].name), "sha256": _sha256(data)} for suffix, data in files.items()
            },
        }
        if ".json" in outputs:
            files[".json"] = (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()
        outdated = [path for suffix, path in outputs.items() if suffix not in files]
        _publish({outputs[suffix]: data for suffix, data in files.items()}, outdated)
        yield Outcome(item.source, "done", {suffix: outputs[suffix] for suffix in files}, record)


def _check_targets(paths: Iterable[Path]) -> None:
    for path in paths:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise InputError("E_PATH", f"the name of the result is longer than {LONGEST_NAME} bytes", "Rename the file")
        if path.is_dir():
            raise InputError("E_PATH", f"{shown(path)} is a folder", "Choose another output folder")


def _is_done(outputs: dict[str, Path], request: str, sha256: str) -> bool:
    """Whether the JSON tells of this input and request, and all files are there; the grid only where it says so."""
    try:
        record = json.loads(outputs[".json"].read_bytes())
        same = record["input"]["sha256"] == sha256 and record["request"] == request
        wanted = [path for s, path in outputs.items() if s not in SUFFIXES["kernels"] or record["varying"]]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return same and all(path.is_file() for path in wanted)


def _publish(files: dict[Path, bytes], outdated: Sequence[Path]) -> None:
    """Writes all files under temporary names, then renames them in order; if writing fails nothing has changed.

    What an earlier result left under the names `outdated` goes.
    """
    try:
        with ExitStack() as stack:
            for path, data in reversed(files.items()):  # the stack unwinds from the last to the first
                file = stack.enter_context(io.atomic_write(path))
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in outdated:
            path.unlink(missing_ok=True)
    except OSError as error:
        hint = "Free some space or choose another folder; finished results are complete"
        folder = shown([*files, *outdated][0].parent)
        raise OutputError("E_OUTPUT", f"cannot write to {folder}: {error.strerror or error}", hint) from None


def _classified(error: Exception) -> FastemError:
    """Every failure of one item, with a code."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FastemError):
        classified = error
    elif is_out_of_memory(error):
        if isinstance(error, MemoryError) and error.args:  # refused by fastem.runtime, with numbers
            classified = InputError("E_OOM", reason, "Use fewer --particles or a smaller picture")
        else:
            hint = "Use a smaller picture, fewer --particles, or evaluate the network on tiles: --tile 256"
            classified = InputError("E_OOM", "not enough memory for this picture", hint)
    elif isinstance(error, ArithmeticError):
        classified = InputError("E_NUMERIC", reason)
    elif isinstance(error, ValueError):
        classified = InputError("E_INPUT", reason)
    else:
        hint = "This is a defect of the program; --debug shows where it happened"
        classified = InputError("E_INTERNAL", f"{type(error).__name__}: {reason}", hint)
    if classified is not error:
        classified.__cause__ = error
    return classified


# -------------------------------------------------------------------------------------------------- files and records


def _deblurred_files(save: Collection[str], picture: Picture, result: Any) -> dict[str, bytes]:
    restored = replace(picture, pixels=result.image)
    return _named(
        save,
        image=lambda: io.encode_png(restored),
        kernel=result.kernel,
        kernels=result.kernels,
        mean=lambda: io.encode_png(replace(picture, pixels=_like(picture.pixels, result.mean()))),
        std=lambda: io.encode_png(Picture(_quantised(_like(np.empty((0, 0), np.float32), result.std()), 16))),
        sheet=lambda: _sheet(picture.pixels, result.image, result.kernel),
    )


def _named(
    save: Collection[str], *, kernel: np.ndarray, kernels: np.ndarray | None = None, **encoders: Callable[[], bytes]
) -> dict[str, bytes]:  # fmt: skip
    """Suffix -> bytes of what is to be saved; the JSON is added later, when the rest is known."""
    files = {}
    for kind in save:
        if kind == "kernel":
            files[".kernel.npy"], files[".kernel.png"] = _npy(kernel), io.encode_kernel_png(kernel)
        elif kind == "kernels" and kernels is not None:
            files[".kernels.npy"], files[".kernels.png"] = _npy(kernels), io.encode_kernels_png(kernels)
        elif kind in encoders:
            files[SUFFIXES[kind][0]] = encoders[kind]()
    return files


def _npy(values: np.ndarray) -> bytes:
    buffer = bytes_io.BytesIO()
    np.save(buffer, np.asarray(values, np.float32))
    return buffer.getvalue()


def _like(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`(H, W, C)` float in [0, 1] -> gray or colour and dtype of `pixels`."""
    values = values.mean(axis=2) if pixels.ndim == 2 else values
    return values.astype(np.float32) if pixels.dtype.kind == "f" else _quantised(values, 8 * pixels.dtype.itemsize)


def _unit(values: np.ndarray) -> np.ndarray:
    return values if values.dtype.kind == "f" else values.astype(np.float64) / np.iinfo(values.dtype).max


def _quantised(values: np.ndarray, bits: int) -> np.ndarray:
    return (values.clip(0, 1) * (2**bits - 1)).round().astype(np.uint8 if bits == 8 else np.uint16)


def _sheet(before: np.ndarray, after: np.ndarray, kernel: np.ndarray, gap: int = 8) -> bytes:
    """Blurred, restored and kernel side by side on white, 8-bit, at most SHEET_HEIGHT pixels high."""
    height, width = before.shape[:2]
    scale = min(1.0, SHEET_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    panels = []
    for pixels in (before, after):
        image = Image.fromarray(_quantised(_unit(pixels), 8)).convert("RGB")
        panels.append(image.resize(size, Image.Resampling.LANCZOS) if scale < 1 else image)
    zoom = io.kernel_zoom(kernel.shape, min(size[1], SHEET_HEIGHT // 2))
    panels.append(Image.fromarray(io.kernel_picture(kernel, zoom)).convert("RGB"))
    width, height = sum(panel.width for panel in panels) + 2 * gap, max(panel.height for panel in panels)
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width + gap
    buffer = bytes_io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _running(config: dict) -> dict:
    """What carries out the work: recorded because it decides the last digits."""
    device = torch.device(config["device"])
    with use_backend(config["backend"]):
        backend = select("wiener_guidance", [torch.empty(1, device=device)])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "backend": str(backend), "threads": torch.get_num_threads()}


def _number(value: float) -> float | None:
    """Six digits; None where JSON has no number for it."""
    return float(f"{float(value):.6g}") if math.isfinite(value) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
