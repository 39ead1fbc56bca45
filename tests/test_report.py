"""What is scored, and what the report says: against figures worked out by hand, from rows written by hand."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastem import io, metrics
from fastem.baselines import Estimate, Problem
from fastem.evaluation import parse_protocol, report, write_report
from fastem.evaluation import run as running
from fastem.evaluation.report import build_report
from fastem.synth import degrade, motion_kernel

SIGMA = 0.02


def scene(size: int, seed: int = 0) -> np.ndarray:
    """`(size, size, 3)` float32 in [0.1, 0.9]: random rectangles."""
    rng = np.random.default_rng(seed)
    x = np.full((size, size, 3), 0.5, np.float32)
    for _ in range(20):
        top, left = rng.integers(0, size - 4, 2)
        x[top : top + size // 3, left : left + size // 3] = rng.uniform(0.1, 0.9, 3)
    return x


def noisy(x: np.ndarray, std: float, seed: int) -> np.ndarray:
    return x + np.random.default_rng(seed).normal(0, std, x.shape).astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(((a.astype(float) - b) ** 2).mean())


def framed(x: np.ndarray, width: int) -> np.ndarray:
    """Nothing of it left in a frame of that many pixels."""
    inner = np.zeros_like(x)
    inner[width:-width, width:-width] = x[width:-width, width:-width]
    return inner


def inside(x: np.ndarray, width: int) -> np.ndarray:
    return x[width : x.shape[0] - width, width : x.shape[1] - width]


# ---------------------------------------------------------------------------------------------------------- scoring


def test_shift_and_gain_are_taken_out_of_the_aligned_figures_alone():
    x = scene(48)
    y, close, mean = noisy(x, 0.07, 1), noisy(x, 0.03, 2), noisy(x, 0.05, 3)
    image = 0.8 * np.roll(close, (2, -1), axis=(0, 1))
    row = running.score(Problem(y, (5, 5), SIGMA, True, x=x), Estimate(image, mean=mean), SIGMA, {})
    assert row["psnr"] == pytest.approx(psnr(image, x)) and row["psnr_input"] == pytest.approx(psnr(y, x))
    assert row["ssim"] == pytest.approx(metrics.ssim(image, x))
    assert (row["shift_rows"], row["shift_columns"]) == pytest.approx((2, -1), abs=0.05)
    assert row["brightness"] == pytest.approx(1.25, abs=0.02)
    after, before = psnr(inside(close, 12), inside(x, 12)), psnr(inside(y, 12), inside(x, 12))
    assert row["psnr_aligned"] == pytest.approx(after, abs=0.1) and after > row["psnr"] + 5
    assert row["ssim_aligned"] == pytest.approx(metrics.ssim(inside(close, 12), inside(x, 12)), abs=0.01)
    assert row["psnr_input_aligned"] == pytest.approx(before, abs=0.1)
    assert row["gain"] == pytest.approx(after - before, abs=0.2)
    assert row["psnr_sa"] == pytest.approx(psnr(mean, x))
    assert row["psnr_sa_aligned"] == pytest.approx(psnr(inside(mean, 12), inside(x, 12)), abs=0.1)
    assert row["ms_ssim"] is None and "chi2" not in row and "kernel_error" not in row  # too small; no kernel


def test_a_border_that_depends_on_the_outside_is_not_scored():
    x, border = scene(64), 20
    y, image, mean = noisy(x, 0.1, 1), noisy(x, 0.03, 2), noisy(x, 0.05, 3)
    problem = Problem(framed(y, border), (5, 5), SIGMA, x=x, border=border)
    row = running.score(problem, Estimate(framed(image, border), mean=framed(mean, border)), SIGMA, {})
    x, y, image, mean = (inside(v, border) for v in (x, y, image, mean))
    for name, v in {"psnr": image, "psnr_input": y, "psnr_sa": mean}.items():
        assert row[name] == pytest.approx(psnr(v, x))
    assert row["ssim"] == pytest.approx(metrics.ssim(image, x))
    for name, v in {"psnr_aligned": image, "psnr_input_aligned": y, "psnr_sa_aligned": mean}.items():
        assert row[name] == pytest.approx(psnr(v, x), abs=0.1)
    assert row["ssim_aligned"] == pytest.approx(metrics.ssim(image, x), abs=0.01)


def test_ms_ssim_of_what_is_scored():
    pytest.importorskip("torchmetrics")
    x, border = scene(188), 6
    image = noisy(x, 0.1, 1)
    problem = Problem(x, (5, 5), SIGMA, x=x, border=border)
    wanted = metrics.ms_ssim(inside(image, border), inside(x, border))
    assert running.score(problem, Estimate(framed(image, border)), SIGMA, {})["ms_ssim"] == pytest.approx(wanted)


@pytest.mark.parametrize("border", [0, 6])
@pytest.mark.parametrize("circular", [True, False])
def test_chi2_is_1_for_the_truth_whatever_the_border(circular, border):
    """A camera's pixels near the edge depend on what it did not see."""
    x, k = scene(96), motion_kernel(9, 3)
    y = degrade(x, k, SIGMA, 0, boundary="circular" if circular else "valid")
    x = x if circular else np.ascontiguousarray(inside(x, 4))
    problem = Problem(y, k.shape, SIGMA, circular, k, x, border=0 if circular else border)
    image = framed(x, border) if border and not circular else x
    row = running.score(problem, Estimate(image, k), SIGMA, {})
    assert row["chi2"] == pytest.approx(1, abs=0.05)
    if circular:
        assert row["chi2"] == pytest.approx(metrics.chi2(y, x, k, SIGMA))  # of all pixels


