"""Backends for the tests. One that is missing skips, or fails where FASTEM_REQUIRE=native,triton,cuda names it."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels_triton is imported

from fastem.ops import Backend, native, use_backend  # noqa: E402

REQUIRED = frozenset(filter(None, os.environ.get("FASTEM_REQUIRE", "").replace(" ", "").split(",")))


def require(name: str, available: bool, why: str) -> None:
    """Skips the test where `name` is not available, or fails where FASTEM_REQUIRE insists on it."""
    if available:
        return
    if name in REQUIRED:
        pytest.fail(f"FASTEM_REQUIRE names {name}, but {why}")
    pytest.skip(why)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request) -> Backend:
    """Each backend in turn, forced for the duration of the test."""
    chosen = Backend(request.param)
    if chosen is Backend.NATIVE:
        require("native", native.available(), native.why_not())
    if chosen is Backend.TRITON:
        require("triton", importlib.util.find_spec("triton") is not None, "triton is not installed")
    with use_backend(chosen):
        yield chosen


@pytest.fixture
def native_backend() -> Backend:
    """The compiled extension, forced for the duration of the test."""
    require("native", native.available(), native.why_not())
    with use_backend(Backend.NATIVE):
        yield Backend.NATIVE


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request) -> int:
    """The number of threads torch may use during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
