"""A guard against operations that make the host wait for the device: a CUDA graph cannot record them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {  # their result, or its size, is a value that lies on the device
    "_local_scalar_dense": "reads a value: .item(), float(t), bool(t), an if on a tensor",
    "is_nonzero": "reads a value: bool(t)",
    "equal": "compares on the host: torch.equal",
    "allclose": "compares on the host",
    "nonzero": "has a size that depends on values",
    "masked_select": "has a size that depends on values",
    "unique_consecutive": "has a size that depends on values",
    "unique_dim": "has a size that depends on values",
    "_unique2": "has a size that depends on values",
    "bincount": "has a size that depends on values",
    "lift_fresh": "takes a constant from the host: torch.tensor(...)",
}


class SyncError(RuntimeError):
    """An operation inside the step makes the host wait for the device, or copies between them."""


class NoSync(TorchDispatchMode):
    """Within it, operations that wait for the device, or copy between it and the host, raise `SyncError`.

    It works on any device: reading a value is found on the CPU too. Copies show where there are two devices; torch's
    meta device counts as one.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name = func.overloadpacket.__name__
        if (why := WAITS.get(name)) and not (name == "lift_fresh" and _host_scalar(args[0])):
            raise SyncError(f"{func} inside the step {why}. Keep it on the device, for example with torch.where")
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]) if isinstance(t, Tensor)
        ):
            raise SyncError(f"{func} with a mask inside the step has a size that depends on values. Use torch.where")
        result = func(*args, **(kwargs or {}))
        kinds = set(_device_types((args, kwargs, result)))
        if len(kinds) > 1:
            raise SyncError(f"{func} inside the step works on {' and '.join(sorted(kinds))}: it copies between them")
        return result


def _device_types(values: Any) -> Iterator[str]:
    """Of all tensors but 0-dim ones of the host, which travel with the call of a kernel."""
    for t in tree_leaves(values):
        if isinstance(t, Tensor) and not _host_scalar(t):
            yield t.device.type


def _host_scalar(t: Tensor) -> bool:
    return t.dim() == 0 and t.device.type == "cpu"
