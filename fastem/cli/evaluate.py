"""`fastem evaluate`"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Annotated

import typer

from fastem.cli import console


def evaluate(
    protocol: Annotated[
        str, typer.Argument(help="a packaged protocol (see --list), or a .toml file", show_default=False)
    ] = "",
    data: Annotated[Path, typer.Option(help="folder that holds the images and kernels of the protocol")] = Path("."),
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the results; a run there is continued")] = Path(
        "evaluation"
    ),
    limit: Annotated[int | None, typer.Option(min=1, help="only so many images per source, evenly spread")] = None,
    shard: Annotated[
        str, typer.Option(metavar="i/n", help="every n-th case from the i-th; shards share --out")
    ] = "1/1",
    methods: Annotated[str, typer.Option(metavar="A,B", help="only these methods", show_default="all")] = "",
    option: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE", help="of Deblurrer, for all engine methods; repeat")
    ] = [],  # noqa: B006  (typer copies it)
    prior: Annotated[Path | None, typer.Option(help="weights for all engine methods, instead of their own")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="where to compute")] = "auto",
    metric_plugin: Annotated[
        list[str], typer.Option(metavar="MODULE:FUNCTION", help="your own metric of one image; repeat")
    ] = [],  # noqa: B006
    set_plugin: Annotated[
        list[str], typer.Option(metavar="MODULE:FUNCTION", help="your own metric of a folder of images; repeat")
    ] = [],  # noqa: B006
    save_images: Annotated[
        bool, typer.Option("--save-images", help="keep every restored image, not only those shown")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="run nothing; write the report of --out again")
    ] = False,
    list_protocols: Annotated[bool, typer.Option("--list", help="list the packaged protocols")] = False,
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Measure methods on the same images: rows, statistics and a report.

    Writes rows.csv, summary.json, report.md and report.html with plots and pictures. What is in rows.csv is not run
    again; a changed protocol, program or prior is refused.
    """
    from fastem import evaluation  # torch loads here, not for --help

    if list_protocols:
        for name in evaluation.names():
            print(f"{name:10} {evaluation.load_protocol(name).title}")
        return
    if set_plugin and not save_images and not report_only:
        raise typer.BadParameter("--set-plugin measures every restored image; keep them with --save-images")
    if report_only:
        _publish(out, set_plugin)
        return
    if not protocol:
        raise typer.BadParameter(f"name a protocol: {', '.join(evaluation.names())}, or a .toml file")
    chosen = evaluation.load_protocol(protocol).with_options(_parse_options(option))
    run = evaluation.Evaluation(
        chosen, data, out, limit=limit, shard=_parse_shard(shard), methods=_split(methods, chosen.methods),
        prior=None if prior is None else str(prior), device=device, plugins=tuple(metric_plugin),
        save_images=save_images,
    )  # fmt: skip
    total, done = run.total, run.total - run.left
    if done:
        console.tell("resumed", f"{done} of {total} rows were there before")
    with console.Progress(progress) as bar:
        for row in run.run():
            done += 1
            bar(row["method"], done, total)
            print(json.dumps({"event": "row"} | row) if progress == "json" else _line(row), flush=True)
    _publish(out, set_plugin)
    if run.errors:
        console.tell("errors", f"{run.errors} of {total} rows ended with an error", "The same command tries them again")
        raise typer.Exit(console.ExitCode.SOME_FAILED)


def _publish(out: Path, set_plugin: list[str]) -> None:
    """The metrics of whole sets that are asked for, and the report."""
    from fastem import evaluation

    if set_plugin:
        evaluation.measure_sets(out, tuple(set_plugin))
    print(evaluation.write_report(out))


def _line(row: dict) -> str:
    facts = [f"{label} {row[name]:{form}}" for name, label, form in (
        ("psnr_aligned", "PSNR", ".2f"), ("gain", "gain", "+.2f"), ("kernel_error", "kernel error", ".3f"),
        ("kernel_correlation", "correlation", ".2f"), ("chi2", "chi^2", ".2f"), ("seconds", "s", ".1f"),
    ) if name in row]  # fmt: skip
    what = [row["method"], row["image"], row["kernel"], f"sigma {row['sigma'] or 'estimated'}", row["boundary"]]
    return f"{', '.join(what)}: {row['error'] if 'error' in row else ', '.join(facts)}"


def _parse_options(given: list[str]) -> dict:
    """`name=value`; a value is JSON, or else text."""
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--option is NAME=VALUE, got {text!r}; for instance --option steps=20")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"--shard is i/n with 1 <= i <= n, got {text!r}; for instance --shard 1/4")
    return int(match[1]), int(match[2])


def _split(text: str, names: Container[str]) -> list[str] | None:
    """The methods of a list; commas may be part of their names, and the longest name counts."""
    parts, found = text.split(","), []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if ",".join(parts[:n]).strip() in names), 1)
        found.append(",".join(parts[:count]).strip())
        del parts[:count]
    return [name for name in found if name] or None
