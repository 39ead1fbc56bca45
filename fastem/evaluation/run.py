"""Runs a protocol: every method on the same observations, one row per case and method, resumable."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io as text_io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastem.ops
from fastem import io, metrics, noise, runtime
from fastem.baselines import BASELINES, Estimate, Problem
from fastem.em import delta_kernel, denoise_observation
from fastem.engine import SIGMA_FLOOR, Deblurrer, least_lossy_sigma
from fastem.evaluation.cases import KEY, Case, list_cases, spread
from fastem.evaluation.protocol import Method, Protocol, ProtocolError
from fastem.io import FastemError
from fastem.operators import Observation
from fastem.ops.backend import use_backend

ROW_KEY = ("method", *KEY)
SCORES = (
    "psnr", "ssim", "psnr_aligned", "ssim_aligned", "ms_ssim", "psnr_input", "psnr_input_aligned", "gain", "psnr_sa",
    "psnr_sa_aligned", "shift_rows", "shift_columns", "brightness", "kernel_mse", "kernel_error",
    "kernel_correlation", "chi2",
)  # fmt: skip
COSTS = ("seconds", "cpu_seconds", "forwards", "vjps", "gflop")
TEXTS = ("observation", "warnings", "error")
COLUMNS = (*ROW_KEY, *SCORES, *COSTS, "sigma_used", *TEXTS)
FLUSH_SECONDS = 2.0
MAX_SHIFT = 16  # pixels; larger images than 64 pixels are aligned within it
MOST_SHEETS = 64

Row = dict[str, Any]
MetricPlugin = Callable[[np.ndarray | None, np.ndarray | None, np.ndarray], Mapping[str, float]]


# ---------------------------------------------------------------------------------------------------------- counting


class NetworkCounter:
    """Counts what a network is asked for, by hooks on the network itself: images evaluated, gradients pulled back, and
    the FLOPs of both (a multiplication and an addition are two). Tiles count as images of their size."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handle = model.register_forward_hook(self._called)
        self.reset()

    def reset(self) -> None:
        self._forwards: Counter[tuple[int, ...]] = Counter()
        self._vjps: Counter[tuple[int, ...]] = Counter()

    def _called(self, model: nn.Module, inputs: tuple, output: Tensor) -> None:
        count, *shape = inputs[0].shape
        self._forwards[tuple(shape)] += count
        if output.requires_grad:
            output.register_hook(lambda _: self._vjps.update({tuple(shape): count}))

    @property
    def forwards(self) -> int:
        return sum(self._forwards.values())

    @property
    def vjps(self) -> int:
        return sum(self._vjps.values())

    @property
    def gflop(self) -> float | None:
        """Of everything counted, in 1e9 FLOPs; None where the network has an operation of unknown cost."""
        try:
            costs = {shape: network_flops(self._model, shape) for shape in {*self._forwards, *self._vjps}}
        except Exception:  # the network's own code on tensors without values: it may raise anything
            return None
        total = sum(n * costs[shape][0] for shape, n in self._forwards.items())
        return (total + sum(n * costs[shape][1] for shape, n in self._vjps.items())) / 1e9

    def close(self) -> None:
        self._handle.remove()


