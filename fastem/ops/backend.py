"""What runs an op: plain torch, the C++ / CUDA extension, or Triton. The only place that decides."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastem.ops import native, reference

BUILD = "pip install --no-build-isolation -e . (needs g++; CUDA sources where torch has CUDA and nvcc is found)"

_HALF = ("group_norm_silu", "group_norm_silu_backward")  # ops of networks, whose CUDA kernels take 16-bit maps


class Backend(StrEnum):
    """Implementations of the ops. CUDA is part of `NATIVE`: the device of the tensors decides."""

    AUTO = "auto"  # native where it is built and fits, else reference
    REFERENCE = "reference"  # plain torch, any precision, differentiable: the specification
    NATIVE = "native"  # fastem._C
    TRITON = "triton"  # kernels_triton


_forced: ContextVar[Backend | None] = ContextVar("fastem_backend", default=None)


@contextmanager
def use_backend(backend: Backend | str) -> Iterator[None]:
    """Within the block, and in this thread, every op runs on `backend`, or raises where that cannot be."""
    token = _forced.set(_parse(backend))
    try:
        yield
    finally:
        _forced.reset(token)


def current_backend() -> Backend:
    """The backend asked for: by `use_backend`, else by the environment variable FASTEM_BACKEND, else `AUTO`."""
    return _forced.get() or _parse(os.environ.get("FASTEM_BACKEND", Backend.AUTO))


def run(op: str, *args):
    """Calls `op` on the backend that suits its tensors; every implementation has the arguments of the reference.

    Raises:
        RuntimeError: if a forced backend cannot run, or an input requires grad and the backend has no backward.
    """
    tensors = list(_tensors(args))
    backend = select(op, tensors)
    if backend is not Backend.REFERENCE and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op} has no backward on the {backend.value} backend and an input requires grad. "
            "Call it under torch.no_grad(), or differentiate with use_backend(Backend.REFERENCE)."
        )
    return getattr(implementation(backend), op)(*args)


def select(op: str, tensors: Sequence[Tensor]) -> Backend:
    """The backend that runs `op` on these tensors, never `AUTO`. Double precision always goes to the reference."""
    wanted = current_backend()
    if wanted is Backend.REFERENCE or any(t.dtype in (torch.float64, torch.complex128) for t in tensors):
        return Backend.REFERENCE
    problem = _triton_problem(op, tensors) if wanted is Backend.TRITON else _native_problem(op, tensors)
    if problem is None:
        return Backend.TRITON if wanted is Backend.TRITON else Backend.NATIVE
    if wanted is not Backend.AUTO:
        raise RuntimeError(f"{op} cannot run on the {wanted.value} backend: {problem}")
    if not native.available():
        _warn_once(f"fastem runs on plain torch, several times slower: {problem}")
    return Backend.REFERENCE


def _native_problem(op: str, tensors: Sequence[Tensor]) -> str | None:
    if not native.available():
        return f"{native.why_not()}. Build it with {BUILD}"
    for t in tensors:
        half = op in _HALF and t.device.type == "cuda" and t.dtype in (torch.float16, torch.bfloat16)
        if t.dtype not in (torch.float32, torch.complex64, torch.int64) and not half:
            return f"it takes float32{', and on a GPU 16 bit' if op in _HALF else ''}, got {t.dtype}"
        if t.device.type == "cuda" and not native.has_cuda():
            return f"the extension was built without CUDA and the tensors are on {t.device}. Build it with {BUILD}"
        if t.device.type not in ("cpu", "cuda", "meta"):
            return f"it runs on cpu and cuda, got {t.device}"
    return None


def _triton_problem(op: str, tensors: Sequence[Tensor]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed. Install it with pip install triton"
    if op not in implementation(Backend.TRITON).__all__:
        return f"it has no Triton twin; those of {', '.join(implementation(Backend.TRITON).__all__)} have one"
    if os.environ.get("TRITON_INTERPRET") != "1" and any(t.device.type != "cuda" for t in tensors):
        return "the tensors are not on a GPU. Move them there, or start with TRITON_INTERPRET=1 (slow, for tests)"
    return None


def implementation(backend: Backend) -> ModuleType:
    """What has the ops of a backend that `select` found, under their names: for callers that checked once for many."""
    if backend is Backend.REFERENCE:
        return reference
    return torch.ops.fastem if backend is Backend.NATIVE else importlib.import_module("kernels_triton")


def _tensors(args: Sequence) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def _parse(backend: Backend | str) -> Backend:
    try:
        return Backend(backend)
    except ValueError:
        raise ValueError(f"backend must be one of {', '.join(Backend)}, got {backend!r}") from None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
