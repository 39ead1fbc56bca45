"""Batches: order, padding, failures that stay apart, and what happens where memory ends."""

from __future__ import annotations

import threading
import warnings
import weakref

import pytest
import torch

from fastem.runtime import MicroBatches, ahead


class Runs:
    """`run` of letters: records its batches; lower-case is the result; some letters fail, large batches do not fit."""

    def __init__(self, fits=99, tiled_fits=99, broken="", unlucky=""):
        self.batches, self.fits, self.tiled_fits, self.broken, self.unlucky = [], fits, tiled_fits, broken, unlucky
        self.freed = 0

    def __call__(self, items, tiled):
        self.batches.append(("tiled " if tiled else "") + "".join(items))
        if len(items) > (self.tiled_fits if tiled else self.fits):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if any(item in self.broken for item in items):
            raise KeyError("broken")
        return [ValueError(i) if i in self.unlucky else i.lower() for i in items]

    def free(self):
        self.freed += 1

    def map(self, items, size=4, **options):
        batches = MicroBatches(self, kind=lambda letter: letter < "N", size=size, free=self.free, **options)
        return [r if isinstance(r, str) else type(r).__name__ for r in batches(items)]


def test_items_of_a_kind_share_padded_batches_and_come_in_order():
    runs = Runs()
    assert runs.map("AZBYCXDEF", size=4) == list("azbycxdef")
    assert runs.batches == ["ABCD", "ZYXX", "EF"]
    assert Runs().map("", size=4) == []


def test_an_item_waits_only_so_long():
    """A kind that is rare must not hold back all the others."""
    runs = Runs()
    results = MicroBatches(runs, kind=lambda letter: letter < "N", size=2)(iter("ZABCDEFGHIJKLM"))
    assert next(results) == "z"
    assert runs.batches[-1] == "Z" and len(runs.batches) < 6
    assert list(results) == list("abcdefghijklm")


def test_failures_stay_with_their_items():
    runs = Runs(broken="C", unlucky="B")
    assert runs.map(["A", "B", OSError("unread"), "C", "D"], size=4) == ["a", "ValueError", "OSError", "KeyError", "d"]
    assert runs.batches == ["ABCD", "A", "B", "C", "D"]


def test_where_memory_ends_the_batch_is_halved_for_good():
    runs = Runs(fits=2)
    with pytest.warns(RuntimeWarning, match="batches of at most 4 from here on") as caught:
        assert runs.map("ABCDEFGHIJKL", size=8) == list("abcdefghijkl")
    assert runs.batches == ["ABCDEFGH", "ABCD", "AB", "CD", "EFGH", "EF", "GH", "IJ", "KL"]
    assert len(caught) == 1 and runs.freed == 3


def test_a_single_item_is_tiled_and_then_fails():
    runs = Runs(fits=0)
    assert runs.map("AB", size=1) == ["a", "b"]
    assert runs.batches == ["A", "tiled A", "B", "tiled B"]
    hopeless = Runs(fits=0, tiled_fits=0)
    with warnings.catch_warnings(record=True):
        assert hopeless.map("ABC", size=2) == ["OutOfMemoryError"] * 3
    whole = Runs(fits=0)
    assert whole.map("A", size=1, cut=lambda letter: False) == ["OutOfMemoryError"] and whole.batches == ["A"]


def test_the_failed_attempt_holds_no_memory_when_the_next_begins():
    """Frames of the exception are gone: nothing the attempt had allocated is alive."""
    alive = []

    class Held:
        pass

    def run(items, tiled):
        assert not any(ref() is not None for ref in alive)
        big = Held()
        alive.append(weakref.ref(big))
        if len(items) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return [items[0]]

    with pytest.warns(RuntimeWarning):
        assert list(MicroBatches(run, kind=lambda _: 0, size=2)("AB")) == ["A", "B"]
    assert len(alive) == 3


def test_preparing_ahead_keeps_the_order_and_the_bound():
    started, lock, release = [], threading.Lock(), threading.Event()

    def prepare(i):
        with lock:
            started.append(i)
        if i == 0:
            release.wait(5)
        return i * i

    results = ahead(iter(range(20)), prepare, threads=2, most=3)
    release.set()
    assert next(results) == 0 and max(started) <= 3
    assert list(results) == [i * i for i in range(1, 20)]
    failing = ahead([1, 0], lambda i: 1 // i, threads=1, most=2)
    assert next(failing) == 1
    with pytest.raises(ZeroDivisionError):
        next(failing)
