"""Blind deblurring: a blurred image in, a sharp one and its blur kernel out.

    engine = fastem.Deblurrer()
    r = engine(image)          # r.image, r.kernel, r.sigma

The names below load with their modules at first use, so that `import fastem` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "fastem.batch": ("deblur",),
    "fastem.engine": ("Deblurrer", "Restoration"),
    "fastem.em": ("EdgeEM", "HQS", "Known", "diffusion_em"),
    "fastem.samplers": ("DDIM", "DDPM", "PhiloxNoise", "PlugAndPlay", "Renoise", "sample"),
    "fastem.guidance": ("DPS", "PiGDM", "PosteriorMean"),
    "fastem.mstep": ("L1", "L2", "PnP", "mstep"),
    "fastem.operators": ("Observation", "blur"),
    "fastem.models": ("CheckpointError", "load_kernel_denoiser", "load_model"),
    "fastem.schedules": ("Schedule", "Step"),
    "fastem.metrics": ("kernel_correlation", "kernel_mse", "psnr", "psnr_aligned", "reblur_loss", "ssim"),
    "fastem.synth": ("degrade", "motion_kernel"),
    "fastem.noise": ("estimate_sigma",),
    "fastem.ops": ("use_backend",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", "models", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name == "models":
        return import_module("fastem.models")
    if name not in _HOME:
        raise AttributeError(f"module 'fastem' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `fastem.mstep` the function: importing the module `fastem.mstep` would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
