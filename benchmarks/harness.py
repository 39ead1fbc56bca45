"""What the benchmarks share: paired timing, and results as JSON that says where they were measured."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import torch

from fastem import io, profiling, runtime

RESULTS = Path(__file__).parent / "results"
Clock = Callable[[], float]


def parser(doc: str | None) -> ArgumentParser:
    """The options all scripts have."""
    from argparse import RawDescriptionHelpFormatter

    options = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="write the figures to this file too, for report.py")
    return options


def alternate(functions: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of every call, one call of each per round, so that what else runs slows all; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if round_:
                times[name].append(clock() - start)
    return times


def clock_of(device: torch.device, cpu_time: bool) -> Clock:
    """CPU seconds of the process, which other programs do not slow, or wall seconds; of a GPU when its work is done."""
    if device.type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronised
    return time.process_time if cpu_time else time.perf_counter


def summary(times: dict[str, list[float]], base: str, fast: str) -> dict:
    """Milliseconds (median and fastest) of each, the ratio of the medians, and the quartiles of the paired ratios."""
    paired = [b / f for b, f in zip(times[base], times[fast], strict=True)]
    quartiles = statistics.quantiles(paired, n=4) if len(paired) > 1 else [paired[0]] * 3
    return {
        "base": base,
        "fast": fast,
        "rounds": len(paired),
        "median_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "fastest_ms": {name: 1e3 * min(values) for name, values in times.items()},
        "ratio": statistics.median(times[base]) / statistics.median(times[fast]),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
    }


def write(path: Path, kind: str, rows: list[dict], *, device: str = "cpu", **facts) -> None:
    """One JSON file: what was measured, where and when, and the rows."""
    where = runtime.resolve_device(device)
    record = {
        "kind": kind, "date": datetime.date.today().isoformat(), "device": where.type,
        "environment": profiling.environment(where), **facts, "rows": rows,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.atomic_write(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
