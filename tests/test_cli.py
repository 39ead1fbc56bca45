"""The command line as a script sees it: exit codes, one line per failure, no tracebacks, files where they belong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastem import io
from fastem.cli.deblur import parse_sigma
from fastem.cli.main import run


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> Path:
    """The smallest network that the real engine takes; what it has learnt is nothing."""
    from fastem.models import NaturalConfig, NaturalPrior, save_natural

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("prior") / "small.safetensors"
    save_natural(path, NaturalPrior(NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8)), r2=None, card={})
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 5, 3), np.uint8))
    pixels = np.asarray(coarse.resize((40, 48), Image.Resampling.BICUBIC)) + rng.normal(0, 5, (48, 40, 3))
    path = tmp_path / "photos" / "photo.png"
    path.parent.mkdir()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def fastem(capsys, monkeypatch, tmp_path):
    """Runs the program in this process: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err or "--debug" in arguments
        return int(code), out, err

    return call


QUICK = ("--kernel-size", 7, "--steps", 2)


# -------------------------------------------------------------------------------------------------------- what is done


def test_deblur_writes_what_it_promises(fastem, photo, prior, tmp_path):
    given = ("--prior", prior, *QUICK, "--sigma", 5, "--seed", 3)
    code, out, err = fastem("deblur", photo, "-o", tmp_path / "out", *given)
    assert code == 0, err
    assert out.startswith(f"{photo} -> {tmp_path / 'out' / 'photo.png'} + photo.kernel.npy photo.kernel.png photo.json")
    assert sorted(os.listdir(tmp_path / "out")) == ["photo.json", "photo.kernel.npy", "photo.kernel.png", "photo.png"]
    kernel = np.load(tmp_path / "out" / "photo.kernel.npy")
    assert kernel.shape == (7, 7) and kernel.min() >= 0 and kernel.sum() == pytest.approx(1, abs=1e-5)
    assert io.read_image(tmp_path / "out" / "photo.png").pixels.shape == (48, 40, 3)
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert record["sigma"] == 5.0 and record["seed"] == 3 and record["config"]["steps"] == 2
    assert record["config"]["prior_sha256"] == io.hashlib.sha256(prior.read_bytes()).hexdigest()


def test_deblur_gray_16_bit_with_alpha_and_all_outputs(fastem, prior, tmp_path):
    values = np.random.default_rng(0).integers(20_000, 40_000, (21, 33, 2), dtype=np.uint16)
    io.write_image(tmp_path / "a.png", io.Picture(values[..., 0], values[..., 1], icc=b"profile"))
    given = ("--prior", prior, *QUICK, "--mode", "sample", "--particles", 2)
    save = ("--save", "image,kernel,mean,std,sheet,json")
    code, _, err = fastem("deblur", tmp_path / "a.png", "-o", "out", *given, *save)
    assert code == 0, err
    result = io.read_image(tmp_path / "out" / "a.png")
    assert (result.pixels.shape, result.pixels.dtype, result.icc) == ((21, 33), np.uint16, b"profile")
    np.testing.assert_array_equal(result.alpha, values[..., 1])
    names = ["json", "kernel.npy", "kernel.png", "mean.png", "png", "sheet.png", "std.png"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a." + name for name in names]


def test_same_seed_same_bits(fastem, photo, prior, tmp_path):
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert fastem("deblur", photo, "-o", out, "--prior", prior, *QUICK, "--seed", seed)[0] == 0
    one, two, three = ((tmp_path / out / "photo.png").read_bytes() for out in ("one", "two", "three"))
    assert one == two and one != three


def test_known_kernel(fastem, photo, prior, tmp_path):
    kernel = np.zeros((5, 5), np.float32)
    kernel[2] = 0.4  # sums to 2
    np.save(tmp_path / "k.npy", kernel)
    code, _, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, "--kernel", "k.npy")
    assert code == 0 and "W_KERNEL_SUM: k.npy: the kernel summed to 2" in err
    np.testing.assert_allclose(np.load(tmp_path / "out" / "photo.kernel.npy"), kernel / 2, atol=1e-6)


