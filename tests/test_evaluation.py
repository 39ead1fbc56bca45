"""The harness: paired, resumable, honest about failures; statistics against cases whose answer is known."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastem import metrics
from fastem.baselines import BASELINES, Problem
from fastem.cli.evaluate import _split
from fastem.cli.main import run as command
from fastem.em import EdgeEM
from fastem.engine import EFFORTS, LOSSY_SIGMA, SIGMA_FLOOR, Deblurrer, Request
from fastem.evaluation import (
    Evaluation,
    NetworkCounter,
    ProtocolError,
    bootstrap_mean,
    list_cases,
    load_protocol,
    names,
    network_flops,
    paired,
    parse_protocol,
    write_report,
)
from fastem.evaluation import run as running
from fastem.evaluation.cases import spread
from fastem.evaluation.report import common_cases, per_image, summarise
from fastem.evaluation.report import test_table as table_of_tests
from fastem.evaluation.run import read_rows, row_files
from fastem.io import FastemError
from fastem.noise import estimate_sigma
from fastem.synth import degrade, motion_kernel

TINY = """
title = "Tiny"
reference = "blind"
sheets = 1
plots = ["sigma", "time"]

[[cases]]
source = "synthetic"
images = ["sharp"]
kernels = ["shake", "kernels/"]
size = 5
sigma = [5, 10]
boundary = ["circular", "valid"]

[methods.blind]
options = { steps = 2 }

[methods."with the kernel"]
known = true
options = { steps = 2, guidance = "pigdm", particles = 2 }

[methods.wiener]
kind = "wiener"

