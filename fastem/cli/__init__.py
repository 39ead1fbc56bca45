"""The command line. Each command has its file; `main` turns whatever they raise into one line and an exit code."""

from __future__ import annotations

from fastem.cli.main import app, main

__all__ = ["app", "main"]
