"""`fastem doctor` and `fastem models`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fastem.cli import console

Json = Annotated[bool, typer.Option("--json", help="for programs")]


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, backends and build flags; put this into a bug report."""
    from fastem.env import collect_env

    report = collect_env()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for section, facts in report.items():
        print(section)
        for name, fact in facts.items():
            print(f"  {name:22} {fact}")


def models(as_json: Json = False, debug: console.Debug = False) -> None:
    """List the bundled weights."""
    from importlib import resources

    from fastem.models.checkpoints import read_checkpoint

    table = []
    files = resources.files("fastem").joinpath("weights").iterdir()
    for file in sorted((file for file in files if file.name.endswith(".safetensors")), key=lambda file: file.name):
        with resources.as_file(file) as path:
            checkpoint = read_checkpoint(path)
            size = path.stat().st_size
        table.append(
            {
                "name": path.stem,
                "format": checkpoint.metadata.get("format"),
                "parameters": sum(tensor.numel() for tensor in checkpoint.state_dict.values()),
                "bytes": size,
                "sha256": checkpoint.sha256,
                "card": checkpoint.metadata.get("card"),
            }
        )
    if as_json:
        print(json.dumps(table, indent=2))
        return
    for row in table:
        print(f"{row['name']:12} {row['format']:20} {row['parameters'] / 1e6:6.2f} M parameters  "
              f"{row['bytes'] / 1e6:6.2f} MB  sha256 {row['sha256'][:16]}")  # fmt: skip
