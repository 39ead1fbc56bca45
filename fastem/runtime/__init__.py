"""Where and how things run: the device and its limits, and steps recorded as CUDA graphs."""

from fastem.runtime.graphs import StepGraphs
from fastem.runtime.nosync import NoSync, SyncError
from fastem.runtime.placement import (
    WINDOW_PIXELS,
    WINDOW_SIDE,
    busiest_window,
    check_memory,
    fit_to_size,
    resolve_device,
)

__all__ = [
    "WINDOW_PIXELS",
    "WINDOW_SIDE",
    "NoSync",
    "StepGraphs",
    "SyncError",
    "busiest_window",
    "check_memory",
    "fit_to_size",
    "resolve_device",
]
