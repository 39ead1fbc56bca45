"""Fused operations. `reference` is the specification; the functions here pick the backend."""

from fastem.ops.reference import (
    centre_of_mass,
    conv3x3,
    convolve_support,
    crop_support,
    denoise_chain,
    film_silu,
    film_silu_backward,
    hqs_chain,
    philox_normal,
    predict_x0,
    project_kernel,
    project_simplex,
    psf_to_otf,
    recentre,
    simplex_least_squares,
    spectral_sums,
    step_update,
    wiener_guidance,
)
