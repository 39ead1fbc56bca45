"""Triton twins of the ops whose specification is `fastem/ops/reference.py`: same names, same arguments.

Inputs are CUDA tensors, or CPU tensors under `TRITON_INTERPRET=1`. Shapes are the caller's business: the
public functions of `fastem.ops` check them. Nothing here has a backward of its own.
"""

from kernels_triton.network import group_norm_silu, group_norm_silu_backward
from kernels_triton.spectral import spectral_sums, wiener_guidance
from kernels_triton.step import philox_normal, predict_x0, step_update, step_update_philox

__all__ = [
    "group_norm_silu",
    "group_norm_silu_backward",
    "philox_normal",
    "predict_x0",
    "spectral_sums",
    "step_update",
    "step_update_philox",
    "wiener_guidance",
]
