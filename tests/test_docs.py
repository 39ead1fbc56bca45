"""What the documents say is there: commands, options, names, files, links. A document that lags behind fails."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from test_layers import LAYERS, TOUCH_FILES

import fastem
from fastem import evaluation
from fastem.batch import DEFAULT_SAVE, SUFFIXES
from fastem.cli import app
from fastem.em import EdgeEM
from fastem.engine import SEARCH_SIGMA_MIN

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / "examples" / "README.md", ROOT / "tests" / "data" / "README.md"]
COMMAND = typer.main.get_command(app)

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def fences(text: str, language: str = "") -> list[str]:
    """The code blocks of a language; "" for those of none."""
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if name == language]


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def command_lines(text: str, program: str) -> list[str]:
    """Complete command lines of a program, from plain blocks and inline code."""
    lines = [line.split("#")[0].strip() for code in fences(text) for line in code.splitlines()]
    return [line for line in lines + spans(text) if line.startswith(program + " ")]


def parse(line: str) -> None:
    """Parses a command line of fastem without running it; raises what the command line would."""
    command, arguments = COMMAND, shlex.split(line)[1:]
    while hasattr(command, "commands") and arguments:
        name = arguments.pop(0)
        if name == "--help":
            return
        assert name in command.commands, f"no command {name}: {line}"
        command = command.commands[name]
    if arguments or " " in line.removeprefix("fastem "):
        command.make_context("fastem", arguments)


def option_names() -> set[str]:
    todo, names = [COMMAND], {"--help"}
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        names |= {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return names


def resolve(name: str) -> Any:
    """The object behind a dotted name, through modules first; raises where there is none."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        try:
            value = getattr(value, part)
            if inspect.isfunction(value) and i < len(parts):  # fastem.mstep: the module of that name is meant
                value = importlib.import_module(".".join(parts[:i]))
        except AttributeError:
            value = importlib.import_module(".".join(parts[:i]))
    return value


def check_python(code: str) -> None:
    """Names of fastem exist and take the keywords they are given."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"fastem(\.\w+)+", ast.unparse(node)):
            resolve(ast.unparse(node))
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).startswith("fastem."):
            signature = inspect.signature(resolve(name))
            signature.bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)


def absolute_paths(text: str) -> Iterator[str]:
    """Paths from the root of some machine; those of every Unix are fine."""
    for path in re.findall(r"(?<![\w.:/~\-)\]}*])(/[\w.\-]+(?:/[\w.\-]+)+)", re.sub(r"https?://\S+", "", text)):
        if not path.startswith(("/dev/", "/proc/", "/tmp/", "/usr/bin/")):
            yield path


@every_document
def test_commands_parse(document):
    for line in command_lines(document.read_text(encoding="utf-8"), "fastem"):
        parse(line)


@every_document
def test_options_exist(document):
    spoken = {word for span in spans(document.read_text(encoding="utf-8")) for word in span.split() if "--" in word[:2]}
    foreign = {"--nproc-per-node", "--install", "--no-build-isolation"}  # of torchrun, cmake and pip
    assert {word.split("=")[0] for word in spoken} - foreign <= option_names()


@every_document
def test_maps_of_spread_are_of_samples(document):
    text = document.read_text(encoding="utf-8")
    for span in spans(text) + command_lines(text, "fastem"):
        if re.search(r"--save \S*std", span):
            assert {"--mode sample", "--particles"} <= set(re.findall(r"--mode sample|--particles", span)), span


@every_document
def test_make_targets_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, re.M).group(1).split())
    for line in command_lines(document.read_text(encoding="utf-8"), "make"):
        assert {word for word in shlex.split(line)[1:] if "=" not in word} <= targets, line


@every_document
def test_python_fits_the_package(document):
    for code in fences(document.read_text(encoding="utf-8"), "python"):
        check_python(code)


@every_document
def test_names_resolve(document):
    for span in spans(document.read_text(encoding="utf-8")):
        if re.fullmatch(r"fastem(\.\w+)+", span) and not span.startswith("fastem._C"):
            resolve(span)


@every_document
def test_files_and_links_resolve(document):
    text = document.read_text(encoding="utf-8")
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "dist", "restored"}
    for span in spans(text):
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]*)+", span) and span.split("/")[0] in folders:
            assert (ROOT / span).exists(), f"no file {span}"
    for link in links(text):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = document.parent / target if target else document
        assert path.exists(), f"no file {link}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"no heading {link}"


@every_document
def test_no_path_of_one_machine(document):
    assert list(absolute_paths(document.read_text(encoding="utf-8"))) == []


def test_checks_can_fail():
    with pytest.raises(Exception, match="No such option"):
        parse("fastem deblur a.png --kernelsize 3")
    with pytest.raises(AssertionError, match="no command"):
        parse("fastem sharpen a.png")
    with pytest.raises(Exception, match="valid integer"):
        parse("fastem deblur a.png --seed blue")
    with pytest.raises(TypeError, match="sigmas"):
        check_python("fastem.degrade(x, k, sigma=1, seed=0, sigmas=2)")
    with pytest.raises(ImportError):
        check_python("fastem.sharpen(x)")
    with pytest.raises(ImportError):
        resolve("fastem.ops.sharpen")
    assert command_lines("```\nfastem deblur a.png  # now\n```\nor `fastem models`", "fastem") == [
        "fastem deblur a.png",
        "fastem models",
    ]
    assert list(absolute_paths("see /home/me/photos/a.png, a/b/c, `/tmp/x`")) == ["/home/me/photos/a.png"]
    assert anchors("## Where the kernel starts?") == {"where-the-kernel-starts"}


# ------------------------------------------------------------------------------------------ statements against the code


def section(document: str, title: str) -> str:
    """From a heading `## title` to the next."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)[1]