[paper]
setup = "elsewhere"
[paper.figures.blind]
psnr = 25.66
"""


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> Path:
    """The smallest network that the real engine takes; what it has learnt is nothing."""
    from fastem.models import NaturalConfig, NaturalPrior, save_natural

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("prior") / "small.safetensors"
    save_natural(path, NaturalPrior(NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8)), r2=None, card={})
    return path


def scene(size: int, seed: int) -> np.ndarray:
    """`(size, size, 3)` uint8: random rectangles."""
    rng = np.random.default_rng(seed)
    x = np.full((size, size, 3), 128, np.uint8)
    for _ in range(20):
        top, left = rng.integers(0, size - 4, 2)
        x[top : top + rng.integers(3, size // 2), left : left + rng.integers(3, size // 2)] = rng.integers(10, 245, 3)
    return x


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "sharp").mkdir()
    (root / "kernels").mkdir()
    for i in range(3):
        Image.fromarray(scene(32, i)).save(root / "sharp" / f"{'cab'[i]}.png")
    np.save(root / "kernels" / "small.npy", motion_kernel(3, 1))
    np.save(root / "kernels" / "too_large.npy", motion_kernel(9, 1))
    return root


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def fastem(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, list[str], str]:
        code = command([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(code), out.splitlines(), err

    return call


# ------------------------------------------------------------------------------------------------------- end to end


def test_end_to_end(fastem, tiny, data, prior, tmp_path):
    given = ("evaluate", tiny, "--data", data, "-o", "out", "--prior", prior)
    code, lines, err = fastem(*given, "--limit", 1)
    assert code == 0, err
    assert len(lines) == 2 * 2 * 2 * 3 + 1 and lines[-1] == "out/report.md"
    rows = read_rows(row_files(tmp_path / "out"))
    assert len(rows) == 24 and {row["image"] for row in rows} == {"a"}
    assert {row["kernel"] for row in rows if row["family"] == "kernels"} == {"small"}  # the other does not fit
    for row in rows:
        assert math.isfinite(row["psnr"]) and row["gain"] == pytest.approx(
            row["psnr_aligned"] - row["psnr_input_aligned"], abs=1e-4
        )
        assert row["seconds"] > 0 and row["sigma_used"] == pytest.approx(float(row["sigma"]), abs=1e-4)
        assert ("psnr_sa" in row) == (row["method"] == "with the kernel")  # two particles
    known = [row for row in rows if row["method"] == "with the kernel"]
    assert all(row["kernel_error"] < 1e-9 and row["kernel_correlation"] > 0.999 for row in known)
    assert {(row["forwards"], row["vjps"]) for row in known} == {(4.0, 4.0)}  # two steps of two particles
    assert all(row["gflop"] > 0 for row in known)

    report = (tmp_path / "out" / "report.md").read_text()
    assert "# Tiny" in report and "paper: PSNR" in report and "25.66" in report
    assert "p (Wilcoxon)" not in report  # one image is no sample
    for name in ("report.html", "plot_sigma.png", "plot_time.png", "summary.json", "run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    (sheet,) = (tmp_path / "out" / "sheets").iterdir()
    assert Image.open(sheet).size[0] > 3 * 32
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    blind = summary["groups"]["all cases"]["blind"]
    assert blind["cases"] == 8 and blind["psnr"]["low"] is None  # eight cases of one image have no interval
    of = [row for row in rows if row["method"] == "blind"]
    assert blind["psnr"]["mean"] == pytest.approx(np.mean([row["psnr"] for row in of]), abs=1e-3)
    assert blind["worse"] == sum(row["psnr_aligned"] < row["psnr_input_aligned"] for row in of)

    code, lines, err = fastem(*given, "--limit", 1)  # all there: nothing runs again
    assert code == 0 and lines == ["out/report.md"] and "24 of 24 rows" in err


@pytest.fixture(scope="module")
def rows(data, prior, tmp_path_factory) -> list[dict]:
    """What the tiny protocol gives for one image."""
    root = tmp_path_factory.mktemp("rows")
    (root / "tiny.toml").write_text(TINY)
    run = Evaluation(load_protocol(str(root / "tiny.toml")), data, root / "out", limit=1, prior=str(prior))
    return list(run.run())


def test_methods_see_the_same_observation(rows):
    by_case = {}
    for row in rows:
        by_case.setdefault(tuple(row[n] for n in running.KEY), set()).add(row["observation"])
    assert len(by_case) == 8 and all(len(seen) == 1 for seen in by_case.values())
    assert len({next(iter(seen)) for seen in by_case.values()}) == 8  # and every case is another one
    with pytest.raises(ValueError, match="different observations"):
        common_cases([rows[0] | {"observation": "something else"}, *rows[1:]], ["blind", "wiener"])


def test_pairs_leave_out_what_one_method_lacks(rows):
    gone = next(row for row in rows if row["method"] == "wiener")
    shared = common_cases([row for row in rows if row is not gone], ["blind", "wiener"])
    assert len(shared["blind"]) == len(shared["wiener"]) == 7
    for a, b in zip(shared["blind"], shared["wiener"], strict=True):
        assert [a[n] for n in running.KEY] == [b[n] for n in running.KEY]


def test_resume_and_shards(data, tiny, prior, tmp_path):
    protocol = load_protocol(str(tiny))

    def start(out, **options):
        return Evaluation(protocol, data, tmp_path / out, limit=1, prior=str(prior), methods=["wiener"], **options)

    whole = list(start("whole").run())
    first = start("parts")
    for _, _row in zip(range(3), first.run(), strict=False):  # ended after three rows
        pass
    again = start("parts")
    assert (left := again.left) < 8
    assert len(list(again.run())) == left
    scores = ("psnr", "kernel_error", "observation")
    assert _scores(read_rows(row_files(tmp_path / "parts")), scores) == _scores(whole, scores)

    for i in (1, 2, 3):
        list(start("shards", shard=(i, 3)).run())
    assert sorted(f.name for f in row_files(tmp_path / "shards")) == [f"rows.{i}of3.csv" for i in (1, 2, 3)]
    assert _scores(read_rows(row_files(tmp_path / "shards")), scores) == _scores(whole, scores)
    assert start("shards").left == 0


def _scores(rows, names) -> dict:
    return {
        running.row_key(row): tuple(f"{row[n]:.4g}" if isinstance(row.get(n), float) else row.get(n) for n in names)
        for row in rows
    }


@pytest.mark.parametrize("error", [ValueError, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("text", ["no such\nluck", ""])
def test_a_failing_method_costs_a_row_not_the_run(data, tiny, prior, tmp_path, monkeypatch, error, text):
    def broken(problem):
        raise error(text)

    monkeypatch.setitem(BASELINES, "wiener", broken)
    run = Evaluation(load_protocol(str(tiny)), data, tmp_path / "out", limit=1, methods=["wiener"], prior=str(prior))
    rows = list(run.run())
    said = "no such luck" if text else error.__name__
    assert len(rows) == 8 and all(row["error"] == said and "psnr" not in row for row in rows)
    assert command(["evaluate", "--report-only", "-o", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["groups"]["all cases"]["wiener"]
    assert figures["errors"] == figures["worse"] == 8


def test_errors_are_tried_again(fastem, tiny, data, tmp_path, monkeypatch):
    """Until then the command goes on failing, and the rows of other methods stay."""
    wiener, given = BASELINES["wiener"], ("--data", data, "-o", "out", "--limit", 1)

    def broken(problem):
        if problem.sigma > 0.03 and not problem.circular:
            raise MemoryError("no room")
        return wiener(problem)

    tiny.write_text(TINY + '[methods.also]\nkind = "hyper-laplacian"\n')
    monkeypatch.setitem(BASELINES, "wiener", broken)
    for methods, count in (("wiener,also", 16), ("wiener", 2), ("wiener", 2)):
        code, lines, err = fastem("evaluate", tiny, *given, "--methods", methods)
        assert code == 1 and len(lines) == count + 1 and f"errors: 2 of {8 * len(methods.split(','))} rows ended" in err
    assert fastem("evaluate", tiny, *given, "--methods", "also")[0] == 0
    assert sum("error" in row for row in read_rows(row_files(tmp_path / "out"))) == 2
    monkeypatch.setitem(BASELINES, "wiener", wiener)
    code, lines, err = fastem("evaluate", tiny, *given, "--methods", "wiener")
    assert code == 0 and len(lines) == 3 and "6 of 8 rows were there before" in err
    rows = read_rows(row_files(tmp_path / "out"))
    assert len(rows) == 16 and not any("error" in row for row in rows)


def test_errors_of_a_shard_are_tried_again_by_any(data, tiny, prior, tmp_path, monkeypatch):
    protocol, given = load_protocol(str(tiny)), {"limit": 1, "methods": ["wiener"], "prior": str(prior)}
    with monkeypatch.context() as broken:
        broken.setitem(BASELINES, "wiener", lambda problem: 1 / 0)
        run = Evaluation(protocol, data, tmp_path / "out", shard=(1, 2), **given)
        assert len(list(run.run())) == run.errors == run.left == 4
    run = Evaluation(protocol, data, tmp_path / "out", **given)
    assert (run.errors, run.left) == (4, 8) and len(list(run.run())) == 8 and (run.errors, run.left) == (0, 0)
    assert len(row_files(tmp_path / "out")) == 2 and len(read_rows(row_files(tmp_path / "out"))) == 12
    write_report(tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["groups"]["all cases"]["wiener"]
    assert (figures["cases"], figures["errors"]) == (8, 0)
    assert "8 rows" in (tmp_path / "out" / "report.md").read_text()


def test_other_pictures_are_noticed(fastem, tiny, data, tmp_path):
    given = ("-o", "out", "--methods", "wiener")
    assert fastem("evaluate", tiny, *given, "--data", data, "--limit", 1)[0] == 0
    for folder in ("sharp", "kernels"):
        (tmp_path / "other" / folder).mkdir(parents=True)
        for file in (data / folder).iterdir():
            (tmp_path / "other" / folder / file.name).write_bytes(file.read_bytes())
    assert fastem("evaluate", tiny, *given, "--data", tmp_path / "other", "--limit", 2)[0] == 0  # moved, not changed
    Image.fromarray(scene(32, 9)).save(tmp_path / "other" / "sharp" / "a.png")
    for limit in (2, 3):
        code, out, err = fastem("evaluate", tiny, *given, "--data", tmp_path / "other", "--limit", limit)
        assert code == 2 and not out and len(err.splitlines()) == 2
        assert "out holds results of other pictures or kernels of the same names (a, shake_7000000)" in err
    assert len(read_rows(row_files(tmp_path / "out"))) == 16


def test_a_run_that_is_whole_leaves_its_files_alone(tiny, data, prior, tmp_path):
    protocol = load_protocol(str(tiny))
    for shard in ((1, 2), (2, 2), (1, 1)):
        given = {"shard": shard, "limit": 1, "methods": ["wiener"], "prior": str(prior)}
        list(Evaluation(protocol, data, tmp_path / "out", **given).run())
    assert [file.name for file in row_files(tmp_path / "out")] == ["rows.1of2.csv", "rows.2of2.csv"]


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("run.json", "{}", "out holds no evaluation (no readable run.json)"),
        ("run.json", "[", "out holds no evaluation (no readable run.json)"),
        ("rows.csv", "method,psnr\na,1\na,x\n", "out/rows.csv is damaged after row 1: could not convert"),
        ("rows.csv", "method\na,1\n", "out/rows.csv is damaged after row 0: "),
    ],
)
def test_damaged_folders_are_told(fastem, tiny, data, tmp_path, file, text, message):
    given = ("evaluate", tiny, "--data", data, "-o", "out", "--limit", 1, "--methods", "wiener")
    assert fastem(*given)[0] == 0
    (tmp_path / "out" / file).write_text(text)
    for arguments in (given, ("evaluate", "--report-only", "-o", "out")):
        code, _, err = fastem(*arguments)
        assert code == 2 and len(err.splitlines()) == 1 and message in err


def test_a_method_may_not_be_told_the_noise(data, prior, tmp_path):
    """Others and chi^2 keep the true one."""
    case = {"source": "synthetic", "images": ["sharp"], "kernels": ["delta"], "size": 5, "sigma": [12]}
    hidden = {"kind": "wiener", "blind_sigma": True}
    methods = {
        "told": {"kind": "wiener"}, "hidden": hidden, "engine": {"options": {"steps": 2}, "blind_sigma": True},
    }  # fmt: skip
    protocol = parse_protocol({"cases": [case], "methods": methods}, "p")
    run = Evaluation(protocol, data, tmp_path, limit=1, prior=str(prior))
    told, hidden, engine = run.run()
    (case,) = list_cases(protocol, data, 1)
    y = case.load().y
    assert told["sigma_used"] == pytest.approx(12) and abs(hidden["sigma_used"] - 12) > 0.05
    assert hidden["sigma_used"] == pytest.approx(255 * estimate_sigma(y)) and engine["sigma_used"] != 12
    x = BASELINES["wiener"](replace(case.load(), sigma=hidden["sigma_used"] / 255)).image
    assert hidden["chi2"] == pytest.approx(metrics.chi2(y, x, motion_kernel(5, 0, "delta"), 12 / 255))


def test_methods_may_look_for_the_size_of_the_kernel(prior):
    methods = {name: {"options": {"steps": 2} | o} for name, o in {"told": {}, "auto": {"kernel_size": "auto"}}.items()}
    protocol = parse_protocol({"cases": [{"source": "synthetic"}], "methods": methods}, "p")
    contestants = running.Contestants(protocol, prior=str(prior))
    told, auto = (contestants.run(name, problem())[0].kernel for name in methods)
    assert told.shape == (7, 7) and auto.shape[0] > 7


def test_denoising():
    methods = {"denoising": {"kind": "denoise", "options": {"steps": 2}}}
    contestants = running.Contestants(parse_protocol({"cases": [{"source": "photos"}], "methods": methods}, "p"))
    p = problem(sigma=10 / 255, family="delta")
    estimate, sigma, costs = contestants.run("denoising", p)
    assert metrics.psnr(estimate.image, p.x) > metrics.psnr(p.y, p.x) + 4 and sigma == p.sigma
    np.testing.assert_array_equal(estimate.kernel, p.kernel)
    assert (costs["forwards"], costs["vjps"]) == (1, 0) and costs["gflop"] > 0


def test_networks_of_16_bits_are_counted(prior):
    """Each engine has a copy of its own."""
    halves = {"kind": "engine", "known": True, "options": {"steps": 2, "precision": "bf16", "prior": str(prior)}}
    given = {"cases": [{"source": "photos"}], "methods": {"a": halves, "b": halves}}
    contestants = running.Contestants(parse_protocol(given, "p"))
    for name in ("a", "b", "a"):
        assert contestants.run(name, problem())[2]["forwards"] == 2


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_changed_run_is_refused_in_one_line(fastem, tiny, data, prior, tmp_path):
    given = ("--data", data, "-o", "out", "--prior", prior, "--limit", 1, "--methods", "wiener")
    assert fastem("evaluate", tiny, *given)[0] == 0
    tiny.write_text(TINY.replace("sigma = [5, 10]", "sigma = [5, 12]"))
    code, _, err = fastem("evaluate", tiny, *given)
    assert code == 2 and err.splitlines() == [
        "fastem: E_OPTION: out holds results of another protocol. Choose another folder with -o"
    ]
    tiny.write_text(TINY)
    code, _, err = fastem("evaluate", tiny, *given, "--option", "steps=3")
    assert code == 2 and "another protocol" in err
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps(run | {"program": "0"}))
    code, _, err = fastem("evaluate", tiny, *given)
    assert code == 2 and "another version of fastem" in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("title = 3 =", "is not TOML"),
        ("", "needs one [[cases]] or more"),
        ("[[cases]]\nsource='x'", "needs one [methods.NAME] or more"),
        (TINY.replace("sheets", "sheet"), "unknown key 'sheet'; allowed are cases, methods"),
        (TINY.replace('kind = "wiener"', 'kind = "winner"'), "unknown kind 'winner'; allowed are engine, denoise"),
        (TINY.replace('"synthetic"', '"thin air"'), "unknown source 'thin air'; allowed are synthetic, lai_pairs"),
        (TINY.replace("size = 5", "sice = 5"), "unknown key 'sice'; allowed are images, kernels, size"),
        (TINY.replace('"shake"', '"shook"'), "unknown kernel family 'shook'"),
        (TINY.replace('["sharp"]', '["blunt"]'), "there is no folder"),
        (TINY.replace('"sigma", "time"', '"pie"'), "unknown plot 'pie'"),
        (TINY.replace('reference = "blind"', 'reference = "deaf"'), "the reference 'deaf' is none of its methods"),
        (TINY.replace("steps = 2 }", "strides = 2 }", 1), "method 'blind': "),
        (TINY.replace("psnr = 25.66", "psrn = 25.66"), "unknown key 'psrn'; allowed are forwards"),
        (TINY.replace("psnr = 25.66", "psnr = 'x'"), "[paper.figures.blind]: psnr is 'x'; allowed is a number"),
        (TINY.replace("figures.blind", "figure.blind"), "[paper]: unknown key 'figure'; allowed are figures, setup"),
        (TINY.replace('title = "Tiny"', "title = 3"), "title is 3; allowed is text"),
        (TINY.replace("sheets = 1", "sheets = true"), "sheets is True; allowed is a whole number"),
        (TINY.replace("sigma = [5, 10]", "sigma = 5"), "'synthetic': sigma is 5; allowed is a list, each a number"),
        (TINY.replace('["sharp"]', '"sharp"'), "images is 'sharp'; allowed is a list, each text"),
        (TINY.replace("size = 5", "size = [5]"), "size is [5]; allowed is a whole number"),
        (TINY.replace("sigma = [5, 10]", "sigma = []"), "number 1 of 'tiny' comes to nothing: no images in "),
        (TINY.replace('"valid"', '"open"'), "unknown boundary 'open'; allowed are circular, valid"),
        (TINY.replace("known = true", "known = 1"), "'with the kernel': known is 1; allowed is true or false"),
        (TINY.replace("options = { steps = 2 }", "options = 'x'"), "options is 'x'; allowed is a table"),
        ("methods = 3\n[[cases]]\nsource = 'x'", "needs one [methods.NAME] or more"),
        (TINY.replace('kind = "wiener"', 'kind = "wiener"\noptions = { power = 2 }'),
         "method 'wiener', options: unknown key 'power'; allowed are none"),
        (TINY.replace('kind = "wiener"', 'kind = "deep-prior"\noptions = { width = "x" }'),
         "method 'wiener', options: width is 'x'; allowed is a whole number"),
    ],
)
def test_bad_protocols(fastem, tiny, data, prior, text, message):
    tiny.write_text(text)
    code, out, err = fastem("evaluate", tiny, "--data", data, "--prior", prior)
    assert code == 2 and not out and len(err.splitlines()) == 1 and message in err


def test_names_of_methods_may_hold_commas():
    names = ["fastem", "fastem, turbo", "l0 MAP"]
    assert _split("l0 MAP,fastem, turbo,fastem", names) == ["l0 MAP", "fastem, turbo", "fastem"]
    assert _split("fastem, true kernel", names) == ["fastem", "true kernel"]  # which the evaluation refuses
    assert _split("", names) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "name a protocol: "),
        (("tabel1",), "there is no protocol 'tabel1': packaged are "),
        (("public", "--shard", "3/2"), "--shard is i/n with 1 <= i <= n"),
        (("public", "--option", "steps"), "--option is NAME=VALUE"),
        (("public", "--methods", "magic", "--data", "DATA"), "unknown method 'magic'"),
        (("ffhq", "--data", "DATA"), "needs --prior"),
        (("--report-only", "-o", "nowhere"), "holds no evaluation"),
        (("TINY", "--data", "DATA", "--metric-plugin", "no.such:metric"), "cannot load the metric"),
    ],
)
def test_bad_arguments(fastem, tiny, data, arguments, message):
    arguments = [{"DATA": data, "TINY": tiny}.get(a, a) for a in arguments]
    code, _, err = fastem("evaluate", *arguments)
    assert code == 2 and len(err.splitlines()) == 1 and message in err


def test_packaged_protocols(fastem, prior):
    assert {"public", "table1", "table2", "fig1", "fig4", "fig5", "real", "ffhq", "robust", "noblur"} <= set(names())
    for name in names():
        protocol = load_protocol(name)
        running.Contestants(protocol, prior=str(prior)).configs(list(protocol.methods))  # the engine takes its options
    assert {line.split()[0] for line in fastem("evaluate", "--list")[1]} == set(names())


def test_protocols_measure_what_is_shipped():
    fig1, fig4 = load_protocol("fig1"), load_protocol("fig4")
    assert fig1.methods[fig1.reference].options == {"steps": EFFORTS["exact"].steps}
    em = EdgeEM(torch.ones(1, 1, 1, 1))
    assert {"ridge": em.ridge, "num_iters": em.num_iters} in [m.options for m in fig4.methods.values()]


def test_slow_methods_have_tables_of_their_own(data, tmp_path):
    """Tables without them hold every image; tables with them those that all methods saw."""
    slow = {"kind": "wiener", "limit": 2}
    case = {"source": "synthetic", "images": ["sharp"], "size": 5, "boundary": ["circular", "valid"]}
    methods = {"quick": {"kind": "wiener"}, "slow": slow, "SLOWER": slow | {"limit": 1}}
    protocol = parse_protocol({"cases": [case], "methods": methods, "plots": ["sigma"]}, "p")
    rows = list(Evaluation(protocol, data, tmp_path).run())
    assert [sum(row["method"] == name for row in rows) for name in methods] == [6, 4, 2]
    write_report(tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["groups"]
    counts = {label: {name: of["cases"] for name, of in by.items()} for label, by in found.items()}
    with_slow = "with the slow methods (slow; SLOWER): "
    for label, count in (("all cases", 2), ("sigma 5, circular", 1), ("sigma 5, valid", 1)):
        assert counts[label] == {"quick": 3 * count}
        assert counts[with_slow + label] == dict.fromkeys(methods, count)
        assert len({of["psnr"]["mean"] for of in found[with_slow + label].values()}) == 1  # of the same cases
    assert "## With the slow methods (slow; SLOWER): all cases" in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------- sources


def test_sources_of_pairs(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "lai_pairs").mkdir()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "fastdiffusionem").mkdir()
    (tmp_path / "gopro_pairs").mkdir()
    (tmp_path / "blurred_real").mkdir()
    k = motion_kernel(5, 0)
    np.save(tmp_path / "kernels" / "lai_2.npy", k)
    for name in ("lai_pairs/m_sharp", "lai_pairs/m_kernel2_blurred", "gopro_pairs/a_blurred", "gopro_pairs/a_sharp"):
        Image.fromarray(scene(40, len(name))).save(tmp_path / f"{name}.png")
    Image.fromarray(scene(40, 1)).save(tmp_path / "blurred_real" / "p.jpg")
    x = rng.random((3, 24, 24), np.float32)
    arrays = {"H": x, "L": 1.25 * x, "kernel": 1.25 * k, "sigma": np.float32(0.04)}
    np.savez(tmp_path / "fastdiffusionem" / "sample0.npz", **arrays)
    sources = ["lai_pairs", "fastdiffusionem", "gopro_pairs", "photos"]
    protocol = parse_protocol({"cases": [{"source": s} for s in sources], "methods": {"a": {"kind": "wiener"}}}, "p")
    lai, published, gopro, photo = (case.load() for case in list_cases(protocol, tmp_path))
    np.testing.assert_array_equal(lai.kernel, k)
    assert lai.border == 2 and lai.sigma is None and lai.kernel_size == (5, 5)
    np.testing.assert_allclose(published.y, x.transpose(1, 2, 0), atol=1e-6)  # the sum of the kernel taken out
    assert published.sigma == pytest.approx(0.032) and published.kernel.sum() == pytest.approx(1, abs=1e-6)
    assert gopro.kernel is None and gopro.x is not None and gopro.lossy is False
    assert photo.x is None and photo.lossy is True and photo.quantization.shape == (8, 8)


def test_crops_of_a_jpeg_start_at_its_blocks(tmp_path):
    (tmp_path / "blurred_real").mkdir()
    pixels = scene(64, 1)[:, :59]
    Image.fromarray(pixels).save(tmp_path / "blurred_real" / "a.jpg")
    Image.fromarray(pixels).save(tmp_path / "blurred_real" / "b.png")
    table = {"cases": [{"source": "photos", "crop": 40}], "methods": {"a": {"kind": "l0-map"}}}
    lossy, exact = (case.load() for case in list_cases(parse_protocol(table, "p"), tmp_path))
    stored = np.asarray(Image.open(tmp_path / "blurred_real" / "a.jpg"))
    np.testing.assert_array_equal(np.rint(255 * lossy.y), stored[8:48, 8:48])  # the middle starts at (12, 9)
    np.testing.assert_array_equal(np.rint(255 * exact.y), pixels[12:52, 9:49])


def test_photos_are_restored_as_by_deblur(tmp_path, prior):
    (tmp_path / "blurred_real").mkdir()
    file = tmp_path / "blurred_real" / "a.jpg"
    Image.fromarray(scene(64, 1)).save(file, quality=20)
    case = {"source": "photos", "size": 5}
    protocol = parse_protocol({"cases": [case], "methods": {"blind": {"options": {"steps": 2}}}}, "p")
    (row,) = Evaluation(protocol, tmp_path, tmp_path / "out", prior=str(prior)).run()
    engine = Deblurrer(str(prior), steps=2, kernel_size=5)
    assert row["sigma_used"] == pytest.approx(255 * engine(file).sigma)
    assert row["sigma_used"] > 255 * LOSSY_SIGMA + 0.5  # what the table says, not the floor


@pytest.mark.parametrize("name, sigma", [("a.jpg", 0), ("b.png", 5)])
def test_methods_of_a_case_share_the_noise_of_chi2(tmp_path, prior, monkeypatch, name, sigma):
    folder = tmp_path / "blurred_real"
    folder.mkdir()
    y = scene(64, 1) + np.random.default_rng(0).normal(0, sigma, (64, 64, 3))
    Image.fromarray(y.clip(0, 255).astype(np.uint8)).save(folder / name, quality=20)
    methods = {"blind": {"options": {"steps": 2}}, "l0": {"kind": "l0-map"}}
    protocol = parse_protocol({"cases": [{"source": "photos", "size": 5}], "methods": methods}, "p")
    monkeypatch.setattr(metrics, "chi2", lambda y, x, kernel, sigma, border: sigma)
    rows = list(Evaluation(protocol, tmp_path, tmp_path / "out", prior=str(prior)).run())
    first = Deblurrer(str(prior), steps=2)._job(Request(folder / name), None).sigma  # before EM refines it
    assert [row["chi2"] for row in rows] == pytest.approx([first, first])
    assert rows[1]["sigma_used"] == pytest.approx(255 * first)


def test_noise_of_chi2_where_it_is_known():
    assert running.assumed_sigma(problem(sigma=0.02)) == 0.02
    assert running.assumed_sigma(problem(sigma=0.0)) == SIGMA_FLOOR


def test_random_objects_in_arrays_are_not_unpickled(tmp_path):
    (tmp_path / "fastdiffusionem").mkdir()
    np.savez(tmp_path / "fastdiffusionem" / "sample0.npz", sigma=np.array([{}], dtype=object))
    protocol = parse_protocol({"cases": [{"source": "fastdiffusionem"}], "methods": {"a": {"kind": "wiener"}}}, "p")
    with pytest.raises(ProtocolError, match="sample0.npz is no .npz file of the numbers H, L, kernel and sigma"):
        list_cases(protocol, tmp_path)


def test_failures_of_files_name_them(tmp_path):
    def listed(source, **settings):
        table = {"cases": [{"source": source} | settings], "methods": {"a": {"kind": "wiener"}}}
        return list_cases(parse_protocol(table, "p"), tmp_path)

    for folder in ("sharp", "kernels", "lai_pairs", "gopro_pairs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "sharp" / "torn.png").write_bytes(b"no picture")
    with pytest.raises(FastemError, match="E_UNREADABLE: .*sharp/torn.png: "):
        listed("synthetic", images=["sharp"], size=5)[0].load()
    Image.fromarray(scene(16, 0)).save(tmp_path / "sharp" / "torn.png")
    with pytest.raises(ProtocolError, match="sharp/torn.png: .*33"):  # a kernel that is larger
        listed("synthetic", images=["sharp"], size=33, boundary=["valid"])[0].load()
    (tmp_path / "kernels" / "torn.npy").write_bytes(b"no kernel")
    with pytest.raises(FastemError, match="kernels/torn.npy: "):
        listed("synthetic", images=["sharp"], kernels=["kernels/"])
    for name, size in (("a_blurred", 16), ("a_sharp", 20)):
        Image.fromarray(scene(size, 0)).save(tmp_path / "gopro_pairs" / f"{name}.png")
    with pytest.raises(ProtocolError, match="a_blurred.png: has 16 x 16 pixels, and a_sharp.png 20 x 20"):
        listed("gopro_pairs")[0].load()
    (tmp_path / "gopro_pairs" / "a_sharp.png").unlink()
    with pytest.raises(FastemError, match="E_VANISHED: [^:]*a_sharp.png: "):
        listed("gopro_pairs")[0].load()
    (tmp_path / "lai_pairs" / "m_kernelX_blurred.png").touch()
    with pytest.raises(ProtocolError, match="m_kernelX_blurred.png: the name is not SCENE_kernelNUMBER_blurred.png"):
        listed("lai_pairs")


def test_cases_of_one_name_are_refused(tmp_path, data):
    entry = {"source": "synthetic", "images": ["sharp"], "size": 5}
    table = {"cases": [entry, entry | {"crop": 16}], "methods": {"a": {"kind": "wiener"}}}
    with pytest.raises(ProtocolError, match="2 cases of 'p' have one name, synthetic sharp a shake"):
        list_cases(parse_protocol(table, "p"), data)
    for folder in ("sharp", "kernels"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "kernels" / "only.npy", motion_kernel(3, 1))
    for name in ("a.png", "a.bmp"):
        Image.fromarray(scene(32, 0)).save(tmp_path / "sharp" / name)
    with pytest.raises(ProtocolError, match="Rename a picture"):
        list_cases(parse_protocol(table | {"cases": [entry | {"kernels": ["kernels/"]}]}, "p"), tmp_path)


def test_spread():
    assert spread(list(range(10)), 3) == [0, 3, 6] and spread([1, 2], 5) == [1, 2]


# ------------------------------------------------------------------------------------------------ statistics, metrics


def test_bootstrap_interval_of_a_normal_sample():
    x = np.random.default_rng(0).normal(3, 2, 500)
    mean, low, high = bootstrap_mean(x)
    half = 1.96 * x.std(ddof=1) / math.sqrt(500)
    assert mean == pytest.approx(x.mean())
    assert low == pytest.approx(mean - half, abs=0.05 * half) and high == pytest.approx(mean + half, abs=0.05 * half)
    assert bootstrap_mean(x) == (mean, low, high)  # no luck involved
    assert bootstrap_mean(x, level=0.5).high < high


def test_bootstrap_interval_of_few_values():
    assert bootstrap_mean([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert all(math.isnan(v) for v in bootstrap_mean([1.0])[1:])
    low, high = bootstrap_mean([0.0, 1.0])[1:]
    assert (low, high) == (0.0, 1.0)  # both draws equal in half of the cases
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean([1.0, math.inf])


def test_settings_of_one_image_are_not_independent():
    def rows(method, values):
        return [
            {"method": method, "source": "s", "set": "t", "image": image, "psnr": v}
            for image, of in values.items() for v in of
        ]  # fmt: skip

    a, b = rows("a", {"x": [1.0, 3.0], "y": [10.0, 10.0]}), rows("b", {"x": [0.0, 2.0], "y": [8.0, 8.0]})
    assert per_image(a, "psnr") == [2.0, 10.0]
    found = summarise(a)["psnr"]
    assert (found["mean"], found["low"], found["high"], found["count"]) == (6.0, 2.0, 10.0, 4)
    (line,) = table_of_tests({"a": a, "b": b}, "b", "psnr", "PSNR").rows
    assert line[1] == "2" and float(line[-1]) == 0.5  # two images of one sign: p = 2 / 2^2, not 2 / 2^4


def test_paired_differences():
    rng = np.random.default_rng(0)
    hard = rng.normal(25, 5, 12)  # images differ far more than methods
    t = paired(hard + 0.2 + 0.01 * rng.normal(size=12), hard)
    assert t.difference.low > 0.18 and t.better == 12
    assert t.p == pytest.approx(2 / 2**12)  # exact: all twelve of one sign
    assert math.isnan(paired(hard, hard).p)
    assert paired(hard + rng.normal(size=12), hard).p > 0.05


def test_ssim_and_ms_ssim_agree_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    x = torch.from_numpy(scene(192, 0)).permute(2, 0, 1)[None].double() / 255
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)).clamp(0, 1)
    _, theirs = image.structural_similarity_index_measure(y, x, data_range=1.0, return_full_image=True)
    inside = theirs[..., 5:-5, 5:-5].mean().item()  # they count mirrored borders too
    assert metrics.ssim(y, x) == pytest.approx(inside, abs=1e-9)
    assert metrics.ms_ssim(x, x) == pytest.approx(1) and 0.5 < metrics.ms_ssim(y, x) < 0.999
    assert not metrics.ms_ssim_fits((175, 500)) and metrics.ms_ssim_fits((176, 176))
    with pytest.raises(ValueError, match="176 pixels or more"):
        metrics.ms_ssim(x[..., :175], x[..., :175])
    small = x[..., :176, :176]
    assert metrics.ms_ssim(small, small) == pytest.approx(1)


def test_aligned_takes_out_what_align_found():
    x = scene(64, 0) / 255
    y = np.roll(x, (2, -1), axis=(0, 1)) * 0.8
    found = metrics.align(y, x, max_shift=4)
    assert found.shift == pytest.approx((2, -1), abs=1e-6) and found.gain == pytest.approx(1.25)
    np.testing.assert_allclose(metrics.aligned(y, found), x, atol=1e-6)


def test_counter_counts_and_costs():
    from fastem.models import EpsModel

    class Net(EpsModel):
        def __init__(self):
            super().__init__(3)
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1, bias=False)

        def forward(self, x_t, t):
            return self.conv(x_t)

    net = Net()
    counter = NetworkCounter(net)
    with torch.no_grad():
        net(torch.zeros(2, 3, 8, 8), 1.0)
    assert (counter.forwards, counter.vjps) == (2, 0)
    flops = 2 * 8 * 8 * 3 * 3 * 9
    assert network_flops(net, (3, 8, 8)) == (flops, flops)
    assert counter.gflop == pytest.approx(2 * flops / 1e9)
    x = torch.zeros(4, 3, 8, 8, requires_grad=True)
    torch.autograd.grad(net(x, 1.0), x, torch.ones(4, 3, 8, 8))
    assert (counter.forwards, counter.vjps) == (6, 4) and counter.gflop == pytest.approx(10 * flops / 1e9)
    counter.close()
    net(x, 1.0)
    assert counter.forwards == 6


def test_plugins(fastem, tiny, data, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def error(restored, truth, blurred):\n    return {'l1': abs(restored - truth).mean()}\n"
        "def count(restored, truth):\n\n"
        "    return {'files': len(list(restored.iterdir())), 'truths': len(list(truth.iterdir()))}\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    given = ("--data", data, "-o", "out", "--limit", 1, "--methods", "wiener", "--save-images")
    code, _, err = fastem("evaluate", tiny, *given, "--metric-plugin", "mine:error", "--set-plugin", "mine:count")
    assert code == 0, err
    with open(tmp_path / "out" / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(0 < float(row["error.l1"]) < 0.5 for row in rows)
    sets = json.loads((tmp_path / "out" / "sets.json").read_text())
    assert sets["mine:count"]["wiener"] == {"files": 8, "truths": 8}  # no kernels among them
    assert len(list((tmp_path / "out" / "kernels" / "wiener").iterdir())) == 8
    assert "error.l1" in (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "sets.json").unlink()
    assert fastem("evaluate", "--report-only", "-o", "out", "--set-plugin", "mine:count")[0] == 0
    assert json.loads((tmp_path / "out" / "sets.json").read_text()) == sets


def test_sets_are_measured_whole_or_not(fastem, tiny, data, tmp_path, monkeypatch):
    (tmp_path / "sets.py").write_text("def count(restored, truth):\n    return {}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    given = ("evaluate", tiny, "--data", data, "-o", "out", "--limit", 1, "--methods", "wiener")
    code, out, err = fastem(*given, "--set-plugin", "sets:count")
    assert code == 2 and not out and "--set-plugin measures every restored image; keep them with --save-images" in err
    assert fastem(*given)[0] == 0  # with one sheet
    code, _, err = fastem(*given, "--save-images", "--set-plugin", "sets:count")
    assert code == 2 and "out holds pictures of 1 of 8 restorations by 'wiener'" in err


@pytest.mark.parametrize("body, message", [("return 3", "AttributeError"), ("raise OSError('gone')", "OSError: gone")])
def test_metrics_that_fail_are_named(fastem, tiny, data, tmp_path, monkeypatch, body, message):
    name = f"failing_{len(body)}"
    (tmp_path / f"{name}.py").write_text(f"def f(*images):\n    {body}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    given = ("evaluate", tiny, "--data", data, "-o", "out", "--limit", 1, "--methods", "wiener")
    code, _, err = fastem(*given, "--metric-plugin", f"{name}:f")
    assert code == 2 and err.count("\n") == 1 and "E_OPTION: the metric 'f' fails: " in err and message in err


# -------------------------------------------------------------------------------------------------------- baselines


def problem(sigma=0.01, size=64, seed=0, circular=True, ksize=7, family="line") -> Problem:
    x, k = scene(size, seed).astype(np.float32) / 255, motion_kernel(ksize, 3, family)
    y = degrade(x, k, sigma, seed, boundary="circular" if circular else "valid")
    reach = ksize // 2
    x = x if circular else x[reach:-reach, reach:-reach]
    return Problem(y, (ksize, ksize), sigma, circular, k, np.ascontiguousarray(x), seed)


@pytest.mark.parametrize("name", ["wiener", "hyper-laplacian", "l0-map", "richardson-lucy"])
@pytest.mark.parametrize("circular", [True, False])
def test_baselines_sharpen(name, circular):
    p = problem(sigma=0.002, circular=circular)
    estimate = BASELINES[name](p)
    assert estimate.image.shape == p.y.shape and estimate.kernel.shape == (7, 7)
    assert estimate.kernel.min() >= 0 and estimate.kernel.sum() == pytest.approx(1, abs=1e-4)
    known = name in ("wiener", "hyper-laplacian")
    gain = metrics.psnr_aligned(estimate.image, p.x, max_shift=4) - metrics.psnr_aligned(p.y, p.x, max_shift=4)
    assert gain > (3 if known else 0)


def test_deep_prior_fits_its_observation():
    p = problem(size=32)
    few, many = (BASELINES["deep-prior"](p, num_iters=n, width=8) for n in (3, 40))
    residual = [metrics.chi2(p.y, e.image, e.kernel, p.sigma) for e in (few, many)]
    assert residual[1] < 0.5 * residual[0] and many.kernel.sum() == pytest.approx(1, abs=1e-4)


def test_kernel_of_a_known_image():
    p = problem(sigma=5 / 255, size=96, ksize=11, family="shake")
    found = {
        "simplex": BASELINES["kernel-simplex"](p), "l2": BASELINES["kernel-hqs"](p, prior="l2"),
    }  # fmt: skip
    error = {name: metrics.kernel_error(e.kernel, p.kernel) for name, e in found.items()}
    assert error["simplex"] < 0.03 and error["simplex"] < 0.5 * error["l2"]


def test_oracles_need_their_truth():
    p = Problem(problem().y, (7, 7), 0.01)
    for name, what in (("wiener", "true kernel"), ("kernel-simplex", "sharp image")):
        with pytest.raises(ValueError, match=what):
            BASELINES[name](p)
    with pytest.raises(ProtocolError, match="allowed are"):
        parse_protocol({"cases": [{"source": "photos"}], "methods": {"a": {"kind": "?"}}}, "p")
