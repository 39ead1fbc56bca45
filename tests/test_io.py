"""Pictures in and out: what must survive, what must be refused, what must never be left behind."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from fastem.io import (
    FastemError,
    InputError,
    Picture,
    atomic_write,
    decode_image,
    encode_kernels_png,
    kernel_zoom,
    load_kernel,
    mosaic,
    read_image,
    resize,
    save_kernel_png,
    shown,
    write_image,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 3 % 256, y * 4 % 256, (x + y) * 2 % 256], axis=-1).astype(np.uint8)


def encoded(array: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, format, **options)
    return buffer.getvalue()


def png16(array: np.ndarray) -> bytes:
    height, width, planes = array.shape
    buffer = io.BytesIO()
    writer = png.Writer(width, height, bitdepth=16, greyscale=planes < 3, alpha=planes in (2, 4))
    writer.write(buffer, array.reshape(height, -1))
    return buffer.getvalue()


def chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def code_of(data: bytes, **options) -> str:
    with pytest.raises(InputError) as caught:
        decode_image(data, **options)
    return caught.value.code


# --------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("format, options", [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("shape", [(9, 12, 3), (9, 12)])
def test_lossless_formats_are_exact(tmp_path, format, options, shape):
    if format == "WEBP" and len(shape) == 2:
        pytest.skip("WebP has no gray")
    path = tmp_path / "name.lies"
    path.write_bytes(encoded(noise(*shape), format, **options))
    picture = read_image(path)
    np.testing.assert_array_equal(picture.pixels, noise(*shape))
    assert (picture.format, picture.alpha, picture.warnings) == (format, None, [])
    assert picture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("planes", [1, 2, 3, 4], ids=["gray", "gray+alpha", "rgb", "rgba"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 20)], ids=str)
def test_round_trip_is_exact(tmp_path, dtype, planes, size):
    values = noise(*size, planes, dtype=dtype)
    pixels = values[..., 0] if planes < 3 else values[..., :3]
    alpha = values[..., -1] if planes in (2, 4) else None
    path = tmp_path / "a.png"
    write_image(path, Picture(pixels, alpha, icc=SRGB))
    again = read_image(path)
    assert again.pixels.dtype == dtype and again.icc == SRGB
    np.testing.assert_array_equal(again.pixels, pixels)
    np.testing.assert_array_equal(again.alpha, alpha) if alpha is not None else None
    assert (again.alpha is None) == (alpha is None)
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pixels_in_any_memory_order(tmp_path, dtype):
    values = noise(3, 9, 12, dtype=dtype).transpose(1, 2, 0)
    write_image(tmp_path / "a.png", Picture(values))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, values)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_16_bit_png_of_another_writer(planes):
    values = noise(11, 7, planes, dtype=np.uint16)
    picture = decode_image(png16(values))
    assert picture.pixels.dtype == np.uint16
    np.testing.assert_array_equal(picture.pixels, values[..., 0] if planes < 3 else values[..., :3])
    if planes in (2, 4):
        np.testing.assert_array_equal(picture.alpha, values[..., -1])


def test_our_16_bit_png_for_another_reader(tmp_path):
    values = noise(11, 7, 3, dtype=np.uint16)
    write_image(tmp_path / "a.png", Picture(values))
    width, height, rows, info = png.Reader(filename=str(tmp_path / "a.png")).read()
    assert (width, height, info["bitdepth"], info["planes"]) == (7, 11, 16, 3)
    np.testing.assert_array_equal(np.array([list(row) for row in rows]), values.reshape(11, 21))
    Image.open(tmp_path / "a.png").load()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_is_applied_once(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "Maker"
    if format != "TIFF":  # Pillow does not write GPS data into a TIFF
        exif[0x8825] = {1: "N"}
    data = encoded(smooth(), format, exif=exif, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {}))
    picture = decode_image(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.pixels.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    write_image(tmp_path / "a.png", picture)
    with Image.open(tmp_path / "a.png") as result:
        assert 0x0112 not in result.getexif() and result.getexif()[0x010F] == "Maker"
        assert result.getexif().get_ifd(0x8825).get(1) == ("N" if format != "TIFF" else None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, picture.pixels)


def test_file_layout_of_a_tiff_is_not_carried_as_metadata():
    assert decode_image(encoded(smooth(), "TIFF")).exif is None


def test_broken_exif_costs_the_metadata_only():
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode_image(data).pixels.shape == (48, 64, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colour_profile_bytes_are_carried(tmp_path, format):
    profile = SRGB[:-8] + b"distinct"
    picture = decode_image(encoded(smooth(), format, icc_profile=profile))
    write_image(tmp_path / "a.png", picture)
    assert read_image(tmp_path / "a.png").icc == profile


def test_palette_one_bit_and_transparency():
    rgb = Image.fromarray(smooth()).quantize(16)
    np.testing.assert_array_equal(decode_image(encoded(rgb)).pixels, np.asarray(rgb.convert("RGB")))
    keyed = decode_image(encoded(rgb, transparency=3))
    np.testing.assert_array_equal(keyed.alpha == 0, np.asarray(rgb) == 3)
    bits = noise(9, 10) > 100
    picture = decode_image(encoded(Image.fromarray(bits)))
    np.testing.assert_array_equal(picture.pixels, bits * np.uint8(255))
    gray = noise(9, 10)
    keyed = decode_image(encoded(gray, transparency=int(gray[0, 0])))
    np.testing.assert_array_equal(keyed.alpha == 0, gray == gray[0, 0])
    colour = noise(9, 10, 3)
    keyed = decode_image(encoded(colour, transparency=tuple(map(int, colour[2, 2]))))
    np.testing.assert_array_equal(keyed.alpha == 0, (colour == colour[2, 2]).all(axis=-1))


@pytest.mark.parametrize("planes", [1, 3])
def test_transparent_colour_of_16_bit(planes):
    values = noise(9, 10, planes, dtype=np.uint16)
    key = values[4, 5]
    buffer = io.BytesIO()
    transparent = int(key[0]) if planes == 1 else tuple(map(int, key))
    png.Writer(10, 9, bitdepth=16, greyscale=planes == 1, transparent=transparent).write(buffer, values.reshape(9, -1))
    picture = decode_image(buffer.getvalue())
    np.testing.assert_array_equal(picture.pixels, values.squeeze())
    np.testing.assert_array_equal(picture.alpha, np.where((values == key).all(axis=-1), 0, 65535))


def test_photo_with_a_second_picture_behind_it():
    buffer = io.BytesIO()
    second = Image.fromarray(noise(8, 8, 3))
    Image.fromarray(smooth()).save(buffer, "MPO", save_all=True, append_images=[second])
    picture = decode_image(buffer.getvalue())
    assert picture.pixels.shape == (48, 64, 3) and picture.warnings[0].startswith("W_FRAMES")


def test_colour_under_transparency_is_not_premultiplied():
    rgba = np.concatenate([noise(9, 10, 3), np.full((9, 10, 1), 1, np.uint8)], axis=-1)
    picture = decode_image(encoded(rgba))
    np.testing.assert_array_equal(picture.pixels, rgba[..., :3])
    assert (picture.alpha == 1).all()


def test_cmyk_is_converted_and_said():
    rgb = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    picture = decode_image(encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(picture.pixels.astype(int) - rgb).max() <= 3
    assert any(note.startswith("W_CMYK") for note in picture.warnings)


def test_16_bit_gray_tiff():
    values = noise(9, 10, dtype=np.uint16)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(values), "TIFF")).pixels, values)


def test_float_tiff(tmp_path):
    values = np.random.default_rng(0).random((9, 10), dtype=np.float32)
    picture = decode_image(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(picture.pixels, values)
    write_image(tmp_path / "a.png", picture)
    np.testing.assert_allclose(read_image(tmp_path / "a.png").pixels / 65535, values, atol=1 / 65535)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_float_tiff_names_the_place(bad):
    values = np.zeros((9, 10), np.float32)
    values[4, 7] = bad
    with pytest.raises(InputError, match="1 values are NaN or infinite, first at row 4, column 7") as caught:
        decode_image(encoded(Image.fromarray(values), "TIFF"))
    assert caught.value.code == "E_NONFINITE"


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["uint16", "float32", "rgba"])
def test_deep_colour_tiff(planar, compression, kind):
    tifffile = pytest.importorskip("tifffile")
    values = noise(12, 10, 4 if kind == "rgba" else 3, dtype=np.uint16)
    values = (values / np.float32(65535)).astype(np.float32) if kind == "float32" else values
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    buffer = io.BytesIO()
    extra = {"extrasamples": ["unassalpha"]} if kind == "rgba" else {}
    tifffile.imwrite(
        buffer, stored, photometric="rgb", planarconfig=planar, compression=compression, iccprofile=SRGB,
        extratags=[(274, 3, 1, 6, True)], **extra,
    )  # fmt: skip
    picture = decode_image(buffer.getvalue())
    np.testing.assert_array_equal(picture.pixels, np.rot90(values[..., :3], -1))
    assert picture.icc == SRGB
    if kind == "rgba":
        np.testing.assert_array_equal(picture.alpha, np.rot90(values[..., 3], -1))
    assert code_of(buffer.getvalue()[: len(buffer.getvalue()) - 64]) in ("E_TRUNCATED", "E_UNREADABLE")


def test_deep_tiff_bomb_is_refused_by_its_header():
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((2000, 2000, 3), np.uint16), photometric="rgb", compression="zlib")
    assert code_of(buffer.getvalue(), max_pixels=1_000_000) == "E_TOO_LARGE"


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "data, code",
    [
        (b"", "E_UNREADABLE"),
        (b"hello, this is a text file\n", "E_UNREADABLE"),
        (bytes(1000), "E_UNREADABLE"),
        (noise(5000).tobytes(), "E_UNREADABLE"),
        (b"\x89PNG\r\n\x1a\n", "E_TRUNCATED"),
        (b"\xff\xd8\xff\xe0", "E_TRUNCATED"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "E_UNREADABLE"),
        (b"II*\0" + bytes(50), "E_UNREADABLE"),
        (b"BM" + bytes(60), "E_UNREADABLE"),
        (b"RIFF\x04\0\0\0WEBP", "E_UNREADABLE"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "E_FORMAT"),
        (b"8BPS\0\x01" + bytes(40), "E_FORMAT"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "E_FORMAT"),
    ],
)
def test_files_that_are_no_pictures(data, code):
    assert code_of(data) == code


@pytest.mark.parametrize("format", ["GIF", "ICO", "PPM", "PCX", "JPEG2000", "DDS", "SGI", "EPS"])
def test_other_formats_are_named_and_refused(format):
    try:
        data = encoded(smooth(16, 16), format)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {format}")
    assert code_of(data) == "E_FORMAT"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF"])
def test_animation_is_refused(format):
    frames = [Image.fromarray(noise(16, 16, 3, seed=i)) for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    assert code_of(buffer.getvalue()) == "E_ANIMATED"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncation_at_any_offset(format):
    data = encoded(noise(40, 40, 3), format)
    ends = {int(x) for x in np.linspace(12, len(data) - 2, 32)} | {len(data) - 2, len(data) // 2}
    for end in sorted(ends):
        assert code_of(data[:end]) == "E_TRUNCATED", end


def test_truncated_16_bit_png():
    data = png16(noise(40, 40, 3, dtype=np.uint16))
    for end in range(20, len(data) - 1, len(data) // 17):
        assert code_of(data[:end]) == "E_TRUNCATED", end


def test_jpeg_thumbnail_does_not_hide_a_missing_end():
    thumbnail = encoded(smooth(16, 16), "JPEG")
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0" + thumbnail)
    decode_image(data)
    assert code_of(data[:-2]) == "E_TRUNCATED"


@pytest.mark.parametrize("data", [encoded(smooth()), png16(noise(8, 8, 3, dtype=np.uint16))], ids=["8", "16"])
def test_png_without_end_is_taken_with_a_warning(data):
    picture = decode_image(data[:-12])
    np.testing.assert_array_equal(picture.pixels, decode_image(data).pixels)
    assert [note[:8] for note in picture.warnings] == ["W_NO_END"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PNG16"])
def test_bit_flips_give_a_picture_or_an_error_with_a_code(format):
    data = png16(noise(16, 16, 3, dtype=np.uint16)) if format == "PNG16" else encoded(noise(16, 16, 3), format)
    rng = np.random.default_rng(0)
    caught = 0
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            picture = decode_image(bytes(broken), max_pixels=1_000_000)
        except InputError:
            caught += 1
        else:
            assert picture.pixels.dtype in (np.uint8, np.uint16, np.float32)
    assert caught > (140 if format.startswith("PNG") else 0)  # PNG has checksums


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"BM"]))
def test_garbage_never_raises_anything_else(tail, head):
    try:
        decode_image(head + tail, max_pixels=100_000)
    except FastemError:
        pass


def bomb(width: int, height: int, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF"])
def test_large_headers_are_refused_before_decoding(format):
    if format == "PNG":
        data = bomb(30_000, 30_000)
    else:
        data = bytearray(encoded(smooth(8, 8), format))
        if format == "JPEG":
            at = data.index(b"\xff\xc0") + 5
            data[at : at + 4] = struct.pack(">HH", 30_000, 30_000)
        elif format == "BMP":
            data[18:26] = struct.pack("<ii", 30_000, 30_000)
        else:
            for tag in (256, 257):
                data = data.replace(struct.pack("<HHII", tag, 4, 1, 8), struct.pack("<HHII", tag, 4, 1, 30_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert code_of(bytes(data)) == "E_TOO_LARGE"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_pixel_and_byte_limits(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(smooth()))
    for limits in ({"max_pixels": 48 * 64 - 1}, {"max_bytes": 100}):
        with pytest.raises(InputError) as caught:
            read_image(path, **limits)
        assert caught.value.code == "E_TOO_LARGE" and "--max-mega" in caught.value.hint
    read_image(path, max_pixels=48 * 64)
    assert code_of(encoded(np.zeros((2, 202), np.uint8))) == "E_TOO_LARGE"  # longer than 100 : 1


def test_16_bit_png_that_inflates_beyond_its_size():
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(50_000_000)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    assert code_of(data) == "E_UNREADABLE"


@pytest.mark.parametrize("kind", ["missing", "folder", "dangling", "fifo"])
def test_what_is_not_a_regular_file(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path)  # opening it for reading would wait for a writer
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert caught.value.code == ("E_UNREADABLE" if kind == "fifo" else "E_VANISHED")


# -------------------------------------------------------------------------------------------------------------- writing


def test_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), atomic_write(target) as file:
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, "disk full")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_size_limit_of_the_system_leaves_nothing(tmp_path):
    """A real failing write: RLIMIT_FSIZE in a child process, as a full disk would be."""
    child = os.fork()
    if child == 0:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_image(tmp_path / "a.png", Picture(noise(64, 64, 3)))
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert os.listdir(tmp_path) == []


def test_symlink_at_the_output_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.png").symlink_to(victim)
    write_image(tmp_path / "a.png", Picture(noise(4, 4)))
    assert victim.read_text() == "precious" and not (tmp_path / "a.png").is_symlink()


def test_permissions_follow_the_umask(tmp_path):
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_only_png_is_written(tmp_path):
    with pytest.raises(ValueError, match="written as PNG"):
        write_image(tmp_path / "a.jpg", Picture(noise(4, 4)))


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("size", [(5, 5), (4, 7), (33, 33), (300, 301)], ids=str)
def test_kernel_picture_goes_back_to_the_kernel(tmp_path, size):
    kernel = np.random.default_rng(0).random(size).astype(np.float32)
    kernel /= kernel.sum()
    save_kernel_png(tmp_path / "k.png", kernel)
    zoom = kernel_zoom(size)
    with Image.open(tmp_path / "k.png") as image:
        assert image.size == (size[1] * zoom, size[0] * zoom) and image.getextrema()[1] == 255
    loaded, notes = load_kernel(tmp_path / "k.png")
    assert loaded.shape == size and notes == []
    np.testing.assert_allclose(loaded, kernel, atol=1.1 * kernel.max() / 255)


def test_kernel_array_is_normalised_and_said(tmp_path):
    np.save(tmp_path / "k.npy", np.ones((3, 5)))
    kernel, notes = load_kernel(tmp_path / "k.npy")
    np.testing.assert_allclose(kernel, 1 / 15)
    assert kernel.dtype == np.float32 and notes[0].startswith("W_KERNEL_SUM: the kernel summed to 15")
    np.save(tmp_path / "k.npy", kernel)
    assert load_kernel(tmp_path / "k.npy")[1] == []


@pytest.mark.parametrize(
    "array",
    [np.zeros((3, 3)), np.ones(3), np.ones((3, 3, 3)), np.full((3, 3), np.nan), np.array([[1.0, -0.5]]),
     np.ones((0, 3)), np.ones((2, 2), complex), np.array([[1, None]], dtype=object)],
    ids=["zero", "1d", "3d", "nan", "negative", "empty", "complex", "pickle"],
)  # fmt: skip
def test_impossible_kernels_are_refused(tmp_path, array):
    np.save(tmp_path / "k.npy", array)
    with pytest.raises(InputError) as caught:
        load_kernel(tmp_path / "k.npy")
    assert caught.value.code == "E_KERNEL"


def test_kernel_header_that_promises_too_much(tmp_path):
    np.save(tmp_path / "k.npy", np.ones((9, 9)))
    data = (tmp_path / "k.npy").read_bytes()
    (tmp_path / "k.npy").write_bytes(data.replace(b"(9, 9), ", b"(99999, 99999), ")[: len(data)])
    with pytest.raises(InputError):
        load_kernel(tmp_path / "k.npy")


def test_resize():
    assert resize(smooth(), 0.5).shape == (24, 32, 3)
    assert resize(smooth(1, 1), 0.1).shape == (1, 1, 3)


def test_names_are_shown_on_one_line():
    assert shown(Path("a\nb\x1b[31m é.png")) == "a\\nb\\x1b[31m é.png"
    assert shown(os.fsdecode(b"a\xff.png")) == "a\\udcff.png"


@pytest.mark.parametrize(
    ("name", "options", "lossy"),
    [
        ("a.jpg", {}, True),
        ("a.webp", {"quality": 80}, True),
        ("a.webp", {"quality": 80, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, True),
        ("a.webp", {"lossless": True}, False),
        ("a.tif", {}, False),
        ("a.tif", {"compression": "jpeg"}, True),
        ("a.png", {}, False),
        ("a.bmp", {}, False),
    ],
)
def test_lossy_files_are_known(tmp_path, name, options, lossy):
    Image.effect_noise((24, 16), 40).convert("RGB").save(tmp_path / name, **options)
    assert read_image(tmp_path / name).lossy is lossy


def test_picture_of_a_grid_of_kernels():
    kernels = np.zeros((2, 3, 5, 4), np.float32)
    kernels[:, :, 1, 2] = np.linspace(0.1, 1, 6).reshape(2, 3)  # each is shown by its own peak
    zoom = kernel_zoom((10, 12), 1024)
    with Image.open(io.BytesIO(encode_kernels_png(kernels))) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (10 * zoom + 2, 12 * zoom + 4)
    top, left = np.ix_([zoom, 6 * zoom + 2], [2 * zoom, 6 * zoom + 2, 10 * zoom + 4])
    assert (sheet[top, left] == 255).all() and (sheet == 255).sum() == 6 * zoom**2


def test_mosaic_places_pictures_in_rows():
    pictures = [np.full((2, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = mosaic(pictures, columns=2, gap=1)
    assert sheet.shape == (5, 7)
    assert (sheet[:2, :3] == 10).all() and (sheet[:2, 4:] == 20).all() and (sheet[3:, :3] == 30).all()
    assert (sheet[2] == 128).all() and (sheet[:, 3] == 128).all() and (sheet[3:, 4:] == 128).all()
