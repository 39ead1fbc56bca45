"""`fastem deblur`"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fastem.cli import console

SMALLEST, LARGEST = 0.5, 100.0  # grey levels; beyond these a noise level is more likely a mistaken unit


def deblur(
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("restored"),
    sigma: Annotated[str, typer.Option(metavar="auto|0..255", help="noise std, grey levels; auto: estimated")] = "auto",
    kernel_size: Annotated[
        str, typer.Option(metavar="auto|PIXELS", help="side of the largest blur to look for; auto: found, up to 129")
    ] = "33",
    kernel: Annotated[Path | None, typer.Option(help="the blur, if it is known: .npy, or a picture of it")] = None,
    method: Annotated[str, typer.Option(metavar="fast-em|diffusion-em", help="how the blur is found")] = "fast-em",
    guidance: Annotated[
        str | None,
        typer.Option(metavar="mean|pigdm|dps", help="how the image is held to the photo", show_default="mean"),
    ] = None,
    prior: Annotated[str, typer.Option(help="bundled name (see fastem models), or a checkpoint file")] = "natural",
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="reverse diffusion steps", show_default="what the guidance needs"),
    ] = None,
    particles: Annotated[int, typer.Option(min=1, help="samples per image; all share one kernel")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same restoration")] = 0,
    compat: Annotated[
        str, typer.Option(metavar="paper|released", help="released: the program of the paper's authors, to the detail")
    ] = "paper",
    m_step: Annotated[
        str | None,
        typer.Option("--m-step", metavar="edges|hqs", help="how the kernel is updated", show_default="edges"),
    ] = None,
    r2_term: Annotated[
        bool, typer.Option("--r2-term", help="with --m-step hqs: count the error of the estimate, Appendix D")
    ] = False,
    gamma: Annotated[
        str, typer.Option(metavar="auto|1..4", help="blur in linear light; cameras: 2.2; auto: what explains it better")
    ] = "1",
    saturation: Annotated[
        str, typer.Option(metavar="off|1..255", help="grey level from which on highlights are clipped, and ignored")
    ] = "off",
    mode: Annotated[
        str, typer.Option(metavar="mean|sample", help="mean: the best PSNR; sample: a draw from the posterior, crisper")
    ] = "mean",
    varying: Annotated[bool, typer.Option("--varying", help="look for a blur that changes over the image")] = False,
    guard: Annotated[bool, typer.Option(help="denoise only where no blur is seen")] = True,
    boundary: Annotated[
        str, typer.Option(metavar="auto|photo|circular", help="what lies beyond the borders of the image")
    ] = "auto",
    tile: Annotated[
        int | None, typer.Option(min=64, help="evaluate the network on tiles of this side: less memory")
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="where to compute")] = "auto",
    backend: Annotated[
        str, typer.Option(metavar="auto|reference|native|triton", help="which implementation of the operations")
    ] = "auto",
    precision: Annotated[
        str, typer.Option(metavar="auto|fp32|fp16|bf16", help="of the network; auto: fp16 on a GPU, fp32 on a CPU")
    ] = "auto",
    preset: Annotated[
        str, typer.Option(metavar="exact|turbo", help="turbo: fewer steps, a little less exact")
    ] = "exact",
    save: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="of image,kernel,kernels,mean,std,sheet,json; kernels: with --varying, where the blur varies; "
            "std: spread of the samples, with --mode sample; sheet: before, after and kernel",
        ),
    ] = "image,kernel,kernels,json",
    name_by: console.NameBy = "stem",
    batch_size: Annotated[
        str, typer.Option(metavar="auto|N", help="pictures of one size restored together; auto: 1 on a CPU")
    ] = "auto",
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="leave finished results of this request alone; their JSON tells")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="accept a --sigma that looks like a mistaken unit")] = False,
    max_megapixels: console.MaxMegapixels = 50.0,
    max_megabytes: console.MaxMegabytes = 64.0,
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Restore blurry images and find their blur kernels.

    For a.jpg this writes a.png, a.kernel.npy, a.kernel.png and a.json into the output folder; where --varying finds a
    blur that varies, also its kernels, rows by columns: a.kernels.npy and a.kernels.png.
    """
    level, together = parse_sigma(sigma, force), parse_batch_size(batch_size)
    size = kernel_size
    if kernel_size != "auto":
        size = int(_number("--kernel-size", "auto or 1..513 whole pixels", kernel_size, 1, 513))
    light = "auto" if gamma == "auto" else _number("--gamma", "auto or 1..4", gamma, 1, 4)
    clipped = None if saturation == "off" else _number("--saturation", "off or 1..255", saturation, 1, 255) / 255

    from fastem.batch import deblur_plan, plan_files  # torch loads here, not for --help
    from fastem.io import shown

    chosen = [kind.strip() for kind in save.split(",") if kind.strip()]
    plan = plan_files(images, out, save=chosen, name_by=name_by)
    known = None if kernel is None else console.read_kernel(kernel)

    from fastem.engine import Deblurrer

    with console.options_checked():
        engine = Deblurrer(
            prior, method=method, guidance=guidance, steps=steps, particles=particles, kernel_size=size,
            compat=compat, m_step=m_step, r2_term=r2_term, mode=mode, guard=guard, varying=varying,
            gamma=light, saturation=clipped, boundary=boundary, tile=tile, device=device, backend=backend,
            precision=precision, preset=preset,
        )  # fmt: skip
        if method == "known" and known is None:
            raise ValueError("--method known needs the kernel: give it with --kernel FILE")
        if "std" in chosen and (engine.particles == 1 or engine.mode == "mean" and engine.guidance == "mean"):
            raise ValueError("--save std is the spread of samples: it needs --mode sample and --particles 2 or more")
    with console.Progress(progress) as bar:
        position = {item: index for index, item in enumerate(plan.items, 1)}

        def on_step(item, done: int, total: int) -> None:
            count = f"[{position[item]}/{len(plan.items)}] " if len(plan.items) > 1 else ""
            bar(count + shown(item.source.name), done, total)

        with console.options_checked(RuntimeError):  # a forced backend that cannot run
            outcomes = deblur_plan(
                plan, engine, sigma=level, seed=seed, kernel=known, skip_existing=skip_existing,
                max_pixels=int(max_megapixels * 1e6), max_bytes=int(max_megabytes * 1e6), on_step=on_step,
                batch_size=together,
            )  # fmt: skip
        code = console.show_outcomes(outcomes, plan, progress)
    raise typer.Exit(code)