def test_a_blur_that_varies(fastem, photo, prior, tmp_path, monkeypatch):
    """The grid is written and recorded where it was kept; --varying is not advised to one who gave it."""
    monkeypatch.setattr("fastem.photo.blur_varies", lambda residual: True)

    def varied(*options) -> tuple[dict, str]:
        given = ("--prior", prior, *QUICK, "--no-guard", *options)
        code, _, err = fastem("deblur", photo, "-o", "out", *given)
        assert code == 0, err
        (warning,) = (line for line in err.splitlines() if "W_VARYING" in line)
        return json.loads((tmp_path / "out" / "photo.json").read_text()), warning

    assert varied("--gamma", "2.2")[1].endswith("do not trust it")  # it has no --varying
    record, warning = varied()
    assert (record["varying"], record["kernel_grid"]) == (False, None) and warning.endswith(": --varying")
    record, warning = varied("--varying")
    assert record["varying"] and "photo.kernels.npy" in str(record["outputs"]) and warning.endswith("do not trust it")
    kernels = np.load(tmp_path / "out" / "photo.kernels.npy")
    assert list(kernels.shape) == [*record["kernel_grid"], 7, 7] and (tmp_path / "out" / "photo.kernels.png").exists()
    assert not varied()[0]["varying"]
    assert not list((tmp_path / "out").glob("*.kernels.*"))


def test_the_m_step_of_the_paper(fastem, photo, prior, tmp_path):
    code, _, _ = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, "--m-step", "hqs", "--r2-term")
    config = json.loads((tmp_path / "out" / "photo.json").read_text())["config"]
    assert code == 0 and config["m_step"] == "hqs" and config["r2_term"] is True


def test_one_bad_picture_does_not_stop_the_others(fastem, photo, prior, tmp_path):
    (photo.parent / "broken.png").write_bytes(photo.read_bytes()[:300])
    (photo.parent / "new\nline.png").write_bytes(b"")
    code, out, err = fastem("deblur", photo.parent, "-o", "out", "--prior", prior, *QUICK)
    assert code == 1
    lines = err.splitlines()
    assert lines[0].startswith(f"fastem: E_TRUNCATED: {photo.parent}/broken.png: the PNG ends inside a chunk")
    assert lines[1].startswith(f"fastem: E_UNREADABLE: {photo.parent}/new\\nline.png: the file is empty")
    assert lines[-1] == "fastem: 1 done, 2 failed, of 3" and len(out.splitlines()) == 1
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "out")} == {"photo"}


def test_constant_picture(fastem, prior, tmp_path):
    Image.new("RGB", (24, 20), (7, 7, 7)).save(tmp_path / "flat.png")
    code, _, err = fastem("deblur", "flat.png", "-o", "out", "--prior", prior, *QUICK)
    assert code == 0 and "W_NO_INFORMATION" in err
    np.testing.assert_array_equal(io.read_image(tmp_path / "out" / "flat.png").pixels, np.full((20, 24, 3), 7))
    assert np.load(tmp_path / "out" / "flat.kernel.npy")[3, 3] == 1


def test_json_progress(fastem, photo, prior):
    code, out, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, "--progress", "json")
    assert code == 0
    steps = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert [(step["done"], step["item"]) for step in steps] == [(i + 1, "photo.png") for i in range(len(steps))]
    totals = [step["total"] for step in steps]  # three rounds for the kernel, then the restoration; or more
    assert totals == sorted(totals) and totals[0] == 3 * 2 + 2 and totals[-1] == len(steps)
    (result,) = map(json.loads, out.splitlines())
    assert result["status"] == "done" and result["outputs"][".png"] == "out/photo.png"


def test_degrade_then_deblur(fastem, photo, prior, tmp_path):
    code, out, _ = fastem("degrade", photo, "-o", "blurred", "--kernel-size", 9, "--sigma", 3, "--bits", 16)
    assert code == 0 and "photo.kernel.npy" in out
    record = json.loads((tmp_path / "blurred" / "photo.json").read_text())
    assert record["sigma"] == 3.0 and record["kernel_size"] == [9, 9] and record["kernel_family"] == "shake"
    assert np.load(tmp_path / "blurred" / "photo.kernel.npy").sum() == pytest.approx(1, abs=1e-6)
    assert io.read_image(tmp_path / "blurred" / "photo.png").pixels.dtype == np.uint16
    assert fastem("deblur", "blurred/photo.png", "-o", "out", "--prior", prior, *QUICK)[0] == 0


def test_doctor_and_models(fastem):
    code, out, _ = fastem("doctor")
    assert code == 0 and "native extension" in out
    assert "torch" in json.loads(fastem("doctor", "--json")[1])["software"]
    code, out, _ = fastem("models", "--json")
    assert code == 0 and {"name", "sha256", "parameters"} <= set(json.loads(out)[0])


