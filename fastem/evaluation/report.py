"""The report of an evaluation: `summary.json`, `report.md` and `report.html` with plots and sheets of pictures."""

from __future__ import annotations

import html
import importlib.util
import io as text_io
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from fastem import io
from fastem.evaluation.protocol import PAPER_FIGURES
from fastem.evaluation.run import COLUMNS, KEY, MOST_SHEETS, TEXTS, Row, read_folder, read_run, slug
from fastem.evaluation.statistics import bootstrap_mean, paired

NEEDS_EXTRA = "pip install fastem[eval]"
PANEL, CAPTION, GAP, PANELS_PER_ROW = 256, 16, 6, 4  # pixels of the sheets
LABELS = {
    "psnr": "PSNR", "ssim": "SSIM", "psnr_sa": "PSNR-SA", "kernel_mse": "kernel MSE", "seconds": "seconds",
    "forwards": "evaluations",
}  # fmt: skip


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    path: str
    caption: str


Block = Heading | Table | Picture | str


# ---------------------------------------------------------------------------------------------------------- figures


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Figures of one method over so many cases; a figure that no row has is absent."""
    found: dict[str, Any] = {"scored": len(rows)}
    names = [n for n in COLUMNS if n not in {*KEY, "method", *TEXTS}]
    names += sorted({n for row in rows for n in row} - set(COLUMNS))
    for name in names:
        values = [row[name] for row in rows if has(row, name)]
        if values:
            interval = bootstrap_mean(per_image(rows, name))
            found[name] = interval._asdict() | {"median": statistics.median(values), "count": len(values)}
    found["varying"] = sum("W_VARYING" in row.get("warnings", "") for row in rows)
    return found


def failures(rows: list[Row]) -> dict[str, int]:
    """What one method could not do, of all cases. `worse` counts those with less aligned PSNR than the input, and
    errors; it is absent where no image was compared with a truth."""
    found = {"cases": len(rows), "errors": sum("error" in row for row in rows)}
    if any("gain" in row for row in rows) or found["errors"] == len(rows):
        found["worse"] = sum(row.get("gain", 0) < 0 for row in rows) + found["errors"]
    return found


def has(row: Row, name: str) -> bool:
    return math.isfinite(row.get(name, math.nan))


def per_image(rows: list[Row], name: str) -> list[float]:
    """The mean of a figure over the cases of each image. Settings of one image are not independent: intervals and
    tests count images."""
    values: dict[tuple, list[float]] = {}
    for row in rows:
        if has(row, name):
            values.setdefault((row["source"], row["set"], row["image"]), []).append(row[name])
    return [statistics.mean(of) for of in values.values()]


def common_cases(rows: list[Row], methods: list[str]) -> dict[str, list[Row]]:
    """The rows of each method at the cases that all of them have, in the same order.

    Raises:
        ValueError: if a case was not the same observation for all: such rows must not be compared.
    """
    table: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(tuple(row[name] for name in KEY), {})[row["method"]] = row
    shared = {key: by for key, by in sorted(table.items()) if all(name in by for name in methods)}
    for key, by in shared.items():
        if len({by[name]["observation"] for name in methods}) > 1:
            raise ValueError(f"the methods were given different observations of {' '.join(key)}; start a new folder")
    return {name: [by[name] for by in shared.values()] for name in methods}


def without_errors(shared: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The common cases at which no method has an error: a mean must not gain by an error at a hard case.

    A method that has nothing but errors has no mean either. It is left out, and takes no case from the others.
    """
    able = {name: rows for name, rows in shared.items() if not all("error" in row for row in rows)}
    kept = [not any("error" in row for row in of) for of in zip(*able.values(), strict=True)]
    return {name: list(compress(rows, kept)) for name, rows in able.items()}


GROUPINGS: list[tuple[tuple[str, ...], Callable[[tuple[str, ...]], str]]] = [
    (("sigma", "boundary"), lambda v: f"sigma {v[0] or 'estimated'}, {v[1]}"),
    (("source", "set"), lambda v: f"images of {v[1]}"),
    (("family",), lambda v: f"kernels: {v[0]}"),
]


