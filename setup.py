"""Builds `fastem._C`. Metadata is in pyproject.toml.

FASTEM_NATIVE=0    no extension: everything runs on plain torch
FASTEM_CUDA=0|1    leave the CUDA sources out, or insist on them; by default in where torch has CUDA and nvcc is found
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extension():
    """The arguments of `setup` that build the extension, or none and one line that says why."""
    if os.environ.get("FASTEM_NATIVE", "1") == "0":
        return skip("FASTEM_NATIVE=0")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return skip("torch is not visible to the build; use pip install --no-build-isolation")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return skip(f"no C++ compiler ({compiler}) was found")

    nvcc = cpp_extension.CUDA_HOME and torch.version.cuda
    wanted = os.environ.get("FASTEM_CUDA", "1" if nvcc else "0") == "1"
    if wanted and not nvcc:
        sys.exit("FASTEM_CUDA=1, but this torch has no CUDA or nvcc was not found")
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is a plain loop without it
    # contraction off: fused multiply-adds are written out, so that vector bodies and scalar tails agree to the bit
    cxx = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *openmp]
    settings = {
        "name": "fastem._C",
        "include_dirs": [str(ROOT / "csrc" / "include"), str(ROOT / "csrc" / "cpu")],
        "extra_link_args": openmp,
        "py_limited_api": True,  # no Python symbol in it: torch.ops.load_library
    }
    if wanted:
        module = cpp_extension.CUDAExtension(
            sources=sources("csrc/cpu/*.cpp", "csrc/torch/*.cpp", "csrc/cuda/*.cu"),
            define_macros=[("FASTEM_CUDA", None)],
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20"]},
            **settings,
        )
    else:
        cpu = [path for path in sources("csrc/cpu/*.cpp", "csrc/torch/*.cpp") if not path.endswith("_cuda.cpp")]
        module = cpp_extension.CppExtension(sources=cpu, extra_compile_args={"cxx": cxx}, **settings)
    build = cpp_extension.BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    wheel = {"bdist_wheel": {"py_limited_api": "cp311"}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": build}, "options": wheel}


def skip(reason):
    print(f"fastem: building without the native extension, ops run on plain torch: {reason}", file=sys.stderr)
    return {}


setup(**extension())