def test_train_kernel_denoiser_gives_loadable_weights(fastem, tmp_path, monkeypatch):
    """The wiring only: the training itself is replaced by one that reports a step and writes nothing."""
    import fastem.training as training

    seen = {}

    def fake(out, config, device, init, clean_share, mstep_share, report, stop):
        seen.update(out=out, config=config, device=device, init=init, stop=stop())
        report({"step": 1, "loss": 0.5, "samples_per_s": 10.0, "minutes": 0.1})

    monkeypatch.setattr(training, "train_kernel_denoiser", fake)
    options = ("--minutes", 6, "--seed", 4, "--init", "kernel", "--progress", "json")
    code, out, err = fastem("train", "kernel-denoiser", "-o", "run", *options)
    assert code == 0 and out.strip() == "run/kernel.safetensors" and '"total": 6.0' in err
    assert (seen["config"].minutes, seen["config"].seed, seen["stop"], seen["init"]) == (6.0, 4, False, "kernel")
    assert seen["config"].cooldown == pytest.approx(2.5)  # the recipe's share, 5 of 12


@pytest.mark.parametrize("prior, size", [("kernel-prior", "--kernel-size"), ("tilt-prior", "--size")])
def test_train_a_diffusion_prior(fastem, monkeypatch, prior, size):
    """The wiring only."""
    import fastem.training as training

    seen = {}

    def fake_task(size, width, examples, device):
        assert (examples, device) == (7, "cpu")
        return SimpleNamespace(name=prior, size=size, width=width)

    def fake(out, task, config, device, init, num_samples, report, stop):
        seen.update(size=task.size, width=task.width, config=config, samples=num_samples, init=init)

    monkeypatch.setattr(training, prior.replace("-prior", "_task"), fake_task)
    monkeypatch.setattr(training, "train_diffusion_prior", fake)
    options = (size, 33, "--width", 64, "--batch-size", 5, "--minutes", 5, "--samples", 4, "--examples", 7)
    code, out, _ = fastem("train", prior, "-o", "run", "--device", "cpu", *options)
    assert code == 0 and out.strip() == f"run/{prior}.safetensors"
    assert (seen["size"], seen["width"], seen["samples"], seen["init"]) == (33, 64, 4, None)
    assert (seen["config"].minutes, seen["config"].batch_size) == (5.0, 5)
    code, _, err = fastem("train", prior, "--width", 48)
    assert code == 2 and "--width is a multiple of 32, got 48" in err


def test_interrupted_training_says_how_to_go_on(fastem, tmp_path, monkeypatch):
    import fastem.training as training

    def fake(out, config, device, init, clean_share, mstep_share, report, stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()

    monkeypatch.setattr(training, "train_kernel_denoiser", fake)
    before = signal.getsignal(signal.SIGINT)  # in the background a shell has interrupts ignored
    code, _, err = fastem("train", "kernel-denoiser", "-o", "run", "--minutes", 6, "--device", "cpu")
    assert code == 130 and "goes on from here" in err
    assert signal.getsignal(signal.SIGINT) is before


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sgima", 5], "No such option: --sgima. Did you mean --sigma?"),
        (["--stesp", 5], "Did you mean --steps?"),
        (["--sigma", 0.02], "0.02 looks like [0, 1] units: did you mean 5.1?"),
        (["--sigma", 160], "160 would drown the picture"),
        (["--sigma", "nan"], "--sigma is auto or a noise std of 0..255 grey levels, got 'nan'"),
        (["--sigma", "inf"], "got 'inf'"),
        (["--sigma", -5], "got '-5'"),
        (["--sigma", 300, "--force"], "got '300'"),
        (["--sigma", "five"], "got 'five'"),
        (["--steps", 0], "--steps"),
        (["--steps", 1.5], "--steps"),
        (["--seed", -1], "--seed"),
        (["--kernel-size", 0], "--kernel-size"),
        (["--method", "magic"], "allowed are fast-em"),
        (["--kernel-size", "big"], "--kernel-size is auto or 1..513 whole pixels, got 'big'"),
        (["--gamma", "0.4"], "--gamma is auto or 1..4, got '0.4'"),
        (["--saturation", "nan"], "--saturation is off or 1..255, got 'nan'"),
        (["--gamma", "2.2", "--m-step", "hqs"], "need method 'fast-em'"),
        (["--m-step", "magic"], "allowed are edges, hqs"),
        (["--r2-term"], "r2_term belongs to the M-step 'hqs'"),
        (["--guidance", "magic"], "allowed are mean, pigdm, dps"),
        (["--compat", "magic"], "allowed are paper, released"),
        (["--device", "tpu"], "tpu"),
        (["--method", "known"], "--kernel FILE"),
        (["--save", "image,colour"], "cannot save colour. Allowed are image"),
        (["--save", ","], "nothing to save"),
        (["--save", "std", "--particles", 2], "--save std is the spread of samples: it needs --mode sample"),
        (["--save", "image,std", "--mode", "sample"], "and --particles 2 or more"),
        (["--name-by", "colour"], "--name-by"),
        (["--progress", "loud"], "--progress"),
        (["--kernel", "none.npy"], "--kernel none.npy: E_VANISHED"),
        (["--kernel", "text.npy"], "--kernel text.npy: E_UNREADABLE"),
        (["-o", "photos"], "would replace the input"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(fastem, photo, prior, tmp_path, arguments, message):
    (tmp_path / "text.npy").write_text("text")
    code, out, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, *arguments)
    assert code == 2 and message in err and out == ""
    assert len(err.splitlines()) == 1 and err.startswith("fastem: E_")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_backend_that_cannot_run_is_refused_before_work(fastem, photo, prior, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, _, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, "--backend", "nonsense")
    assert code == 2 and "nonsense" in err
    if not torch.cuda.is_available():
        code, _, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, "--backend", "triton")
        assert code == 2 and "triton" in err.lower()
        code, _, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK, "--device", "cuda")
        assert code == 2 and "cuda" in err


