"""Names for the stages of a sampling step, as torch.profiler, Nsight Systems and Nsight Compute see them.

Nobody listens by default, and a stage then costs one look at a flag. Within `listening()` each becomes a range of
torch.profiler, named by its path (`step/unet_fwd`), and on a GPU an NVTX range pushed on that of its parent, which
Nsight Compute selects by the same path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

STEP = "step"
STAGES = ("unet_fwd", "x0", "mstep", "guidance", "unet_vjp", "update")  # of a step, in the order they run

_OFF = nullcontext()
_path: list[str] | None = None  # the open stages, outermost first; None: nobody listens
T = TypeVar("T")


@contextmanager
def listening() -> Iterator[None]:
    """Within the block stages are named to the profilers. For one sampling thread at a time."""
    global _path
    before, _path = _path, []
    try:
        yield
    finally:
        _path = before


def stage(name: str) -> AbstractContextManager[None]:
    """The block is one stage of what is going on."""
    return _OFF if _path is None else _named(name, _path)


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items; what a loop does with one of them is one stage."""
    for item in items:
        with stage(name):
            yield item


@contextmanager
def _named(name: str, path: list[str]) -> Iterator[None]:
    path.append(name)
    nvtx = torch.cuda.is_available()
    try:
        with torch.profiler.record_function("/".join(path)):
            if nvtx:
                torch.cuda.nvtx.range_push(name)
            try:
                yield
            finally:
                if nvtx:
                    torch.cuda.nvtx.range_pop()
    finally:
        path.pop()
