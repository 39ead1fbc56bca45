"""Poison around every buffer of a kernel: reading outside shows in the results, writing outside in the poison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ZONE = 64  # elements on either side


def poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point or dtype.is_complex else -(1 << 55) if dtype == torch.int64 else -77


class RedZones(TorchFunctionMode):
    """Within it, uninitialised tensors lie between poison, and so do copies that `copy` makes of inputs.

    Buffers that a compiled operation allocates itself are not seen: for those of CUDA there is compute-sanitizer.
    """

    EMPTY = (torch.empty, torch.empty_like, Tensor.new_empty)

    def __init__(self) -> None:
        super().__init__()
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._wholes: list[Tensor] = []

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.EMPTY and out.numel():
            out = self._between(out)
        return out

    def copy(self, t: Tensor) -> Tensor:
        """One with the strides of `t`; t itself where it is empty or expanded."""
        if not t.numel() or any(stride == 0 < size - 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
            return t
        copied = self._between(t).copy_(t)
        self._inputs.append((t, copied))
        return copied

    def check(self) -> None:
        for original, copied in self._inputs:
            assert torch.equal(original.nan_to_num(), copied.nan_to_num()), "an input was written to"
        for whole in self._wholes:
            expected = torch.full_like(whole[:ZONE], poison(whole.dtype)).nan_to_num()
            for zone in (whole[:ZONE], whole[-ZONE:]):
                assert torch.equal(zone.nan_to_num(), expected), "written outside of a buffer"

    def _between(self, t: Tensor) -> Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        whole = torch.full((extent + 2 * ZONE,), poison(t.dtype), dtype=t.dtype, device=t.device)
        self._wholes.append(whole)
        return whole.as_strided(t.shape, t.stride(), ZONE)


def guarded(run: Callable[..., object], *args: object) -> object:
    """`run(*args)` with every tensor between poison, checked afterwards."""
    with RedZones() as zones:
        given = [zones.copy(a) if isinstance(a, Tensor) else a for a in args]
        out = run(*given)
    zones.check()
    return out