def test_exit_codes_of_inputs_weights_and_outputs(fastem, photo, prior, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "file").write_text("")
    for code, arguments in [
        (3, ["none.png", "-o", "out"]),
        (3, ["empty", "-o", "out"]),
        (4, [photo, "-o", "out", "--prior", "none.safetensors"]),
        (4, [photo, "-o", "out", "--prior", "junk.safetensors"]),
        (4, [photo, "-o", "out", "--prior", "naturall"]),
        (5, [photo, "-o", "file/out", "--prior", prior]),
        (2, [photo.parent, "-o", photo.parent / "out", "--prior", prior]),
    ]:
        actual, out, err = fastem("deblur", *arguments)
        assert (actual, out) == (code, ""), err
        assert len(err.splitlines()) == 1 and err.startswith("fastem: E_"), err


def test_failure_while_writing_is_exit_5(fastem, photo, prior, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = fastem("deblur", photo, "-o", "out", "--prior", prior, *QUICK)
    assert code == 5 and "No space left" in err and os.listdir(tmp_path / "out") == []


def test_debug_shows_the_traceback(fastem, photo, prior):
    (photo.parent / "bad.png").write_bytes(b"")
    code, _, err = fastem("deblur", photo.parent / "bad.png", "-o", "out", "--prior", prior, *QUICK, "--debug")
    assert code == 1 and "Traceback" in err and "E_UNREADABLE" in err


@pytest.mark.parametrize("text, value", [("auto", None), ("0", 0.0), ("0.5", 0.5 / 255), ("100", 100 / 255)])
def test_sigma_is_in_grey_levels(text, value):
    assert parse_sigma(text) == value
    assert parse_sigma("0.02", force=True) == 0.02 / 255


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sigma", "auto"], "give the noise std to add"),
        (["--kernel-family", "magic"], "unknown kernel family 'magic'"),
        (["--bits", 12], "--bits is 8 or 16, got 12"),
        (["--boundary", "magic"], "--boundary"),
    ],
    ids=str,
)
def test_degrade_options_that_make_no_sense(fastem, photo, arguments, message):
    code, out, err = fastem("degrade", photo, "-o", "out", *arguments)
    assert code == 2 and message in err and out == "" and len(err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- whole processes


def environment() -> dict[str, str]:
    path = [str(Path(io.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def test_help_is_quick_and_does_not_load_torch():
    script = "import sys, fastem.cli\ntry: fastem.cli.main(['deblur', '-h'])\nfinally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "False"
    assert "grey levels" in result.stdout and "example: fastem deblur photo.jpg" in result.stdout


def test_usage_error_of_a_process():
    command = [sys.executable, "-m", "fastem", "deblur", "a.png", "--sigma", "0.02"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert (result.returncode, result.stdout) == (2, "") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_of_a_process(photo, prior, tmp_path, number, code):
    command = [sys.executable, "-m", "fastem", "deblur", str(photo), "-o", str(tmp_path / "out"), "--prior", str(prior)]
    command += ["--steps", "1000", "--guidance", "dps", "--progress", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    first = process.stderr.readline()  # at work by now
    assert '"event"' in first, first
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert time.monotonic() - start < 10
    assert "Traceback" not in err and err.splitlines()[-1].startswith("fastem: ")
    assert os.listdir(tmp_path / "out") == []


def test_a_degraded_folder_is_restored(fastem, photo, prior, tmp_path):
    """The README's pipeline: kernels lie beside the blurred pictures and are not taken for pictures."""
    assert fastem("degrade", photo, "-o", "blurred", "--kernel-size", 9, "--sigma", 2)[0] == 0
    assert fastem("deblur", "blurred", "-o", "restored", "--prior", prior, *QUICK)[0] == 0
    assert sorted(p.name for p in (tmp_path / "restored").glob("*.png")) == ["photo.kernel.png", "photo.png"]
