"""Blur that changes over the image: the operator, the solve, the kernels of the windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastem.initial import CoarseToFine
from fastem.operators import Canvas, Observation, blur
from fastem.synth import motion_kernel
from fastem.varying import (
    VaryingBlur,
    VaryingMean,
    Windows,
    align_to,
    conjugate_gradients,
    couple,
    first_kernels,
    fit_kernels,
)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid_of(windows: Windows, size: int, seed: int = 0) -> torch.Tensor:
    """`(P, size, size)` float64: another kernel in each window."""
    return torch.stack([torch.from_numpy(motion_kernel(size, seed + p)) for p in range(windows.count)]).double()


def two_motions(windows: Windows, size: int) -> torch.Tensor:
    """`(P, size, size)`: streaks across on the left, down on the right."""
    kernels = torch.zeros(windows.count, size, size, dtype=torch.float64)
    for p in range(windows.count):
        if p % windows.grid[1] < windows.grid[1] / 2:
            kernels[p, size // 2, :] = 1 / size
        else:
            kernels[p, :, size // 2] = 1 / size
    return kernels


SIZES = [((40, 48), (3, 4), (5, 5)), ((37, 50), (2, 3), (4, 7)), ((16, 16), (2, 2), (7, 7))]


@pytest.mark.parametrize(("size", "grid", "ksize"), SIZES, ids=str)
def test_windows_sum_to_one(size, grid, ksize):
    windows = Windows(size, grid, tuple(m // 2 for m in ksize))
    ones = windows.add(windows.weights(uniform(1)).clone())
    assert (ones - 1).abs().max() < 1e-12
    x, patches = uniform(2, *size), uniform(2, windows.count, *windows.weights(uniform(1)).shape[1:], seed=1)
    assert (windows.cut(x) * patches).sum() == pytest.approx(float((x * windows.add(patches)).sum()))


@pytest.mark.parametrize(("size", "grid", "ksize"), SIZES, ids=str)
def test_equal_kernels_are_a_convolution(size, grid, ksize):
    windows = Windows(size, grid, tuple(m // 2 for m in ksize))
    k = uniform(1, 1, *ksize)
    k /= k.sum()
    x = uniform(1, 3, *size, seed=2)
    assert (VaryingBlur(windows, k[0].expand(windows.count, -1, -1))(x) - blur(x, k)).abs().max() < 1e-12


@pytest.mark.parametrize(("size", "grid", "ksize"), SIZES, ids=str)
def test_adjoint(size, grid, ksize):
    windows = Windows(size, grid, tuple(m // 2 for m in ksize))
    kernels = uniform(windows.count, *ksize, seed=3)
    A = VaryingBlur(windows, kernels)
    x, y = uniform(3, *size, seed=4), uniform(3, *size, seed=5)
    left = float((A(x) * y).sum())
    assert float((x * A.adjoint(y)).sum()) == pytest.approx(left, rel=1e-12)
    flipped = VaryingBlur(windows, kernels.flip(-2, -1))
    assert abs(float((x * flipped(y)).sum()) - left) > 1e-6 * abs(left), "windows weigh before the blur, not after"


def test_conjugate_gradients_solve_each_particle():
    matrix = uniform(12, 12)
    matrix = matrix @ matrix.T + torch.eye(12, dtype=torch.float64)
    b = uniform(1, 2, 1, 3, 4, seed=1)
    b[:, 1] *= 100
    u = conjugate_gradients(lambda v: (v.flatten(2) @ matrix).view_as(v), b, lambda v: v, 30)
    assert ((u.flatten(2) @ matrix).view_as(b) - b).abs().max() < 1e-8


@pytest.mark.parametrize("margin", [0, 8])
def test_the_posterior_mean_is_that_of_the_dense_matrix(margin):
    """mu for a blur that varies, with and without a margin that was not measured."""
    size = (16, 16)
    windows = Windows(size, (2, 2), (1, 1))
    A = VaryingBlur(windows, grid_of(windows, 3))
    canvas = Canvas(*size, (16 - margin, 16))
    x, y, r2, sigma = uniform(1, 1, 1, *size), uniform(1, 1, *size, seed=1), 0.3, 0.2
    matrix = torch.stack([A(e.view(size)).flatten() for e in torch.eye(256, dtype=torch.float64)], dim=1)
    rows = canvas.inside((0, 0), x).flatten() > 0
    seen = matrix[rows]
    residual = y.flatten()[rows] - seen @ x.flatten()
    system = r2 * seen @ seen.T + sigma**2 * torch.eye(len(seen), dtype=torch.float64)
    expected = x.flatten() + r2 * seen.T @ torch.linalg.solve(system, residual)
    observation = Observation.of(y, sigma, canvas)
    guidance = VaryingMean(A, num_iters=60)
    mu = torch.fft.irfft2(guidance.mean(torch.fft.rfft2(x), None, observation, r2), s=size)
    assert (mu.flatten() - expected).abs().max() < 1e-7


def test_align_to_takes_the_shift_out():
    k = torch.from_numpy(motion_kernel(15, 3)).double()
    k = k[2:-2, 2:-2]
    padded = torch.nn.functional.pad(k, (4, 4, 4, 4))
    assert torch.equal(align_to(padded.roll((2, -3), dims=(0, 1)), padded), padded)


def test_windows_without_edges_follow():
    windows = Windows((60, 60), (3, 3), (2, 2))
    kernels = grid_of(windows, 5)
    trust = torch.ones(9, dtype=torch.float64)
    trust[4] = 0
    near = couple(kernels, kernels.mean(dim=0), trust, windows)
    around = kernels[[1, 3, 5, 7]].mean(dim=0)
    assert (near[4] - around).norm() < 0.3 * (kernels[4] - around).norm()
    assert (near.sum(dim=(-2, -1)) - 1).abs().max() < 1e-6


def rectangles(size, seed=0):
    rng = np.random.default_rng(seed)
    x = np.full(size, 0.5)
    for _ in range(80):
        top, left, down, across = *rng.integers(0, np.array(size) - 6), *rng.integers(4, 30, 2)
        x[top : top + down, left : left + across] = rng.uniform(0.05, 0.95)
    return torch.from_numpy(x)[None, None]


def correlations(found, truth):
    return (found * truth).sum(dim=(1, 2)) / (found.norm(dim=(1, 2)) * truth.norm(dim=(1, 2)))


def test_kernels_of_windows_are_found():
    """The M-step on the true image tells two motions apart, from one kernel for all."""
    windows = Windows((120, 160), (2, 4), (4, 4))
    truth = two_motions(windows, 9)
    x = rectangles((120, 160))
    y = VaryingBlur(windows, truth)(x)
    start = truth.mean(dim=0).expand(windows.count, -1, -1)
    found = fit_kernels(x, y, start, windows, None)
    assert (found >= 0).all() and (found.sum(dim=(-2, -1)) - 1).abs().max() < 1e-6
    assert correlations(found, truth).min() > 0.9 > correlations(start, truth).max()


def test_first_kernels_of_a_uniform_blur_stay_together():
    """Windows start from the kernel of the whole; where it is right, they do not leave it."""
    windows = Windows((120, 160), (2, 4), (4, 4))
    k = torch.from_numpy(motion_kernel(9, 5)).double()[None, None]
    found = first_kernels(blur(rectangles((120, 160)), k), k, windows, None, CoarseToFine(num_iters=2))
    assert (found >= 0).all() and (found.sum(dim=(-2, -1)) - 1).abs().max() < 1e-5
    assert correlations(found, k[0].expand_as(found)).min() > 0.85
