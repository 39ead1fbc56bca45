"""Sampler steps and their noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastem.ops import reference
from fastem.ops.backend import Backend, implementation, run, select


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: float | Tensor) -> tuple[Tensor, Tensor]:
    """x0_hat of Eq. (12), clamped and mapped from [-1, 1] to [0, 1], and where the clamp let it through.

    Args:
        x_t, eps: in network range, any equal shape.
        alpha_bar: cumulative product of the schedule, in (0, 1]; a 0-dim tensor is read on its device, unchecked.

    Returns:
        x0_hat in [0, 1], and a mask of the same dtype: 1 where the clamp changed nothing (the border included), else 0.

    Raises:
        ValueError: if the shapes disagree or alpha_bar is out of range.
    """
    _check_like(eps, x_t, "eps")
    if isinstance(alpha_bar, Tensor):
        backend = _backend_on_device("predict_x0", x_t, eps)
        if backend is Backend.NATIVE:
            return torch.ops.fastem.predict_x0(x_t, eps, 0.0, alpha_bar.double())
        return implementation(backend).predict_x0(x_t, eps, alpha_bar.double())
    if not 0 < alpha_bar <= 1:
        raise ValueError(f"alpha_bar must be in (0, 1], got {alpha_bar}")
    return run("predict_x0", x_t, eps, float(alpha_bar))


def step_update(
    x_t: Tensor, x0_hat: Tensor, noise: Tensor | None, guidance: Tensor | None,
    c0: float | Tensor, ct: float | Tensor, std: float | Tensor, gain: float | Tensor,
) -> Tensor:  # fmt: skip
    """`x_{t-1} = c0 (2 x0_hat - 1) + ct x_t + std noise + gain guidance`, Eq. (15).

    Args:
        x_t: in network range, any shape; the others have the same.
        x0_hat: in [0, 1].
        noise: standard normal; None only where `std` is 0.
        guidance: a gradient at x_t, or None.
        c0, ct: weights of x0_hat and x_t in the posterior mean.
        std: of the noise, 0 at the last step.
        gain: weight of the guidance, with its sign.

    The four numbers may be 0-dim tensors, which are read on their device; noise is then always needed.

    Raises:
        ValueError: if the shapes disagree, or noise is missing.
    """
    _check_like(x0_hat, x_t, "x0_hat")
    numbers = (c0, ct, std, gain)
    on_device = any(isinstance(c, Tensor) for c in numbers)
    if noise is None and (on_device or std):
        raise ValueError(f"a step of std {'on the device' if on_device else std} needs noise")
    for name, t in (("noise", noise), ("guidance", guidance)):
        if t is not None:
            _check_like(t, x_t, name)
    if on_device:
        backend, numbers = _backend_on_device("step_update", x_t, x0_hat, noise, guidance), _doubles(numbers, x_t)
        if backend is Backend.NATIVE:
            return torch.ops.fastem.step_update(x_t, x0_hat, noise, guidance, 0, 0, 0, 0, *numbers)
        return implementation(backend).step_update(x_t, x0_hat, noise, guidance, *numbers)
    return run("step_update", x_t, x0_hat, noise, guidance, *map(float, numbers))


def step_update_philox(
    x_t: Tensor, x0_hat: Tensor, guidance: Tensor | None, seeds: Tensor,
    c0: float | Tensor, ct: float | Tensor, std: float | Tensor, gain: float | Tensor, step: int | Tensor,
    stream: int | Tensor,
) -> Tensor:  # fmt: skip
    """`step_update` with `philox_normal` noise drawn in the kernel: nothing is stored in between.

    Args:
        x_t: `(B, n, ...)` in network range; x0_hat (in [0, 1]) and guidance have the same shape.
        seeds: `(B,)` int64, one per image.
        c0, ct, std, gain: as there; 0-dim tensors are read on their device.
        step, stream: words of the counter, see `philox_normal`; 0-dim int64 tensors are read on their device.
    """
    _check_like(x0_hat, x_t, "x0_hat")
    if guidance is not None:
        _check_like(guidance, x_t, "guidance")
    _check_seeds(seeds)
    if x_t.dim() < 2 or x_t.shape[0] != seeds.shape[0]:
        raise ValueError(f"x_t must be (B, n, ...) for seeds (B,), got {tuple(x_t.shape)} and {tuple(seeds.shape)}")
    numbers = (c0, ct, std, gain)
    on_host = [0 if isinstance(word, Tensor) else word for word in (step, stream)]
    words = [word if isinstance(word, Tensor) else None for word in (step, stream)]
    _check_words(*on_host)
    on_device = any(isinstance(c, Tensor) for c in (*numbers, step, stream))
    tensors = [t for t in (x_t, x0_hat, guidance, seeds) if t is not None]
    backend = (_backend_on_device if on_device else _select)("step_update_philox", *tensors)
    if on_device:
        numbers = _doubles(numbers, x_t)
    if on_device and backend is Backend.NATIVE:
        return torch.ops.fastem.step_update_philox(x_t, x0_hat, guidance, seeds, 0, 0, 0, 0, *on_host, *numbers, *words)
    if backend is Backend.REFERENCE:
        noise = reference.philox_normal(seeds, x_t.shape[1], tuple(x_t.shape[2:]), step, stream).to(x_t.dtype)
        return reference.step_update(x_t, x0_hat, noise, guidance, *numbers)
    if on_device:
        words = (torch.as_tensor(word, device=x_t.device) for word in (step, stream))
        return implementation(backend).step_update_philox(x_t, x0_hat, guidance, seeds, *numbers, *words)
    return run("step_update_philox", x_t, x0_hat, guidance, seeds, *map(float, numbers), step, stream)


def philox_normal(seeds: Tensor, n: int, shape: tuple[int, ...], step: int, stream: int) -> Tensor:
    """Standard normal noise from counters: the same whatever the batch, the order or the number of threads.

    Args:
        seeds: `(B,)` int64, one per image.
        n: particles per image.
        shape: of one particle.
        step, stream: words of the counter, 0 <= word < 2^32: give each use of noise its own.

    Returns:
        `(B, n, *shape)` float32.

    Source: Salmon et al. 2011 (Philox4x32-10), Box-Muller.
    """
    _check_seeds(seeds)
    if n < 0 or any(side < 0 for side in shape):
        raise ValueError(f"n and shape must not be negative, got {n} and {tuple(shape)}")
    _check_words(step, stream)
    return run("philox_normal", seeds, n, tuple(shape), step, stream)


def _select(op: str, *tensors: Tensor | None) -> Backend:
    return select(op, [t for t in tensors if t is not None])


def _backend_on_device(op: str, *tensors: Tensor | None) -> Backend:
    """What runs where the kernels read their numbers on the device: plain torch too where autograd records."""
    given = [t for t in tensors if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return Backend.REFERENCE if recorded else select(op, given)


def _doubles(numbers: Sequence[float | Tensor], like: Tensor) -> list[Tensor]:
    """Each as a tensor of one float64 on the device of `like`: those that are so already are not copied."""
    return [torch.as_tensor(n, dtype=torch.float64, device=like.device) for n in numbers]


def _check_like(t: Tensor, x_t: Tensor, name: str) -> None:
    if t.shape != x_t.shape:
        raise ValueError(f"{name} must have the shape of x_t, {tuple(x_t.shape)}, got {tuple(t.shape)}")


def _check_seeds(seeds: Tensor) -> None:
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be (B,) int64, got {tuple(seeds.shape)} {seeds.dtype}")


def _check_words(step: int, stream: int) -> None:
    if not (0 <= step < 2**32 and 0 <= stream < 2**32):
        raise ValueError(f"step and stream must be in [0, 2^32), got {step} and {stream}")
