"""The steps of a run as replays of CUDA graphs.

A step is some 500 kernel launches and hardly any decision: recorded once, it costs one launch. Everything that changes
from step to step is on the device: the numbers in a table, the row of the step in a counter that the step itself
increments. What changes from run to run is copied into buffers whose addresses the graph knows.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastem.models import EpsModel
from fastem.operators import Observation
from fastem.ops import current_backend
from fastem.runtime.nosync import NoSync
from fastem.samplers import Draw, Phase, PhiloxDraw, StepBody, StepConstants

MAX_ROWS = 1000  # of the table: the longest schedule
WARM_UP = 2  # runs before recording: algorithms are chosen, plans made and caches filled there


class Program(NamedTuple):
    """What a recording is of."""

    phase: Phase
    draws: bool  # its noise, from the counter of the step; otherwise it reads a buffer


class StepGraphs:
    """Runs steps from recordings, which it keeps for the next run of the same shapes; `execute=` of `sample`.

    On a device without graphs the same steps run as they come, with the same table and counter: that is how the
    recording is tested. If a step cannot be recorded a warning says so, once, and its steps run as they come.

    Args:
        capacity: recordings kept; the one not used for longest goes first. Each holds the memory of one step.
    """

    def __init__(self, capacity: int = 5) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be >= 1, got {capacity}")
        self.capacity = capacity
        self._kept: OrderedDict[Hashable, Recording] = OrderedDict()

    def __call__(
        self, body: StepBody, observation: Observation, state, x_t: Tensor, table: Sequence[StepConstants]
    ) -> Recording:
        key = _key(body, observation, state, x_t)
        recording = self._kept.pop(key, None)
        if recording is None:
            while len(self._kept) >= self.capacity:
                self._kept.popitem(last=False)[1].release()
            recording = Recording(body, observation, state, x_t)
        self._kept[key] = recording
        recording.load(observation, state, x_t, table)
        return recording

    def __len__(self) -> int:
        return len(self._kept)

    def release(self) -> None:
        """Frees all recordings and their memory."""
        while self._kept:
            self._kept.popitem()[1].release()


class Recording:
    """One step on buffers of its own, recorded for each phase at its first use."""

    def __init__(self, body: StepBody, observation: Observation, state, x_t: Tensor) -> None:
        device = x_t.device
        self.body = body
        self._table = torch.zeros(MAX_ROWS, len(StepConstants._fields), dtype=torch.float64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._x_t, self._x0_hat = x_t.clone(), torch.zeros_like(x_t)
        self._seeds = torch.zeros(len(x_t), dtype=torch.int64, device=device)
        self._stream = torch.zeros((), dtype=torch.int64, device=device)
        self._drawn: PhiloxDraw | None = None  # whose seeds and stream are in the buffers
        self._noise: Tensor | None = None  # a buffer for noise that is not drawn in the step
        self._state = replace(state, **{name: t.clone() for name, t in _tensors(state)})
        own = {name: getattr(observation, name).clone() for name in ("y", "sigma")}
        seen = None if observation.seen is None else observation.seen.clone()
        self._observation = replace(observation, **own, seen=seen)
        self._programs: dict[Program, Callable[[], None]] = {}
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @property
    def x_t(self) -> Tensor:
        """A copy: the buffer belongs to the next run."""
        return self._x_t.clone()

    @property
    def state(self):
        return replace(self._state, **{name: t.clone() for name, t in _tensors(self._state)})

    @property
    def x0_hat(self) -> Tensor:
        return self._x0_hat

    @property
    def kernel(self) -> Tensor:
        return self._state.k

    def load(self, observation: Observation, state, x_t: Tensor, table: Sequence[StepConstants]) -> None:
        """Starts a run: its data goes into the buffers, its numbers into the table."""
        if len(table) > MAX_ROWS:
            raise ValueError(f"a recorded run has at most {MAX_ROWS} steps, got {len(table)}")
        self._table[: len(table)].copy_(torch.tensor(table, dtype=torch.float64))
        self._row.zero_()
        self._drawn = None
        self._x_t.copy_(x_t)
        for name, buffer in _tensors(self._state):
            buffer.copy_(getattr(state, name))
        self._observation.y.copy_(observation.y)
        self._observation.sigma.copy_(observation.sigma)
        if observation.seen is not None:
            self._observation.seen.copy_(observation.seen)
        self._observation.Y.copy_(observation.Y)

    def advance(self, row: int, noise: Draw | None, phase: Phase) -> None:
        """One launch, but for the first step of a run, and for noise that does not come from counters."""
        if isinstance(noise, PhiloxDraw):
            last, self._drawn = self._drawn, noise
            if last is None or last.seeds is not noise.seeds or last.stream != noise.stream:
                self._seeds.copy_(noise.seeds)
                self._stream.fill_(noise.stream)
        elif noise is not None:
            self._own_noise().copy_(noise())
        # Where nothing is drawn, whatever noise there is meets a zero of the table.
        program = Program(phase, draws=isinstance(noise, PhiloxDraw) or (noise is None and self._drawn is not None))
        run = self._programs.get(program)
        if run is None:
            run = self._programs[program] = self._record(program)
        run()

    def step(self, program: Program) -> None:
        """One step from buffers to buffers: the function that is recorded."""
        numbers = StepConstants(*self._table.index_select(0, self._row)[0].unbind())
        noise: Draw = self._own_noise
        if program.draws:
            particles, *shape = self._x_t.shape[1:]
            noise = PhiloxDraw(self._seeds, particles, tuple(shape), numbers.index.long(), self._stream)
        x_t, state, x0_hat = self.body(self._x_t, self._state, noise, self._observation, numbers, program.phase)
        self._x_t.copy_(x_t)
        self._x0_hat.copy_(x0_hat)
        for name, buffer in _tensors(self._state):
            buffer.copy_(getattr(state, name))
        self._row.add_(1)

    def _own_noise(self) -> Tensor:
        if self._noise is None:
            self._noise = torch.zeros_like(self._x_t)
        return self._noise

    def release(self) -> None:
        self._programs.clear()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()

    def _record(self, program: Program) -> Callable[[], None]:
        if self._x_t.device.type != "cuda":
            return lambda: self.step(program)
        changed = [self._x_t, self._x0_hat, self._row, *(t for _, t in _tensors(self._state))]
        before = [t.clone() for t in changed]
        try:
            replay = self._capture(program)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it was, the steps can still run one by one
            reason = " ".join(str(error).split())[:300]
            warnings.warn(f"steps run without a CUDA graph, slower: {reason}", RuntimeWarning, stacklevel=2)
            replay = None
        for t, value in zip(changed, before, strict=True):
            t.copy_(value)
        return replay or (lambda: self.step(program))

    def _capture(self, program: Program) -> Callable[[], None]:
        side = torch.cuda.Stream(self._x_t.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(program)
            with NoSync():
                for _ in range(WARM_UP - 1):
                    self.step(program)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        shared = self._graphs[0].pool() if self._graphs else None  # phases never run at the same time
        # Other threads may pin and copy images meanwhile; only what this thread must not do ends the recording.
        with torch.cuda.graph(graph, pool=shared, capture_error_mode="thread_local"):
            self.step(program)
        self._graphs.append(graph)
        return graph.replay


def _tensors(state) -> list[tuple[str, Tensor]]:
    return [(f.name, value) for f in fields(state) if isinstance(value := getattr(state, f.name), Tensor)]


def _key(body: StepBody, observation: Observation, state, x_t: Tensor) -> Hashable:
    shapes = [(tuple(t.shape), t.dtype) for t in (x_t, observation.y, *(t for _, t in _tensors(state)))]
    kind = observation.canvas, observation.gamma, observation.seen is None
    program = body.estimator.program(), body.guidance, kind, current_backend()
    return *shapes, x_t.device, _network(body.model), program


def _network(model: nn.Module) -> Hashable:
    """The recording keeps the network alive, so that an id stays its own."""
    return model.program() if isinstance(model, EpsModel) else id(model)
