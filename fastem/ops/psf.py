"""Ops on blur kernels: `(B, 1, h, w)`, any odd or even size, origin at `(h // 2, w // 2)`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastem.ops import reference
from fastem.ops.backend import Backend, run, select
from fastem.ops.reference import centre_of_mass, crop_support

__all__ = [
    "centre_of_mass", "convolve_support", "crop_support", "denoise_chain", "hqs_chain", "project_kernel",
    "project_simplex", "psf_to_otf", "recentre", "simplex_least_squares",
]  # fmt: skip

_PRUNED_ROWS = 40  # kernels up to this height: a pruned transform beats an FFT of the padded kernel


def psf_to_otf(k: Tensor, size: tuple[int, int]) -> Tensor:
    """F(P k): the half spectrum of each kernel, centred at the origin of an image.

    Args:
        k: `(B, 1, h, w)`.
        size: `(H, W)` of the image, not smaller than the kernel.

    Returns:
        `(B, 1, H, W // 2 + 1)` complex.

    Raises:
        ValueError: if the kernel is larger than the image.
    """
    _check_kernels(k, "k")
    if len(size) != 2 or size[0] < k.shape[-2] or size[1] < k.shape[-1]:
        raise ValueError(f"the image {tuple(size)} must not be smaller than the kernel {tuple(k.shape[-2:])}")
    if k.shape[-2] > _PRUNED_ROWS and select("psf_to_otf", [k]) is Backend.NATIVE:
        return reference.psf_to_otf(k, tuple(size))
    return run("psf_to_otf", k, tuple(size))


def convolve_support(g: Tensor, k: Tensor) -> Tensor:
    """`(g (*) k)[p] = sum_q g[p - q] k[q]`, p and q on the support, a true convolution.

    Args:
        g: `(B, 1, 2h - 1, 2w - 1)`, origin in the middle.
        k: `(B, 1, h, w)`.

    Returns:
        `(B, 1, h, w)`.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_autocorrelation(g, k)
    return run("convolve_support", g, k)


def project_kernel(z: Tensor) -> Tensor:
    """Negative values to 0, then divided by the sum, as the released program does.

    z `(B, 1, h, w)` -> the same shape; a map without a positive value gives nan.
    """
    _check_kernels(z, "z")
    return run("project_kernel", z)


def project_simplex(z: Tensor) -> Tensor:
    """The nearest non-negative kernel of sum 1: `max(z - tau, 0)`. z finite, `(B, 1, h, w)` -> the same shape.

    Source: Michelot 1986; Held et al. 1974.
    """
    _check_kernels(z, "z")
    return run("project_simplex", z)


def simplex_least_squares(g: Tensor, b: Tensor, k: Tensor, num_iters: int) -> Tensor:
    """`argmin 1/2 k^T G k - b^T k` over kernels >= 0 of sum 1, by FISTA (Beck and Teboulle 2009).

    Args:
        g: `(B, 1, 2h - 1, 2w - 1)`, an autocorrelation: `G k = g (*) k` on the support.
        b: `(B, 1, h, w)`.
        k: `(B, 1, h, w)`, where to start.
        num_iters: iterations, >= 0. The step is one over the l1 norm of g, a bound of the largest eigenvalue of G.

    Returns:
        `(B, 1, h, w)`, non-negative, sums to 1 (k itself after no iterations).

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_autocorrelation(g, k)
    _check_like(b, k, "b")
    _check_num_iters(num_iters)
    return run("simplex_least_squares", g, b, k, num_iters)


def denoise_chain(
    k: Tensor, noise_std: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], scale: float
) -> Tensor:
    """A chain of 3x3 convolutions with ReLU between, on (kernel, constant noise-level plane).

    Args:
        k: `(B, 1, h, w)`, noisy kernels.
        noise_std: `(B,)`, their noise levels, in the units of k.
        weights: of each layer, `(out, in, 3, 3)`; 2 inputs first, 1 output last.
        biases: of each layer, `(out,)` or None.
        scale: both input planes are multiplied by it, the output is divided by it.

    Returns:
        `(B, 1, h, w)`, clean kernels, not projected.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_chain(k, noise_std, weights, biases)
    return run("denoise_chain", k, noise_std, list(weights), list(biases), scale)


