"""The programs in benchmarks/: the cost model against what torch dispatches, and every script at a tiny size."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fastem import evaluation, ops, profiling
from fastem.evaluation.run import KEY, write_rows
from fastem.models import NaturalConfig, NaturalPrior, UNet, UNetConfig, load_kernel_denoiser

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def one_thread():
    """Scripts set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script(name: str):
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------ the cost model


def dispatched(make, height: int, width: int, *, vjp: bool, device: str = "meta") -> int:
    """FLOPs that torch counts for one image; on the meta device nothing is computed."""
    with torch.device(device):
        net = make().requires_grad_(False)
        x, t = torch.zeros(1, 3, height, width, requires_grad=vjp), torch.ones(1)
    with FlopCounterMode(display=False) as mode, torch.set_grad_enabled(vjp):
        y = net(x.clone(), t)
        if vjp:
            y.backward(torch.empty_like(y))
    return mode.get_total_flops()


def test_the_ffhq_network_costs_what_was_counted():
    cost = script("cost_model").unet(profiling.RANDOM["ffhq-random"], 256, 256)
    assert round(cost.forward / 1e9, 2) == 387.93
    assert round(cost.forward_and_vjp / 1e9, 2) == 776.26
    for vjp, flops in ((False, cost.forward), (True, cost.forward_and_vjp)):
        assert dispatched(lambda: UNet(profiling.RANDOM["ffhq-random"]), 256, 256, vjp=vjp) == flops


@pytest.mark.parametrize(
    "config",
    [
        profiling.RANDOM["small-random"],
        UNetConfig(widths=(32, 32, 64), base=32, num_blocks=2, attention_levels=(1, 2), num_head_channels=32),
        UNetConfig(widths=(32, 64), base=16, out_channels=3, scale_shift=False, resblock_updown=False, num_heads=2),
    ],
    ids=["small", "two blocks, attention twice", "plain convolutions change the resolution"],
)
def test_networks_of_any_configuration(config):
    cost = script("cost_model").unet(config, 32, 64)
    assert dispatched(lambda: UNet(config), 32, 64, vjp=False) == cost.forward
    if config.resblock_updown:
        assert dispatched(lambda: UNet(config), 32, 64, vjp=True) == cost.forward_and_vjp


@pytest.mark.parametrize(
    "config", [NaturalConfig(), NaturalConfig(widths=(8, 16), num_blocks=1)], ids=["bundled", "small"]
)
def test_the_natural_prior(config):
    cost = script("cost_model").natural(config, 64, 32)
    for vjp, flops in ((False, cost.forward), (True, cost.forward_and_vjp)):
        assert dispatched(lambda: NaturalPrior(config), 64, 32, vjp=vjp, device="cpu") == flops


@pytest.mark.parametrize("kernel", [9, 12])
def test_the_loop_of_the_m_step(kernel):
    chain = load_kernel_denoiser("kernel").as_chain()
    k, g = torch.rand(1, 1, kernel, kernel), torch.rand(1, 1, 2 * kernel - 1, 2 * kernel - 1)
    with ops.use_backend("reference"), FlopCounterMode(display=False) as mode, torch.no_grad():
        ops.hqs_chain(k, g, k, torch.tensor([0.01]), *chain, 3)
    assert mode.get_total_flops() == script("cost_model").mstep_chain(kernel, num_iters=3)
    assert round(script("cost_model").mstep_chain(33) / 1e9, 3) == 0.645


def test_a_wrong_configuration_is_noticed():
    config = UNetConfig(widths=(32, 64), base=32, num_head_channels=32)
    wrong = script("cost_model").unet(UNetConfig(widths=(32, 96), base=32, num_head_channels=32), 32, 32)
    assert dispatched(lambda: UNet(config), 32, 32, vjp=False) != wrong.forward


# ------------------------------------------------------------------------------------------------ every script once


def read(path: Path) -> dict:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"kind", "date", "device", "environment", "rows"} <= record.keys() and record["rows"]
    return record


