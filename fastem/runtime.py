"""Where and how things run: the device, the size limits of networks, and the memory a restoration needs."""

from __future__ import annotations

import torch
from torch import nn

from fastem.models import EpsModel, TiledEps

TILE_PIXELS = 2_000_000  # larger images are evaluated tile by tile, which bounds the activations
LARGE_TILE, LARGE_OVERLAP = 768, 64  # tiles of networks that take any size


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
        raise ValueError(f"device {name!r} was asked for, but this torch ({torch.__version__}) sees no GPU; use --device cpu")
    return device


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
