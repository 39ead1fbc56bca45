"""The optimisation run that every training shares: step, average, checkpoint, resume.

The learning rate follows warm-up, constant, cool-down: a run may stop at any time, be resumed with
more minutes, and is brought to rest by a linear decay over the last `cooldown` minutes. Under torchrun
several processes make one run (`fastem.training.parallel`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastem import io
from fastem.training import parallel

NUM_BANDS = 12  # noise bands, equal in ln(sigma), in which the loss is tracked and balanced
CHECK_STEPS = 20  # on a GPU the loss is looked at after so many steps: each look waits for the device


@dataclass(frozen=True)
class TrainConfig:
    """How long and how hard; the defaults are for the bundled natural prior on a CPU."""

    minutes: float = 120.0  # wall-clock time of this call
    cooldown: float = 25.0  # minutes of linear decay to zero at its end; 0 leaves the run resumable at full rate
    batch_size: int = 32  # of each process
    patch: int = 64
    lr: float = 1e-3
    warmup: int = 300  # steps
    ema_halflife: float = 2000.0  # steps
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_minutes: float = 5.0
    max_steps: int | None = None  # of all calls together; None leaves the minutes in charge


class BandBalance:
    """Divides the loss of each noise band by its running mean, so that every band gains equal decibels.

    The means are those over all processes that train together.
    """

    def __init__(self, device: torch.device | str, lowest: float = 0.005, highest: float = 160.0) -> None:
        self.low, self.high = math.log(lowest), math.log(highest)
        self.mean = torch.ones(NUM_BANDS, device=device)

    def __call__(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """loss, sigma `(N,)` -> the balanced mean loss, a scalar."""
        band = ((sigma.log() - self.low) / (self.high - self.low) * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)
        with torch.no_grad():
            count = torch.zeros_like(self.mean).index_add_(0, band, torch.ones_like(loss))
            total = torch.zeros_like(self.mean).index_add_(0, band, loss.detach())
            count, total = parallel.total(torch.stack([count, total]))
            rate = 1 - 0.98**count
            self.mean += rate * (total / count.clamp(min=1) - self.mean)
        return (loss / self.mean[band]).mean()


class Ema:
    """Exponential moving average of the parameters, with a half-life in steps that grows from zero."""

    def __init__(self, model: nn.Module, halflife: float) -> None:
        self.halflife = halflife
        self.params = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = 0.5 ** (1 / min(self.halflife, max(step * 0.1, 1e-3)))
        torch._foreach_lerp_(self.params, [p.detach() for p in model.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for param, average in zip(model.parameters(), self.params, strict=True):
            param.copy_(average)


def tell(records: Iterable[dict], log_file: Path, report: Callable[[dict], None]) -> None:
    """Runs through a run: reports each record and appends it to the log, one JSON line each; the first process does."""
    for record in records:
        if parallel.rank() == 0:
            report(record)
            with open(log_file, "a") as log:
                log.write(json.dumps(record) + "\n")


class Trainer:
    """One optimisation run: step, average, checkpoint, resume.

    What is learned is the `loss_of(model, generator, balance)` given to `run`; it draws all that is random from the
    generator, so that a resumed run continues as if it had never stopped. Of processes that train together each has a
    generator of its own, and the first one writes.

    Args:
        balance: of the loss of this training; by default that of the image prior.
        flops: floating-point operations of a training step per sample; gives the rate in the progress records.
        notes: what is to be known at the end about the start of the run; JSON-able, kept in the state.
        compiled: `torch.compile` the network where Triton is installed.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        state_file: Path,
        device: str = "cpu",
        balance: BandBalance | None = None,
        flops: float = 0,
        compiled: bool = False,
        notes: dict | None = None,
    ) -> None:
        self.model, self.config, self.state_file, self.device = model.to(device), config, state_file, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0)
        self.ema = Ema(self.model, config.ema_halflife)
        self.generator = torch.Generator(device).manual_seed(config.seed + parallel.rank())
        self.balance = balance or BandBalance(device)
        self.flops, self.notes = flops, notes or {}
        self.step = 0
        self.seconds = 0.0  # spent in all calls
        if state_file.exists():
            self._resume()
        self.network = parallel.averaged(self.model)
        if compiled and importlib.util.find_spec("triton"):
            self.network = torch.compile(self.network)

    def _resume(self) -> None:
        try:
            state = torch.load(self.state_file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch raises nearly anything on damaged files
            raise ValueError(
                f"cannot resume from {self.state_file}: damaged, or of another network; remove it to start afresh, "
                f"or give another folder ({' '.join(str(error).split())[:300]})"
            ) from error
        self.ema.params = [p.to(self.device) for p in state["ema"]]
        self.balance.mean = state["bands"].to(self.device)
        self.step, self.seconds, self.notes = state["step"], state["seconds"], state["notes"]
        if parallel.rank() < len(state["rng"]):
            self.generator.set_state(state["rng"][parallel.rank()].cpu())
        else:  # more processes than before: a sequence that none of them has seen
            self.generator.manual_seed(self.config.seed + parallel.rank() + (self.step << 20))

    def save(self) -> None:
        """Writes the state; of processes that train together all must call it."""
        rng = parallel.gathered(self.generator.get_state())
        if parallel.rank() > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.params,
            "rng": rng,
            "bands": self.balance.mean,
            "step": self.step,
            "seconds": self.seconds,
            "notes": self.notes,
            "config": asdict(self.config),
        }
        with io.atomic_write(self.state_file) as file:
            torch.save(state, file)

    def run(
        self,
        loss_of: Callable[[nn.Module, torch.Generator, BandBalance], Tensor],
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[dict]:
        """Trains for `config.minutes`, or until `stop()`; yields a progress record about every 10 seconds.

        The state is saved every `checkpoint_minutes` and at the end. `stop` is asked before each step: let it tell
        whether a signal has come, and nothing is lost.

        Raises:
            FloatingPointError: if the loss is not finite; the state file still holds the last good state.
        """
        config, start, base = self.config, time.monotonic(), self.seconds
        told, saved = start, 0.0
        loss_sum, steps_told = torch.zeros((), device=self.device), self.step
        check_steps = 1 if torch.device(self.device).type == "cpu" else CHECK_STEPS
        self.network.train()

        def minutes_left() -> float:
            """The same in every process: they must take the same steps, at the same rate."""
            return parallel.least(0.0 if stop() else config.minutes - (time.monotonic() - start) / 60)

        left = minutes_left()
        while left > 0 and (config.max_steps is None or self.step < config.max_steps):
            rate = min(1.0, (self.step + 1) / config.warmup)
            if config.cooldown > 0:
                rate *= min(1.0, left / config.cooldown)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * rate
            loss = loss_of(self.network, self.generator, self.balance)
            loss_sum += loss.detach()
            if self.step % check_steps == 0:
                self._check(loss_sum)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.model, self.step)
            left, now = minutes_left(), time.monotonic()
            self.seconds = base + now - start
            if now - told > 10:
                done = self.step - steps_told
                samples_per_s = done * config.batch_size * parallel.size() / (now - told)
                yield {
                    "step": self.step,
                    "minutes": round((now - start) / 60, 2),
                    "lr": config.lr * rate,
                    "loss": self._check(loss_sum) / done,
                    "samples_per_s": samples_per_s,
                    **({"tflops": samples_per_s * self.flops / 1e12} if self.flops else {}),
                    "bands": [round(v, 4) for v in self.balance.mean.tolist()],
                }
                told, steps_told = now, self.step
                loss_sum.zero_()
            if config.minutes - left - saved > config.checkpoint_minutes:
                self._check(loss_sum)
                self.save()
                saved = config.minutes - left
        self._check(loss_sum)
        self.save()

    def _check(self, loss_sum: Tensor) -> float:
        """The value; raises if a loss in it was not finite."""
        value = loss_sum.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}; resume from {self.state_file} at a smaller learning rate"
            )
        return value