def test_mstep_script(tmp_path, capsys):
    given = "--sizes 32 --kernels 9 --particles 2 --rounds 2 --recentre --json".split()
    script("bench_mstep").main([*given, str(tmp_path / "a.json")])
    (row,) = read(tmp_path / "a.json")["rows"]
    assert row["difference"] < 1e-5  # two ways to one kernel
    assert row["ratio"] == pytest.approx(row["median_ms"][row["base"]] / row["median_ms"][row["fast"]])
    assert "32   9   2" in capsys.readouterr().out


@pytest.mark.parametrize("net", ["natural", "small-random"])
def test_unet_script(tmp_path, net):
    given = f"--net {net} --size 16 --threads 1 --rounds 1 --cpu-time --json".split()
    script("bench_unet").main([*given, str(tmp_path / "a.json")])
    assert [row["task"] for row in read(tmp_path / "a.json")["rows"]] == ["forward", "forward + VJP"]


def test_step_script(tmp_path):
    given = "--size 32 --kernel 7 --particles 1 --threads 1 --rounds 1 --cpu-time --json".split()
    script("bench_step").main([*given, str(tmp_path / "a.json")])
    assert read(tmp_path / "a.json")["rows"][0]["guidance"] == "mean"


def test_scaling_script(tmp_path, capsys):
    given = "--batch 1 2 --particles 1 --sizes 16 --kernels 7 9 --steps 1 --device cpu --json".split()
    script("scaling").main([*given, str(tmp_path / "a.json")])
    record = read(tmp_path / "a.json")
    assert [(r["batch"], r["size"], r["kernel_size"]) for r in record["rows"]] == [(1, 16, 7), (2, 16, 7), (1, 16, 9)]
    assert record["law"].keys() == {"t0", "t_net", "t_mstep", "largest_error"}


def test_the_law_is_found():
    model = script("cost_model")
    rows = [
        {"batch": b, "particles": n, "size": h, "kernel_size": k,
         "step_ms": 2 + b * n * (h / 256) ** 2 * 7 + b * model.mstep_chain(k) / model.mstep_chain(33) * 3}
        for b, n, h, k in script("scaling").cases([1, 4], [1, 16], [128, 256, 512], [17, 33, 64])
    ]  # fmt: skip
    law = script("scaling").fit(rows)
    assert [law[name] for name in ("t0", "t_net", "t_mstep")] == pytest.approx([2, 7, 3])
    assert law["largest_error"] < 1e-9


def test_cost_model_script(capsys):
    script("cost_model").main(["--size", "256"])
    assert "387.934 GFLOP forward" in capsys.readouterr().out


def test_harness_pairs_the_calls():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    ticks = iter(range(100))
    times = script("harness").alternate(calls, 2, lambda: next(ticks))
    assert order == ["a", "b"] * 3 and times == {"a": [1, 1], "b": [1, 1]}
    summary = script("harness").summary({"a": [4.0, 6.0, 5.0], "b": [2.0, 2.0, 2.0]}, "a", "b")
    assert summary["ratio"] == 2.5 and summary["ratio_quartiles"] == [2.0, 3.0]


# ------------------------------------------------------------------------------------------------ the released program

CHECKOUT = {  # a stand-in with the names of the released program, made of fastem
    "guided_diffusion/__init__.py": "",
    "guided_diffusion/unet.py": """
from fastem.models import UNet
from fastem.profiling import RANDOM
def create_model(image_size, num_channels, num_res_blocks, channel_mult="", model_path="", **kwargs):
    return UNet(RANDOM["small-random"])
""",
    "guided_diffusion/agem.py": """
import torch
import motionblur
from fastem import ops
from fastem.mstep import mstep
def HQS_ker(y, x, sigma, init_ker, denoiser=None, reg="pnp", beta=1e5, lamb=1.0, n_iter=100, ksize=33):
    assert n_iter == 10 and ksize == 33 and reg == "pnp"
    def prior(k, beta):
        level = torch.full_like(k, (lamb / beta) ** 0.5)
        return denoiser(torch.cat([k, level], dim=1))
    return mstep(y, x[None], init_ker, sigma=sigma, prior=prior, num_iters=n_iter, compat="released")
def kernel_shift(kernel, sf):
    assert sf == 1 and kernel.ndim == 2
    return ops.recentre(torch.from_numpy(kernel)[None, None])[0, 0].numpy()
""",
    "guided_diffusion/gaussian_diffusion.py": """
import torch
from guided_diffusion.agem import HQS_ker
def create_sampler(sampler, steps, timestep_respacing=""):
    if sampler != "ddpm":
        raise NameError(sampler)
    return Sampler(int(timestep_respacing))
class Sampler:
    def __init__(self, steps):
        self.steps = steps
    def fastem_pigdm(self, model, x_start, y, sigma, ksize=33):
        for t in range(self.steps):
            model(x_start.detach(), torch.full((len(x_start),), float(t)))
""",
}