def test_the_house_is_complete():
    house = section("docs/architecture.md", "The house")
    entries = [path for path in (ROOT / "fastem").iterdir() if path.name[0] not in "_."]
    names = {path.name + "/" * path.is_dir() for path in entries}
    assert "varying.py" in names and names <= set(re.findall(r"[\w.]+/?", fences(house)[0]))
    rules = {rule.__name__ for rule in typing.get_args(importlib.import_module("fastem.samplers").Rule)}
    assert rules <= set(re.findall(r"\w+", fences(house)[0]))


def test_the_layers_are_those_of_the_house():
    house = section("docs/architecture.md", "The house")
    chain = " ".join(re.search(r"`(cli -> [^`]+)`", house)[1].split()).split(" -> ")
    assert [set(layer.split(" | ")) for layer in chain[-2::-1]] == LAYERS[:-1]  # without what is compiled, and __main__
    openers = re.search(r"only `cli` prints; only (.+?) open files", house, re.S)[1]
    assert set(re.findall(r"`([\w.]+)`", openers)) == TOUCH_FILES


def test_what_deblur_writes_is_listed():
    table = section("README.md", "Your own photos")
    written = {suffix for kind in DEFAULT_SAVE for suffix in SUFFIXES[kind]}
    assert set(re.findall(r"`out/photo(\.[\w.]+)`", table)) == written
    (save,) = (option for option in COMMAND.commands["deblur"].params if option.name == "save")
    assert save.help.startswith(f"of {','.join(SUFFIXES)};") and save.default == ",".join(DEFAULT_SAVE)


def test_every_protocol_is_listed():
    table = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8"), re.M)
    assert set(evaluation.names()) <= {name for cell in table for name in re.findall(r"\w+", cell)}


def test_when_the_kernel_is_updated():
    on, off = EdgeEM.sigma_on, SEARCH_SIGMA_MIN
    assert f"only while sigma_t is between {on} and {off}" in section("docs/paper_vs_code.md", "Blind estimation")


def test_public_names():
    for name in fastem.__all__:
        assert getattr(fastem, name) is not None
    assert set(fastem.__all__) <= set(dir(fastem))
    with pytest.raises(AttributeError, match="sharpen"):
        fastem.sharpen  # noqa: B018
    importlib.import_module("fastem.mstep")  # a module of that name
    assert inspect.isfunction(fastem.mstep)


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cmake = re.search(r"project\(fastem VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert project["version"] == cmake.group(1) == fastem.__version__
