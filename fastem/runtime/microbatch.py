"""Many items through a function of batches: packed by kind, in order, and smaller where memory ends."""

from __future__ import annotations

import gc
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from fastem.runtime.transfer import Later

LOOK_AHEAD = 4  # batches of items that are prepared before the first of them must go, alone if need be

S, T, R = TypeVar("S"), TypeVar("T"), TypeVar("R")


def ahead(items: Iterable[S], prepare: Callable[[S], T], *, threads: int, most: int) -> Iterator[T]:
    """`prepare` of each item, in order, up to `most` of them in other threads before they are asked for.

    What `prepare` raises comes out in its place.
    """
    source, waiting = iter(items), deque[Future[T]]()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastem")
    try:
        while True:
            for item in itertools.islice(source, most - len(waiting)):
                waiting.append(pool.submit(prepare, item))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class MicroBatches(Generic[T, R]):
    """Runs items in batches of one kind, and says in order what became of each.

    Args:
        run: `run(items, tiled)` gives the results of some items of one kind; an item that fails by itself has its
            exception as result. `tiled` asks for less memory per item. A result may be `Later`: it is finished in
            another thread while the next batch runs, and comes out after that batch has started.
        kind: items of equal kind may share a batch.
        size: items per batch, or a function of the first item of a kind that tells.
        free: called where memory ended, before the next attempt.
        cut: whether `run(..., tiled=True)` is worth a try for an item (None: always).

    Batches are padded to a power of two with copies of their last item: the same programs serve all of them, and the
    result of an item does not depend on its company in a batch of the same padded size. Where memory ends the batch is
    halved, also for all that follow; then a single item is tiled; then it fails. A batch that fails otherwise runs
    again one by one: a failure is that of its item.
    """

    def __init__(
        self, run: Callable[[Sequence[T], bool], Sequence[R | Exception]], *, kind: Callable[[T], Hashable],
        size: int | Callable[[T], int], free: Callable[[], None] = gc.collect, cut: Callable[[T], bool] | None = None,
    ) -> None:  # fmt: skip
        self.run, self.kind, self.size, self.free, self.cut = run, kind, size, free, cut
        self.limit: int | None = None  # what memory allows, once that was found out
        self._sizes: dict[Hashable, int] = {}

    def __call__(self, items: Iterable[T | Exception]) -> Iterator[R | Exception]:
        """Results in the order of the items; an item that is an exception already is its own result."""
        with ThreadPoolExecutor(1, thread_name_prefix="fastem-finish") as pool:  # its thread starts at the first use
            try:
                yield from self._in_order(items, pool)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _in_order(self, items: Iterable[T | Exception], pool: ThreadPoolExecutor) -> Iterator[R | Exception]:
        waiting: dict[Hashable, list[tuple[int, T]]] = {}  # in order of their oldest item
        done: dict[int, R | Exception | Future] = {}
        due = 0  # the next to come out
        newest: set[int] = set()  # positions of the last batch

        def go(batch: list[tuple[int, T]]) -> None:
            results = self._go(batch)
            newest.clear()
            for position, result in results:
                newest.add(position)
                done[position] = pool.submit(result.finish) if isinstance(result, Later) else result

        def ready() -> bool:
            """Whether the next is there; of the last batch only what is finished: another batch may start meanwhile."""
            found = done.get(due)
            return due in done and not (isinstance(found, Future) and due in newest and not found.done())

        for position, item in enumerate(items):
            if isinstance(item, Exception):
                done[position] = item
            else:
                kind = self.kind(item)
                waiting.setdefault(kind, []).append((position, item))
                size = self._size_of(kind, item)
                if len(waiting[kind]) >= size:
                    go(waiting.pop(kind))
                elif position - due >= LOOK_AHEAD * size:
                    oldest = min(waiting, key=lambda k: waiting[k][0][0])
                    go(waiting.pop(oldest))
            while ready():
                yield _settled(done.pop(due))
                due += 1
        for kind in sorted(waiting, key=lambda k: waiting[k][0][0]):
            go(waiting[kind])
            while ready():
                yield _settled(done.pop(due))
                due += 1
        while due in done:
            yield _settled(done.pop(due))
            due += 1

    def _size_of(self, kind: Hashable, item: T) -> int:
        if kind not in self._sizes:
            self._sizes[kind] = max(self.size(item) if callable(self.size) else self.size, 1)
        return min(self._sizes[kind], self.limit or self._sizes[kind])

    def _go(self, batch: list[tuple[int, T]]) -> Iterator[tuple[int, R | Exception]]:
        positions, items = zip(*batch, strict=True)
        return zip(positions, self._results(items), strict=True)

    def _results(self, items: Sequence[T]) -> list[R | Exception]:
        padded = 1 << (len(items) - 1).bit_length()
        failure = None
        try:
            return list(self.run([*items, *[items[-1]] * (padded - len(items))], False))[: len(items)]
        except Exception as error:  # handled below: its traceback holds the tensors of the attempt
            failure = _Failure(error)
        if not failure.out_of_memory:
            return [failure.error] if len(items) == 1 else [r for item in items for r in self._results([item])]
        self.free()
        if len(items) > 1:
            self._shrink(padded // 2)
            half = min(padded // 2, len(items) - 1)
            return self._results(items[:half]) + self._results(items[half:])
        if self.cut is not None and not self.cut(items[0]):
            return [failure.error]
        try:
            return list(self.run(items, True))
        except Exception as error:
            failure = _Failure(error)
        if failure.out_of_memory:
            self.free()
        return [failure.error]

    def _shrink(self, limit: int) -> None:
        if self.limit is None:
            warnings.warn(
                f"memory ended: images run in batches of at most {limit} from here on", RuntimeWarning, stacklevel=2
            )
        self.limit = min(limit, self.limit or limit)


def _settled(result: R | Exception | Future) -> R | Exception:
    if not isinstance(result, Future):
        return result
    try:
        return result.result()
    except Exception as error:
        return error


class _Failure:
    """An exception without the frames it went through, and the tensors in them."""

    def __init__(self, error: Exception) -> None:
        self.out_of_memory = is_out_of_memory(error)
        self.error = error.with_traceback(None) if self.out_of_memory else error
        if self.out_of_memory:
            self.error.__context__ = self.error.__cause__ = None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ended, on the host or on a device, as Python, numpy or torch says it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    told = str(error).lower()
    return isinstance(error, RuntimeError) and ("defaultcpuallocator" in told or "out of memory" in told)


def release_device() -> None:
    """Gives back what Python no longer holds, and what torch keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
