"""Pictures and kernels, in and out of files.

What comes in is not trusted: five formats only, sizes checked before anything is decoded, nothing half-read accepted
in silence. What goes out is complete or absent: temporary file, fsync, rename. Failures are `InputError` (this file
is bad, others may go on) or `OutputError` (nothing can be written), each with a code and a hint.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})
MAX_PIXELS = 50_000_000
MAX_BYTES = 64_000_000
MAX_ASPECT = 100
KERNEL_VIEW = 256  # pixels; kernels are shown enlarged by the largest whole factor that stays within
GRID_VIEW = 1024  # pixels; the same for a grid of kernels
_ZOOM_KEY = b"fastem:zoom"
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
# Tags of IFD0 that describe the file they came from (layout, orientation, embedded profiles), not the photograph.
_FILE_TAGS = frozenset(
    [*range(254, 270), 273, 274, *range(277, 282), 284, 285, *range(288, 294), 297, 301, *range(317, 350)]
    + [*range(512, 533), 700, 33723, 34377, 34675, 59932]
)


class FastemError(Exception):
    """A failure that can be told in one line: `code` for programs, the message and `hint` for people."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.hint = code, hint

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}" + (f". {self.hint}" if self.hint else "")


class InputError(FastemError):
    """One input cannot be used; the others are not concerned."""


class OutputError(FastemError):
    """Results cannot be written (folder missing, read-only, full)."""


@dataclass
class Picture:
    """A decoded picture, upright, with everything of its file that the result should carry.

    Attributes:
        pixels: `(H, W)` gray or `(H, W, 3)` RGB; uint8, uint16, or float32 (nominally [0, 1]); never premultiplied.
        alpha: `(H, W)` of the same dtype, or None.
        icc: the colour profile's bytes, untouched.
        exif: a TIFF structure without orientation, thumbnail and file-layout tags.
        warnings: lines such as "W_NO_END: ...".
        sha256: hexadecimal, of the file.
        format: one of `FORMATS`.
        lossy: whether the file was compressed with losses (JPEG, most WebP, JPEG in TIFF).
        quantization: `(8, 8)` float32, of a JPEG: the steps of its luminance, upright like the pixels; else None.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    warnings: list[str] = field(default_factory=list)
    sha256: str = ""
    format: str = ""
    lossy: bool = False
    quantization: np.ndarray | None = None


# ------------------------------------------------------------------------------------------------------------- reading


def read_image(path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Picture:
    """Reads a PNG, JPEG, WebP, TIFF or BMP; the content decides, not the name.

    EXIF orientation is applied and its tag removed; palette, 1-bit, CMYK and YCbCr become gray or RGB (CMYK through its
    colour profile, with the warning W_CMYK); 16-bit files stay 16-bit.

    Raises:
        InputError: E_VANISHED, E_UNREADABLE, E_TRUNCATED, E_FORMAT, E_TOO_LARGE, E_ANIMATED or E_NONFINITE.
    """
    return decode_image(_read_regular(path, max_bytes), max_pixels=max_pixels)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """`read_image` for bytes that are already in memory."""
    kind = _sniff(data)
    notes: list[str] = []
    ihdr = None
    if kind == "PNG":
        ihdr, data_to_decode = _check_png(data, notes)
    else:
        data_to_decode = data
        if kind == "JPEG" and not _jpeg_has_end(data):
            raise InputError("E_TRUNCATED", "the JPEG stream ends before its end marker")
        if kind == "WEBP" and struct.unpack("<I", data[4:8])[0] + 8 > len(data):
            raise InputError("E_TRUNCATED", "the WebP file is shorter than its header says")
    try:
        picture = _decode(data_to_decode, kind, ihdr, max_pixels, notes)
    except (FastemError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(str(error)) from None
    except Exception as error:  # decoders raise almost anything on broken files
        reason = str(error) or type(error).__name__
        cut = isinstance(error, EOFError) or "truncated" in reason.lower() or any("W_NO_END" in n for n in notes)
        raise InputError("E_TRUNCATED" if cut else "E_UNREADABLE", f"cannot decode this {kind}: {reason}") from error
    _check_finite(picture.pixels)
    picture.warnings += _range_note(picture.pixels)
    picture.sha256, picture.format = hashlib.sha256(data).hexdigest(), kind
    return picture


def _read_regular(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The bytes of a regular file; never waits on a pipe, never reads more than the limit."""
    flags = getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError("E_UNREADABLE", "not a regular file")
            if status.st_size > max_bytes:
                raise _too_large(f"the file has {status.st_size / 1e6:.0f} MB, allowed are {max_bytes / 1e6:.0f}")
            data = file.read(max_bytes + 1)
    except OSError as error:  # gone, unreadable for this user, or a folder by now
        raise InputError("E_VANISHED", f"cannot read the file: {error.strerror or error}") from None
    if len(data) > max_bytes:
        raise _too_large(f"the file grew beyond {max_bytes / 1e6:.0f} MB while it was read")
    return data


