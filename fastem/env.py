"""What this machine and this installation offer, for `fastem doctor` and for bug reports.

Every probe stands alone: one that fails contributes the text of its exception, and the report still comes.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

PACKAGES = ("torch", "numpy", "pillow", "safetensors", "typer", "rich", "pypng", "tifffile", "triton")


def collect_env() -> dict[str, dict[str, str]]:
    """Sections of named facts, all text: `{"software": {"python": "3.11.7", ...}, ...}`. Never raises."""
    return {section: _guarded_section(probe) for section, probe in _SECTIONS.items()}


def versions() -> dict[str, str]:
    """Versions of fastem and of the packages that shape its results, as recorded beside each output."""
    return {name: _version(name) for name in ("fastem", "torch", "numpy", "pillow")}


def _guarded_section(probe: Callable[[], dict[str, Callable[[], object]]]) -> dict[str, str]:
    try:
        return {name: _guarded(fact) for name, fact in probe().items()}
    except Exception as error:
        return {"error": _told(error)}


def _guarded(fact: Callable[[], object]) -> str:
    try:
        return str(fact())
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"broken: {type(error).__name__}: {lines[0] if lines else ''}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _software() -> dict[str, Callable[[], object]]:
    facts: dict[str, Callable[[], object]] = {
        "fastem": lambda: _version("fastem"),
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform,
    }
    return facts | {package: lambda package=package: _version(package) for package in PACKAGES}


def _processor() -> dict[str, Callable[[], object]]:
    return {
        "name": cpu_name,
        "cores": lambda: len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector instructions": _vector_instructions,
        "torch threads": lambda: _torch().get_num_threads(),
        "memory": _memory,
    }


def _devices() -> dict[str, Callable[[], object]]:
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "torch built for": lambda: f"CUDA {_torch().version.cuda}" if _torch().version.cuda else "CPU only",
        "CUDA devices": lambda: _torch().cuda.device_count() if _torch().cuda.is_available() else "none",
        "nvcc": lambda: _command_line("nvcc", "--version"),
        "driver": lambda: _command_line("nvidia-smi", *query),
    }


def _backends() -> dict[str, Callable[[], object]]:
    return {
        "backend": _backend,
        "native extension": _native,
        "triton kernels": _triton,
        "C++ compiler": lambda: _command_line(os.environ.get("CXX", "g++"), "--version"),
        "FASTEM_BACKEND": lambda: os.environ.get("FASTEM_BACKEND", "not set"),
    }


_SECTIONS = {"software": _software, "processor": _processor, "devices": _devices, "backends": _backends}


def _torch():
    import torch

    return torch


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _vector_instructions() -> str:
    """What torch dispatches to, and what the processor lists."""
    used = _torch().backends.cpu.get_cpu_capability()
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split(":", 1)[1].split() for line in file if line.startswith("flags")), [])
    except OSError:
        flags = []
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile")
    listed = ", ".join(flag for flag in wanted if flag in flags)
    return f"torch uses {used}; the processor lists {listed or 'none of ' + ', '.join(wanted)}"


def _memory() -> str:
    pages, free = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
    size = os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 2**30:.1f} GiB, {free * size / 2**30:.1f} GiB free"


def _backend() -> str:
    """The backend that the options and this machine come to, for float32 tensors on the CPU."""
    from fastem.ops import backend

    asked = backend.current_backend()
    return f"{asked.value} -> {backend.select('wiener_guidance', [_torch().zeros(1)]).value}"


def _native() -> str:
    from fastem.ops import native

    return native.build_info()


def _triton() -> str:
    import kernels_triton

    where = "on the GPU" if _torch().cuda.is_available() else "in the interpreter only (no GPU)"
    return f"{len(kernels_triton.__all__)} ops, run {where}"


def _command_line(program: str, *arguments: str) -> str:
    """The most telling line of a program's output, or that it is not there."""
    path = shutil.which(program)
    if path is None:
        return "not found"
    result = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=True)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else "no output")
