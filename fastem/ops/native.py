"""Loads the compiled extension and tells torch the shapes of its results (fake kernels)."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor


def _load() -> str | None:
    """Registers torch.ops.fastem; in words why it cannot. The library is no Python module: it needs torch alone."""
    package = Path(__file__).parents[1]
    built = [path for suffix in EXTENSION_SUFFIXES if (path := package / f"_C{suffix}").is_file()]
    if not built:
        return "it is not built"
    try:
        torch.ops.load_library(built[0])
    except OSError as error:  # built for another torch
        return f"it does not load, {error}"
    return None


_problem = _load()


def available() -> bool:
    """Whether the extension was built and loads with this torch."""
    return _problem is None


def why_not() -> str:
    """Why the extension is not available, in words; empty where it is."""
    return "" if _problem is None else f"no extension fastem._C: {_problem}"


def build_info() -> str:
    """The instruction set in use, threading and CUDA of the build, or why there is none."""
    return torch.ops.fastem.build_info() if available() else why_not()


def has_cuda() -> bool:
    """Whether the extension was built with CUDA."""
    return available() and "no CUDA" not in build_info()


# --------------------------------------------------------------------------------------------- fake kernels


def _spectral_sums(X: Tensor, Y: Tensor, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    batch, _, channels, height, width = X.shape
    shape = (batch, channels if per_channel else 1, height, width)
    return X.new_empty(shape), X.new_empty(shape, dtype=torch.float32)


def _psf_to_otf(k: Tensor, size: list[int]) -> Tensor:
    return k.new_empty((k.shape[0], 1, size[0], size[1] // 2 + 1), dtype=torch.complex64)


def _philox_normal(seeds: Tensor, n: int, shape: list[int], step: int, stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], n, *shape), dtype=torch.float32)


def _predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: float, on_device: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _dense(x_t), _dense(x_t)


def _group_norm_silu(x: Tensor, skip: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor]:
    weight, groups = rest[0], rest[4]
    shape = (x.shape[0], x.shape[1] + (0 if skip is None else skip.shape[1]), *x.shape[2:])
    moments = weight.new_empty((x.shape[0], groups))
    return x.new_empty(shape).contiguous(memory_format=_image_format(x)), moments, torch.empty_like(moments)


def _group_norm_silu_backward(grad: Tensor, x: Tensor, skip: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    layout = _image_format(x)
    dx = torch.empty_like(x, memory_format=layout)
    return dx, x.new_empty(0) if skip is None else torch.empty_like(skip, memory_format=layout)


def _dense(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _image_format(x: Tensor) -> torch.memory_format:
    """Channels last where x is that or the kernel knows nothing else, otherwise plain."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last or x.device.type == "cuda" else torch.contiguous_format


def _register() -> str | None:
    """Tells torch the shapes of the results; in words what the extension lacks."""
    like_first = ("wiener_guidance", "project_kernel", "project_simplex", "recentre", "denoise_chain", "step_update")
    fakes = {
        "spectral_sums": _spectral_sums,
        "psf_to_otf": _psf_to_otf,
        "philox_normal": _philox_normal,
        "predict_x0": _predict_x0,
        "group_norm_silu": _group_norm_silu,
        "group_norm_silu_backward": _group_norm_silu_backward,
        "convolve_support": lambda g, k: _dense(k),
        "simplex_least_squares": lambda g, b, k, num_iters: _dense(k),
        "hqs_chain": lambda a, g, k, *rest: _dense(k),
        "step_update_philox": lambda x_t, *rest: _dense(x_t),
        **{op: lambda first, *rest: _dense(first) for op in like_first},
    }
    missing = [op for op in fakes if not hasattr(torch.ops.fastem, op)]
    if missing:
        return f"it was built from older sources and lacks {', '.join(missing)}; build it again (make native)"
    for op, fake in fakes.items():
        torch.library.register_fake(f"fastem::{op}", fake)
    return None


if available():
    _problem = _register()
