"""A prior whose eps is known in closed form: the oracle for tests of schedules, samplers and guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from fastem.models.eps import EpsModel, alpha_bar
from fastem.models.unet import batch_times


class GaussianEps(EpsModel):
    """The exact eps of images x_0 ~ N(mean, S) in [-1, 1] units, S stationary on the torus.

    Args:
        mean: `(C, H, W)`.
        power: eigenvalues of S on the half spectrum, broadcastable to `(C, H, W // 2 + 1)`: the variance of each
            coefficient of the orthonormal DFT. A number is white noise of that variance.

    Computes in the dtype of x_t, float64 included; differentiable in x_t and in t.
    """

    def __init__(self, mean: Tensor, power: Tensor | float) -> None:
        super().__init__(mean.shape[0])
        self.size = tuple(mean.shape)
        power = torch.as_tensor(power, dtype=torch.float64, device=mean.device)
        self.register_buffer("mean", mean.double())
        self.register_buffer("power", power.expand(*mean.shape[:-1], mean.shape[-1] // 2 + 1).clone())
        if not (self.power >= 0).all():  # also catches nan
            raise ValueError("power is a variance per frequency and must be >= 0 everywhere")

    def forward(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        if x_t.shape[1:] != self.size:
            raise ValueError(f"this prior is of images {self.size}, got {tuple(x_t.shape[1:])}")
        ab = alpha_bar(batch_times(t, x_t)).to(x_t.dtype).view(-1, 1, 1, 1)
        mean, power = self.mean.to(x_t), self.power.to(x_t)
        # x_t ~ N(sqrt(ab) mean, ab S + (1 - ab) I) and eps = -sqrt(1 - ab) grad log p(x_t)
        return (1 - ab).sqrt() * self._filter(x_t - ab.sqrt() * mean, 1 / (ab * power + 1 - ab))

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """`(num, C, H, W)` float64 images drawn from the prior."""
        noise = torch.randn(num, *self.size, dtype=torch.float64, generator=generator).to(self.mean)
        return self.mean + self._filter(noise, self.power.sqrt())

    def r2(self, sigma_t: float) -> float:
        """The posterior variance of a pixel, averaged over the image: exact."""
        variance = self.power * sigma_t**2 / (self.power + sigma_t**2)
        twice = torch.full((variance.shape[-1],), 2.0, dtype=variance.dtype, device=variance.device)
        twice[0] = 1  # columns that are their own mirror image count once
        if self.size[2] % 2 == 0:
            twice[-1] = 1
        return float((variance * twice).sum(-1).mean() / self.size[2])

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=self.size[1:])