def _too_large(message: str) -> InputError:
    return InputError("E_TOO_LARGE", message, "Reduce the picture, or raise --max-megapixels / --max-megabytes")


def _sniff(data: bytes) -> str:
    """The name of the format, from the first bytes."""
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        try:
            frames = getattr(Image.open(io.BytesIO(data), formats=("GIF",)), "n_frames", 1)
        except Exception:
            frames = 1
        if frames > 1:
            raise _animated(frames)
    if not data:
        raise InputError("E_UNREADABLE", "the file is empty")
    Image.init()
    head = data[:32].ljust(32)  # some of the tests below index without looking at the length
    for name, (_, accept) in Image.OPEN.items():  # `accept` looks at the first bytes only; no decoder runs
        if accept and name not in FORMATS and accept(head) is True:
            allowed = ", ".join(FORMATS)
            raise InputError("E_FORMAT", f"{name} files are not read", f"Convert to one of {allowed}")
    raise InputError("E_UNREADABLE", "not a picture in a format that is known here")


def _animated(frames: int) -> InputError:
    return InputError("E_ANIMATED", f"the file holds {frames} frames or pages", "Save the one to restore as a PNG")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InputError("E_UNREADABLE", f"the header says {width} x {height} pixels")
    if width * height > max_pixels:
        limit = f"allowed are {max_pixels / 1e6:.0f} megapixels"
        raise _too_large(f"{width} x {height} is {width * height / 1e6:.0f} megapixels, {limit}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError("E_TOO_LARGE", f"{width} x {height} is longer than {MAX_ASPECT} : 1", "Crop it first")


def _check_finite(pixels: np.ndarray) -> None:
    if pixels.dtype.kind == "f" and not (finite := np.isfinite(pixels)).all():
        bad = np.argwhere(~finite)
        where = f"first at row {bad[0][0]}, column {bad[0][1]}"
        raise InputError("E_NONFINITE", f"{len(bad)} values are NaN or infinite, {where}")


def _range_note(pixels: np.ndarray) -> list[str]:
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind != "f" or (low >= 0 and high <= 1):
        return []
    return [f"W_RANGE: values from {low:.3g} to {high:.3g}; results are clipped to 0..1"]


@dataclass
class _Ihdr:
    width: int
    height: int
    depth: int
    colour: int
    data: bytes  # the joined IDAT chunks


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, payload) of each chunk up to IEND; CRCs are checked."""
    position = 8
    while position < len(data):
        if position + 12 > len(data):
            raise InputError("E_TRUNCATED", f"the PNG ends inside a chunk, at byte {len(data)}")
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, end = data[position + 4 : position + 8], position + 8 + length
        if end + 4 > len(data):
            raise InputError("E_TRUNCATED", f"the PNG ends inside a chunk, at byte {len(data)}")
        if zlib.crc32(data[position + 4 : end]) != struct.unpack(">I", data[end : end + 4])[0]:
            raise InputError("E_UNREADABLE", f"checksum error in the PNG, chunk at byte {position}")
        yield kind, data[position + 8 : end]
        if kind == b"IEND":
            return
        position = end + 4


def _check_png(data: bytes, notes: list[str]) -> tuple[_Ihdr, bytes]:
    """Checks the chunks of a PNG; returns its header and the file, completed by an end chunk if that was missing."""
    header, last, pixels = b"", b"", []
    for kind, payload in _png_chunks(data):
        header = payload if kind == b"IHDR" and not header else header
        if kind == b"IDAT":
            pixels.append(payload)
        last = kind
    if len(header) != 13:
        raise InputError("E_TRUNCATED" if not last else "E_UNREADABLE", "the PNG has no header")
    if last != b"IEND":
        notes.append("W_NO_END: the PNG has no end chunk; it may be incomplete")
        data += struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    return _Ihdr(width, height, depth, colour, b"".join(pixels)), data


def _jpeg_has_end(data: bytes) -> bool:
    """Whether an end marker follows the start of the scan (the one of an embedded thumbnail does not count)."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:
            return True  # not a marker where one should be: the decoder will say so
        if marker == 0xFF:  # padding
            position += 1
        elif marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        else:
            position += 2 + struct.unpack(">H", data[position + 2 : position + 4])[0]
    return False


