"""The device, the size limits of networks, and the memory a restoration needs."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastem.models import EpsModel, TiledEps
from fastem.operators import Canvas

TILE_PIXELS = 2_000_000  # larger images are evaluated tile by tile, which bounds the activations
LARGE_TILE, LARGE_OVERLAP = 768, 64  # tiles of networks that take any size
BASE_BYTES, BACKWARD_BYTES = 1_000_000_000, 700_000_000  # program and network, and what the network's backward adds
IMAGE_BYTES, PARTICLE_BYTES, GUIDED_BYTES = 120, 200, 260  # per pixel; the last where there is a backward
FREE_SHARE, MOST_IMAGES = 0.6, 32  # of a batch: part of the free GPU memory it may fill; more images gain nothing
WINDOW_PIXELS = 1_500_000  # of larger images a window of this size decides where the search for the kernel starts
WINDOW_SIDE = 512  # pixels; it is no narrower, unless the image is
WINDOW_STEP = 16  # pixels; grid on which windows are placed


def resolve_device(name: str = "auto") -> torch.device:
    """`"auto"` is the first GPU if there is one; a device that is not there is an error, not a fallback.

    Raises:
        ValueError: if the name is unknown or the device is missing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; allowed are auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {name!r} was asked for, but this torch ({torch.__version__}) sees no GPU; use --device cpu"
        )
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the network's body: `"auto"` is float16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: for 16 bits on a CPU that would have to emulate them, several times slower than float32.
    """
    allowed = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in allowed:
        raise ValueError(f"unknown precision {name!r}; allowed are auto, {', '.join(allowed)}")
    if device.type == "cpu" and name != "fp32" and not has_native(allowed[name]):
        raise ValueError(f"this CPU does not compute in {name}; use precision fp32, or a GPU")
    return allowed[name]


def has_native(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of 16-bit numbers."""
    probe = {torch.bfloat16: "_is_avx512_bf16_supported", torch.float16: "_is_amx_fp16_supported"}[dtype]
    return bool(getattr(torch.cpu, probe, lambda: False)())


def check_memory(size: tuple[int, int], particles: int, *, jacobian: bool, device: torch.device) -> None:
    """Refuses what cannot fit in the memory of this machine before the system ends the program without a word.

    Measured on photos of 3 and 12 megapixels, rounded up. On a GPU torch itself says when memory ends.

    Raises:
        MemoryError: with what is needed, what there is, and the option that makes it fit.
    """
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return
    per_pixel = IMAGE_BYTES + particles * (GUIDED_BYTES if jacobian else PARTICLE_BYTES)
    need = BASE_BYTES + jacobian * BACKWARD_BYTES + size[0] * size[1] * per_pixel
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise MemoryError(
            f"{size[1]} x {size[0]} pixels with {particles} particles need about {need / 1e9:.0f} GB of memory, "
            f"this machine has {have / 1e9:.0f} GB"
        )


def device_bytes(model: nn.Module, canvas: Canvas, particles: int, *, jacobian: bool, device: torch.device) -> int:
    """What one image and its particles take on a GPU: the peak of an evaluation of the network, and the step's rest."""
    x = torch.zeros(particles, 3, canvas.height, canvas.width, device=device, requires_grad=jacobian)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.set_grad_enabled(jacobian):
        eps = model(x, 500.0)
    if jacobian:
        torch.autograd.grad(eps, x, torch.zeros_like(eps))
    torch.cuda.synchronize(device)
    network = torch.cuda.max_memory_allocated(device) - before
    return network + canvas.height * canvas.width * (IMAGE_BYTES + particles * PARTICLE_BYTES)


def largest_batch(free: int, each: int) -> int:
    """Images of `each` bytes that a batch holds with `free` bytes: a power of two up to `MOST_IMAGES`."""
    fitting = int(FREE_SHARE * free) // max(each, 1)
    return min(1 << max(fitting.bit_length() - 1, 0), MOST_IMAGES)


def fit_to_size(model: EpsModel, size: tuple[int, int], tile: int | None = None) -> nn.Module:
    """The model as it should be evaluated on images of `size`: whole, or on overlapping tiles.

    Networks tied to one size (`model.image_size`) are tiled at that size unless the image has it; others only where
    the image is large, or where `tile` asks for it.
    """
    if model.image_size is not None and size != (model.image_size, model.image_size):
        return TiledEps(model, model.image_size, model.image_size // 4)
    if tile is not None:
        return TiledEps(model, tile, min(LARGE_OVERLAP, tile // 4), batch=1)
    if size[0] * size[1] > TILE_PIXELS:
        return TiledEps(model, LARGE_TILE, LARGE_OVERLAP, batch=1)
    return model


def busiest_window(y: Tensor, pixels: int = WINDOW_PIXELS) -> Tensor:
    """Of each image `(B, C, H, W)` the window with the most edges, at most `pixels` large and about of its shape.

    A kernel has far fewer unknowns than such a window has edges; the rest of a large photo is sky and blurred
    background, and costs time and memory. Edges are gradients of the luminance averaged over 4 x 4 pixels, which leaves
    blurred edges and takes most of the noise. Images of up to `pixels` pixels come back as they are.
    """
    height, width = y.shape[-2:]
    if height * width <= pixels:
        return y
    short = min(height, width, max(int(min(height, width) * math.sqrt(pixels / (height * width))), WINDOW_SIDE))
    rows, columns = (short, pixels // short) if height <= width else (pixels // short, short)
    coarse = F.avg_pool2d(y.mean(dim=1, keepdim=True), 4)
    edges = (coarse[..., 1:, 1:] - coarse[..., :-1, 1:]).abs() + (coarse[..., 1:, 1:] - coarse[..., 1:, :-1]).abs()
    cells = F.avg_pool2d(edges, WINDOW_STEP // 4, ceil_mode=True)
    size = tuple(min(max(n // WINDOW_STEP, 1), m) for n, m in zip((rows, columns), cells.shape[-2:], strict=True))
    sums = F.avg_pool2d(cells, size, stride=1)
    found = []
    for image, best in zip(y, sums.flatten(1).argmax(dim=1).tolist(), strict=True):
        top, left = (WINDOW_STEP * i for i in divmod(best, sums.shape[-1]))
        top, left = min(top, height - rows), min(left, width - columns)
        found.append(image[:, top : top + rows, left : left + columns])
    return torch.stack(found)
