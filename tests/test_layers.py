"""The house rules that a program can check, read from the sources with `ast`: who imports whom, who prints, who opens
files. Each rule comes with a planted violation that it must find."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [  # low to high: a module of fastem imports only lower layers, or its own package
    {"ops"},
    {"schedules", "metrics", "synth", "io", "noise", "photo", "env", "ranges"},
    {"models", "operators"},
    {"guidance"},
    {"samplers", "mstep", "initial"},
    {"em", "varying"},
    {"runtime", "baselines"},
    {"engine"},
    {"batch", "training", "profiling", "evaluation"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TOUCH_FILES = {"io", "batch", "training", "profiling", "evaluation", "models.checkpoints", "env"}  # env reads /proc
FILE_CALLS = {"read_text", "write_text", "read_bytes", "write_bytes", "fdopen"}
FILE_CALLS |= {"torch.load", "torch.save", "np.load", "np.save", "Image.open", "tarfile.open"}


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """`(dotted name, syntax tree)` of each module of a package; a package itself goes by its own name."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """`(line, dotted name)` of everything imported, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def called(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """`(line, name)` of every call by a plain or dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def layer_violations(module: str, tree: ast.Module) -> list[str]:
    """Imports of `fastem.X.Y` that go up, sideways or to no known layer. The public face, `fastem` itself, has none."""
    found = []
    own = module.split(".")[1] if "." in module else None
    for line, name in imported(tree):
        if name.split(".")[0] != "fastem":
            continue
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 else ""
        if target == own or target == "__version__":
            continue
        if own is None or target not in RANK or own not in RANK or RANK[target] >= RANK[own]:
            found.append(f"{module}:{line} imports {name}")
    return found


def file_violations(module: str, tree: ast.Module) -> list[str]:
    short = module.removeprefix("fastem.")
    if short in TOUCH_FILES or short.split(".")[0] in TOUCH_FILES:
        return []
    return [
        f"{module}:{line} calls {name}"
        for line, name in called(tree)
        if name == "open" or name in FILE_CALLS or name.rsplit(".", 1)[-1] in FILE_CALLS
    ]


def print_violations(module: str, tree: ast.Module) -> list[str]:
    if module.split(".")[1:2] == ["cli"]:
        return []
    return [
        f"{module}:{line} calls {name}"
        for line, name in called(tree)
        if name == "print" or name.startswith(("sys.stdout.", "sys.stderr."))
    ]


def backend_violations(module: str, tree: ast.Module) -> list[str]:
    """Only `ops` knows the compiled extension and the Triton twins; `env` reports them."""
    if module.startswith(("fastem.ops", "fastem.env")):
        return []
    uses = [(line, name) for line, name in imported(tree) if name.startswith("kernels_triton")]
    uses += [(line, name) for line, name in called(tree) if name.startswith("torch.ops.")]
    return [f"{module}:{line} uses {name}" for line, name in uses]


RULES = [layer_violations, file_violations, print_violations, backend_violations]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rules(rule):
    assert [found for module, tree in modules("fastem") for found in rule(module, tree)] == []


@pytest.mark.parametrize(
    "rule, module, source, found",
    [
        (layer_violations, "fastem.guidance", "from fastem.engine import Deblurrer", "fastem.guidance:1"),
        (layer_violations, "fastem.mstep", "def f():\n    from fastem import em", "fastem.mstep:2"),
        (layer_violations, "fastem.noise", "import fastem.metrics", "fastem.noise:1"),  # sideways
        (layer_violations, "fastem.ops.psf", "import fastem.models", "fastem.ops.psf:1"),
        (layer_violations, "fastem.newcomer", "from fastem import ops", "fastem.newcomer:1"),  # in no layer
        (layer_violations, "fastem.engine", "import fastem", "fastem.engine:1"),  # the public face is above all
        (file_violations, "fastem.engine", "open('weights')", "fastem.engine:1"),
        (file_violations, "fastem.models.unet", "x = 1\ntorch.load(f)", "fastem.models.unet:2"),
        (file_violations, "fastem.em", "Path('a').write_bytes(b'')", "fastem.em:1"),
        (print_violations, "fastem.samplers", "for i in range(3):\n    print(i)", "fastem.samplers:2"),
        (print_violations, "fastem.batch", "sys.stderr.write('done')", "fastem.batch:1"),
        (backend_violations, "fastem.mstep", "import kernels_triton", "fastem.mstep:1"),
        (backend_violations, "fastem.models.fused", "torch.ops.fastem.conv_pack(w)", "fastem.models.fused:1"),
    ],
)
def test_a_planted_violation_is_found(rule, module, source, found):
    (violation,) = rule(module, ast.parse(source))
    assert violation.startswith(found + " ")


def test_what_is_allowed_is_not_found():
    source = "from fastem import ops\nfrom fastem.guidance import PiGDM\nfrom fastem.samplers import sample"
    assert layer_violations("fastem.em", ast.parse(source)) == []
    assert layer_violations("fastem.models.eps", ast.parse("from fastem.models.unet import UNet")) == []


def test_kernels_triton_stands_alone():
    names = {name.split(".")[0] for _, tree in modules("kernels_triton") for _, name in imported(tree)}
    assert names, "kernels_triton was not found"
    assert names - sys.stdlib_module_names <= {"torch", "triton", "kernels_triton"}


def foreign_headers(source: str) -> list[str]:
    """Headers of torch or Python that a C++ or CUDA source includes."""
    return re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|pybind11|Python)\b[^>"]*)', source)


def test_only_the_bindings_know_torch():
    sources = [path for suffix in ("h", "cuh", "inc", "cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    bindings = {path for path in sources if path.parent == ROOT / "csrc" / "torch"}
    assert bindings
    assert any(foreign_headers(path.read_text(encoding="utf-8")) for path in bindings)  # the rule can find one
    for path in set(sources) - bindings:
        assert foreign_headers(path.read_text(encoding="utf-8")) == [], path


def test_help_is_quick():
    """`import fastem` and the command line load neither torch nor numpy."""
    code = "import sys, fastem, fastem.cli; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