@lru_cache(maxsize=64)
def network_flops(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """FLOPs of one evaluation at `(1, *shape)`, and of one gradient with respect to the image: plain torch, shapes
    only, nothing is computed."""
    device = next(model.parameters()).device
    with torch.no_grad():
        model.forward(torch.zeros(1, shape[0], 32, 32, device=device), 500.0)  # what it caches must hold numbers
    with FakeTensorMode(allow_non_fake_inputs=True), fastem.ops.use_backend("reference"), torch.enable_grad():
        x = torch.empty(1, *shape, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            eps = model.forward(x, 500.0)  # past the hooks: this is no evaluation
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(eps, x, torch.empty_like(eps))
    return forward.get_total_flops(), backward.get_total_flops()


# ----------------------------------------------------------------------------------------------------------- scoring


def assumed_sigma(problem: Problem) -> float:
    """The noise that chi^2 of all methods is measured in, image units: the true one, or the first estimate of the
    engine (`Deblurrer.__call__`), which its search may refine or raise."""
    if problem.sigma is not None:
        return max(problem.sigma, SIGMA_FLOOR)
    sigma = max(noise.estimate_sigma(problem.y), SIGMA_FLOOR)
    return max(sigma, least_lossy_sigma(problem.y, problem.quantization)) if problem.lossy else sigma


def score(problem: Problem, estimate: Estimate, sigma: float, plugins: Mapping[str, MetricPlugin]) -> Row:
    """Every metric that truth and estimate allow; the others are absent.

    Raw metrics compare pixel by pixel. Aligned ones first take out shift and gain, which blind deconvolution cannot
    know (`fastem.metrics.align`), and leave out a border that depends on the outside. `gain` is the aligned PSNR over
    that of the observation, aligned too. chi^2 is in units of `sigma`.
    """
    row: Row = {}
    x, y, image, kernel = problem.x, problem.y, estimate.image, estimate.kernel
    if x is not None and image is not None:
        reach = min(MAX_SHIFT, min(x.shape[:2]) // 4)
        border = max(reach, problem.border)
        inner = tuple(slice(problem.border, n - problem.border) for n in x.shape[:2])
        found, before = (metrics.align(v, x, max_shift=reach, border=border) for v in (image, y))
        moved = metrics.aligned(image, found)
        edge = tuple(slice(border, n - border) for n in x.shape[:2])
        row |= {
            "psnr": metrics.psnr(image[inner], x[inner]), "ssim": _ssim(image[inner], x[inner]),
            "psnr_aligned": found.psnr, "ssim_aligned": _ssim(moved[edge], x[edge]),
            "ms_ssim": _ms_ssim(image[inner], x[inner]),
            "psnr_input": metrics.psnr(y[inner], x[inner]), "psnr_input_aligned": before.psnr,
            "gain": found.psnr - before.psnr, "shift_rows": found.shift[0], "shift_columns": found.shift[1],
            "brightness": found.gain,
        }  # fmt: skip
        if estimate.mean is not None:
            row["psnr_sa"] = metrics.psnr(estimate.mean[inner], x[inner])
            row["psnr_sa_aligned"] = metrics.psnr_aligned(estimate.mean, x, max_shift=reach, border=border)
    if kernel is not None and problem.kernel is not None:
        a, b = _same_size(kernel, problem.kernel)
        row["kernel_mse"], row["kernel_error"] = metrics.kernel_mse(a, b), metrics.kernel_error(a, b)
        row["kernel_correlation"] = metrics.kernel_correlation(a, b)
    if image is not None and kernel is not None:
        edge = 0 if problem.circular else max(kernel.shape) // 2 + problem.border
        if min(y.shape[:2]) > 2 * edge:
            row["chi2"] = metrics.chi2(y, image, kernel, sigma, border=edge)
    for name, plugin in plugins.items():
        row |= {f"{name}.{key}": value for key, value in _figures_of(name, plugin, image, x, y).items()}
    return row


def _figures_of(name: str, plugin: Callable[..., Mapping[str, float]], *given: Any) -> dict[str, float]:
    """What a metric of the user's says.

    Raises:
        ProtocolError: if it fails, or returns no named numbers.
    """
    try:
        return {str(key): float(value) for key, value in plugin(*given).items()}
    except Exception as error:  # it may raise anything
        raise ProtocolError(f"the metric {name!r} fails: {type(error).__name__}: {error}") from error


def _ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    return metrics.ssim(a, b) if min(a.shape[:2]) >= 11 else None


def _ms_ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """None for small images, and without torchmetrics."""
    if not metrics.ms_ssim_fits(a.shape[:2]) or importlib.util.find_spec("torchmetrics") is None:
        return None
    return metrics.ms_ssim(a, b)


def _same_size(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both kernels around their centres on the support of the larger one."""
    shape = tuple(max(m, n) for m, n in zip(a.shape, b.shape, strict=True))

    def grown(k: np.ndarray) -> np.ndarray:
        wide = np.zeros(shape, np.float64)
        top, left = (n // 2 - m // 2 for n, m in zip(shape, k.shape, strict=True))
        wide[top : top + k.shape[0], left : left + k.shape[1]] = k
        return wide

    return grown(a), grown(b)


def load_plugin(name: str) -> Callable:
    """`module:function`, imported; for the user's own metrics (docs/evaluation.md).

    Raises:
        ProtocolError: if it cannot be imported.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ProtocolError(f"cannot load the metric {name!r}: {error}", "Give it as module:function") from None


# ----------------------------------------------------------------------------------------------------------- methods


class Contestants:
    """The methods of a protocol, made when first needed; engines of one prior share its network."""

    def __init__(self, protocol: Protocol, *, prior: str | None = None, device: str = "auto") -> None:
        self._protocol, self._prior, self._device = protocol, prior, device
        self._engines: dict[tuple, Deblurrer] = {}
        self._networks: dict[tuple[str, str], nn.Module] = {}  # by prior and precision
        self._counters: dict[nn.Module, NetworkCounter] = {}  # engines of 16 bits have a copy each

    def engine(self, name: str, kernel_size: tuple[int, int] = (33, 33)) -> Deblurrer:
        """The engine of a method at a kernel size.

        Raises:
            ProtocolError: for options that it refuses.
        """
        if (name, kernel_size) not in self._engines:
            options = {"device": self._device, "kernel_size": kernel_size} | self._protocol.methods[name].options
            source = str(self._prior or options.pop("prior", "natural"))
            options.pop("prior", None)
            kept = source, str(options.get("precision", "auto"))
            try:
                engine = Deblurrer(self._networks.get(kept, source), **options)
            except (TypeError, ValueError) as error:
                if getattr(error, "code", None):
                    raise
                raise ProtocolError(f"method {name!r}: {error}") from None
            self._engines[name, kernel_size] = engine
            self._networks.setdefault(kept, engine.model)
            if engine.model not in self._counters:
                self._counters[engine.model] = NetworkCounter(engine.model)
        return self._engines[name, kernel_size]

    def configs(self, names: list[str]) -> dict[str, dict]:
        """What decides the results of each method, as far as it is told; the prior by its checksum."""
        found = {}
        for name in names:
            method = self._protocol.methods[name]
            config = method.options
            if method.has_engine:
                config = {k: v for k, v in self.engine(name).config.items() if k not in ("prior", "kernel_size")}
            found[name] = {"kind": method.kind, "known": method.known, "blind_sigma": method.blind_sigma} | config
        return json.loads(json.dumps(found))

    def run(self, name: str, problem: Problem) -> tuple[Estimate, float, Row]:
        """The estimate, the sigma it assumed (image units), and what it cost."""
        method = self._protocol.methods[name]
        engine = self.engine(name, problem.kernel_size) if method.has_engine else None
        if method.blind_sigma:
            problem = replace(problem, sigma=None)
        for counter in self._counters.values():
            counter.reset()
        wall, cpu = time.perf_counter(), time.process_time()
        if method.kind == "engine":
            estimate, sigma = _restore(engine, method, problem)
        else:
            sigma = assumed_sigma(problem)
            told = replace(problem, sigma=sigma)
            estimate = _denoise(engine, told) if engine else BASELINES[method.kind](told, **method.options)
        costs: Row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        if engine is not None:
            costs["forwards"] = sum(c.forwards for c in self._counters.values())
            costs["vjps"] = sum(c.vjps for c in self._counters.values())
            gflops = [c.gflop for c in self._counters.values()]
            costs["gflop"] = None if None in gflops else sum(gflops)
        return estimate, sigma, costs


def _restore(engine: Deblurrer, method: Method, problem: Problem) -> tuple[Estimate, float]:
    if method.known and problem.kernel is None:
        raise ValueError("this method is given the true kernel, and there is none")
    r = engine(
        problem.y, sigma=problem.sigma, seed=problem.seed, kernel=problem.kernel if method.known else None,
        lossy=problem.lossy, quantization=problem.quantization,
    )  # fmt: skip
    mean = r.mean() if len(r.samples) > 1 else None
    return Estimate(np.asarray(r.image), r.kernel, mean, tuple(w.split(":")[0] for w in r.warnings)), r.sigma


def _denoise(engine: Deblurrer, problem: Problem) -> Estimate:
    """The prior's estimate of the observation without its noise, and no blur: what an image that was sharp deserves."""
    y = torch.from_numpy(np.ascontiguousarray(problem.y, np.float32)).permute(2, 0, 1)[None].to(engine.device)
    model = runtime.fit_to_size(engine.model, (y.shape[-2], y.shape[-1]), engine.tile)
    with use_backend(engine.backend):
        x = denoise_observation(model, Observation.of(y, problem.sigma))
    return Estimate(x[0].permute(1, 2, 0).cpu().numpy(), delta_kernel(1, problem.kernel_size)[0, 0].numpy())


# -------------------------------------------------------------------------------------------------------------- rows


class Evaluation:
    """A protocol on its way in an output folder.

    The folder holds `run.json` (protocol, configurations, program: what must not change between runs), `rows*.csv`
    (one row per case and method, a file per shard), and `pictures/` and `kernels/` of the cases shown side by side.

    Raises:
        ProtocolError: if the folder holds another run, or a setting cannot be used.
        FastemError: E_OUTPUT if it cannot be written.
    """

    def __init__(
        self, protocol: Protocol, data: Path, out: Path, *, limit: int | None = None, shard: tuple[int, int] = (1, 1),
        methods: list[str] | None = None, prior: str | None = None, device: str = "auto",
        plugins: tuple[str, ...] = (), save_images: bool = False,
    ) -> None:  # fmt: skip
        for name in methods or []:
            if name not in protocol.methods:
                raise ProtocolError(f"unknown method {name!r}; {protocol.name!r} has {', '.join(protocol.methods)}")
        if protocol.needs_prior and prior is None:
            raise ProtocolError(f"protocol {protocol.name!r} needs --prior with the weights file", protocol.notes)
        self.protocol, self.out, self._save_all = protocol, Path(out), save_images
        self._methods = methods or list(protocol.methods)
        self._plugins = {name.partition(":")[2]: load_plugin(name) for name in plugins}
        self._contestants = Contestants(protocol, prior=prior, device=device)
        everything = list_cases(protocol, Path(data), limit)
        self._cases = everything[shard[0] - 1 :: shard[1]]
        self._shown = {case.key for case in spread(everything, min(protocol.sheets, MOST_SHEETS))}
        self._few = {n: _first_images(everything, m.limit) for n, m in protocol.methods.items() if m.limit}
        self._file = self.out / ("rows.csv" if shard == (1, 1) else f"rows.{shard[0]}of{shard[1]}.csv")
        self._check_folder(plugins)
        self._mine = {row_key(row): row for row in read_rows([self._file])}
        self._rows = {row_key(row): row for row in read_folder(self.out)}
        self._written = time.monotonic()

    @property
    def total(self) -> int:
        return len(self._tasks())

    @property
    def left(self) -> int:
        return sum(not self._is_done(case, name) for case, name in self._tasks())

    @property
    def errors(self) -> int:
        """Rows that end with an error, of this run or of one before."""
        return sum("error" in self._rows.get((name, *case.key), {}) for case, name in self._tasks())

    def run(self) -> Iterator[Row]:
        """Runs what is missing or ended with an error, and yields its rows; what was done before is not run again.

        Raises:
            ProtocolError: if the pictures are not those of the rows that are there.
        """
        tasks = self._tasks()
        if (before := next((case for case, name in tasks if self._is_done(case, name)), None)) is not None:
            self._check_observation(before, before.load())
        problem, at = None, None
        try:
            for case, name in tasks:
                if self._is_done(case, name):
                    continue
                if at is not case:
                    problem, at = case.load(), case
                    self._check_observation(case, problem)
                row = self._one(case, name, problem)
                self._mine[row_key(row)] = self._rows[row_key(row)] = row
                if time.monotonic() - self._written > FLUSH_SECONDS:
                    self._flush()
                yield row
        finally:
            if at is not None:
                self._flush()

    def _is_done(self, case: Case, name: str) -> bool:
        row = self._rows.get((name, *case.key))
        return row is not None and "error" not in row

    def _tasks(self) -> list[tuple[Case, str]]:
        return [
            (case, name)
            for case in self._cases
            for name in self._methods
            if name not in self._few or (case.source, case.number) in self._few[name]
        ]

    def _check_observation(self, case: Case, problem: Problem) -> None:
        now = checksum(problem.y)
        rows = (self._rows.get((name, *case.key)) for name in self.protocol.methods)
        if any(row is not None and row["observation"] != now for row in rows):
            raise ProtocolError(
                f"{io.shown(self.out)} holds results of other pictures or kernels of the same names "
                f"({case.image}, {case.kernel})",
                "Choose another folder with -o",
            )

    def _one(self, case: Case, name: str, problem: Problem) -> Row:
        row: Row = dict(zip(ROW_KEY, (name, *case.key), strict=True))
        row["observation"] = checksum(problem.y)
        try:
            estimate, used, costs = self._contestants.run(name, problem)
            found = score(problem, estimate, assumed_sigma(problem), self._plugins) | costs | {"sigma_used": 255 * used}
            row |= {name: value for name, value in found.items() if value is not None}
            if estimate.warnings:
                row["warnings"] = " ".join(estimate.warnings)
        except (ValueError, ArithmeticError, MemoryError, torch.OutOfMemoryError) as error:
            if isinstance(error, FastemError) or getattr(error, "code", None):
                raise
            row["error"] = " ".join(str(error).split()) or type(error).__name__
            return row
        if self._save_all or case.key in self._shown:
            self._keep(case, name, problem, estimate)
        return row

    def _keep(self, case: Case, name: str, problem: Problem, estimate: Estimate) -> None:
        """Pictures for the sheets of the report: input, truth, and what the method made of it."""
        stem = slug("-".join(part for part in case.key if part))
        shown = {
            "input": (problem.y, None),
            "truth": (problem.x, problem.kernel),
            name: (estimate.image, estimate.kernel),
        }
        for label, (image, kernel) in shown.items():
            pictures, kernels = (self.out / kind / slug(label) for kind in ("pictures", "kernels"))
            if image is not None:
                pictures.mkdir(parents=True, exist_ok=True)
                pixels = (np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8)
                io.write_image(pictures / f"{stem}.png", io.Picture(pixels))
            if kernel is not None:
                kernels.mkdir(parents=True, exist_ok=True)
                io.save_kernel_png(kernels / f"{stem}.png", kernel)

    def _flush(self) -> None:
        write_rows(self._file, list(self._mine.values()))
        self._written = time.monotonic()

    def _check_folder(self, plugins: tuple[str, ...]) -> None:
        """Writes `run.json`, or compares it with the one that is there."""
        now = {
            "protocol": self.protocol.to_dict(), "plugins": sorted(plugins), "program": program_digest(),
            "configs": self._contestants.configs(self._methods),
        }  # fmt: skip
        now = json.loads(json.dumps(now))
        path = self.out / "run.json"
        if path.exists():
            before = read_run(self.out)
            both = set(before["configs"]) & set(now["configs"])
            kinds = {"protocol": "another protocol", "plugins": "other metrics", "program": "another version of fastem"}
            for key, what in kinds.items():
                if before[key] != now[key]:
                    raise ProtocolError(
                        f"{io.shown(self.out)} holds results of {what}", "Choose another folder with -o"
                    )
            for name in sorted(both):
                if before["configs"][name] != now["configs"][name]:
                    changed = sorted(
                        k for k in {*before["configs"][name], *now["configs"][name]}
                        if before["configs"][name].get(k) != now["configs"][name].get(k)
                    )  # fmt: skip
                    raise ProtocolError(
                        f"{io.shown(self.out)} holds results of {name!r} with another {changed[0]}",
                        "Choose another folder with -o",
                    )
            now["configs"] = before["configs"] | now["configs"]
            now["machine"] = before["machine"]
        else:
            now["machine"] = machine()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FastemError("E_OUTPUT", f"cannot make {io.shown(self.out)}: {error.strerror}") from None
        with io.atomic_write(path) as file:
            file.write(json.dumps(now, indent=1).encode())


def checksum(y: np.ndarray) -> str:
    """Of an observation, as it stands in its rows."""
    return hashlib.sha256(np.ascontiguousarray(y).tobytes()).hexdigest()[:16]


def _first_images(cases: list[Case], count: int) -> set[tuple[str, int]]:
    sources = {case.source for case in cases}
    return {
        (source, number)
        for source in sources
        for number in spread(sorted({case.number for case in cases if case.source == source}), count)
    }


def read_run(out: Path) -> dict:
    """`run.json` of a folder.

    Raises:
        ProtocolError: if there is none.
    """
    try:
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run = None
    if not isinstance(run, dict) or not {"protocol", "plugins", "program", "configs", "machine"} <= run.keys():
        raise ProtocolError(f"{io.shown(out)} holds no evaluation (no readable run.json)")
    return run


def row_files(out: Path) -> list[Path]:
    return sorted(out.glob("rows*.csv"))


def row_key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ROW_KEY)


def read_rows(files: list[Path]) -> list[Row]:
    """Rows of CSV files: numbers as floats, what was empty absent.

    Raises:
        ProtocolError: for a file that `write_rows` did not write.
    """
    rows, texts = [], {*ROW_KEY, *TEXTS}
    for file in files:
        if not file.exists():
            continue
        try:
            for raw in csv.DictReader(text_io.StringIO(file.read_text(encoding="utf-8"))):
                given = dict.fromkeys(ROW_KEY, "") | {k: v for k, v in raw.items() if v != ""}
                rows.append({k: v if k in texts else float(v) for k, v in given.items()})
        except (ValueError, TypeError, csv.Error) as error:
            raise ProtocolError(
                f"{io.shown(file)} is damaged after row {len(rows)}: {error}", "Delete it, or choose another folder"
            ) from None
    return rows


def read_folder(out: Path) -> list[Row]:
    """The rows of all shards. Of one that was run again by another shard the last counts, which is no error if any of
    them is none."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in read_rows(row_files(out)):
        if "error" in rows.setdefault(row_key(row), row):
            rows[row_key(row)] = row
    return list(rows.values())


def write_rows(file: Path, rows: list[Row]) -> None:
    """The whole file at once, or nothing: a run that is ended leaves no half row."""
    extra = sorted({name for row in rows for name in row} - set(COLUMNS))
    columns = [*COLUMNS[:-1], *extra, COLUMNS[-1]]
    buffer = text_io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    with io.atomic_write(file) as out:
        out.write(buffer.getvalue().encode())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.7g}" if math.isfinite(value) else "inf" if value > 0 else ""
    return str(value)


def slug(text: str) -> str:
    """Letters, digits, dot and dash only: safe in a file name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text).strip("-") or "x"


@lru_cache(maxsize=1)
def program_digest() -> str:
    """Checksum of everything in the package that can change a result: code, compiled kernels and weights."""
    root, digest = Path(fastem.ops.__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*")):
        part = path.relative_to(root).parts
        shows = part[0] in ("cli", "training") or part == ("evaluation", "report.py")
        if path.suffix in (".py", ".so", ".safetensors") and not shows:
            digest.update("/".join(part).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def machine() -> dict:
    """Where the times were measured."""
    from fastem.env import collect_env

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": collect_env()["processor"].get("name", ""), "gpu": gpu, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "fastem": fastem.__version__,
    }  # fmt: skip


def measure_sets(out: Path, plugins: tuple[str, ...]) -> None:
    """Metrics of whole sets, such as FID: each plugin gets the folders of restored and of sharp pictures of a method,
    and returns named figures. They go to `sets.json`. The pictures are those kept by `save_images`.

    Raises:
        ProtocolError: if a plugin cannot be loaded or fails, or pictures were not kept.
    """
    folder = out / "pictures"
    known = [name for name in read_run(out)["protocol"]["methods"] if (folder / slug(name)).is_dir()]
    if not known:
        raise ProtocolError(f"{io.shown(out)} holds no pictures to measure", "Run with --save-images")
    restored = Counter(row["method"] for row in read_folder(out) if "error" not in row)
    for name in known:
        if (kept := len(list((folder / slug(name)).iterdir()))) < restored[name]:
            raise ProtocolError(
                f"{io.shown(out)} holds pictures of {kept} of {restored[name]} restorations by {name!r}",
                "Run with --save-images from the start, in a new folder",
            )
    functions = {plugin: load_plugin(plugin) for plugin in plugins}
    found = {
        plugin: {name: _figures_of(plugin, of, folder / slug(name), folder / "truth") for name in known}
        for plugin, of in functions.items()
    }
    with io.atomic_write(out / "sets.json") as file:
        file.write(json.dumps(found, indent=1).encode())
