"""nvcc compiles the CUDA sources, the kernels fit the hardware, and the binding parses. No GPU is needed.

FASTEM_REQUIRE=nvcc makes a missing compiler a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
KERNELS = {
    "convolve_support_kernel", "group_norm_backward_kernel", "group_norm_chunk_kernel", "group_norm_combine_kernel",
    "group_norm_silu_kernel", "group_norm_small_backward_kernel", "group_norm_small_kernel", "hqs_chain_kernel",
    "otf_columns_kernel", "otf_rows_kernel", "pack_weights_kernel", "philox_normal_kernel", "predict_x0_kernel",
    "project_kernel_kernel", "project_simplex_kernel", "recentre_kernel", "simplex_least_squares_kernel",
    "spectral_sums_kernel", "step_update_kernel", "wiener_guidance_kernel",
}  # fmt: skip

if NVCC is None:
    if "nvcc" in os.environ.get("FASTEM_REQUIRE", ""):
        raise FileNotFoundError("FASTEM_REQUIRE names nvcc, but it is not installed")
    pytest.skip("nvcc is not installed", allow_module_level=True)

compiled: dict[str, dict[str, int]] = {}  # kernel -> registers, bytes spilled, bytes of stack; filled file by file


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_source_compiles_without_spills(source, tmp_path):
    command = [NVCC, "-c", "-O3", "-std=c++17", "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v"]
    command += ["-Xcompiler", "-fPIC", "-Werror", "all-warnings", "-DFASTEM_CUDA", f"-I{CSRC / 'include'}"]
    target = tmp_path / "object.o"
    result = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert target.stat().st_size > 0
    found = resources(result.stderr)
    assert found
    for kernel, use in found.items():
        assert use["spill"] == 0, f"{kernel} spills {use['spill']} bytes"
    compiled.update(found)


def test_every_kernel_was_seen():
    if len(compiled) == 0:
        pytest.skip("runs after the compilation of all sources")
    assert set(compiled) == KERNELS


def test_chain_kernel_runs_with_its_largest_block():
    if "hqs_chain_kernel" not in compiled:
        pytest.skip("runs after the compilation of chain.cu")
    assert compiled["hqs_chain_kernel"]["registers"] * 640 <= 65536  # kMaxThreads, registers of an SM


def resources(report):
    """What ptxas -v says of each kernel."""
    kernels = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", report, re.S):
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        stack, stores, loads = map(int, memory.groups())
        registers = int(re.search(r"Used (\d+) registers", text).group(1))
        now = {"registers": registers, "spill": stores + loads, "stack": stack}
        plain = next((k for k in KERNELS if f"{len(k)}{k}" in name), name)  # as the ABI writes names: length, name
        kernels.setdefault(plain, {"registers": 0, "spill": 0, "stack": 0})  # instances of a template count together
        kernels[plain] = {key: max(kernels[plain][key], use) for key, use in now.items()}
    return kernels


def test_binding_parses_against_the_headers_of_torch():
    """The CPU wheel of torch carries the headers of c10/cuda, which is all that the CUDA binding includes."""
    torch_include = Path(torch.__file__).parent / "include"
    plan = subprocess.run([NVCC, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    cuda_include = Path(re.search(r"TOP=(\S+)", plan).group(1)) / "include"
    headers = [torch_include / "c10" / "cuda" / "CUDAGuard.h", cuda_include / "cuda_runtime.h"]
    if shutil.which("g++") is None or not all(path.exists() for path in headers):
        pytest.skip("needs g++ and the headers of CUDA and of c10/cuda")
    defines = ["-DFASTEM_CUDA", "-DC10_USING_CUSTOM_GENERATED_MACROS"]  # the CPU wheel lacks one generated header
    includes = [f"-I{CSRC / 'include'}", "-isystem", torch_include, "-isystem", cuda_include]
    command = ["g++", "-std=c++20", "-fsyntax-only", *defines, *includes, CSRC / "torch" / "bindings_cuda.cpp"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