def test_kernels_of_two_sizes_are_compared_around_their_centres():
    a, b = np.arange(1.0, 16).reshape(3, 5), np.arange(1.0, 22).reshape(7, 3)
    wide, high = running._same_size(a, b)
    np.testing.assert_array_equal(wide, np.pad(a, ((2, 2), (0, 0))))
    np.testing.assert_array_equal(high, np.pad(b, ((0, 0), (1, 1))))


# ----------------------------------------------------------------------------------------------------------- reports


def rows_of(method: str, images: str = "abc", sigma: str = "5", errors: str = "", **figures) -> list[dict]:
    """One row per image, each figure a value per image; `errors` names the images at which it has none of them."""
    case = {"source": "synthetic", "set": "sharp", "family": "shake", "kernel": "k", "boundary": "valid", "seed": "0"}
    rows = []
    for i, image in enumerate(images):
        row = {"method": method, **case, "image": image, "sigma": sigma, "observation": image + sigma}
        found = {name: values[i] for name, values in figures.items()}
        rows.append(row | ({"error": "no luck"} if image in errors else found))
    return rows


def folder(out: Path, rows: list[dict], methods: dict[str, dict] | None = None, gpu: str = "", **protocol) -> Path:
    """An evaluation as `fastem evaluate` leaves it."""
    methods = methods or {name: {"kind": "wiener"} for name in dict.fromkeys(row["method"] for row in rows)}
    parsed = parse_protocol({"cases": [{"source": "photos"}], "methods": methods} | protocol, "made by hand")
    machine = {"cpu": "a processor", "gpu": gpu, "threads": 1, "torch": "2", "fastem": "1"}
    run = {"protocol": parsed.to_dict(), "configs": {}, "plugins": [], "program": "0", "machine": machine}
    (out / "run.json").write_text(json.dumps(run))
    running.write_rows(out / "rows.csv", rows)
    return out


def tables(out: Path) -> list[list[dict[str, str]]]:
    """Every table of a report, a dictionary per line."""
    found = [block for block in build_report(out)[0] if isinstance(block, report.Table)]
    return [[dict(zip(table.header, line, strict=True)) for line in table.rows] for table in found]


def pictures(out: Path) -> dict[str, str]:
    found = [block for block in build_report(out)[0] if isinstance(block, report.Picture)]
    return {picture.path: picture.caption for picture in found}


