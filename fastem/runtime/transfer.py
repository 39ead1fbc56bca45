"""Copies between host and device beside the computation: pinned buffers, a stream for each direction.

What runs on a stream waits for what it needs by events, never by stopping the host. Three rules keep memory alive and
in order: a stream that reads what another one writes waits for its event; a tensor that another stream than its own
uses is marked, so that its memory is not handed out too early; and the host reads a buffer after its event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

AHEAD_BYTES = 64e6  # of a tensor that is sent ahead: several wait on the device


class Queues(Protocol):
    """Streams of a device: what `Transfers` needs of `torch.cuda`."""

    def stream(self) -> Any:
        """A new one."""
        ...

    def current(self) -> Any:
        """That of the computation in this thread."""
        ...

    def event(self, stream: Any) -> Any:
        """Happens when all that is on the stream now is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """What is put on the stream from now on comes after the event."""
        ...

    def upload(self, t: Tensor, stream: Any) -> Tensor: ...

    def download(self, t: Tensor, stream: Any) -> Tensor: ...

    def keep(self, t: Tensor, stream: Any) -> None:
        """The memory of t is in use until what is on the stream now is done."""
        ...

    def finish(self, event: Any) -> None:
        """Stops the host until the event."""
        ...


class CudaQueues:
    """`Queues` of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def upload(self, t: Tensor, stream: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(stream):  # torch keeps the pinned buffer until the copy is done
            return t.pin_memory().to(self.device, non_blocking=True)

    def download(self, t: Tensor, stream: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(stream):
            return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)

    def keep(self, t: Tensor, stream: torch.cuda.Stream) -> None:
        t.record_stream(stream)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()


@dataclass(frozen=True)
class Arriving:
    """A tensor on its way to the device."""

    tensor: Tensor
    event: Any = None
    queues: Queues | None = None

    def get(self) -> Tensor:
        """For the computation of this thread, which waits for it on the device."""
        if self.queues is not None:
            stream = self.queues.current()
            self.queues.wait(stream, self.event)
            self.queues.keep(self.tensor, stream)
        return self.tensor


@dataclass(frozen=True)
class Leaving:
    """Tensors on their way to the host."""

    tensors: Sequence[Tensor]
    event: Any = None
    queues: Queues | None = None

    def get(self) -> Sequence[Tensor]:
        """On the host; waits until they are there."""
        if self.queues is not None:
            self.queues.finish(self.event)
        return self.tensors


class Transfers:
    """Copies to and from a device on streams of their own; on a CPU tensors stay where they are."""

    def __init__(self, device: torch.device | None, queues: Queues | None = None) -> None:
        if queues is None and device is not None and device.type == "cuda":
            queues = CudaQueues(device)
        self.queues = queues
        if queues is not None:
            self._inward, self._outward = queues.stream(), queues.stream()

    @property
    def overlap(self) -> bool:
        """Whether there is anything beside the computation."""
        return self.queues is not None

    def send(self, t: Tensor) -> Arriving | None:
        """From any thread, ahead of the computation that will use it; None for what should rather travel with it.

        That is what is large, and what cannot be sent: if memory ended, who computes knows what to do.
        """
        if self.queues is None:
            return Arriving(t)
        if t.nbytes > AHEAD_BYTES:
            return None
        try:
            tensor = self.queues.upload(t, self._inward)
        except (RuntimeError, MemoryError):
            return None
        return Arriving(tensor, self.queues.event(self._inward), self.queues)

    def fetch(self, tensors: Sequence[Tensor]) -> Leaving:
        """What the computation of this thread will have written; the next computation need not wait."""
        if self.queues is None:
            return Leaving([t.cpu() for t in tensors])
        queues = self.queues
        queues.wait(self._outward, queues.event(queues.current()))
        copies = [queues.download(t, self._outward) for t in tensors]
        for t in tensors:
            queues.keep(t, self._outward)
        return Leaving(copies, queues.event(self._outward), queues)


@dataclass(frozen=True)
class Later:
    """A result that needs the host alone, for another thread: `MicroBatches` computes the next batch meanwhile."""

    finish: Callable[[], Any]
