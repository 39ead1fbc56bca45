"""What every command shares: exit codes, one-line messages, the progress bar, options that occur twice."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fastem.batch import Outcome, Plan

debug = False  # set by --debug


class ExitCode(IntEnum):
    DONE = 0
    SOME_FAILED = 1
    USAGE = 2
    NO_INPUT = 3
    CHECKPOINT = 4
    OUTPUT = 5
    INTERRUPTED = 130
    PIPE = 141


def _set_debug(value: bool) -> None:
    global debug
    debug = debug or value


Debug = Annotated[
    bool, typer.Option("--debug", help="show where a failure comes from", callback=_set_debug, is_eager=True)
]
ProgressMode = Literal["auto", "json", "none"]
ProgressOption = Annotated[
    ProgressMode, typer.Option(help="a bar on a terminal; JSON lines, results on stdout and steps on stderr; or none")
]
MaxMegapixels = Annotated[float, typer.Option(min=0.0001, help="refuse larger inputs")]
MaxMegabytes = Annotated[float, typer.Option(min=0.001, help="refuse larger input files")]
NameBy = Annotated[Literal["stem", "full"], typer.Option(help="outputs of a.jpg are a.png, ... or a.jpg.png, ...")]


def tell(code: str, message: str, hint: str = "") -> None:
    """One line on stderr."""
    text = " ".join(message.split()).rstrip(".")
    stop = "" if text.endswith("?") else "."
    print(f"fastem: {code}: {text}" + (f"{stop} {hint}" if hint else ""), file=sys.stderr, flush=True)


def tell_error(error: BaseException, about: str = "") -> None:
    """One line for an exception, whatever it is; its traceback too where --debug asks for it."""
    from fastem.io import FastemError

    prefix = f"{about}: " if about else ""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, FastemError):
        tell(error.code, prefix + error.args[0], error.hint)
    elif code := getattr(error, "code", None):  # CheckpointError
        tell(str(code), prefix + str(error))
    else:
        hint = "" if debug else "--debug shows where it happened"
        tell("E_INTERNAL", f"{prefix}{type(error).__name__}: {error}", hint)


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that tells a script what kind of failure this is."""
    code = getattr(error, "code", "")
    return {
        "E_OPTION": ExitCode.USAGE,
        "E_NAME_CLASH": ExitCode.USAGE,
        "E_PATH": ExitCode.USAGE,
        "E_NO_INPUT": ExitCode.NO_INPUT,
        "E_CHECKPOINT": ExitCode.CHECKPOINT,
        "E_OUTPUT": ExitCode.OUTPUT,
    }.get(code, ExitCode.SOME_FAILED)


class OptionError(Exception):
    """Options that a library function refuses; told as it says."""

    code = "E_OPTION"


@contextmanager
def options_checked(*kinds: type[Exception]) -> Iterator[None]:
    """Within the block a ValueError (or one of `kinds`) is the user's mistake in an option; a code stays what it is."""
    try:
        yield
    except (ValueError, *kinds) as error:
        if getattr(error, "code", None):
            raise
        raise OptionError(str(error)) from error


def read_kernel(path: Path):
    """The kernel of --kernel `(h, w)`, or a usage failure; what had to be changed is told."""
    from fastem.io import InputError, load_kernel, shown

    try:
        kernel, notes = load_kernel(path)
    except InputError as error:
        raise OptionError(f"--kernel {shown(path)}: {error}") from error
    for note in notes:
        tell_warning(note, shown(path))
    return kernel


def tell_warning(warning: str, about: str) -> None:
    code, _, message = warning.partition(": ")
    tell(code, f"{about}: {message}")


class Progress:
    """A bar on stderr where it is a terminal, JSON lines there, or nothing.

    Use as a context manager, and call with (what is being done, steps done, steps in all).
    """

    def __init__(self, mode: ProgressMode) -> None:
        self.mode = mode
        self._bar = None
        if mode == "auto" and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # results that go to a file or a pipe must get there
            )
            self._task = self._bar.add_task("", total=None, visible=False)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, description: str, done: float, total: float) -> None:
        if self._bar:
            self._bar.update(self._task, description=description, completed=done, total=total, visible=True)
        elif self.mode == "json":
            event = {"event": "step", "item": description, "done": done, "total": total}
            print(json.dumps(event), file=sys.stderr, flush=True)


def show_outcomes(outcomes: Iterable[Outcome], plan: Plan, mode: ProgressMode) -> ExitCode:
    """One line per result: files on stdout, warnings and failures on stderr."""
    from fastem.io import shown

    counts = {"done": 0, "skipped": 0, "failed": 0}
    for outcome in outcomes:
        counts[outcome.status] += 1
        source = shown(outcome.source)
        for warning in outcome.warnings:
            tell_warning(warning, source)
        if outcome.error is not None:
            tell_error(outcome.error.__cause__ if debug and outcome.error.__cause__ else outcome.error, source)
        if mode == "json":
            print(json.dumps(_result_event(outcome)), flush=True)
        elif outcome.error is None:
            print(_result_line(outcome), flush=True)
    if len(plan.items) > 1:
        summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        print(f"fastem: {summary}, of {len(plan.items)}", file=sys.stderr)
    return ExitCode.SOME_FAILED if counts["failed"] else ExitCode.DONE


def _result_line(outcome: Outcome) -> str:
    from fastem.io import shown

    first, *others = outcome.outputs.values()
    record = outcome.record
    if outcome.status == "skipped":
        facts = "finished before"
    elif "reblur" in record:
        origin = "estimated" if record["sigma_estimated"] else "given"
        chi2 = "unknown" if record["reblur"] is None else f"{record['reblur']:.3g}"
        facts = f"sigma {record['sigma']:.3g} {origin}, reblur chi^2 {chi2}, {record['seconds']:.1f} s"
    else:
        facts = f"sigma {record['sigma']:.3g}, {100 * record['clipped']:.2g} % clipped"
    also = "".join(f" {shown(path.name)}" for path in others)
    return f"{shown(outcome.source)} -> {shown(first)}" + (f" +{also}" if also else "") + f" ({facts})"


def _result_event(outcome: Outcome) -> dict:
    from fastem.io import shown

    event = {"event": "result", "source": shown(outcome.source), "status": outcome.status}
    if outcome.error is not None:
        return event | {"code": outcome.error.code, "message": outcome.error.args[0], "hint": outcome.error.hint}
    event["outputs"] = {suffix: shown(path) for suffix, path in outcome.outputs.items()}
    facts = ("sigma", "sigma_estimated", "reblur", "item_seed", "seconds", "warnings")
    return event | {name: outcome.record[name] for name in facts if name in outcome.record}
