"""The `fastem` program: its commands, and the one place where failures become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

import typer

from fastem.cli import console, deblur, degrade, doctor, evaluate, profile, train
from fastem.cli.console import ExitCode

LEFT_BEHIND = "finished results are complete, the one in progress is absent"
UsageError = typer.BadParameter.__base__  # typer's own copy of click has no public name for it

app = typer.Typer(
    name="fastem",
    help="Blind deblurring: a blurred photo in, a sharp one and its blur kernel out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, and no import of rich for it
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog="example: fastem deblur photo.jpg -o out/ --sigma 5")(deblur.deblur)
app.command(epilog="example: fastem degrade sharp/ -o blurred/ --sigma 5 --kernel-size 33")(degrade.degrade)
app.command(epilog="example: fastem evaluate public --data images/ -o results/ --limit 4")(evaluate.evaluate)
app.add_typer(train.app, name="train")
app.command(epilog="example: fastem profile --guidance pigdm --json base.json")(profile.profile)
app.command()(doctor.doctor)
app.command()(doctor.models)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and leaves the process with its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except _Stopped as stopped:
        code = stopped.code
        console.tell("interrupted" if code == ExitCode.INTERRUPTED else "terminated", LEFT_BEHIND)
    except BrokenPipeError:  # the reader of our output has gone: be quiet, as every filter is
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.PIPE
    sys.exit(int(code))


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command; failures are told in one line on stderr (with a traceback after --debug)."""
    console.debug = False
    try:
        return app(args=list(arguments), prog_name="fastem", standalone_mode=False) or ExitCode.DONE
    except UsageError as error:
        _tell_usage(error)
        return ExitCode.USAGE
    except (typer.Abort, KeyboardInterrupt):
        console.tell("interrupted", LEFT_BEHIND)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        console.tell_error(error)
        return console.exit_code_of(error)


def _tell_usage(error: Exception) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text
        print(error.format_message(), file=sys.stderr)
        return
    message = error.format_message().removeprefix("Invalid value: ")
    if near := get_close_matches(getattr(error, "option_name", ""), getattr(error, "possibilities", None) or [], 1):
        message = f"No such option: {error.option_name}. Did you mean {near[0]}?"
    context = getattr(error, "ctx", None)
    console.tell("E_USAGE", message, f"See {context.command_path if context else 'fastem'} --help")


class _Stopped(SystemExit):
    """A signal came; `code` is the exit code."""


def _stop(number: int, frame: object) -> NoReturn:
    """Ends the process from where it stands; what is being written is removed on the way out.

    Says nothing here: the signal may have come in the middle of a write to the same stream.
    """
    raise _Stopped(128 + number)