def groups(rows: list[Row], brief: bool = False) -> Iterable[tuple[str, list[Row]]]:
    """All rows; then by noise and boundary and, unless `brief`, by image folder and by kernel family, where there are
    several."""
    yield "all cases", rows
    for names, label in GROUPINGS[:1] if brief else GROUPINGS:
        values = sorted({tuple(row[n] for n in names) for row in rows}, key=lambda v: [_natural(x) for x in v])
        if len(values) > 1:
            for value in values:
                yield label(value), [row for row in rows if tuple(row[n] for n in names) == value]


def _natural(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


# ----------------------------------------------------------------------------------------------------------- tables


def _number(entry: dict | None, digits: int = 2, what: str = "mean") -> str:
    return "" if entry is None else f"{entry[what]:.{digits}f}"


def _interval(entry: dict | None, digits: int = 2, sign: str = "") -> str:
    if entry is None:
        return ""
    mean = f"{entry['mean']:{sign}.{digits}f}"
    return (
        mean
        if math.isnan(entry["low"])
        else f"{mean} [{entry['low']:{sign}.{digits}f}, {entry['high']:{sign}.{digits}f}]"
    )


def _small(entry: dict | None) -> str:
    return "" if entry is None else f"{entry['mean']:.2g}"


def _of(some: int, all_: int) -> str:
    return f"{some} of {all_}"


Column = tuple[str, Callable[[dict[str, Any]], str]]
FIGURES: list[Column] = [
    ("cases", lambda s: _of(s["scored"], s["cases"]) if s["scored"] < s["cases"] else str(s["cases"])),
    ("errors", lambda s: str(s["errors"] or "")),
    ("PSNR aligned, dB [95 %]", lambda s: _interval(s.get("psnr_aligned"))),
    ("gain, dB [95 %]", lambda s: _interval(s.get("gain"), sign="+")),
    ("median gain", lambda s: "" if "gain" not in s else f"{s['gain']['median']:+.2f}"),
    ("worse", lambda s: _of(s["worse"], s["cases"]) if "worse" in s else ""),
    ("PSNR raw", lambda s: _number(s.get("psnr"))),
    ("PSNR-SA", lambda s: _number(s.get("psnr_sa"))),
    ("SSIM raw", lambda s: _number(s.get("ssim"), 3)),
    ("SSIM aligned", lambda s: _number(s.get("ssim_aligned"), 3)),
    ("MS-SSIM", lambda s: _number(s.get("ms_ssim"), 3)),
    ("kernel MSE", lambda s: _small(s.get("kernel_mse"))),
    ("kernel rel. error", lambda s: _number(s.get("kernel_error"), 3)),
    ("median rel. error", lambda s: _number(s.get("kernel_error"), 3, "median")),
    ("kernel corr. (median)", lambda s: _number(s.get("kernel_correlation"), 3, "median")),
    ("chi² (median)", lambda s: _number(s.get("chi2"), 2, "median")),
    ("blur varies", lambda s: _of(s["varying"], s["scored"]) if s["varying"] else ""),
]
COST_FIGURES: list[Column] = [
    ("seconds (median)", lambda s: "" if "seconds" not in s else f"{s['seconds']['median']:.3g}"),
    ("CPU seconds (median)", lambda s: "" if "cpu_seconds" not in s else f"{s['cpu_seconds']['median']:.3g}"),
    ("network evaluations", lambda s: _number(s.get("forwards"), 1)),
    ("gradients", lambda s: _number(s.get("vjps"), 1)),
    ("GFLOP", lambda s: "" if "gflop" not in s else f"{s['gflop']['mean']:.4g}"),
]


def figure_table(by_method: dict[str, dict[str, Any]], columns: list[Column], paper: dict | None = None) -> Table:
    """One line per method; columns without any figure are left out. The paper's figures have columns of their own."""
    plugins = sorted({n for s in by_method.values() for n in s if "." in n})
    columns = (
        [*columns, *((n, lambda s, n=n: _number(s.get(n), 4)) for n in plugins)] if columns is FIGURES else columns
    )
    figures = (paper or {}).get("figures", {})
    quoted = [n for n in PAPER_FIGURES if any(n in figures.get(m, {}) for m in by_method)]
    filled = [(h, f) for h, f in columns if any(f(s) for s in by_method.values())]
    header = ["method", *(h for h, _ in filled), *(f"paper: {LABELS[n]}" for n in quoted)]
    rows = [
        [name, *(f(s) for _, f in filled), *(_quote(figures.get(name, {}).get(n)) for n in quoted)]
        for name, s in by_method.items()
    ]
    return Table(header, rows)


def _quote(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def test_table(rows: dict[str, list[Row]], reference: str, name: str, label: str) -> Table | None:
    """Paired differences of a figure: each method minus the reference."""
    lines = []
    for method, of in rows.items():
        both = [(a, b) for a, b in zip(of, rows[reference], strict=True) if has(a, name) and has(b, name)]
        pairs = list(zip(*(per_image([pair[i] for pair in both], name) for i in (0, 1)), strict=True))
        if method == reference or len(pairs) < 2:
            continue
        t = paired(*zip(*pairs, strict=True))
        p = "" if math.isnan(t.p) else f"{t.p:.2g}"
        lines.append(
            [method, str(t.count), _interval(t.difference._asdict(), 3, "+"), f"{t.median:+.3f}", str(t.better), p]
        )
    header = [f"{label}, minus {reference}", "images", "mean [95 %]", "median", "higher in", "p (Wilcoxon)"]
    return Table(header, lines) if lines else None


# ------------------------------------------------------------------------------------------------------------ report


def build_report(out: Path) -> tuple[list[Block], dict[str, Any]]:
    """The report of the rows in a folder, and the figures behind it; plots and sheets are drawn into the folder.

    Raises:
        ProtocolError: if the folder holds no evaluation.
        ValueError: if rows of one case belong to different observations.
    """
    run, rows = read_run(out), read_folder(out)
    protocol = run["protocol"]
    methods = [name for name in protocol["methods"] if any(row["method"] == name for row in rows)]
    blocks: list[Block] = [Heading(protocol["title"], 1)]
    blocks += [protocol["notes"]] if protocol["notes"] else []
    machine = run["machine"]
    where = ", ".join(str(machine[k]) for k in ("cpu", "gpu") if machine[k])
    blocks.append(
        f"Protocol `{protocol['name']}`, {len(rows)} rows, program {run['program']}, fastem {machine['fastem']}, "
        f"torch {machine['torch']}, {machine['threads']} threads of {where}."
    )
    summary: dict[str, Any] = {"run": run, "groups": {}}
    if not methods:
        blocks.append("Nothing was run yet.")
    else:
        fast = [m for m in methods if not protocol["methods"][m]["limit"]] or methods
        blocks += _sections(rows, fast, protocol, summary, "")
        if slow := [m for m in methods if m not in fast]:
            prefix = f"with the slow methods ({'; '.join(slow)}): "
            blocks += _sections(rows, methods, protocol, summary, prefix, brief=True)
        blocks += _plots(out, rows, methods, fast, run)
        blocks += _sheets(out, rows, methods)
    if (out / "sets.json").exists():
        blocks += [Heading("Metrics of whole sets"), *_set_tables(json.loads((out / "sets.json").read_text()))]
    blocks += [Heading("How to read this"), HOW_TO_READ]
    return blocks, _finite(summary)


def write_report(out: Path) -> Path:
    """Writes `build_report` as `summary.json`, `report.md` and `report.html`; returns the path of `report.md`."""
    blocks, summary = build_report(out)
    title = summary["run"]["protocol"]["title"]
    for name, text in (
        ("summary.json", json.dumps(summary, indent=1)), ("report.md", markdown(blocks)),
        ("report.html", web_page(blocks, title)),
    ):  # fmt: skip
        with io.atomic_write(out / name) as file:
            file.write(text.encode())
    return out / "report.md"


HOW_TO_READ = (
    "All methods see the same observations. Aligned: after the best shift and gain, which blind deconvolution cannot "
    "know, and without a border. Gain: aligned PSNR over that of the input, aligned too. Worse: cases with less than "
    "the input, and errors. Other figures leave out the cases at which a method compared has an error, unless it has "
    "nothing else. Intervals: bootstrap over the images. PSNR-SA: of the mean of the particles. Relative kernel error: "
    "squared distance over squared norm, after the best shift (1 is no kernel at all); correlation: greatest "
    "normalised cross-correlation. chi²: mean squared residual of image and kernel over the variance of the noise, for "
    "all methods of a case the true one, or one estimate where it is not known. Blur varies: images that no single "
    "blur explains (`W_VARYING`). SSIM: 11 x 11 Gaussian window of std 1.5, mean over pixels and channels. Network "
    "evaluations and gradients were counted on the network while it ran; FLOPs count multiplications and additions "
    "apart. Columns `paper` quote published figures from other images and weights: they are no comparison."
)


def _sections(
    rows: list[Row], methods: list[str], protocol: dict, summary: dict, prefix: str, brief: bool = False
) -> list[Block]:
    blocks: list[Block] = []
    for label, part in groups(rows, brief):
        shared = common_cases(part, methods)
        if not shared[methods[0]]:
            continue
        scored = without_errors(shared)
        figures = {name: summarise(scored.get(name, [])) | failures(of) for name, of in shared.items()}
        heading = prefix + label
        summary["groups"][heading] = figures
        everything = label == "all cases"
        blocks.append(Heading(heading[0].upper() + heading[1:]))
        blocks.append(figure_table(figures, FIGURES, protocol["paper"] if everything else None))
        if everything:
            if protocol["paper"].get("setup") and protocol["paper"].get("figures"):
                blocks.append(f"Columns `paper`: {protocol['paper']['setup']}")
            blocks.append(figure_table(figures, COST_FIGURES))
            blocks += _tests(scored, protocol["reference"])
    return blocks


def _tests(scored: dict[str, list[Row]], reference: str) -> list[Block]:
    if reference not in scored or len(scored) < 2:
        return []
    if importlib.util.find_spec("scipy") is None:
        return [f"Tests of paired differences need scipy: {NEEDS_EXTRA}"]
    named = [("psnr_aligned", "PSNR aligned"), ("kernel_error", "kernel rel. error")]
    return [t for n, label in named if (t := test_table(scored, reference, n, label))]


def _set_tables(sets: dict[str, dict[str, dict[str, float]]]) -> list[Block]:
    tables: list[Block] = []
    for plugin, by_method in sets.items():
        names = sorted({n for values in by_method.values() for n in values})
        lines = [[m, *(f"{v[n]:.4g}" if n in v else "" for n in names)] for m, v in by_method.items()]
        tables.append(Table([plugin, *names], lines))
    return tables


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(blocks: list[Block]) -> str:
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading(text, level):
                lines.append(f"{'#' * level} {text}")
            case Table(header, rows):
                cells = [header, ["---"] * len(header), *rows]
                lines.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells))
            case Picture(path, caption):
                lines.append(f"![{caption}]({path})")
            case str(text):
                lines.append(text)
    return "\n\n".join(lines) + "\n"


