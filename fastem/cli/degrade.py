"""`fastem degrade`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastem.cli import console
from fastem.cli.deblur import parse_sigma


def degrade(
    images: Annotated[list[Path], typer.Argument(help="sharp image files, or folders of them", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("degraded"),
    sigma: Annotated[str, typer.Option(metavar="0..255", help="noise std in grey levels")] = "5",
    kernel_size: Annotated[int, typer.Option(min=1, max=513, help="side of the kernels, pixels")] = 33,
    kernel: Annotated[Path | None, typer.Option(help="one kernel for all: .npy, or a picture of it")] = None,
    kernel_family: Annotated[
        str, typer.Option(metavar="shake|line|gaussian|...", help="what the drawn kernels look like")
    ] = "shake",
    boundary: Annotated[
        Literal["circular", "valid"],
        typer.Option(help="circular: periodic; valid: as in a camera, smaller by the kernel"),
    ] = "circular",
    seed: Annotated[int, typer.Option(min=0, help="same seed, same kernels and noise")] = 0,
    bits: Annotated[int | None, typer.Option(help="8 or 16 per channel", show_default="as the input")] = None,
    name_by: console.NameBy = "stem",
    force: Annotated[bool, typer.Option("--force", help="accept a --sigma that looks like a mistaken unit")] = False,
    max_megapixels: console.MaxMegapixels = 50.0,
    max_megabytes: console.MaxMegabytes = 64.0,
    progress: console.ProgressOption = "auto",
    debug: console.Debug = False,
) -> None:
    """Blur sharp images and add noise: a test set with known kernels.

    For a.jpg this writes the blurred a.png, a.kernel.npy, a.kernel.png (kernels sum to 1) and a.json with the noise
    level and the seed. Every image gets its own kernel, drawn from the seed and the bytes of the file.
    """
    level = parse_sigma(sigma, force)
    if level is None:
        raise typer.BadParameter("--sigma auto is for fastem deblur; give the noise std to add, in grey levels")
    if bits not in (None, 8, 16):
        raise typer.BadParameter(f"--bits is 8 or 16, got {bits}")

    from fastem.batch import degrade_plan, plan_files
    from fastem.synth import motion_kernel

    with console.options_checked():
        motion_kernel(kernel_size, 0, kernel_family)  # says what is wrong before the work begins
    plan = plan_files(images, out, name_by=name_by)
    known = None if kernel is None else console.read_kernel(kernel)
    outcomes = degrade_plan(
        plan, sigma=level, kernel=known, kernel_size=kernel_size, family=kernel_family, boundary=boundary, seed=seed,
        bits=bits, max_pixels=int(max_megapixels * 1e6), max_bytes=int(max_megabytes * 1e6),
    )  # fmt: skip
    raise typer.Exit(console.show_outcomes(outcomes, plan, progress))
