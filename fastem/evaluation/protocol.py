"""A protocol: which images, blurred how, restored by what, and what other people measured. Read from TOML.

title = "..."                       # heading of the report
notes = "..."                       # what a reader must know to judge the figures
reference = "fastem"                # the method that the others are tested against
sheets = 4                          # so many cases side by side, as pictures
plots = ["sigma", "time"]           # of PLOTS
needs_prior = false                 # refuse to run without --prior

[[cases]]                           # any number; every case goes to every method
source = "synthetic"                # of fastem.evaluation.cases.SOURCES, with its own settings

[methods.NAME]
kind = "engine"                     # or "denoise", its prior alone, or a name in fastem.baselines.BASELINES
known = false                       # the engine is given the true kernel
blind_sigma = false                 # the noise level is hidden from the method
options = {}                        # of Deblurrer, or of the baseline; kernel_size is that of the case if left out
series = "..."                      # methods of one series are joined in plots
limit = 4                           # only so many images, for slow ones

[paper]                             # optional: published figures, in columns of their own
setup = "where they were measured, and why they are no comparison"
[paper.figures.NAME]
psnr = 25.66
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from fastem.baselines import BASELINES
from fastem.io import FastemError

KINDS = ("engine", "denoise", *BASELINES)
PLOTS = ("sigma", "time", "kernel")
PLAIN = {  # what a value in a protocol may be, by the annotation of where it goes
    "str": (str, "text"), "bool": (bool, "true or false"), "int": (int, "a whole number"),
    "float": (int | float, "a number"), "dict[str, Any]": (Mapping, "a table"),
}  # fmt: skip
PAPER_FIGURES = ("psnr", "ssim", "psnr_sa", "kernel_mse", "seconds", "forwards")


class ProtocolError(FastemError):
    """A protocol that cannot be run as it stands."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__("E_OPTION", message, hint)


@dataclass(frozen=True)
class Method:
    """One contestant; see the module's docstring."""

    kind: str = "engine"
    known: bool = False
    blind_sigma: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    series: str = ""
    limit: int = 0

    @property
    def has_engine(self) -> bool:
        return self.kind not in BASELINES


@dataclass(frozen=True)
class Protocol:
    """See the module's docstring."""

    name: str
    title: str
    cases: list[dict[str, Any]]
    methods: dict[str, Method]
    notes: str = ""
    reference: str = ""
    sheets: int = 0
    plots: list[str] = field(default_factory=list)
    needs_prior: bool = False
    paper: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain JSON values: two protocols are the same if and only if these are."""
        return asdict(self)

    def with_options(self, options: Mapping[str, Any]) -> Protocol:
        """Every method that has an engine with these options of Deblurrer on top of its own."""
        methods = {
            name: replace(m, options={**m.options, **options}) if m.has_engine else m
            for name, m in self.methods.items()
        }
        return replace(self, methods=methods)


def names() -> list[str]:
    """The protocols that come with fastem."""
    folder = resources.files("fastem").joinpath("protocols")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_protocol(name: str) -> Protocol:
    """A packaged protocol by its name, or any by its file.

    Raises:
        ProtocolError: saying what is wrong and what is allowed.
    """
    if name in names():
        text = resources.files("fastem").joinpath("protocols", f"{name}.toml").read_text(encoding="utf-8")
    else:
        path = Path(name)
        if not path.is_file():
            raise ProtocolError(
                f"there is no protocol {name!r}: packaged are {', '.join(names())}; or give a .toml file"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProtocolError(f"cannot read the protocol {name!r}: {error}") from None
        name = path.stem
    try:
        return parse_protocol(tomllib.loads(text), name)
    except tomllib.TOMLDecodeError as error:
        raise ProtocolError(f"the protocol {name!r} is not TOML: {error}") from None


def parse_protocol(table: Mapping[str, Any], name: str) -> Protocol:
    """Checks what can be checked without data."""
    where = f"protocol {name!r}"
    fields = set(Protocol.__dataclass_fields__) - {"name"}
    _known_keys(table, fields, where)
    rest = {key: value for key, value in table.items() if key not in ("cases", "methods")}
    check_types(rest, Protocol.__annotations__, where)
    cases, methods = table.get("cases", []), table.get("methods", {})
    if not cases or not isinstance(cases, list) or not all(isinstance(c, dict) and "source" in c for c in cases):
        raise ProtocolError(f"{where} needs one [[cases]] or more, each with a source")
    if not methods or not isinstance(methods, dict) or not all(isinstance(m, dict) for m in methods.values()):
        raise ProtocolError(f"{where} needs one [methods.NAME] or more")
    parsed = {}
    for key, entry in methods.items():
        about = f"{where}, method {key!r}"
        _known_keys(entry, set(Method.__dataclass_fields__), about)
        check_types(entry, Method.__annotations__, about)
        parsed[key] = method = Method(**entry)
        if method.kind not in KINDS:
            raise ProtocolError(f"{about}: unknown kind {method.kind!r}; allowed are {', '.join(KINDS)}")
        if not method.has_engine:
            settings = settings_of(BASELINES[method.kind])
            _known_keys(method.options, set(settings), f"{about}, options")
            check_types(method.options, settings, f"{about}, options")
    reference = table.get("reference", next(iter(parsed)))
    if reference not in parsed:
        raise ProtocolError(f"{where}: the reference {reference!r} is none of its methods {', '.join(parsed)}")
    for plot in table.get("plots", []):
        if plot not in PLOTS:
            raise ProtocolError(f"{where}: unknown plot {plot!r}; allowed are {', '.join(PLOTS)}")
    paper = table.get("paper", {})
    _known_keys(paper, {"setup", "figures"}, f"{where}, [paper]")
    check_types(paper, {"setup": "str", "figures": "dict[str, Any]"}, f"{where}, [paper]")
    quoted = paper.get("figures", {})
    check_types(quoted, dict.fromkeys(quoted, "dict[str, Any]"), f"{where}, [paper.figures]")
    for key, figures in quoted.items():
        _known_keys(figures, set(PAPER_FIGURES), f"{where}, [paper.figures.{key}]")
        check_types(figures, dict.fromkeys(PAPER_FIGURES, "float"), f"{where}, [paper.figures.{key}]")
    return Protocol(name=name, **{"title": name} | dict(table) | {"methods": parsed, "reference": reference})


def _known_keys(table: Mapping[str, Any], allowed: set[str], where: str) -> None:
    if unknown := sorted(set(table) - allowed):
        names = ", ".join(sorted(allowed)) or "none"
        raise ProtocolError(f"{where}: unknown key {unknown[0]!r}; allowed are {names}")


def settings_of(function: Callable) -> dict[str, str]:
    """What a source or a baseline can be told, with annotations: its parameters after the first (the data)."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.annotation for p in parameters}


def check_types(table: Mapping[str, Any], annotations: Mapping[str, str], where: str) -> None:
    """Refuses values that are not what their annotation says.

    Raises:
        ProtocolError: naming the key, the value and what is allowed.
    """
    for key, value in table.items():
        of = re.fullmatch(r"list\[(\w+)\]", annotations[key])
        kind, what = PLAIN[of[1] if of else annotations[key]]
        values = value if of and isinstance(value, list) else [value]
        fits = all(isinstance(v, kind) and (kind is bool or not isinstance(v, bool)) for v in values)
        if not fits or bool(of) != isinstance(value, list):
            raise ProtocolError(f"{where}: {key} is {value!r}; allowed is {'a list, each ' * bool(of)}{what}")
