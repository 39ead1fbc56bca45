"""Where and how things run: the device and its limits, steps recorded as CUDA graphs, batches of images."""

from fastem.runtime.graphs import StepGraphs
from fastem.runtime.microbatch import LOOK_AHEAD, MicroBatches, ahead, is_out_of_memory, release_device
from fastem.runtime.nosync import NoSync, SyncError
from fastem.runtime.placement import (
    WINDOW_PIXELS,
    WINDOW_SIDE,
    busiest_window,
    check_memory,
    device_bytes,
    fit_to_size,
    largest_batch,
    resolve_device,
    resolve_precision,
)
from fastem.runtime.transfer import Arriving, Later, Leaving, Transfers

__all__ = [
    "LOOK_AHEAD",
    "WINDOW_PIXELS",
    "WINDOW_SIDE",
    "Arriving",
    "Later",
    "Leaving",
    "MicroBatches",
    "NoSync",
    "StepGraphs",
    "SyncError",
    "Transfers",
    "ahead",
    "busiest_window",
    "check_memory",
    "device_bytes",
    "fit_to_size",
    "is_out_of_memory",
    "largest_batch",
    "release_device",
    "resolve_device",
    "resolve_precision",
]
