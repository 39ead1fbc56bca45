"""`fastem train`"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastem.cli import console

app = typer.Typer(
    help="Train the priors. Ctrl-C stops a run; the same command goes on where it was.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Minutes = Annotated[
    float | None, typer.Option(min=0.01, help="wall-clock time of this call", show_default="the recipe's")
]
Cooldown = Annotated[
    float | None,
    typer.Option(min=0, help="minutes of decay at the end; 0 to go on later at the full rate", show_default="a fifth"),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="folder of the run: its state, log and weights")]
Init = Annotated[
    str | None, typer.Option(help="weights a fresh run starts from: a bundled name, or a file", show_default="none")
]
Seed = Annotated[int, typer.Option(min=0, help="same seed, same run on the same machine")]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="where to compute")]


@app.command("image-prior", epilog="example: fastem train image-prior photos/ shard.tar -o run/ --minutes 120")
def image_prior(
    data: Annotated[
        list[Path], typer.Argument(help="folders of images (train/ and metadata.jsonl count), or tar shards")
    ],
    out: Out = Path("run-image-prior"),
    minutes: Minutes = None,
    cooldown: Cooldown = None,
    batch_size: Annotated[int, typer.Option(min=1, help="patches per step and process")] = 32,
    patch: Annotated[int, typer.Option(min=16, help="side of a patch, pixels")] = 64,
    size: Annotated[Literal["natural", "natural-large"], typer.Option(help="1.8 or 14 million parameters")] = "natural",
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="pictures to validate on (repeatable)", show_default="one in 32 of DATA, by name"),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=1e-8, max=1, help="peak learning rate", show_default="1e-3, with --init 3e-4")
    ] = None,
    init: Init = None,
    seed: Seed = 0,
    device: Device = "auto",
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Train a natural-image prior on your own photos; gives OUT/natural.safetensors for fastem deblur --prior."""
    from fastem.models.natural import SIZES
    from fastem.training import TrainConfig, train_image_prior

    if missing := [str(path) for path in [*data, *(validation or [])] if not path.exists()]:
        raise console.OptionError(f"no such file or folder: {', '.join(missing[:3])}")
    config = replace(_timed(TrainConfig(), minutes, cooldown), batch_size=batch_size, patch=patch, seed=seed)
    config = replace(config, lr=lr or (config.lr if init is None else 3e-4))
    with _running(config.minutes, progress) as (report, stop), console.options_checked():
        train_image_prior(data, out, config, SIZES[size], _device(device), init, validation, report=report, stop=stop)
    _tell_result(out / f"{size}.safetensors")


