"""Two processes under torchrun, on a CPU: one run, one set of files, the same weights in both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import fastem
from fastem.models import load_model

WORKER = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from fastem.models.natural import NaturalConfig
from fastem.training import TrainConfig, core, parallel, train_image_prior

folder = Path(sys.argv[1])
config = TrainConfig(minutes=5, cooldown=0, batch_size=2, patch=16, warmup=2, ema_halflife=3)
network = NaturalConfig(widths=(8, 8), num_blocks=1, embedding=8)
drawn = []

class Watched(core.Trainer):
    def run(self, loss_of, stop):
        def watched(model, generator, balance):
            drawn.append(torch.rand(1, generator=generator).item())
            return loss_of(model, generator, balance)
        yield from super().run(watched, stop)
        everyone = [None] * parallel.size()
        torch.distributed.all_gather_object(everyone, {
            "params": [p.detach() for p in self.model.parameters()], "ema": self.ema.params,
            "bands": self.balance.mean, "step": self.step, "drawn": drawn,
        })
        if parallel.rank() == 0:
            torch.save(everyone, folder / f"ranks-{config.max_steps}.pt")

import fastem.training.image_prior as image_prior
image_prior.Trainer = Watched
with parallel.joined("cpu"):  # once for both calls
    for max_steps in (2, 4):  # the second call resumes
        drawn.clear()
        config = replace(config, max_steps=max_steps)
        # asked before each step: one process alone wants to stop after the third, both must
        stop = lambda: parallel.rank() == 1 and len(drawn) == 1 and max_steps == 4
        train_image_prior([folder / "photos"], folder / "run", config, network, stop=stop)
"""


def launch(script, *arguments):
    path = [str(Path(fastem.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_make_one_run(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "worker.py").write_text(WORKER)
    launch(str(tmp_path / "worker.py"), str(tmp_path))

    sequences = []
    for max_steps, done in ((2, 2), (4, 3)):
        first, second = torch.load(tmp_path / f"ranks-{max_steps}.pt", weights_only=True)
        assert first["step"] == second["step"] == done
        for name in ("params", "ema"):
            assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)), name
        assert torch.equal(first["bands"], second["bands"])
        sequences += [first["drawn"], second["drawn"]]
    drawn = [number for sequence in sequences for number in sequence]
    assert len(drawn) == 6 and len(set(drawn)) == 6  # no process repeats another's crops, nor its own after a resume

    assert {p.name for p in (tmp_path / "run").iterdir()} == {"training.pt", "validation.json", "natural.safetensors"}
    state = torch.load(tmp_path / "run" / "training.pt", weights_only=True)
    assert len(state["rng"]) == 2 and not torch.equal(*state["rng"])
    card = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert "after 3 steps" in card["what"]
    loaded = load_model(tmp_path / "run" / "natural.safetensors").denoiser.prior
    for param, average in zip(loaded.parameters(), first["ema"], strict=True):
        torch.testing.assert_close(param, average, atol=1e-3, rtol=1e-3)
