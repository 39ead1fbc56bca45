"""Networks and their weights. Everything in here works in [-1, 1]; everything outside in [0, 1]."""

from __future__ import annotations

from fastem.models.analytic import GaussianEps
from fastem.models.checkpoints import (
    CheckpointError,
    bundled_models,
    load_model,
    read_checkpoint,
    save_natural,
    save_safetensors,
    unet_from_state_dict,
)
from fastem.models.eps import DenoiserEps, EpsModel, ErrorSpectrum, TiledEps, UNetEps, alpha_bar
from fastem.models.natural import NaturalConfig, NaturalPrior
from fastem.models.unet import UNet, UNetConfig

_KERNEL_DENOISERS = ("FDnCNN", "KernelDenoiser", "load_kernel_denoiser")

__all__ = [
    "CheckpointError",
    "DenoiserEps",
    "EpsModel",
    "ErrorSpectrum",
    "GaussianEps",
    "NaturalConfig",
    "NaturalPrior",
    "TiledEps",
    "UNet",
    "UNetConfig",
    "UNetEps",
    "alpha_bar",
    "bundled_models",
    "load_model",
    "read_checkpoint",
    "save_natural",
    "save_safetensors",
    "unet_from_state_dict",
    *_KERNEL_DENOISERS,
]


def __getattr__(name: str):
    if name in _KERNEL_DENOISERS:
        from fastem.models import kernel_denoiser

        return getattr(kernel_denoiser, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
