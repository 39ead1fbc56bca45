"""Many files at once: one outcome each, nothing half-written, nothing that one picture does to another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from fastem import io
from fastem.batch import (
    SUFFIXES,
    NoInputError,
    PlanError,
    deblur_files,
    degrade_plan,
    item_seed,
    plan_files,
)
from fastem.io import OutputError


@dataclass
class Restored:
    image: np.ndarray
    kernel: np.ndarray
    samples: np.ndarray
    sigma: float = 5 / 255
    reblur: float = 1.0
    warnings: list[str] = field(default_factory=list)
    kernels: np.ndarray | None = None

    def mean(self) -> np.ndarray:
        return self.samples.mean(axis=0)

    def std(self) -> np.ndarray:
        return self.samples.std(axis=0)


@dataclass
class Engine:
    """Stands in for the real engine: inverts the picture, and fails for pictures whose first value is in `failures`."""

    failures: dict[int, Exception] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    lossy: list[bool] = field(default_factory=list)
    kernels: np.ndarray | None = None
    config = {"method": "none", "device": "cpu", "backend": "reference"}

    def __call__(self, image, *, sigma, seed, kernel, lossy, quantization, on_step=None):
        self.lossy.append(lossy)
        if error := self.failures.get(int(image.flat[0])):
            raise error
        self.seeds.append(seed)
        for done in range(1, 3):
            on_step(done, 2) if on_step else None
        unit = image / (np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1)
        samples = np.stack([unit.reshape(*image.shape[:2], -1) * np.ones(3)] * 2)
        inverted = np.iinfo(image.dtype).max - image if image.dtype.kind == "u" else 1 - image
        return Restored(inverted, np.full((5, 3), 1 / 15, np.float32), samples, kernels=self.kernels)


def save_picture(path: Path, value: int = 1, mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> Path:
    Image.new(mode, size, (value,) * len(mode) if len(mode) > 1 else value).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    for value, name in enumerate(["a.png", "b.jpg", "c.bmp"]):
        save_picture(path / name, value)
    return path


def test_outputs_and_record(folder, tmp_path):
    out = tmp_path / "out"
    engine = Engine(kernels=np.full((2, 4, 5, 3), 1 / 15, np.float32))
    outcomes = list(deblur_files([folder], engine, out, save=SUFFIXES, sigma=5 / 255, seed=3))
    assert [(o.source.name, o.status) for o in outcomes] == [("a.png", "done"), ("b.jpg", "done"), ("c.bmp", "done")]
    suffixes = [suffix for group in SUFFIXES.values() for suffix in group]
    assert sorted(os.listdir(out)) == sorted(stem + suffix for stem in "abc" for suffix in suffixes)
    record = json.loads((out / "a.json").read_text())
    data = (folder / "a.png").read_bytes()
    sha = io.decode_image(data).sha256
    assert record["input"] == {"name": "a.png", "sha256": sha, "format": "PNG", "width": 16, "height": 12,
                               "channels": 3, "bits": 8, "alpha": False}  # fmt: skip
    assert (record["config"], record["seed"], record["item_seed"]) == (Engine.config, 3, item_seed(3, sha))
    assert (record["sigma"], record["sigma_estimated"], record["reblur"]) == (5.0, False, 1.0)
    assert record["backend"] == "reference" and set(record["versions"]) >= {"fastem", "torch"}
    assert record["seconds"] >= 0 and record["kernel_size"] == [5, 3] and not record["kernel_given"]
    assert (record["varying"], record["kernel_grid"]) == (True, [2, 4])
    for suffix, output in record["outputs"].items():
        assert hashlib.sha256((out / ("a" + suffix)).read_bytes()).hexdigest() == output["sha256"]
    np.testing.assert_array_equal(np.asarray(Image.open(out / "a.png")), 255 - np.asarray(Image.open(folder / "a.png")))
    np.testing.assert_allclose(np.load(out / "a.kernel.npy"), np.full((5, 3), 1 / 15))
    kernels = np.load(out / "a.kernels.npy")
    assert kernels.shape == (2, 4, 5, 3) and kernels.dtype == np.float32
    with Image.open(out / "a.sheet.png") as sheet:
        assert sheet.height == 12 and sheet.width > 2 * 16


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "P", "I;16"])
def test_kind_of_picture_is_kept(tmp_path, mode):
    source = tmp_path / "a.png"
    image = Image.fromarray((np.arange(192, dtype=np.uint16) * 300).reshape(12, 16)) if mode == "I;16" else (
        Image.effect_noise((16, 12), 60).convert(mode))  # fmt: skip
    image.save(source)
    (outcome,) = deblur_files([source], Engine(), tmp_path / "out", save=["image", "mean"])
    assert outcome.status == "done"
    before, after = io.read_image(source), io.read_image(tmp_path / "out" / "a.png")
    assert (after.pixels.shape, after.pixels.dtype) == (before.pixels.shape, before.pixels.dtype)
    np.testing.assert_array_equal(after.pixels, np.iinfo(before.pixels.dtype).max - before.pixels)
    np.testing.assert_array_equal(io.read_image(tmp_path / "out" / "a.mean.png").pixels, before.pixels)
    if before.alpha is not None:
        np.testing.assert_array_equal(after.alpha, before.alpha)


def test_failures_stay_with_their_item(folder, tmp_path):
    (folder / "broken.png").write_bytes(b"junk")
    (folder / "empty.png").write_bytes(b"")
    save_picture(folder / "tiny.png", 9, size=(16, 7))
    save_picture(folder / "numeric.png", 10)
    save_picture(folder / "memory.png", 11)
    save_picture(folder / "torch_memory.png", 12)
    save_picture(folder / "defect.png", 13)
    save_picture(folder / "value.png", 14)
    engine = Engine({
        10: FloatingPointError("not finite"),
        11: MemoryError(),
        12: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        13: KeyError("x"),
        14: ValueError("the kernel is\nlarger than the image"),
    })  # fmt: skip
    outcomes = {o.source.name: o for o in deblur_files([folder], engine, tmp_path / "out")}
    codes = {name: o.error.code for name, o in outcomes.items() if o.status == "failed"}
    assert codes == {
        "broken.png": "E_UNREADABLE",
        "empty.png": "E_UNREADABLE",
        "tiny.png": "E_TOO_SMALL",
        "numeric.png": "E_NUMERIC",
        "memory.png": "E_OOM",
        "torch_memory.png": "E_OOM",
        "defect.png": "E_INTERNAL",
        "value.png": "E_INPUT",
    }
    assert {name for name, o in outcomes.items() if o.status == "done"} == {"a.png", "b.jpg", "c.bmp"}
    assert "--tile" in outcomes["memory.png"].error.hint
    assert all("\n" not in str(o.error) for o in outcomes.values() if o.error)
    assert {name.split(".")[0] for name in os.listdir(tmp_path / "out")} == {"a", "b", "c"}


def test_the_engine_learns_which_files_were_compressed_with_losses(folder, tmp_path):
    engine = Engine()
    outcomes = list(deblur_files([folder], engine, tmp_path / "out"))
    assert {o.source.name: lossy for o, lossy in zip(outcomes, engine.lossy, strict=True)} == {
        "a.png": False,
        "b.jpg": True,
        "c.bmp": False,
    }


def test_memory_that_is_refused_with_numbers_is_told_with_them(tmp_path):
    engine = Engine({1: MemoryError("needs about 40 GB")})
    (outcome,) = deblur_files([save_picture(tmp_path / "a.png", 1)], engine, tmp_path / "out")
    assert outcome.error.code == "E_OOM" and outcome.error.args[0] == "needs about 40 GB"
    assert "--particles" in outcome.error.hint


def test_vanished_and_replaced_inputs(folder, tmp_path):
    outcomes = deblur_files([folder, tmp_path / "never.png"], Engine(), tmp_path / "out")
    (folder / "b.jpg").unlink()
    (folder / "c.bmp").unlink()
    (folder / "c.bmp").mkdir()
    result = [(o.source.name, o.status, o.error and o.error.code) for o in outcomes]
    assert result == [("a.png", "done", None)] + [
        (name, "failed", "E_VANISHED") for name in ("b.jpg", "c.bmp", "never.png")
    ]


def test_only_regular_visible_pictures_of_a_folder_are_taken(folder, tmp_path):
    os.mkfifo(folder / "pipe.png")
    (folder / "sub.png").mkdir()
    (folder / "notes.txt").write_text("")
    save_picture(folder / ".hidden.png")
    (folder / "link.png").symlink_to(folder / "a.png")
    plan = plan_files([folder], tmp_path / "out")
    assert [item.source.name for item in plan.items] == ["a.png", "b.jpg", "c.bmp", "link.png"]


def test_seed_depends_on_content_only(folder, tmp_path):
    def seeds(paths, **options):
        engine = Engine()
        list(deblur_files(paths, engine, tmp_path / "out", **options))
        return engine.seeds

    a, b, c = (folder / name for name in ("a.png", "b.jpg", "c.bmp"))
    together = seeds([a, b, c])
    assert seeds([c, a]) == [together[2], together[0]] and len(set(together)) == 3
    (folder / "renamed.png").write_bytes(a.read_bytes())
    assert seeds([folder / "renamed.png"]) == together[:1]
    assert seeds([a], seed=1) != together[:1]
    assert all(0 <= seed < 2**63 for seed in together)


@pytest.mark.parametrize(
    "names",
    [("a.jpg", "a.png"), ("x.png", "X.bmp"), ("\u00e9.png", "e\u0301.bmp"), ("a.png", "a.kernel.bmp")],
    ids=ascii,
)
def test_name_clashes_are_found_before_work(tmp_path, names):
    for value, name in enumerate(names):
        save_picture(tmp_path / name, value)
    engine = Engine()
    with pytest.raises(PlanError) as caught:
        deblur_files([tmp_path / name for name in names], engine, tmp_path / "out")
    assert caught.value.code == "E_NAME_CLASH" and not engine.seeds and "--name-by full" in caught.value.hint
    if names == ("a.jpg", "a.png"):
        outcomes = list(deblur_files([tmp_path / name for name in names], engine, tmp_path / "out", name_by="full"))
        assert [o.outputs[".png"].name for o in outcomes] == ["a.jpg.png", "a.png.png"]


def test_inputs_are_never_overwritten(folder):
    with pytest.raises(PlanError, match="would replace the input"):
        plan_files([folder / "a.png"], folder)
    assert plan_files([folder / "b.jpg"], folder).items[0].stem == folder / "b"


@pytest.mark.parametrize("out", ["in", "in/results", "in/../in"])
def test_output_in_the_input_folder_is_refused(folder, tmp_path, out):
    with pytest.raises(PlanError) as caught:
        plan_files([folder], tmp_path / out)
    assert caught.value.code == "E_PATH" and not (folder / "results").exists()


def test_nothing_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for paths in ([], [tmp_path / "empty"], [tmp_path / "none.png"]):
        with pytest.raises(NoInputError):
            plan_files(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        plan_files([folder], tmp_path / "file")
    with pytest.raises(OutputError):
        plan_files([folder], tmp_path / "file" / "below")
    with pytest.raises(PlanError, match="cannot save colour"):
        plan_files([folder], tmp_path / "out", save=["colour"])


@pytest.mark.parametrize(
    "name", ["a b", "-dash", "\u96ea\U0001f600", "quote'\"", "new\nline", "dots..", "%s{x}", "\udcff"], ids=ascii
)
def test_odd_names(tmp_path, name):
    (tmp_path / "in").mkdir()
    save_picture(tmp_path / "in" / (name + ".png"))
    (outcome,) = deblur_files([tmp_path / "in"], Engine(), tmp_path / "out")
    assert outcome.status == "done" and (tmp_path / "out" / (name + ".png")).is_file()
    json.loads((tmp_path / "out" / (name + ".json")).read_text())


def test_name_that_leaves_no_room_for_the_suffix(tmp_path):
    save_picture(tmp_path / ("n" * 248 + ".png"))
    save_picture(tmp_path / "ok.png")
    outcomes = list(deblur_files([tmp_path / ("n" * 248 + ".png"), tmp_path / "ok.png"], Engine(), tmp_path / "out"))
    assert [o.status for o in outcomes] == ["failed", "done"] and outcomes[0].error.code == "E_PATH"


def test_full_disk_stops_the_run_and_leaves_no_half_result(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    outcomes = deblur_files([folder], Engine(), out)
    assert next(outcomes).status == "done"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        next(outcomes)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_interruption_leaves_no_half_result(folder, tmp_path, monkeypatch):
    outcomes = deblur_files([folder], Engine(), tmp_path / "out")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    assert os.listdir(tmp_path / "out") == []


def test_json_is_published_last(folder, tmp_path, monkeypatch):
    order, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), real(a, b)))
    list(deblur_files([folder / "a.png"], Engine(), tmp_path / "out", save=["json", "kernel", "image"]))
    assert order == ["a.png", "a.kernel.npy", "a.kernel.png", "a.json"]


def test_finished_items_can_be_skipped(folder, tmp_path):
    def statuses(**options):
        return [o.status for o in deblur_files([folder], Engine(), tmp_path / "out", skip_existing=True, **options)]

    assert statuses() == ["done"] * 3
    assert statuses() == ["skipped"] * 3
    assert statuses(sigma=0.01) == ["done"] * 3  # another request is other work
    save_picture(folder / "a.png", 77)
    (tmp_path / "out" / "b.png").unlink()
    assert statuses(sigma=0.01) == ["done", "done", "skipped"]
    assert statuses(save=["image"]) == ["done"] * 3  # without a JSON nothing tells


def test_kernels_that_vary_are_written_only_where_they_were_found(folder, tmp_path):
    def run(kernels, **options):
        (outcome,) = deblur_files([folder / "a.png"], Engine(kernels=kernels), tmp_path / "out", **options)
        written = sorted(suffix for suffix in SUFFIXES["kernels"] if (tmp_path / "out" / f"a{suffix}").exists())
        assert sorted(set(outcome.outputs) & set(SUFFIXES["kernels"])) == written
        return outcome.status, written, outcome.record

    grid = np.full((2, 3, 5, 3), 1 / 15, np.float32)
    assert run(grid)[:2] == ("done", [".kernels.npy", ".kernels.png"])
    assert run(grid, skip_existing=True)[:2] == ("skipped", [".kernels.npy", ".kernels.png"])
    (tmp_path / "out" / "a.kernels.npy").unlink()
    assert run(grid, skip_existing=True)[:2] == ("done", [".kernels.npy", ".kernels.png"])
    status, written, record = run(None)  # the grid of the earlier result does not stay
    assert (status, written, record["varying"], record["kernel_grid"]) == ("done", [], False, None)
    assert run(None, skip_existing=True)[:2] == ("skipped", [])


def test_progress_names_the_item(folder, tmp_path):
    seen = []

    def on_step(item, done, total):
        seen.append((item.source.name, done, total))

    list(deblur_files([folder / "a.png"], Engine(), tmp_path / "out", on_step=on_step))
    assert seen == [("a.png", 1, 2), ("a.png", 2, 2)]


@pytest.mark.parametrize("boundary, size", [("circular", (60, 70)), ("valid", (56, 66))])
def test_degraded_sets_tell_the_truth(tmp_path, boundary, size):
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(60, 190, (6, 7, 4)), np.ones((10, 10, 1))).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.png")
    plan = plan_files([tmp_path / "a.png"], tmp_path / "out")
    (outcome,) = degrade_plan(plan, sigma=4 / 255, kernel_size=5, boundary=boundary, bits=16)
    assert outcome.status == "done" and outcome.record["sigma"] == 4.0
    kernel, notes = io.load_kernel(tmp_path / "out" / "a.kernel.npy")
    assert kernel.shape == (5, 5) and notes == [] and kernel.sum() == pytest.approx(1, abs=1e-6)
    blurred = io.read_image(tmp_path / "out" / "a.png")
    assert blurred.pixels.shape[:2] == size and blurred.pixels.dtype == np.uint16

    clean, k = smooth[..., :3] / 255, kernel.astype(float)[..., None]
    expected = scipy.ndimage.convolve(clean, k, mode="wrap")
    crop = slice(None) if boundary == "circular" else slice(2, -2)
    noise = blurred.pixels / 65535 - expected[crop, crop]
    assert noise.std() * 255 == pytest.approx(4, rel=0.03) and abs(noise.mean()) < 1e-3
    np.testing.assert_array_equal(blurred.alpha, smooth[crop, crop, 3].astype(np.uint16) * 257)
    before = blurred.pixels.copy()
    list(degrade_plan(plan, sigma=4 / 255, kernel_size=5, boundary=boundary, bits=16))
    np.testing.assert_array_equal(io.read_image(tmp_path / "out" / "a.png").pixels, before)


def test_degrading_a_picture_smaller_than_the_kernel(tmp_path):
    save_picture(tmp_path / "a.png")
    (outcome,) = degrade_plan(plan_files([tmp_path / "a.png"], tmp_path / "out"), sigma=0.01)
    assert outcome.error.code == "E_TOO_SMALL"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_read_only_folder(folder, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="Permission denied"):
        plan_files([folder], tmp_path / "out")


class Together(Engine):
    """The same engine, whose `map` works in batches: all requests first, then the results, some of them failures."""

    def map(self, requests, *, batch_size, kernel, on_step):
        assert batch_size == 2
        requests = list(requests)
        for r in requests:
            on_step(1, 2)
            try:
                yield self(
                    r.image, sigma=r.sigma, seed=r.seed, kernel=kernel, lossy=r.lossy, quantization=r.quantization
                )
            except Exception as error:
                yield error


def test_batches_have_the_outcomes_of_single_files(folder, tmp_path):
    """Broken files before, between and after the good ones; an item that fails; resumption."""
    for name in ("0.png", "bb.png", "z.png"):
        (folder / name).write_bytes(b"junk")
    save_picture(folder / "d.png", 10)
    failures = {10: FloatingPointError("not finite")}
    one = list(deblur_files([folder], Engine(failures), tmp_path / "one", seed=5))
    steps = []
    options = {"seed": 5, "batch_size": 2, "on_step": lambda item, done, total: steps.append(item.source.name)}
    many = list(deblur_files([folder], Together(failures), tmp_path / "many", **options))

    def facts(outcome):
        kept = {k: v for k, v in outcome.record.items() if k not in ("seconds", "finished")}
        return outcome.source, outcome.status, outcome.error and (outcome.error.code, str(outcome.error)), kept

    assert [facts(o) for o in many] == [facts(o) for o in one] and len(many) == 7
    assert steps[0] == "a.png"
    assert sorted(os.listdir(tmp_path / "many")) == sorted(os.listdir(tmp_path / "one"))
    again = list(deblur_files([folder], Together(failures), tmp_path / "many", skip_existing=True, **options))
    assert [o.status for o in again] == ["failed", "skipped", "skipped", "failed", "skipped", "failed", "failed"]
