"""Training of the bundled priors."""

from fastem.training.core import BandBalance, Ema, TrainConfig, Trainer
from fastem.training.diffusion_prior import kernel_task, tilt_task, train_diffusion_prior
from fastem.training.image_prior import ImagePool, sample_sigma, train_image_prior
from fastem.training.kernel_denoiser import KernelPool, train_kernel_denoiser

__all__ = [
    "BandBalance",
    "Ema",
    "ImagePool",
    "KernelPool",
    "TrainConfig",
    "Trainer",
    "kernel_task",
    "sample_sigma",
    "tilt_task",
    "train_diffusion_prior",
    "train_image_prior",
    "train_kernel_denoiser",
]
