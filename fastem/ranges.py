"""Names for the stages of a sampling step, for whoever listens: profilers, clocks, counters.

Nobody listens by default, and a stage then costs one look at a flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

STEP = "step"
STAGES = ("unet_fwd", "x0", "mstep", "guidance", "unet_vjp", "update")  # of a step, in the order they run

Listener = Callable[[str], AbstractContextManager]  # the path of a stage, as "step/unet_fwd" -> what goes around it
T = TypeVar("T")

_OFF = nullcontext()
_listener: Listener | None = None
_path: list[str] = []  # the open stages, outermost first


@contextmanager
def announce(path: str) -> Iterator[None]:
    """The listener for profilers: a range of torch.profiler named by the path, and on a GPU an NVTX range.

    NVTX ranges nest, so each has the last part of the path alone; Nsight Compute selects them by the whole one.
    """
    nvtx = torch.cuda.is_available()
    with torch.profiler.record_function(path):
        if nvtx:
            torch.cuda.nvtx.range_push(path.rsplit("/", 1)[-1])
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


@contextmanager
def listening(listener: Listener = announce) -> Iterator[None]:
    """Within the block every stage is told to the listener. For one sampling thread at a time.

    Backward passes run in the thread that asks for them: NVTX ranges and dispatch modes belong to threads.
    """
    global _listener, _path
    before = _listener, _path
    _listener, _path = listener, []
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _listener, _path = before


def stage(name: str) -> AbstractContextManager[None]:
    """The block is one stage of what is going on."""
    return _OFF if _listener is None else _told(name, _listener)


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; what a loop does with one of them is one stage."""
    for item in items:
        with stage(name):
            yield item


@contextmanager
def _told(name: str, listener: Listener) -> Iterator[None]:
    _path.append(name)
    try:
        with listener("/".join(_path)):
            yield
    finally:
        _path.pop()
