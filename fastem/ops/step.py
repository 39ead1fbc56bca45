"""Sampler steps and their noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastem.ops import reference
from fastem.ops.backend import Backend, current_backend, run, select


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
        if _runs_native("predict_x0", x_t, eps):
            return torch.ops.fastem.predict_x0(x_t, eps, 0.0, alpha_bar.double())
        return reference.predict_x0(x_t, eps, alpha_bar)
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
        if _runs_native("step_update", x_t, x0_hat, noise, guidance):
            return torch.ops.fastem.step_update(x_t, x0_hat, noise, guidance, 0, 0, 0, 0, *_doubles(numbers, x_t))
        return reference.step_update(x_t, x0_hat, noise, guidance, *numbers)
    return run("step_update", x_t, x0_hat, noise, guidance, *map(float, numbers))


def step_update_philox(
    x_t: Tensor, x0_hat: Tensor, guidance: Tensor | None, seeds: Tensor,
    c0: float | Tensor, ct: float | Tensor, std: float | Tensor, gain: float | Tensor, step: int | Tensor, stream: int,
) -> Tensor:  # fmt: skip
    """`step_update` with `philox_normal` noise drawn in the kernel: nothing is stored in between.

    Args:
        x_t: `(B, n, ...)` in network range; x0_hat (in [0, 1]) and guidance have the same shape.
        seeds: `(B,)` int64, one per image.
        c0, ct, std, gain: as there; 0-dim tensors are read on their device.
        step, stream: words of the counter, see `philox_normal`; the step may be a 0-dim int64 tensor, which the kernel
            reads on its device.
    """
    _check_like(x0_hat, x_t, "x0_hat")
    if guidance is not None:
        _check_like(guidance, x_t, "guidance")
    _check_seeds(seeds)
    if x_t.dim() < 2 or x_t.shape[0] != seeds.shape[0]:
        raise ValueError(f"x_t must be (B, n, ...) for seeds (B,), got {tuple(x_t.shape)} and {tuple(seeds.shape)}")
    numbers, counter = (c0, ct, std, gain), step if isinstance(step, Tensor) else None
    _check_words(0 if counter is not None else step, stream)
    on_device = counter is not None or any(isinstance(c, Tensor) for c in numbers)
    if on_device and _runs_native("step_update_philox", x_t, x0_hat, guidance, seeds):
        word = 0 if counter is not None else step
        numbers = _doubles(numbers, x_t)
        return torch.ops.fastem.step_update_philox(
            x_t, x0_hat, guidance, seeds, 0, 0, 0, 0, word, stream, *numbers, counter
        )
    if on_device or _select("step_update_philox", x_t, x0_hat, guidance, seeds) is Backend.REFERENCE:
        noise = reference.philox_normal(seeds, x_t.shape[1], tuple(x_t.shape[2:]), step, stream).to(x_t.dtype)
        return reference.step_update(x_t, x0_hat, noise, guidance, *numbers)
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


def _runs_native(op: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels that read their numbers on the device are to run; the Triton twins take floats alone."""
    given = [t for t in tensors if t is not None]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return not recorded and current_backend() is not Backend.TRITON and select(op, given) is Backend.NATIVE


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