@app.command("kernel-denoiser", epilog="example: fastem train kernel-denoiser -o run/ --minutes 12")
def kernel_denoiser(
    out: Out = Path("run-kernel-denoiser"),
    minutes: Minutes = None,
    cooldown: Cooldown = None,
    init: Init = None,
    clean_share: Annotated[float, typer.Option(min=0, max=1, help="share of kernels without noise")] = 0.0,
    mstep_share: Annotated[float, typer.Option(min=0, max=1, help="share of kernels as M-steps leave them")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Train the denoiser of blur kernels on synthetic ones; gives OUT/kernel.safetensors."""
    from fastem.training import train_kernel_denoiser
    from fastem.training.kernel_denoiser import DEFAULTS

    config = replace(_timed(DEFAULTS, minutes, cooldown), seed=seed)
    with _running(config.minutes, progress) as (report, stop), console.options_checked():
        train_kernel_denoiser(
            out, config, device=_device(device), init=init, clean_share=clean_share, mstep_share=mstep_share,
            report=report, stop=stop,
        )  # fmt: skip
    _tell_result(out / "kernel.safetensors")


BatchSize = Annotated[int, typer.Option(min=1, help="examples per step; 256 on a large GPU")]
Width = Annotated[int, typer.Option(min=32, help="channels of the first level, a multiple of 32; 64 on a GPU")]
Examples = Annotated[
    int | None,
    typer.Option(min=1, help="kernels or fields drawn before it starts", show_default="20000 kernels, 200 fields"),
]
Samples = Annotated[int, typer.Option(min=1, help="samples drawn at the end for OUT/samples.png")]


@app.command("kernel-prior", epilog="example: fastem train kernel-prior --kernel-size 33 -o run/ --minutes 25")
def kernel_prior(
    kernel_size: Annotated[int, typer.Option(min=9, max=129, help="side of the kernels, pixels: 33 or 64")] = 64,
    out: Out = Path("run-kernel-prior"),
    minutes: Minutes = None,
    cooldown: Cooldown = None,
    batch_size: BatchSize = 32,
    width: Width = 32,
    examples: Examples = None,
    samples: Samples = 16,
    init: Init = None,
    seed: Seed = 0,
    device: Device = "auto",
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Train a diffusion prior of blur kernels, for parallel diffusion; gives OUT/kernel-prior.safetensors."""
    from fastem.training import kernel_task

    def make_task(device: str):
        return kernel_task(kernel_size, width, examples or 20_000, device)

    _train_diffusion(make_task, out, minutes, cooldown, batch_size, width, samples, init, seed, device, progress)


@app.command("tilt-prior", epilog="example: fastem train tilt-prior --size 128 -o run/ --minutes 25")
def tilt_prior(
    size: Annotated[int, typer.Option(min=32, max=512, help="side of the crops trained on, pixels")] = 128,
    out: Out = Path("run-tilt-prior"),
    minutes: Minutes = None,
    cooldown: Cooldown = None,
    batch_size: BatchSize = 32,
    width: Width = 32,
    examples: Examples = None,
    samples: Samples = 16,
    init: Init = None,
    seed: Seed = 0,
    device: Device = "auto",
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Train a diffusion prior of the tilt of turbulent air, two channels; gives OUT/tilt-prior.safetensors."""
    from fastem.training import tilt_task

    def make_task(device: str):
        return tilt_task(size, width, examples or 200, device)

    _train_diffusion(make_task, out, minutes, cooldown, batch_size, width, samples, init, seed, device, progress)


def _train_diffusion(make_task, out, minutes, cooldown, batch_size, width, samples, init, seed, device, progress):
    from fastem.training import train_diffusion_prior
    from fastem.training.diffusion_prior import DEFAULTS

    if width % 32:
        raise console.OptionError(f"--width is a multiple of 32, got {width}")
    config = replace(_timed(DEFAULTS, minutes, cooldown), batch_size=batch_size, seed=seed)
    with _running(config.minutes, progress) as (report, stop), console.options_checked():
        device = _device(device)
        task = make_task(device)
        train_diffusion_prior(
            out, task, config, device=device, init=init, num_samples=samples, report=report, stop=stop
        )
    _tell_result(out / f"{task.name}.safetensors")


def _timed(config, minutes: float | None, cooldown: float | None):
    """The recipe over another time; the cool-down keeps its share unless it is given."""
    minutes = config.minutes if minutes is None else minutes
    share = config.cooldown / config.minutes
    return replace(config, minutes=minutes, cooldown=share * minutes if cooldown is None else cooldown)


def _tell_result(path: Path) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun the first one wrote it
        print(path)


def _device(name: str) -> str:
    from fastem.runtime import resolve_device

    return str(resolve_device(name))


@contextmanager
def _running(minutes: float, mode: console.ProgressMode) -> Iterator[tuple[Callable[[dict], None], Callable[[], bool]]]:
    """A reporter that drives the bar, and a stop that Ctrl-C and SIGTERM pull: the run ends with its state saved."""
    pulled = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, frame: pulled.append(n)) for number in signals}
    try:
        with console.Progress(mode) as bar:

            def report(record: dict) -> None:
                text = f"step {record['step']}  loss {record['loss']:.4f}  {record['samples_per_s']:.0f} samples/s"
                if "tflops" in record:
                    text += f"  {record['tflops']:.3g} TFLOP/s"
                bands = " ".join(f"{band:.2g}" for band in record.get("bands", []))
                bar(f"{text}  by noise {bands}" if bands else text, record["minutes"], minutes)

            yield report, lambda: bool(pulled)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pulled:
        console.tell("interrupted", "the state is saved; the same command goes on from here")
        raise typer.Exit(128 + pulled[0])
