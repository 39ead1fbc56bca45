"""`fastem profile`"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastem.cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from fastem.profiling import Workload


def profile(
    size: Annotated[str, typer.Option(metavar="HxW", help="of the images, pixels")] = "256x256",
    batch: Annotated[int, typer.Option(min=1, help="images")] = 1,
    particles: Annotated[int, typer.Option(min=1, help="samples per image")] = 1,
    kernel_size: Annotated[int, typer.Option(min=1, help="side of the kernel's support, pixels")] = 33,
    guidance: Annotated[str, typer.Option(metavar="mean|pigdm|dps", help="the last two have a backward pass")] = "mean",
    m_step: Annotated[str, typer.Option(metavar="hqs|edges", help="how the kernel is updated, at every step")] = "hqs",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="steps per measurement; figures are medians")] = 5,
    prior: Annotated[
        str, typer.Option(help="bundled name or file; ffhq-random, small-random: U-Nets of random weights")
    ] = "natural",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="where to compute")] = "auto",
    backend: Annotated[
        str, typer.Option(metavar="auto|reference|native|triton", help="which implementation of the operations")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="of the blocks of a U-Net")
    ] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="layout of the network's weights")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="the network by torch.compile, max-autotune")] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="also a step as a replay of a CUDA graph")] = False,
    top: Annotated[int, typer.Option(min=0, help="operations to show")] = 15,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="write the whole record; - for stdout, the tables then go to stderr")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="a record of --json to hold this one against")] = None,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace, for ui.perfetto.dev")] = None,
    ncu: Annotated[
        str | None, typer.Option(metavar="STAGE", help="print the Nsight Compute command for one stage, and stop")
    ] = None,
    run_only: Annotated[
        bool, typer.Option("--run-only", help="the steps with their NVTX ranges and nothing else: to run under a tool")
    ] = False,
    debug: console.Debug = False,
) -> None:
    """Show where the time of a step goes: per stage and operation, against what this machine can do.

    The image is synthetic. docs/profiling.md tells what the columns mean and how to use them.
    """
    from fastem import profiling

    workload = profiling.Workload(
        parse_size(size), batch, particles, kernel_size, guidance, m_step, steps, prior, device, backend, dtype,
        channels_last, compile_, graphs,
    )  # fmt: skip
    with console.options_checked(RuntimeError):  # a forced backend that cannot run
        if ncu is not None:
            print(profiling.ncu_command(ncu, _arguments(workload)))
            return
        if run_only:
            profiling.run_only(workload)
            return
        base = None if compare is None else profiling.read_record(compare)
        for path in (trace, as_json):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"no folder {path.parent} to write {path.name} to")
        record = profiling.profile(workload, trace=trace)
        changes = [] if base is None else profiling.compare(record, base)
    if as_json is not None and str(as_json) != "-":
        _write(as_json, record)
    elif as_json is not None:
        print(json.dumps(record, indent=1))
    _show(record, changes, top, to_stderr=str(as_json) == "-")


def parse_size(text: str) -> tuple[int, int]:
    """`HxW`, or one number for both.

    Raises:
        typer.BadParameter: if it is neither.
    """
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(size) < 8:
        raise typer.BadParameter(f"--size is HEIGHTxWIDTH in pixels, at least 8x8, such as 256x256; got {text!r}")
    return size


def _arguments(workload: Workload) -> list[str]:
    """The options that make this workload, without those that have their default."""
    words = []
    for option in fields(workload):
        value = getattr(workload, option.name)
        if value != option.default:
            words.append("--" + option.name.replace("_", "-"))
            words += [] if value is True else ["x".join(map(str, value)) if option.name == "size" else str(value)]
    return words


def _write(path: Path, record: dict) -> None:
    from fastem.io import OutputError, atomic_write

    try:
        with atomic_write(path) as file:
            file.write(json.dumps(record, indent=1).encode())
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise OutputError("E_OUTPUT", message, "Choose another file") from None


def _show(record: dict, changes: list[dict], top: int, *, to_stderr: bool) -> None:
    from rich.console import Console

    stream = sys.stderr if to_stderr else sys.stdout
    out = Console(file=stream, width=None if stream.isatty() else 120, highlight=False, soft_wrap=True)
    for line in _head(record):
        out.print(line, markup=False)
    out.print(_stage_table(record))
    out.print(_op_table(record, top))
    if changes:
        out.print(_change_table(changes))


def _head(record: dict) -> list[str]:
    work, where, step, roof = (record[name] for name in ("workload", "environment", "step", "roofline"))
    peaks = ", ".join(f"{_si(1e12 * value)}FLOP/s {dtype}" for dtype, value in roof["tflop_s"].items())
    line = (
        f"{work['prior']}, {work['size'][0]}x{work['size'][1]}, B = {work['batch']}, n = {work['particles']}, "
        f"K = {work['kernel_size']}, guidance {work['guidance']}, M-step {work['m_step']}, {work['dtype']}"
    )
    facts = [f"peak memory {_si(step['peak_memory_bytes'])}B", f"{step['host_reads_per_step']:g} reads by the host"]
    replay = [f"as a replay: {_times(record['graphs'])}{_idle(record['graphs'])}"] if record["graphs"] else []
    return [
        line,
        f"{where['device']}, {where['threads']} CPU threads, torch {where['torch']}, backend {work['backend']}; "
        f"{where['native']}",
        f"measured peaks: copy {_si(1e9 * roof['copy_gb_s'])}B/s, {peaks}",
        f"a step: {_times(step)}{_idle(step)}; {'; '.join(facts)}",
        *replay,
    ]


def _times(step: dict) -> str:
    return ", ".join(f"{step[name]:.4g} ms {label}" for name, label in _CLOCKS.items() if name in step)


def _idle(step: dict) -> str:
    if step["gpu_idle_percent"] is None:
        return ""
    return f"; GPU idle {step['gpu_idle_percent']:.1f} %, {step['syncs_per_step']:g} waits for it"


_CLOCKS = {"wall_ms": "wall", "cpu_ms": "CPU", "device_ms": "device"}


def _table(title: str, columns: list[str], left: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


_EFFICIENCY: list[tuple[str, Callable[[dict], str]]] = [
    ("bytes", lambda row: _si(row["bytes"])),
    ("FLOP", lambda row: _si(row["flops"])),
    ("B/s", lambda row: _si(1e9 * row["gb_s"])),
    ("FLOP/s", lambda row: _si(1e12 * row["tflop_s"])),
    ("% of roofline", lambda row: f"{row['roofline_percent']:.0f}"),
]


def _stage_table(record: dict) -> Table:
    clocks = [name for name in _CLOCKS if name in record["step"]]
    label = _CLOCKS[record["clock"]]
    columns = ["stage", *(f"{_CLOCKS[name]} ms" for name in clocks), "% of step", *(name for name, _ in _EFFICIENCY)]
    table = _table(f"Stages of a step (rates by {label} time)", columns, 1)
    for row in record["stages"]:
        times = [f"{row[name]:.3f}" for name in clocks]
        table.add_row(row["stage"], *times, f"{row['step_percent']:.1f}", *(show(row) for _, show in _EFFICIENCY))
    return table


def _op_table(record: dict, top: int) -> Table:
    label = _CLOCKS[record["clock"]]
    title = f"Operations ({label} time, {min(top, len(record['ops']))} of {len(record['ops'])})"
    table = _table(title, ["stage", "operation", "calls", "ms", *(name for name, _ in _EFFICIENCY)], 2)
    for row in record["ops"][:top]:
        shown = [show(row) for _, show in _EFFICIENCY]
        table.add_row(row["stage"], row["op"], f"{row['calls']:g}", f"{row['ms']:.3f}", *shown)
    return table


def _change_table(changes: list[dict]) -> Table:
    label = _CLOCKS[changes[0]["clock"]]
    table = _table(f"Against the base ({label} time)", ["stage", "base ms", "ms", "base / now"], 1)
    for row in changes:
        numbers = [("-" if row[name] is None else f"{row[name]:.3f}") for name in ("base_ms", "ms")]
        table.add_row(row["stage"], *numbers, "-" if row["ratio"] is None else f"{row['ratio']:.2f}x")
    return table


def _si(value: float) -> str:
    """Three digits and a prefix: 1.23 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