def hqs_chain(
    a: Tensor, g: Tensor, k: Tensor, noise_std: Tensor,
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], scale: float, num_iters: int,
    *, recentred: bool = False,
) -> Tensor:  # fmt: skip
    """The whole M-step loop with a denoiser chain as prior: Eq. (24) and (25), `num_iters` times.

    Args:
        a: `(B, 1, h, w)` and
        g: `(B, 1, 2h - 1, 2w - 1)`, with which Eq. (24) on the support is `z = a + g (*) k`.
        k: `(B, 1, h, w)`, where to start.
        noise_std: `(B,)`, sqrt(lambda / beta).
        weights, biases, scale: as in `denoise_chain`.
        num_iters: HQS iterations, >= 0; the paper uses 10.
        recentred: `recentre` the result, in the same launch on a GPU.

    Returns:
        `(B, 1, h, w)`, non-negative, sums to 1 (before it is recentred). The kernel of an image does not depend on the
        rest of the batch.

    Raises:
        ValueError: if the shapes disagree.
    """
    _check_autocorrelation(g, k)
    _check_like(a, k, "a")
    _check_chain(k, noise_std, weights, biases)
    _check_num_iters(num_iters)
    return run("hqs_chain", a, g, k, noise_std, list(weights), list(biases), scale, num_iters, recentred)


def recentre(k: Tensor) -> Tensor:
    """Moves each kernel by a cubic spline so that its centre of mass sits at `(h - h % 2) / 2 + (1 - h % 2) / 2`.

    The interpolation of the released program: neither clipped nor renormalised, zeros outside. k `(B, 1, h, w)` -> the
    same shape; a kernel of no mass, or not finite, becomes 0. Source: Unser 1999.
    """
    _check_kernels(k, "k")
    return run("recentre", k)


def _check_kernels(k: Tensor, name: str) -> None:
    if k.dim() != 4 or k.shape[1] != 1 or not k.shape[2] or not k.shape[3]:
        raise ValueError(f"{name} must be kernels (B, 1, h, w), got {tuple(k.shape)}")


def _check_like(t: Tensor, k: Tensor, name: str) -> None:
    if t.shape != k.shape:
        raise ValueError(f"{name} must have the shape of k, {tuple(k.shape)}, got {tuple(t.shape)}")


def _check_autocorrelation(g: Tensor, k: Tensor) -> None:
    _check_kernels(k, "k")
    h, w = k.shape[-2:]
    expected = (k.shape[0], 1, 2 * h - 1, 2 * w - 1)
    if g.shape != expected:
        raise ValueError(f"g must be {expected} for k {tuple(k.shape)}, got {tuple(g.shape)}")


def _check_chain(k: Tensor, noise_std: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    _check_kernels(k, "k")
    if noise_std.shape != (k.shape[0],):
        raise ValueError(f"noise_std must be (B,) = ({k.shape[0]},), got {tuple(noise_std.shape)}")
    if not weights or len(weights) != len(biases):
        raise ValueError(f"a chain needs a bias or None for each of its layers, got {len(weights)} and {len(biases)}")
    inputs = [2, *(w.shape[0] for w in weights)]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 4 or weight.shape[1] != inputs[i] or weight.shape[2:] != (3, 3):
            raise ValueError(f"layer {i} must have weights (out, {inputs[i]}, 3, 3), got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias of layer {i} must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if inputs[-1] != 1:
        raise ValueError(f"the last layer must have 1 output, got {inputs[-1]}")


def _check_num_iters(num_iters: int) -> None:
    if num_iters < 0:
        raise ValueError(f"num_iters must be >= 0, got {num_iters}")