def make_checkout(root: Path, **changes: str) -> Path:
    for name, text in CHECKOUT.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
    return root


TINY = "--device cpu --net small-random --size 40 --particles 2 --rounds 1 --steps 2 --parts".split()


def test_reference_script(tmp_path, capsys):
    modules, here = set(sys.modules), os.getcwd()
    checkout, result = make_checkout(tmp_path / "checkout"), str(tmp_path / "a.json")
    assert script("compare_reference").main([str(checkout), *TINY, "unet", "mstep", "run", "--json", result]) == 0
    rows = read(tmp_path / "a.json")["rows"]
    assert [row["part"] for row in rows] == ["unet", "unet", "mstep", "run"]
    assert all(row["difference"] < 1e-4 for row in rows if "difference" in row)
    assert all(row["base"] == "released" and row["ratio"] > 0 for row in rows)
    assert "tf32_convolutions" in capsys.readouterr().out
    assert not [m for m in set(sys.modules) - modules if m.startswith(("guided_diffusion", "motionblur"))]
    assert os.getcwd() == here


@pytest.mark.parametrize(
    "changes, told",
    [
        (None, "no folder"),
        ({"HQS_ker": "hqs"}, "does not define HQS_ker"),
        ({"n_iter=100": "n_iter=100, *, mystery"}, "parameter 'mystery' that is not known here"),
        ({"import motionblur": "import guided_missing"}, "does not import: No module named 'guided_missing'"),
    ],
    ids=["missing", "other names", "other parameters", "dependency"],
)
def test_another_checkout_is_refused(tmp_path, capsys, changes, told):
    path = tmp_path / "checkout"
    if changes is not None:
        make_checkout(path, **changes)
    assert script("compare_reference").main([str(path), *TINY, "mstep"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("compare_reference: ") and told in err and err.count("\n") == 1


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert script("compare_reference").main([str(tmp_path)]) == 2
    assert "no checkout of FastDiffusionEM: it has no folder guided_diffusion" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ groups and the report


def test_groups_and_report(tmp_path):
    """Every group once at the smallest size, and the table from its JSON."""
    result = tmp_path / "results" / "cpu-groups.json"
    result.parent.mkdir()
    words = f"-m pytest {BENCHMARKS} -q -p no:cacheprovider --benchmark-only --scale ci --device cpu --benchmark-json"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words.split(), str(result)], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:]
    record = json.loads(result.read_text())
    assert {b["group"] for b in record["benchmarks"]} == {
        "zupdate", "mstep", "guidance", "update", "groupnorm_silu", "resblock", "unet", "step", "e2e"
    }  # fmt: skip
    assert all(b["extra_info"]["floor_us"] > 0 for b in record["benchmarks"])
    assert record["machine_info"] == record["commit_info"] == {}  # no names of hosts
    report = script("report")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    given = ["--results", str(result.parent), "--readme", str(readme)]
    assert report.main([*given, "--check"]) == 1
    assert report.main(given) == 0 and report.main([*given, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| guidance kernel")]
    cpu, gpu = row.split("|")[3:5]
    assert cpu.strip().endswith("%") and gpu.strip() == ""  # no file holds a figure of a GPU


def summary(part: str, ratio: float, **facts) -> dict:
    return {"part": part, "ratio": ratio, "ratio_quartiles": [ratio, ratio], "rounds": 1,
            "median_ms": {"released": 4000.0, "fastem": 4000.0 / ratio}, **facts}  # fmt: skip


def test_cells_of_a_gpu():
    """Figures that were made up, to see that each finds its way into its cell."""
    report = script("report")
    groups = [
        {"group": "unet", "net": "ffhq-random", "task": "forward + VJP", "engine": "fastem", "B": 1, "flops": 776e9,
         "seconds": 4e-3},
        {"group": "step", "net": "ffhq-random", "dtype": "float16", "n": 1, "engine": "fastem", "seconds": 2.0},
        {"group": "step", "net": "ffhq-random", "dtype": "float16", "n": 1, "engine": "compiled", "seconds": 3.0},
        {"group": "guidance", "backend": "native", "floor_us": 6.0, "seconds": 8e-6},
    ]  # fmt: skip
    scaling = {"net": "ffhq-random", "guidance": "pigdm", "rows": [{"batch": 16, "size": 256, "wall_ms": 40.0}]}
    released = [summary("run", 8.0, particles=1, steps=100), summary("mstep", 20.0, particles=16)]
    profile = {"syncs_per_step": 0.0, "gpu_idle_percent": 1.25}
    kinds = {"groups": {"rows": groups}, "scaling": scaling, "reference": {"rows": released}}
    kinds["profile"] = {"rows": [profile]}
    results = report.Results([{"kind": kind, "device": "cuda", **record} for kind, record in kinds.items()])
    assert report.released_ratio(1)(results) == "8x" and report.released_ratio(4)(results) == ""
    assert report.mstep_ratio(16)(results) == "20x"
    assert report.throughput(results) == "4.00 images/s (B = 16), 16.0x"
    assert report.sustained(1)(results) == "194 TFLOP/s" and report.sustained(16)(results) == ""
    assert report.against_compiled(results) == "1.50x (n = 1)"
    assert report.of_roofline("guidance")(results) == "75 %"
    assert report.waits(results) == "0 waits, 1.2 % idle"


def test_the_committed_table_is_that_of_the_committed_files():
    assert script("report").main(["--check"]) == 0, "run python benchmarks/report.py"


# --------------------------------------------------------------------------------------------------- wanted and reached


def row(method: str, image="a", sigma="5", boundary="circular", source="synthetic", **facts) -> dict:
    case = {"source": source, "set": "sharp", "image": image, "family": "shake", "kernel": "k", "sigma": sigma,
            "boundary": boundary, "seed": "0"}  # fmt: skip
    return {"method": method, **case, "observation": "-".join(case.values()), **facts}


def psnr(of: dict[str, float], **where) -> list[dict]:
    return [row(method, psnr_aligned=value, **where) for method, value in of.items()]


RELEASED = "Fast EM, released"
OF_FIG1 = "released, 100 steps"
WORK = {"fastem": 10.0, "6 steps": 10.0, RELEASED: 100.0, OF_FIG1: 100.0}
MEASURED = [  # what, the rows of each protocol, what is found, whether it holds
    ("gain of blind",
     {"public": [row("fastem", gain=3.5), row("fastem", "b", gain=4.5), row("fastem", sigma="20", gain=0)]},
     "+4.00 [+3.50, +4.50] dB (2 images, 2 cases)", "yes"),
    ("gain of blind", {"public": [row("fastem", gain=2.0), row("fastem", sigma="10", gain=3.0)]},
     "+2.50 dB (1 image, 2 cases)", "no"),
    ("gain of blind", {"public": [row("fastem", gain=4.0), row("fastem", sigma="10", error="it broke")]},
     "+4.00 dB (1 image, 1 case, and 1 error)", "yes"),
    ("median correlation", {"public": [row("fastem", str(c), kernel_correlation=c) for c in (0.1, 0.8, 0.9)]},
     "0.800 (3 cases)", "yes"),
    ("relative error of the kernel, sharp image known, sigma 10",
     {"fig4": [row("simplex", sigma="5", kernel_error=0.9), row("simplex", sigma="10", kernel_error=0.04),
               row("pnp, released", sigma="10", kernel_error=0.06)]},
     "0.0400 (1 image, 1 case); pnp, released: 0.0600 (1 image, 1 case)", "yes"),
    ("fastem minus Fast EM",  # the case that table1 and fig5 share counts once, one without an opponent not at all
     {"table1": psnr({"fastem": 25.0, RELEASED: 23.5}) + psnr({"fastem": 9.0}, image="b"),
      "fig5": psnr({"fastem": 25.0, RELEASED: 23.5})},
     "+1.50 dB (1 image, 1 case)", "yes"),
    ("cases in which fastem",
     {"table1": psnr({"fastem": 25.0, RELEASED: 23.5}) + psnr({"fastem": 22.0, RELEASED: 23.5}, image="b")},
     "50.0 % (1 of 2 cases)", "no"),
    ("cases in which fastem", {"table1": [row("fastem", error="it broke"), row(RELEASED, psnr_aligned=3.0)]},
     "0.0 % (0 of 1 case)", "no"),
    ("recorded kernels alone: fastem with the true",
     {"recorded": psnr({"fastem": 25.0, "fastem, true kernel": 26.5})}, "+1.50 dB (1 image, 1 case)", ""),
    ("PiGDM", {"table1": psnr({"fastem": 25.0, "PiGDM, true kernel": 26.5})}, "+1.50 dB (1 image, 1 case)", "no"),
    ("work over", {"fig1": [r | {"gflop": WORK[r["method"]]} for r in psnr({"6 steps": 25.0, OF_FIG1: 24.0})]},
     "0.100 (10 / 100 GFLOP); PSNR +1.00 dB (1 image, 1 case)", "yes"),
    ("work over", {"fig1": [r | {"gflop": WORK[r["method"]]} for r in psnr({"6 steps": 23.0, OF_FIG1: 24.0})]},
     "0.100 (10 / 100 GFLOP); PSNR -1.00 dB (1 image, 1 case)", "no"),
    ("the same of the default", {"fig5": [r | {"gflop": WORK[r["method"]]} for r in
                                          psnr({"fastem": 25.0, RELEASED: 24.0})]},
     "0.100 (10 / 100 GFLOP); PSNR +1.00 dB (1 image, 1 case)", ""),
    ("the same of the preset turbo",  # on what robust and table1 share
     {"robust": [row("fastem, turbo", psnr_aligned=25.0, gflop=25.0), row("fastem, turbo", "b", gflop=9.0)],
      "table1": [row(RELEASED, psnr_aligned=24.0, gflop=100.0)]},
     "0.250 (25 / 100 GFLOP); PSNR +1.00 dB (1 image, 1 case)", ""),
    ("cases worse",
     {"public": [row("fastem", gain=1.0), row("fastem", "b", error="it broke"), row("fastem", sigma="20", gain=-1)]},
     "50.0 % (1 of 2 cases); sigma 20: 100.0 % (1 of 1 case)", "no"),
    ("no blur: fastem",
     {"noblur": psnr({"fastem": 30.0, "denoising": 30.4}) + psnr({"fastem": 29.0, "denoising": 30.0}, image="b")},
     "-1.00 dB (b, sigma 5); 1 of 2 cases hold", "no"),
    ("no blur: fastem",
     {"noblur": [row("fastem", "b", error="it broke"), *psnr({"fastem": 30.0, "denoising": 30.4})]},
     "an error (b, sigma 5); 1 of 2 cases hold", "no"),
    ("no blur: kernels", {"noblur": [row("fastem", kernel_correlation=1.0), row("denoising", kernel_correlation=0.5)]},
     "100.0 % (1 of 1 case)", "yes"),
    ("gain, circular minus valid, sigma 10",  # the case that has both
     {"public": [row("fastem", sigma="10", gain=4.0), row("fastem", "b", "10", "valid", gain=3.75),
                   row("fastem", "b", "10", gain=4.5)]},
     "+0.75 dB (1 image, 1 case)", "no"),
    ("noise not known", {"robust": psnr({"fastem": 25.0, "fastem, sigma unknown": 24.5})},
     "-0.50 dB (1 image, 1 case)", "no"),
    ("size of the kernel", {"robust": psnr({"fastem": 25.0, "fastem, kernel size auto": 24.75})},
     "-0.25 dB (1 image, 1 case)", "yes"),
    ("varying", {"robust": psnr({"fastem": 25.0, "fastem, varying": 24.5})}, "0.500 dB at most (1 case)", "no"),
    ("gain, Lai et al., mode sample",
     {"pairs": [row("fastem", gain=1.0, source="lai_pairs"), row("fastem, sample", gain=2.0, source="lai_pairs"),
                row("fastem, sample", gain=3.0, source="gopro_pairs")]},
     "+2.00 dB (1 image, 1 case)", ""),
    ("preset turbo", {"robust": psnr({"fastem": 25.0, "fastem, turbo": 24.5})}, "-0.50 dB (1 image, 1 case)", ""),
    ("mode sample", {"robust": psnr({"fastem": 25.0, "fastem, sample": 24.5})}, "-0.50 dB (1 image, 1 case)", ""),
]  # fmt: skip


@pytest.mark.parametrize("what, rows, reached, holds", MEASURED, ids=[what for what, *_ in MEASURED])
def test_a_wanted_figure_is_found(what, rows, reached, holds):
    _, table, _ = script("results").wanted_and_reached(rows)
    (line,) = [line for line in table.rows if line[0].startswith(what)]
    assert (line[2], line[4]) == (reached, holds)


def test_a_wanted_figure_names_the_protocols_it_is_of():
    public = psnr({"fastem": 25.0, "l0 MAP": 20.0})
    table1, fig5 = (psnr({"fastem": 25.0, RELEASED: 23.5}, image=image) for image in "ab")

    def named(**rows) -> str:
        _, table, _ = script("results").wanted_and_reached(rows)
        (line,) = [line for line in table.rows if line[0].startswith("fastem minus Fast EM")]
        return line[3]

    assert named(table1=table1, fig5=fig5, public=public) == "table1, fig5"
    assert named(table1=table1, public=public) == "table1"
    assert named(table1=table1, fig5=table1) == "table1, fig5, public"  # either would do
    turbo = [row("fastem, turbo", psnr_aligned=25.0, gflop=25.0)]
    found = script("results").Wanted("", "", "robust table1", lambda rows: script("results").share(len(rows), 1))
    assert found.line({"robust": turbo, "table1": table1})[3] == "robust, table1"


def test_what_was_not_run_was_not_measured():
    _, table, _ = script("results").wanted_and_reached({})
    assert len({line[0] for line in table.rows}) == len(table.rows)
    assert {(line[2], line[4]) for line in table.rows} == {("", "not measured")}
    known = set(evaluation.names())
    assert {name for line in table.rows for name in line[3].split(", ")} <= known


def test_different_observations_are_not_compared():
    rows = [row("fastem", psnr_aligned=25.0), row(RELEASED, psnr_aligned=23.5, observation="another")]
    with pytest.raises(ValueError, match="different observations"):
        script("results").wanted_and_reached({"table1": rows})


@pytest.fixture
def pictures(tmp_path) -> Path:
    for folder in ("sharp", "faces"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / folder / f"{folder}{i}.png")
    return tmp_path / "data"


def evaluated(folder: Path, data: Path, limit: int | None = None, shard=(1, 1), methods=None, drop: int = 0) -> Path:
    """A folder as `fastem evaluate fig5` leaves it, with rows of nothing."""
    protocol = evaluation.load_protocol("fig5")
    run = {"protocol": protocol.to_dict(), "configs": dict.fromkeys(methods or protocol.methods, {}), "program": "0",
           "plugins": [], "machine": {"cpu": "", "gpu": "", "fastem": "", "torch": "", "threads": 1}}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    cases = evaluation.list_cases(protocol, data, limit)[shard[0] - 1 :: shard[1]]
    name = "rows.csv" if shard == (1, 1) else f"rows.{shard[0]}of{shard[1]}.csv"
    facts = {"observation": "0", "psnr_aligned": 20.0}
    rows = [{"method": m, **dict(zip(KEY, c.key, strict=True)), **facts} for c in cases[drop:] for m in run["configs"]]
    write_rows(folder / name, rows)
    return folder


def test_the_command_is_that_of_the_run(tmp_path, pictures):
    command, typed = script("results").command, "`fastem evaluate fig5 --data folder -o results/fig5"
    everything = "10 images (5 of faces, 5 of sharp)."
    assert command(evaluated(tmp_path / "a", pictures), pictures) == f"{typed}`: {everything}"
    limited = evaluated(tmp_path / "b", pictures, limit=2)
    assert command(limited, pictures) == f"{typed} --limit 2`: 4 images (faces0, faces2, sharp0, sharp2)."
    methods = ["fastem", "fastem, true kernel"]
    shard = evaluated(tmp_path / "c", pictures, shard=(1, 3), methods=methods)
    wanted = f'{typed} --methods "fastem,fastem, true kernel" --shard 1/3`'
    assert command(shard, pictures).startswith(f"{wanted}: 7 images (")
    evaluated(shard, pictures, shard=(3, 3), methods=methods)
    assert command(shard, pictures).startswith(f"{wanted}, {wanted.replace('1/3', '3/3')}: 10 images")
    evaluated(shard, pictures, shard=(2, 3), methods=methods)
    assert "--shard" not in command(shard, pictures)  # all of them
    for parts in (((1, 2), (2, 4), (4, 4)), ((1, 1), (1, 2))):
        for part in parts:
            evaluated(folder := tmp_path / f"of{len(parts)}", pictures, shard=part, methods=methods)
        assert "--shard" not in command(folder, pictures)
    ended = evaluated(tmp_path / "d", pictures, drop=1)
    assert command(ended, pictures) == f"{typed}`: {everything} The run is not finished, or its pictures changed since."


def test_pictures_that_may_not_be_passed_on_stay_where_they_are(tmp_path, pictures):
    folder = evaluated(tmp_path / "a", pictures)
    (folder / "pictures" / "input").mkdir(parents=True)

    def section(most: int = 2) -> tuple[int, bool]:
        blocks = script("results").section(folder, pictures, tmp_path, most)
        return sum("sheets" not in b.path for b in blocks if hasattr(b, "caption")), "passed on" in str(blocks[-1])

    assert section() == (0, False)  # there are none
    for name in ("synthetic-sharp-other.png", "synthetic-sharp-kodak24-a.png", "synthetic-sharp-kodak24-b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "pictures" / "input" / name)
        found = section()
        assert found == ((0, True) if "other" in name else (int("-b" in name) + 1, False))
    assert section(1) == (1, False)
    assert [file.name for file in sorted(tmp_path.glob("results_*"))] == [
        "results_fig5_synthetic-sharp-kodak24-a.png", "results_fig5_synthetic-sharp-kodak24-b.png",
    ]  # fmt: skip


def test_results_begin_with_what_is_wanted_and_keep_the_main_tables(tmp_path, pictures):
    folder, out = evaluated(tmp_path / "a", pictures), tmp_path / "docs" / "results.md"
    script("results").main([str(folder), "--data", str(pictures), "-o", str(out)])
    headings = [line for line in out.read_text().splitlines() if line.startswith("#")]
    assert headings == [
        "# Results", "## Wanted and reached", "## Out of distribution (Fig. 5 of Fast Diffusion EM)", "### All cases",
        "### Images of faces", "### Images of sharp", "## How to read this",
    ]  # fmt: skip
    assert (
        "| fastem minus Fast EM, released | >= 1 dB | +0.00 [+0.00, +0.00] dB (10 images, 20 cases) |"
        in out.read_text()
    )
