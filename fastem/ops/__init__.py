"""Fused operations. `reference` is the specification; `backend` decides what runs."""

from fastem.ops.backend import Backend, current_backend, use_backend
from fastem.ops.network import group_norm_silu
from fastem.ops.psf import (
    centre_of_mass,
    convolve_support,
    crop_support,
    denoise_chain,
    hqs_chain,
    project_kernel,
    project_simplex,
    psf_to_otf,
    recentre,
    simplex_least_squares,
)
from fastem.ops.spectral import spectral_sums, wiener_guidance
from fastem.ops.step import philox_normal, predict_x0, step_update, step_update_philox

__all__ = [
    "Backend",
    "centre_of_mass",
    "convolve_support",
    "crop_support",
    "current_backend",
    "denoise_chain",
    "group_norm_silu",
    "hqs_chain",
    "philox_normal",
    "predict_x0",
    "project_kernel",
    "project_simplex",
    "psf_to_otf",
    "recentre",
    "simplex_least_squares",
    "spectral_sums",
    "step_update",
    "step_update_philox",
    "use_backend",
    "wiener_guidance",
]