class Cells(HTMLParser):
    """The cells of all tables of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self._inside:
            self.tables[-1][-1][-1] += data


STRANGE = '<i>PnP</i> & "others" | 2'
FIGURES = {  # three images: the mean is not the median
    "psnr_aligned": [20, 21, 28], "gain": [-1, 1, 6], "psnr": [19, 20, 27], "psnr_sa": [18, 19, 26],
    "ssim": [0.1, 0.2, 0.9], "ssim_aligned": [0.2, 0.3, 0.7], "ms_ssim": [0.5, 0.6, 0.7],
    "kernel_mse": [1e-4, 2e-4, 9e-4], "kernel_error": [0.1, 0.2, 0.9], "kernel_correlation": [0.5, 0.9, 0.91],
    "chi2": [1, 1.25, 9], "warnings": ["W_VARYING", "", "W_OTHER W_VARYING"], "seconds": [10, 11, 60],
    "cpu_seconds": [20, 21.5, 70], "forwards": [4, 4, 5], "vjps": [1, 2, 6], "gflop": [100, 200, 900],
    "mine.l1": [0.1, 0.2, 0.6],
}  # fmt: skip


def test_every_cell_of_a_report(tmp_path):
    pytest.importorskip("scipy")
    lower = {name: [v - 1 for v in FIGURES[name]] for name in ("psnr_aligned", "kernel_error")}
    rows = rows_of(STRANGE, **FIGURES) + rows_of("b", **lower)
    paper = {"setup": "elsewhere", "figures": {"b": {"psnr": 25.5}}}
    write_report(folder(tmp_path, rows, reference="b", title="Two & <more>", paper=paper))
    expected = [
        [
            ["method", "cases", "PSNR aligned, dB [95 %]", "gain, dB [95 %]", "median gain", "worse", "PSNR raw",
             "PSNR-SA", "SSIM raw", "SSIM aligned", "MS-SSIM", "kernel MSE", "kernel rel. error", "median rel. error",
             "kernel corr. (median)", "chi² (median)", "blur varies", "mine.l1", "paper: PSNR"],
            [STRANGE, "3", "23.00 [20.00, 28.00]", "+2.00 [-1.00, +6.00]", "+1.00", "1 of 3", "22.00",
             "21.00", "0.400", "0.400", "0.600", "0.0004", "0.400", "0.200",
             "0.900", "1.25", "2 of 3", "0.3000", ""],
            ["b", "3", "22.00 [19.00, 27.00]", "", "", "", "",
             "", "", "", "", "", "-0.600", "-0.800",
             "", "", "", "", "25.5"],
        ], [
            ["method", "seconds (median)", "CPU seconds (median)", "network evaluations", "gradients", "GFLOP"],
            [STRANGE, "11", "21.5", "4.3", "3.0", "400"],
            ["b", "", "", "", "", ""],
        ], [
            ["PSNR aligned, minus b", "images", "mean [95 %]", "median", "higher in", "p (Wilcoxon)"],
            [STRANGE, "3", "+1.000 [+1.000, +1.000]", "+1.000", "3", "0.25"],
        ], [
            ["kernel rel. error, minus b", "images", "mean [95 %]", "median", "higher in", "p (Wilcoxon)"],
            [STRANGE, "3", "+1.000 [+1.000, +1.000]", "+1.000", "3", "0.25"],
        ],
    ]  # fmt: skip
    text, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    lines = [line[2:-2].replace("\\|", "\0").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = [[cell.replace("\0", "|") for cell in line] for line in lines if line[0] != "---"]
    assert found == [line for table in expected for line in table]
    assert Cells(page).tables == expected
    for shown in ("Two & <more>", "Columns `paper`: elsewhere", "a processor", report.HOW_TO_READ):
        assert shown in text and report.html.escape(shown) in page
    assert "<i>" not in page and "<more>" not in page


def test_figures_of_whole_sets_are_told(tmp_path):
    (tmp_path / "sets.json").write_text(json.dumps({"fid:fid": {"a": {"fid": 12.3456, "n": 8}, "b": {"fid": 1}}}))
    rows = rows_of("a", psnr_aligned=[20, 21, 28])
    assert tables(folder(tmp_path, rows))[-1] == [
        {"fid:fid": "a", "fid": "12.35", "n": "8"}, {"fid:fid": "b", "fid": "1", "n": ""},
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_error_does_not_raise_a_mean(tmp_path):
    """At the hard case: all means are of the other two, and whoever failed is told."""
    given = {"psnr_aligned": [30, 28, 8], "gain": [3, 1, -2], "psnr": [30, 28, 8], "seconds": [1, 2, 9]}
    rows = rows_of("steady", **given) + rows_of("fragile", errors="c", **given)
    figures, costs, *tests = tables(folder(tmp_path, rows))
    same = {
        "cases": "2 of 3", "PSNR aligned, dB [95 %]": "29.00 [28.00, 30.00]",
        "gain, dB [95 %]": "+2.00 [+1.00, +3.00]", "median gain": "+2.00", "worse": "1 of 3", "PSNR raw": "29.00",
    }  # fmt: skip
    assert figures == [
        {"method": "steady", "errors": ""} | same, {"method": "fragile", "errors": "1"} | same,
    ]  # fmt: skip
    assert [line["seconds (median)"] for line in costs] == ["1.5", "1.5"]
    assert all(line["images"] == "2" for table in tests for line in table)
    summary = build_report(tmp_path)[1]["groups"]["all cases"]
    assert {name: (of["cases"], of["scored"], of["errors"], of["worse"]) for name, of in summary.items()} == {
        "steady": (3, 2, 0, 1), "fragile": (3, 2, 1, 1),
    }  # fmt: skip


def test_errors_of_two_methods_at_different_cases_leave_out_both(tmp_path):
    rows = [
        row
        for name, errors in (("x", ""), ("y", "b"), ("z", "c"))
        for row in rows_of(name, errors=errors, psnr=[1, 2, 6])
    ]
    figures, *_ = tables(folder(tmp_path, rows))
    assert [(line["cases"], line["errors"], line["PSNR raw"]) for line in figures] == [
        ("1 of 3", "", "1.00"), ("1 of 3", "1", "1.00"), ("1 of 3", "1", "1.00"),
    ]  # fmt: skip


def test_a_method_with_nothing_but_errors_takes_no_case_from_the_others(tmp_path):
    pytest.importorskip("matplotlib")
    given = {"psnr_aligned": [30, 28, 8], "gain": [3, 1, -2]}
    rows = rows_of("a", **given) + rows_of("broken", errors="abc") + rows_of("b", **given)
    out = folder(tmp_path, rows, reference="broken", plots=["sigma"])
    figures, *_ = tables(out)
    named = [(line["method"], line["cases"], line["errors"], line["worse"], line["median gain"]) for line in figures]
    assert named == [
        ("a", "3", "", "1 of 3", "+1.00"), ("broken", "0 of 3", "3", "3 of 3", ""), ("b", "3", "", "1 of 3", "+1.00"),
    ]  # fmt: skip
    assert pictures(out) == {"plot_sigma.png": "PSNR over noise level, 95 % intervals: 3 cases, without broken"}


def test_without_errors_there_is_no_column_of_them(tmp_path):
    rows = rows_of("a", psnr_aligned=[1, 2, 3])
    (line,), *_ = tables(folder(tmp_path, rows))
    assert "errors" not in line and "worse" not in line and line["cases"] == "3"


# ------------------------------------------------------------------------------------------------------------- plots


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes of each figure that is drawn."""
    pytest.importorskip("matplotlib")
    figures, draw = [], report._png
    monkeypatch.setattr(report, "_png", lambda figure, axes: figures.append(figure.axes) or draw(figure, axes))
    return figures


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line with a name."""
    lines, names = axes.get_legend_handles_labels()
    lines = [getattr(line, "lines", [line])[0] for line in lines]  # an error bar holds its line
    return {name: list(map(tuple, line.get_xydata().tolist())) for name, line in zip(names, lines, strict=True)}


@pytest.mark.parametrize("kind, name", [("kernel", "kernel_error"), ("sigma", "psnr_aligned")])
def test_plots_over_the_noise_level(tmp_path, drawn, kind, name):
    rows = [
        row for method, factor in (("a", 1), ("b", 2)) for sigma, v in (("10", 0.2), ("2.5", 0.1))
        for row in rows_of(method, sigma=sigma, **{name: [factor * v, 2 * factor * v, 6 * factor * v]})
    ]  # fmt: skip
    out = folder(tmp_path, rows + rows_of("a", sigma="", **{name: [9, 9, 9]}), plots=[kind])
    ((path, caption),) = pictures(out).items()
    assert path == f"plot_{kind}.png" and caption.endswith("over noise level, 95 % intervals: 6 cases")
    ((axes,),) = drawn
    assert lines_of(axes) == {
        "a": [(2.5, pytest.approx(0.3)), (10, pytest.approx(0.6))],
        "b": [(2.5, pytest.approx(0.6)), (10, pytest.approx(1.2))],
    }
    assert axes.get_yscale() == ("log" if kind == "kernel" else "linear")
    assert Image.open(out / f"plot_{kind}.png").size[0] > 500


TIMES = {"psnr_aligned": [20, 21, 28], "seconds": [1, 2, 9], "cpu_seconds": [10, 20, 90], "gflop": [100, 200, 600]}


@pytest.mark.parametrize(
    "gpu, label, x", [("", "CPU seconds per image", 20), ("an accelerator", "seconds per image", 2)]
)
def test_time_is_that_of_the_processor_where_there_is_no_gpu(tmp_path, drawn, gpu, label, x):
    out = folder(tmp_path, rows_of("a", **TIMES), plots=["time"], gpu=gpu)
    assert pictures(out) == {"plot_time.png": "PSNR over time and over work: 3 cases"}
    ((time, work),) = drawn
    assert (time.get_xlabel(), lines_of(time)) == (label, {"a": [(x, 23)]})  # the median
    assert (work.get_xlabel(), lines_of(work)) == ("GFLOP of the network", {"a": [(300, 23)]})  # the mean


def test_slow_methods_are_drawn_at_the_cases_that_all_have(tmp_path, drawn):
    methods = {
        "fast": {"kind": "wiener", "series": "ours"}, "slow": {"kind": "wiener", "series": "ours", "limit": 2},
        "other": {"kind": "wiener"},
    }  # fmt: skip
    slower = {name: [10 * v for v in values[:2]] for name, values in TIMES.items()}
    rows = rows_of("fast", **TIMES) + rows_of("slow", images="ab", **slower) + rows_of("other", errors="a", **TIMES)
    out = folder(tmp_path, rows, methods, plots=["time"])
    assert pictures(out) == {
        "plot_time.png": "PSNR over time and over work: 2 cases, without slow",  # other failed at one of three
        "plot_time_slow.png": "PSNR over time and over work, with the slow methods: 1 case that all methods have",
    }
    (few, _), (all_, _) = drawn
    assert lines_of(few) == {"ours": [(55, 24.5)], "other": [(55, 24.5)]}
    assert lines_of(all_) == {"ours": [(20, 21), (200, 210)], "other": [(20, 21)]}
    assert (out / "plot_time_slow.png").stat().st_size > 1000


def test_what_no_method_has_is_not_drawn(tmp_path, drawn):
    assert pictures(folder(tmp_path, rows_of("a", psnr_aligned=[1, 2, 3]), plots=["kernel"])) == {} and not drawn
    assert "Plots" not in (write_report(tmp_path)).read_text()


# ------------------------------------------------------------------------------------------------------------ sheets


def test_a_sheet_shows_input_methods_and_truth_with_their_kernels(tmp_path):
    rows = rows_of("m 1", images="a", psnr_aligned=[20])
    stem = "synthetic-sharp-a-shake-k-5-valid-0"
    colours = {"input": (200, 0, 0), "m-1": (0, 200, 0), "truth": (0, 0, 200)}
    for name, colour in colours.items():
        for kind in ("pictures", "kernels"):
            (tmp_path / kind / name).mkdir(parents=True)
        io.write_image(tmp_path / "pictures" / name / f"{stem}.png", io.Picture(np.full((40, 40, 3), colour, np.uint8)))
    for name, at in {"m-1": 0, "truth": 2}.items():
        io.save_kernel_png(tmp_path / "kernels" / name / f"{stem}.png", np.eye(3)[at][None].repeat(3, 0) / 3)
    out = folder(tmp_path, rows)
    assert pictures(out) == {f"sheets/{stem}.png": stem}
    sheet = Image.open(out / "sheets" / f"{stem}.png")
    panels = [i * (report.PANEL // 2 + report.GAP) for i in range(3)]  # the left of each
    assert [sheet.getpixel((left + x, y)) for left in panels for x, y in ((5, 5), (35, 35))] == [
        colour for colour in colours.values() for _ in range(2)
    ]
    corners = [[sheet.getpixel((left + x, 5)) for x in (31, 38)] for left in panels]  # of ten pixels
    black, white = (0, 0, 0), (255, 255, 255)
    assert corners == [[colours["input"]] * 2, [white, black], [black, white]]
    assert np.asarray(sheet.convert("L"))[41:54, : report.PANEL // 2].min() < 128  # a caption
