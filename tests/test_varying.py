"""Blur that changes over the image: the operator, the solve, the kernels of the windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastem import ops
from fastem.operators import Canvas, Observation, blur
from fastem.schedules import Schedule
from fastem.synth import motion_kernel
from fastem.varying import (
    VaryingBlur,
    VaryingMean,
    Windows,
    WindowSums,
    conjugate_gradients,
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


def rectangles(size, seed=0):
    rng = np.random.default_rng(seed)
    x = np.full(size, 0.5)
    for _ in range(80):
        top, left, down, across = *rng.integers(0, np.array(size) - 6), *rng.integers(4, 30, 2)
        x[top : top + down, left : left + across] = rng.uniform(0.05, 0.95)
    return torch.from_numpy(x)[None, None]


def correlations(found, truth):
    return (found * truth).sum(dim=(1, 2)) / (found.norm(dim=(1, 2)) * truth.norm(dim=(1, 2)))


def sums_of(x, truth, windows, start, canvas=None, **options) -> WindowSums:
    """Of the true image, blurred by `truth`, for kernels `start`."""
    observation = Observation.of(VaryingBlur(windows, truth)(x), 0.01, canvas)
    sums = WindowSums(VaryingBlur(windows, start), observation, **options)
    (*_, last) = Schedule.karras(3, 1.0, 0.2).reverse()
    sums(last, x[:, None], None)
    return sums


def test_kernels_of_windows_are_found():
    """The M-step on the true image tells two motions apart, from one kernel for all."""
    windows = Windows((120, 160), (2, 4), (4, 4))
    truth, x = two_motions(windows, 9), rectangles((120, 160))
    start = truth.mean(dim=0).expand(windows.count, -1, -1)
    sums = sums_of(x, truth, windows, start, edges=1.0)
    found = fit_kernels(sums.cross, sums.energy, start, windows, coupling=0.05, ridge=0.05)
    assert (found >= 0).all() and (found.sum(dim=(-2, -1)) - 1).abs().max() < 1e-6
    assert correlations(found, truth).min() > 0.9 > correlations(start, truth).max()
    defaults = fit_kernels(sums.cross, sums.energy, start, windows)
    assert correlations(defaults, truth).mean() > correlations(start, truth).mean() + 0.02


@pytest.mark.parametrize("margin", [0, 24])
def test_on_a_uniform_blur_windows_stay_together(margin):
    """Also where the margin was not measured: what is predicted there teaches nothing."""
    windows = Windows((120, 160), (2, 4), (4, 4))
    k = torch.from_numpy(motion_kernel(9, 5)).double().expand(windows.count, -1, -1)
    canvas = Canvas(120, 160, (120 - margin, 160 - margin)) if margin else None
    sums = sums_of(rectangles((120, 160)), k, windows, k, canvas)
    found = fit_kernels(sums.cross, sums.energy, k, windows)
    assert correlations(found, k).min() > 0.93
    unlike = torch.from_numpy(motion_kernel(9, 6)).double().expand(windows.count, -1, -1)
    sums = sums_of(rectangles((120, 160)), k, windows, unlike, canvas)
    found = fit_kernels(sums.cross, sums.energy, unlike, windows)
    assert correlations(found, k).min() > float(correlations(unlike, k).max()) + 0.05


def test_windows_without_edges_follow():
    """What flat windows know of their kernels is what their neighbours have."""
    windows = Windows((120, 160), (2, 4), (4, 4))
    k = torch.from_numpy(motion_kernel(9, 5)).double().expand(windows.count, -1, -1)
    x = rectangles((120, 160))
    x[..., :, 110:] = 0.5
    start = k.clone()
    start[windows.grid[1] - 1 :: windows.grid[1]] = torch.from_numpy(motion_kernel(9, 6)).double()
    sums = sums_of(x, k, windows, start)
    found = fit_kernels(sums.cross, sums.energy, start, windows, sweeps=10)
    assert correlations(found, k)[-1] > correlations(start, k)[-1] + 0.1


def test_the_kernels_move_together():
    windows = Windows((120, 160), (2, 4), (4, 4))
    k = torch.from_numpy(motion_kernel(9, 5)).double().roll(1, dims=0).expand(windows.count, -1, -1)
    sums = sums_of(rectangles((120, 160)), k, windows, k)
    found = fit_kernels(sums.cross, sums.energy, k, windows)
    assert (ops.centre_of_mass(found.mean(dim=0)[None, None]) - 4).abs().max() <= 0.5


def test_only_late_steps_and_strong_edges_count():
    windows = Windows((60, 60), (2, 2), (2, 2))
    k = torch.from_numpy(motion_kernel(5, 5)).double().expand(windows.count, -1, -1)
    x = rectangles((60, 60))
    sums = WindowSums(VaryingBlur(windows, k), Observation.of(VaryingBlur(windows, k)(x), 0.01))
    early, *_, late = Schedule.karras(9, 1.0, 0.2).reverse()
    sums(early, x[:, None], None)
    assert isinstance(sums.energy, float)
    sums(late, x[:, None], None)
    once = sums.energy.clone()
    sums(late, x[:, None], None)
    torch.testing.assert_close(sums.energy, once * (1 + sums.memory))
    assert 0.1 < sums._strongest(torch.rand(1, 60, 60).double(), torch.ones(60, 60).double()).mean() < 0.2