def _number(option: str, allowed: str, text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or (option == "--kernel-size" and value % 1):
        raise typer.BadParameter(f"{option} is {allowed}, got {text!r}")
    return value


def parse_batch_size(text: str) -> int | str:
    """ "auto", or a whole number from 1 to 1024."""
    if text == "auto":
        return text
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise typer.BadParameter(f"--batch-size is auto or a whole number from 1 to 1024, got {text!r}")
    return int(text)


def parse_sigma(text: str, force: bool = False) -> float | None:
    """Grey levels, as text, to image units; None for "auto".

    Raises:
        typer.BadParameter: if it is no number in 0..255, or looks like another unit and `force` is not set.
    """
    if text == "auto":
        return None
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if not 0 <= level <= 255:  # also catches nan
        raise typer.BadParameter(f"--sigma is auto or a noise std of 0..255 grey levels, got {text!r}")
    if not force and 0 < level < SMALLEST:
        raise typer.BadParameter(
            f"--sigma is in grey levels 0..255; {text} looks like [0, 1] units: did you mean {level * 255:.2g}? "
            f"Use --sigma {level * 255:.2g}, or --force to keep {text}"
        )
    if not force and level > LARGEST:
        raise typer.BadParameter(
            f"--sigma is a std in grey levels; {text} would drown the picture. "
            f"Use --sigma auto, or --force to keep {text}"
        )
    return level / 255