def web_page(blocks: list[Block], title: str) -> str:
    body = []
    for block in blocks:
        match block:
            case Heading(text, level):
                body.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Table(header, rows):
                head = "".join(f"<th>{html.escape(c)}</th>" for c in header)
                lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
                body.append(f"<table><tr>{head}</tr>{lines}</table>")
            case Picture(path, caption):
                path, caption = html.escape(path, quote=True), html.escape(caption)
                body.append(f'<figure><img src="{path}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
            case str(text):
                body.append(f"<p>{html.escape(text)}</p>")
    style = (
        "body{font:15px/1.5 sans-serif;max-width:110em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;"
        "margin:1em 0}th,td{padding:.2em .7em;border-bottom:1px solid #ccc;text-align:right}th:first-child,"
        "td:first-child{text-align:left}img{max-width:100%}figure{margin:1em 0}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style>{''.join(body)}</html>\n"
    )


# ------------------------------------------------------------------------------------------------------------- plots


def _plots(out: Path, rows: list[Row], methods: list[str], fast: list[str], run: dict) -> list[Block]:
    """Each plot of the protocol, of the fast methods; and another one of all methods at the fewer cases of the slow
    ones."""
    if not run["protocol"]["plots"]:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        return [f"Plots need matplotlib: {NEEDS_EXTRA}"]
    blocks: list[Block] = [Heading("Plots")]
    compared = [("", without_errors(common_cases(rows, fast)))]
    compared += [("_slow", without_errors(common_cases(rows, methods)))] if fast != methods else []
    for kind in run["protocol"]["plots"]:
        for suffix, scored in compared:
            plot, path = PLOTTERS[kind], f"plot_{kind}{suffix}.png"
            shown = {name: found for name, of in scored.items() if (found := [row for row in of if plot.shows(row)])}
            if not shown:
                continue
            with io.atomic_write(out / path) as file:
                file.write(plot.draw(shown, run))
            number = max(len(of) for of in shown.values())
            caption = plot.caption + (", with the slow methods: " if suffix else ": ")
            caption += f"{number} case{'s' * (number > 1)}{' that all methods have' if suffix else ''}"
            if absent := [name for name in methods if name not in shown]:
                caption += f", without {'; '.join(absent)}"
            blocks.append(Picture(path, caption))
    return blocks if len(blocks) > 1 else []


MARKERS = "osD^v<>"  # seven, and ten colours: seventy methods differ


class Plot(NamedTuple):
    caption: str
    shows: Callable[[Row], bool]  # whether there is anything to draw of a row
    draw: Callable[[dict[str, list[Row]], dict], bytes]  # of the rows of each method, in a run


def _figure(panels: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _png(figure, axes) -> bytes:
    """With the legend of these axes beside the plot, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    buffer = text_io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _against_sigma(shown: dict[str, list[Row]], name: str, label: str, scale: str) -> bytes:
    figure, (axes,) = _figure()
    for i, (method, rows) in enumerate(shown.items()):
        x = sorted({float(row["sigma"]) for row in rows})
        points = [bootstrap_mean(per_image([r for r in rows if float(r["sigma"]) == level], name)) for level in x]
        error = np.nan_to_num([[p.mean - p.low for p in points], [p.high - p.mean for p in points]])
        axes.errorbar(x, [p.mean for p in points], error, marker=MARKERS[i % 7], capsize=3, label=method)
    axes.set(xlabel="sigma, grey levels", ylabel=label, yscale=scale)
    axes.grid(alpha=0.3)
    return _png(figure, axes)


def _plot_time(shown: dict[str, list[Row]], run: dict) -> bytes:
    """Time and work as in the tables. Without a GPU it is CPU time: the machine may have been shared."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    time = ("seconds", "seconds per image") if run["machine"]["gpu"] else ("cpu_seconds", "CPU seconds per image")
    series = {method: run["protocol"]["methods"][method]["series"] or method for method in shown}
    names = list(dict.fromkeys(series.values()))  # alike in both panels
    figure, panels = _figure(2)
    for axes, (cost, label) in zip(panels, (time, ("gflop", "GFLOP of the network")), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for method, rows in shown.items():
            if costs := [row[cost] for row in rows if has(row, cost)]:
                x = statistics.mean(per_image(rows, cost)) if cost == "gflop" else statistics.median(costs)
                lines.setdefault(series[method], []).append((x, statistics.mean(per_image(rows, "psnr_aligned"))))
        for name, points in lines.items():
            i = names.index(name)
            axes.plot(*zip(*sorted(points), strict=True), MARKERS[i % 7] + "-", color=f"C{i % 10}", label=name)
        if lines:
            axes.set(xlabel=label, ylabel="PSNR aligned, dB", xscale="log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(axis="x", labelsize=8)
        axes.grid(alpha=0.3)
    return _png(figure, panels[0])


PLOTTERS = {
    "sigma": Plot(
        "PSNR over noise level, 95 % intervals", lambda row: row["sigma"] != "" and has(row, "psnr_aligned"),
        lambda shown, run: _against_sigma(shown, "psnr_aligned", "PSNR aligned, dB", "linear"),
    ),
    "time": Plot("PSNR over time and over work", lambda row: has(row, "psnr_aligned"), _plot_time),
    "kernel": Plot(
        "Relative kernel error over noise level, 95 % intervals",
        lambda row: row["sigma"] != "" and has(row, "kernel_error"),
        lambda shown, run: _against_sigma(shown, "kernel_error", "relative kernel error", "log"),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ sheets


def _sheets(out: Path, rows: list[Row], methods: list[str]) -> list[Block]:
    """Side by side: the input, every method with its kernel, the truth."""
    folder = out / "pictures" / "input"
    if not folder.is_dir():
        return []
    captions: dict[tuple[str, str], str] = {}
    for row in rows:
        stem = slug("-".join(row[n] for n in KEY if row[n]))
        figure = (
            f"{row['psnr_aligned']:.2f} dB"
            if "psnr_aligned" in row
            else f"chi^2 {row['chi2']:.2f}"
            if "chi2" in row
            else ""
        )
        varies = ", varies" if "W_VARYING" in row.get("warnings", "") else ""
        captions[row["method"], stem] = f"{row['method']} {figure}{varies}"
    blocks: list[Block] = [Heading("Side by side")]
    (out / "sheets").mkdir(exist_ok=True)
    for file in sorted(folder.glob("*.png"))[:MOST_SHEETS]:
        stem = file.stem
        panels = [_panel(out, label, stem, text) for label, text in (
            ("input", "input"), *((m, captions.get((m, stem), m)) for m in methods), ("truth", "truth"),
        )]  # fmt: skip
        sheet = _mosaic([p for p in panels if p is not None])
        buffer = text_io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        with io.atomic_write(out / "sheets" / f"{stem}.png") as target:
            target.write(buffer.getvalue())
        blocks.append(Picture(f"sheets/{stem}.png", stem))
    return blocks if len(blocks) > 1 else []


def _panel(out: Path, label: str, stem: str, caption: str) -> Image.Image | None:
    """A picture with its kernel in the corner and a caption below."""
    file, kernel = (out / kind / slug(label) / f"{stem}.png" for kind in ("pictures", "kernels"))
    if not file.exists():
        return None
    image = Image.fromarray(io.read_image(file).pixels).convert("RGB")
    scale = PANEL / max(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    if kernel.exists():
        side = max(min(image.size) // 4, 8)
        small = Image.fromarray(io.read_image(kernel).pixels).convert("RGB").resize((side, side), Image.Resampling.BOX)
        image.paste(small, (image.width - side, 0))
    panel = Image.new("RGB", (max(image.width, PANEL // 2), image.height + CAPTION), "white")
    panel.paste(image, (0, 0))
    ImageDraw.Draw(panel).text((2, image.height + 2), caption, fill="black")
    return panel


def _mosaic(panels: list[Image.Image]) -> Image.Image:
    lines = [panels[i : i + PANELS_PER_ROW] for i in range(0, len(panels), PANELS_PER_ROW)]
    width = max(sum(p.width + GAP for p in line) for line in lines)
    sheet = Image.new("RGB", (width, sum(max(p.height for p in line) + GAP for line in lines)), "white")
    top = 0
    for line in lines:
        left = 0
        for panel in line:
            sheet.paste(panel, (left, top))
            left += panel.width + GAP
        top += max(p.height for p in line) + GAP
    return sheet