def _decode(data: bytes, kind: str, ihdr: _Ihdr | None, max_pixels: int, notes: list[str]) -> Picture:
    if ihdr:
        _check_size(ihdr.width, ihdr.height, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own size and metadata warnings; sizes are checked here
        try:
            image = Image.open(io.BytesIO(data), formats=(kind,))
        except Image.UnidentifiedImageError:
            if kind == "TIFF":  # float RGB, planar 16-bit
                return _decode_tiff(data, max_pixels, notes)
            raise
        with image:
            _check_size(*image.size, max_pixels)
            frames = getattr(image, "n_frames", 1)
            if image.format == "MPO":  # a photo followed by its preview or depth map
                notes.append(f"W_FRAMES: the file holds {frames} pictures; the first is used")
            elif frames > 1:
                raise _animated(frames)
            if kind == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8 and len(image.tag_v2[258]) > 1:
                return _decode_tiff(data, max_pixels, notes)  # Pillow would drop the low bytes
            image.load()
            icc, (exif, orientation) = image.info.get("icc_profile"), _exif(image, notes)
            if ihdr and ihdr.depth == 16 and ihdr.colour != 0:
                pixels, alpha = _decode_png16(data, ihdr)
            else:
                pixels, alpha = _split(image, notes)
            if image.mode == "CMYK":
                icc = None  # no longer the profile of these pixels
            if ihdr and alpha is None and "transparency" in image.info and image.mode != "P":
                alpha = _keyed_alpha(pixels, image.info["transparency"], ihdr.depth)
            packed = image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")  # TIFF
            lossy = kind == "JPEG" or packed or _webp_is_lossy(data)
            steps = jpeg_quantization(image)
    if steps is not None and orientation >= 5:  # the orientations that swap rows and columns
        steps = steps.T
    upright = _upright(pixels, orientation), _upright(alpha, orientation)
    return Picture(*upright, icc, exif, notes, lossy=lossy, quantization=steps)


def jpeg_quantization(image: Image.Image) -> np.ndarray | None:
    """`(8, 8)` float32: the quantisation steps of the luminance of an opened JPEG; None for anything else."""
    tables = getattr(image, "quantization", None)
    if not tables or len(first := next(iter(tables.values()))) != 64:
        return None
    return np.array(first, np.float32).reshape(8, 8)


def _webp_is_lossy(data: bytes) -> bool:
    """Whether the pixels of a WebP file are in a VP8 chunk (VP8L is lossless); False for other files."""
    position = 12 if data[8:12] == b"WEBP" else len(data)
    while position + 8 <= len(data):
        if data[position : position + 4] == b"VP8 ":
            return True
        (length,) = struct.unpack("<I", data[position + 4 : position + 8])
        position += 8 + length + length % 2
    return False


def _split(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels `(H, W)` or `(H, W, 3)` and alpha of a loaded Pillow image of any mode."""
    mode = image.mode
    if mode in ("L", "RGB", "F"):
        return np.array(image), None
    if mode == "1":
        return np.array(image.convert("L")), None
    if mode.startswith("I;16"):
        return np.array(image).astype(np.uint16), None
    if mode == "I":
        pixels = np.array(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise InputError("E_FORMAT", "32-bit integer pixels beyond 0..65535", "Save it as 16-bit or as float")
        return pixels.astype(np.uint16), None
    if mode in ("LA", "La"):
        both = np.array(image.convert("LA"))
        return both[..., 0].copy(), both[..., 1].copy()
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and "transparency" in image.info):
        both = np.array(image.convert("RGBA"))
        return both[..., :3].copy(), both[..., 3].copy()
    if mode in ("P", "YCbCr", "RGBX"):
        return np.array(image.convert("RGB")), None
    if mode == "CMYK":
        notes.append("W_CMYK: converted from CMYK to sRGB")
        return np.array(_cmyk_to_srgb(image)), None
    raise InputError("E_FORMAT", f"pixels of the kind {mode} are not read", "Convert the picture to RGB")


def _cmyk_to_srgb(image: Image.Image) -> Image.Image:
    if profile := image.info.get("icc_profile"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # an unusable profile: fall through to the plain conversion
    return image.convert("RGB")


def _keyed_alpha(pixels: np.ndarray, key: int | tuple[int, ...], depth: int) -> np.ndarray:
    """Alpha of a PNG whose tRNS chunk names one transparent gray or colour, given at the depth of the file."""
    top = np.iinfo(pixels.dtype).max
    match = pixels == np.asarray(key, dtype=np.int64) * (top // (2**depth - 1))
    transparent = match.all(axis=-1) if pixels.ndim == 3 else match
    return np.where(transparent, 0, top).astype(pixels.dtype)


def _decode_png16(data: bytes, ihdr: _Ihdr) -> tuple[np.ndarray, np.ndarray | None]:
    """16-bit RGB, gray + alpha and RGBA, of which Pillow keeps the high bytes only."""
    import png  # pypng

    planes = {2: 3, 4: 2, 6: 4}[ihdr.colour]
    _check_inflated_size(ihdr.data, ihdr.width * ihdr.height * planes * 2 + 2 * ihdr.height + 64)
    _, _, rows, _ = png.Reader(bytes=data).read()
    values = np.empty((ihdr.height, ihdr.width * planes), np.uint16)
    for target, row in zip(values, rows, strict=True):
        target[:] = row
    values = values.reshape(ihdr.height, ihdr.width, planes)
    if planes == 3:
        return values, None
    return (values[..., 0] if planes == 2 else values[..., :3]).copy(), values[..., -1].copy()


def _check_inflated_size(data: bytes, limit: int) -> None:
    if len(zlib.decompressobj().decompress(data, limit + 1)) > limit:
        raise InputError("E_UNREADABLE", "the compressed pixels are larger than the header says")


def _decode_tiff(data: bytes, max_pixels: int, notes: list[str]) -> Picture:
    """The TIFFs that Pillow reads at reduced depth or not at all: several channels of 16 bits, or of floats."""
    try:
        import tifffile
    except ImportError:
        hint = "Install the reader with: pip install 'fastem[tiff]'"
        raise InputError("E_FORMAT", "16-bit and float colour TIFFs need the tifffile package", hint) from None

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        if len(tiff.pages) > 1:
            raise _animated(len(tiff.pages))
        page = tiff.pages[0]
        _check_size(page.imagewidth, page.imagelength, max_pixels)
        samples, photometric = page.samplesperpixel, int(page.photometric)
        if page.axes not in ("YX", "YXS", "SYX") or samples > 4 or photometric not in (0, 1, 2):
            raise InputError("E_FORMAT", f"TIFF with axes {page.axes}, {samples} samples, photometric {photometric}")
        if page.dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
            raise InputError("E_FORMAT", f"TIFF with {page.dtype} pixels", "Save it as 8-bit, 16-bit or float")
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if any(offset + count > len(data) for offset, count in segments):
            raise InputError("E_TRUNCATED", "the TIFF ends before its pixels do")
        if page.compression in (8, 32946):  # deflate: nothing else would bound what is inflated
            for offset, count in segments:
                _check_inflated_size(data[offset : offset + count], 2 * max_pixels * samples * page.dtype.itemsize)
        elif page.compression not in (1, 5, 32773):  # none, LZW, PackBits
            raise InputError("E_FORMAT", f"TIFF compression {page.compression!s} is not read", "Save it uncompressed")
        try:
            values = page.asarray(maxworkers=1)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            hint = "Save it uncompressed, or: pip install imagecodecs"
            raise InputError("E_FORMAT", "this TIFF compression needs the imagecodecs package", hint) from None
        extra = [int(kind) for kind in page.extrasamples]
        tags = {code: tag.value for code in (274, 34675) if (tag := page.tags.get(code))}

    values = np.moveaxis(values, 0, -1) if page.axes == "SYX" else values
    values = values.astype(np.float32) if values.dtype.kind == "f" else values
    top = 1.0 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
    colours = 3 if photometric == 2 else 1
    pixels = values if values.ndim == 2 else values[..., :colours]
    pixels = pixels[..., 0] if pixels.ndim == 3 and colours == 1 else pixels
    pixels = top - pixels if photometric == 0 else pixels
    alpha = values[..., colours].copy() if extra[:1] in ([1], [2]) else None
    if extra[:1] == [1]:  # associated: colours are premultiplied
        weight = np.maximum(alpha.astype(np.float64), np.finfo(np.float32).tiny)[..., None]
        restored = (pixels.reshape(*pixels.shape[:2], -1) / weight * top).clip(0, top).reshape(pixels.shape)
        pixels = (restored if values.dtype.kind == "f" else restored.round()).astype(values.dtype)
    orientation = tags.get(274, 1)
    icc = bytes(tags[34675]) if 34675 in tags else None
    return Picture(_upright(pixels, orientation), _upright(alpha, orientation), icc, None, notes)


def _exif(image: Image.Image, notes: list[str]) -> tuple[bytes | None, int]:
    """The metadata of the photograph as a TIFF structure (None if there is none), and the orientation 1..8."""
    try:
        found = image.getexif()
        orientation = found.get(ExifTags.Base.Orientation, 1)
        kept = Image.Exif()
        for tag, value in found.items():
            if tag not in _FILE_TAGS and tag not in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
                kept[tag] = value
        for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if values := found.get_ifd(ifd):
                kept[ifd] = dict(values)
        exif = kept.tobytes().removeprefix(b"Exif\0\0") if len(kept) else None
    except Exception as error:  # metadata is never a reason to lose the picture
        notes.append(f"W_EXIF: metadata dropped, it cannot be read ({type(error).__name__})")
        return None, 1
    return exif, orientation if orientation in range(1, 9) else 1


def _upright(array: np.ndarray | None, orientation: int) -> np.ndarray | None:
    """Turns `(H, W[, C])` as EXIF orientation 1..8 asks."""
    if array is None:
        return None
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


# ------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` when the block ends well, and not at all otherwise.

    A symbolic link at `path` is replaced, not followed. Raises OSError (disk full, no permission) with nothing left.
    """
    path = Path(path)
    temporary = path.parent / f".fastem-{secrets.token_hex(8)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where the file system can."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError:
            pass  # some network file systems refuse; the file itself is synced
        finally:
            os.close(fd)


def write_image(path: str | os.PathLike, picture: Picture) -> None:
    """Writes a PNG: 8-bit for uint8 pixels, 16-bit for uint16 and float32 (clipped to [0, 1]); alpha, profile and
    metadata go with it.

    Raises:
        ValueError: if the name does not end in .png.
        OSError: if it cannot be written; then nothing is left behind.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"pictures are written as PNG, got the name {shown(path)}; let it end in .png")
    encoded = encode_png(picture)
    with atomic_write(path) as file:
        file.write(encoded)


def encode_png(picture: Picture) -> bytes:
    """The bytes of the PNG that `write_image` writes."""
    planes = _stacked(picture)
    buffer = io.BytesIO()
    if planes.dtype == np.uint8:
        image = Image.fromarray(planes[..., 0] if planes.shape[2] == 1 else planes)
        image.save(buffer, "PNG", icc_profile=picture.icc, **({"exif": picture.exif} if picture.exif else {}))
        return buffer.getvalue()

    import png  # pypng; Pillow cannot write more than one channel of 16 bits

    height, width, count = planes.shape
    raw = planes.astype(">u2", order="C").view(np.uint8).reshape(height, width * count * 2)
    filtered = np.empty((height, 1 + raw.shape[1]), np.uint8)
    filtered[:, 0] = 2  # filter type Up: the difference to the row above
    filtered[0, 1:], filtered[1:, 1:] = raw[0], raw[1:] - raw[:-1]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if picture.icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")]
    png.write_chunks(buffer, chunks)
    return buffer.getvalue()


def _stacked(picture: Picture) -> np.ndarray:
    """`(H, W, 1..4)` uint8 or uint16: gray or RGB, then alpha."""
    planes = [picture.pixels if picture.pixels.ndim == 3 else picture.pixels[..., None]]
    if picture.alpha is not None:
        planes.append(picture.alpha[..., None])
    stacked = np.concatenate(planes, axis=-1)
    if stacked.dtype.kind == "f":
        stacked = (stacked.clip(0, 1) * 65535).round().astype(np.uint16)
    return stacked


# ------------------------------------------------------------------------------------------------------------- kernels


def load_kernel(path: str | os.PathLike) -> tuple[np.ndarray, list[str]]:
    """A blur kernel from an .npy file or a picture of it (white on black, linear).

    Returns:
        `(h, w)` float32, non-negative, sums to 1, and warnings: W_KERNEL_SUM when it had to be normalised. The pictures
        that `encode_kernel_png` enlarged are reduced to the size of the kernel again.

    Raises:
        InputError: E_KERNEL for a wrong shape or negative, infinite or vanishing values; those of `read_image`.
    """
    data = _read_regular(path, MAX_BYTES)
    notes: list[str] = []
    is_array = data.startswith(b"\x93NUMPY")
    kernel = _decode_npy(data) if is_array else _decode_kernel_picture(data, notes)
    if kernel.ndim != 2 or not kernel.size or kernel.dtype.kind not in "fiub":
        raise InputError("E_KERNEL", f"a kernel is a 2-D array of numbers, got shape {kernel.shape}, {kernel.dtype}")
    kernel = kernel.astype(np.float64)
    if not np.isfinite(kernel).all():
        raise InputError("E_KERNEL", "the kernel holds NaN or infinite values")
    total = kernel.clip(min=0).sum()
    if not total > 0:
        raise InputError("E_KERNEL", "the kernel has no positive value")
    negative = -kernel.clip(max=0).sum()
    if negative > 1e-3 * total:
        raise InputError("E_KERNEL", f"the kernel has negative values (sum -{negative:.3g}, positive {total:.3g})")
    if is_array and abs(total - 1) > 1e-3:
        notes.append(f"W_KERNEL_SUM: the kernel summed to {total:.4g} and was normalised to 1")
    return (kernel.clip(min=0) / total).astype(np.float32), notes


def _decode_npy(data: bytes) -> np.ndarray:
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if len(shape) != 2 or shape[0] * shape[1] * dtype.itemsize > len(data):
            raise ValueError(f"shape {shape} of {dtype} in a file of {len(data)} bytes")
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, SyntaxError, EOFError, TypeError) as error:
        raise InputError("E_KERNEL", f"not a 2-D array in .npy format: {error}") from None


def _decode_kernel_picture(data: bytes, notes: list[str]) -> np.ndarray:
    picture = decode_image(data)
    notes += picture.warnings
    pixels = picture.pixels.astype(np.float64)
    pixels = pixels.mean(axis=2) if pixels.ndim == 3 else pixels
    if picture.format == "PNG":
        for kind, payload in _png_chunks(data):
            key, _, value = payload.partition(b"\0")
            if kind == b"tEXt" and key == _ZOOM_KEY and value.isdigit() and 1 < int(value) <= min(pixels.shape):
                return pixels[int(value) // 2 :: int(value), int(value) // 2 :: int(value)]
    return pixels


def save_kernel_png(path: str | os.PathLike, kernel: np.ndarray) -> None:
    """Writes what `encode_kernel_png` makes."""
    encoded = encode_kernel_png(kernel)
    with atomic_write(path) as file:
        file.write(encoded)


def encode_kernel_png(kernel: np.ndarray) -> bytes:
    """A picture of a kernel to look at: its peak is white, each value a square of pixels as large as fits in 256.

    The enlargement is noted in the file, so that `load_kernel` gives the original size back (at 8-bit precision).
    """
    buffer, info = io.BytesIO(), PngInfo()
    zoom = kernel_zoom(kernel.shape)
    info.add_text(_ZOOM_KEY.decode(), str(zoom))
    Image.fromarray(kernel_picture(kernel, zoom)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def encode_kernels_png(kernels: np.ndarray) -> bytes:
    """A picture of a grid of kernels `(rows, cols, h, w)`, in place on a grey ground; the peak of each is white."""
    rows, cols, h, w = kernels.shape
    zoom = kernel_zoom((rows * h, cols * w), GRID_VIEW)
    buffer = io.BytesIO()
    Image.fromarray(mosaic([kernel_picture(k, zoom) for row in kernels for k in row], cols)).save(buffer, "PNG")
    return buffer.getvalue()


def kernel_zoom(shape: tuple[int, ...], view: int = KERNEL_VIEW) -> int:
    """The largest whole factor that keeps a kernel of this shape within `view` pixels, at least 1."""
    return max(1, view // max(shape))


def kernel_picture(kernel: np.ndarray, zoom: int) -> np.ndarray:
    """`(h zoom, w zoom)` uint8, the peak at 255."""
    scaled = (kernel / max(float(kernel.max()), 1e-30) * 255).round().clip(0, 255).astype(np.uint8)
    return scaled.repeat(zoom, axis=0).repeat(zoom, axis=1)


def mosaic(pictures: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures of one size, `(h, w)` uint8 each, in rows of `columns` on a mid-grey ground `gap` pixels wide."""
    (h, w), rows = pictures[0].shape, -(-len(pictures) // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap), 128, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = picture
    return sheet


# ------------------------------------------------------------------------------------------------------------ training


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """`(H, W, 3)` uint8 scaled by a factor, antialiased (Lanczos)."""
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def shown(path: str | os.PathLike) -> str:
    """A path for one line of text: control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))
