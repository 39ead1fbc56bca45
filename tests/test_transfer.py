"""Copies beside the computation: where streams run as late as they may, nothing is read too early."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fastem import runtime
from fastem.engine import Deblurrer
from fastem.runtime import Later, MicroBatches, Transfers
from fastem.synth import degrade, motion_kernel


class Stream:
    def __init__(self) -> None:
        self.todo, self.done = [], 0

    def put(self, work) -> None:
        self.todo.append(work)

    def run_to(self, count: int) -> None:
        while self.done < count:
            work = self.todo[self.done]
            self.done += 1
            work()


class LazyQueues:
    """Streams on the host that run only when something waits for them, and a device whose memory is poison till then.

    `current()` is a stream too: `compute` puts work on it, as launches of kernels are.
    """

    def __init__(self) -> None:
        self.main, self.made, self.kept = Stream(), [], []

    def stream(self):
        self.made.append(Stream())
        return self.made[-1]

    def current(self):
        return self.main

    def event(self, stream):
        return stream, len(stream.todo)

    def wait(self, stream, event):
        stream.put(lambda: event[0].run_to(event[1]))

    def _copy(self, t, stream):
        out = torch.full_like(t, -999)
        stream.put(lambda: out.copy_(t))
        return out

    upload = download = _copy

    def keep(self, t, stream):
        self.kept.append((t.data_ptr(), stream))

    def finish(self, event):
        event[0].run_to(event[1])

    def compute(self, function, *inputs):
        out = torch.full_like(inputs[0], -999)
        self.main.put(lambda: out.copy_(function(*inputs)))
        return out


class Careless(LazyQueues):
    """Negative control: nothing waits on the device."""

    def wait(self, stream, event):
        pass


@pytest.mark.parametrize("queues", [LazyQueues(), Careless()], ids=["lazy", "careless"])
def test_what_arrives_and_leaves_is_whole(queues):
    transfers, results = Transfers(None, queues), []
    sent = [transfers.send(torch.full((3,), float(i))) for i in range(4)]  # ahead of all batches
    for arriving in sent:
        x = arriving.get()
        results.append(transfers.fetch([queues.compute(lambda x: 2 * x, x), x]))
    found = [[float(t[0]) for t in leaving.get()] for leaving in results]
    good = found == [[2.0 * i, float(i)] for i in range(4)]
    assert good == (type(queues) is LazyQueues)


def test_memory_is_marked_for_the_stream_that_uses_it():
    queues = LazyQueues()
    transfers = Transfers(None, queues)
    arriving = transfers.send(torch.ones(2))
    x = arriving.get()
    transfers.fetch([x])
    inward, outward = queues.made
    assert queues.kept == [(x.data_ptr(), queues.main), (x.data_ptr(), outward)] and inward is not outward


def test_fetching_does_not_hold_up_the_next_computation():
    """The copy of a batch is not what the next batch waits for."""
    queues = LazyQueues()
    transfers = Transfers(None, queues)
    leaving = transfers.fetch([queues.compute(lambda x: x + 1, torch.zeros(2))])
    second = queues.compute(lambda x: x + 5, torch.zeros(2))
    queues.finish(queues.event(queues.main))
    assert second.tolist() == [5, 5] and leaving.tensors[0].tolist() == [-999, -999]
    assert leaving.get()[0].tolist() == [1, 1]


def test_what_cannot_be_sent_ahead_travels_with_its_batch(monkeypatch):
    queues = LazyQueues()
    transfers = Transfers(None, queues)
    monkeypatch.setattr(runtime.transfer, "AHEAD_BYTES", 8)
    assert transfers.send(torch.zeros(2)) is not None and transfers.send(torch.zeros(3)) is None

    def full(t, stream):
        raise torch.OutOfMemoryError("CUDA out of memory")

    queues.upload = full
    assert transfers.send(torch.zeros(2)) is None


def test_on_a_cpu_nothing_moves():
    t, transfers = torch.ones(2), Transfers(torch.device("cpu"))
    assert not transfers.overlap and transfers.send(t).get() is t
    assert transfers.fetch([t]).get()[0] is t


# ------------------------------------------------------------------------------------------ beside batches


def test_a_batch_is_finished_while_the_next_runs():
    log, release = [], threading.Event()

    def run(items, tiled):
        log.append("run " + "".join(items))
        if "C" in items:
            release.set()  # the first batch can only be finished once the second has started

        def finish(item):
            assert release.wait(10)
            log.append("finish " + item)
            return item.lower()

        return [Later(lambda item=item: finish(item)) for item in items]

    results = []
    for result in MicroBatches(run, kind=lambda _: 0, size=2)("ABCDE"):
        log.append("out " + result)
        results.append(result)
    assert results == list("abcde")
    assert log.index("run CD") < log.index("finish A") < log.index("out a") < log.index("out c")


def test_what_fails_while_it_is_finished_is_its_own_result():
    def run(items, tiled):
        return [Later(lambda i=i: 1 // (i - 2)) for i in items]

    results = list(MicroBatches(run, kind=lambda _: 0, size=2)(iter([1, 2, 3])))
    assert [r if isinstance(r, int) else type(r).__name__ for r in results] == [-1, "ZeroDivisionError", 1]


def test_results_that_are_not_asked_for_are_not_waited_for():
    started = []
    batches = MicroBatches(
        lambda items, tiled: [Later(lambda i=i: started.append(i) or i) for i in items], kind=lambda _: 0, size=1
    )
    results = batches(iter(range(100)))
    assert next(results) == 0
    results.close()
    assert len(started) < 10 and not [t for t in threading.enumerate() if t.name.startswith("fastem-finish")]


def test_the_engine_gives_the_same_results_beside_transfers(monkeypatch):
    """Through queues that do nothing until they must, and by itself."""

    class Eager(LazyQueues):  # the engine's computation is not on a stream here: what it reads must be there
        def wait(self, stream, event):
            super().wait(stream, event)
            if stream is self.main:
                stream.run_to(len(stream.todo))

    rng, k = np.random.default_rng(0), motion_kernel(5, 1)
    images = [degrade(rng.random((16, 20, 3), np.float32), k, 0.02, i) for i in range(3)] + [np.full((4, 4), 0.5)]
    engine = Deblurrer(kernel_size=5, boundary="circular", device="cpu", steps=2)
    expected = list(engine.map(images, batch_size=2, sigma=0.02, kernel=k))
    made = []

    def beside(device):
        made.append(Transfers(device, Eager() if device is not None else None))
        return made[-1]

    monkeypatch.setattr(runtime, "Transfers", beside)
    actual = list(engine.map(images, batch_size=2, sigma=0.02, kernel=k))
    assert made[0].overlap and made[0].queues.made[1].done > 0
    assert isinstance(actual.pop(), ValueError) and isinstance(expected.pop(), ValueError)  # too small for the kernel
    for a, e in zip(actual, expected, strict=True):
        assert (a.image == e.image).all() and (a.kernel == e.kernel).all() and a.warnings == e.warnings
