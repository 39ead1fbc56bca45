"""Makes the picture of the README: the photo of `make demo`, and two of the ten Kodak crops of `recorded.toml`.

    python benchmarks/picture.py DATA -o docs/images/before_after.png

The crops are those whose gains are the two in the middle of the ten (noise of 5 grey levels, borders as in a camera).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import fastem
from fastem import io, metrics, synth

GAP, TILE, INSET = 8, 224, 0.22
KERNEL_SIZE, DEMO_SIZE = 33, 41


def with_kernel(image: np.ndarray, kernel: np.ndarray) -> Image.Image:
    """The image with its kernel in the corner."""
    picture = Image.fromarray(image)
    side = round(INSET * picture.width)
    inset = Image.fromarray(np.round(255 * kernel / kernel.max()).astype(np.uint8)).resize((side, side), Image.NEAREST)
    picture.paste((255, 255, 255), (0, 0, side + 2, side + 2))
    picture.paste(inset, (0, 0))
    return picture


def levels(image: np.ndarray) -> np.ndarray:
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


def crops(data: Path) -> list[tuple[float, np.ndarray, fastem.engine.Restoration]]:
    """Gain, observation and restoration of every Kodak crop."""
    files = [f for folder in ("sharp", "faces") for f in sorted((data / folder).glob("*.png"))]
    given = [io.load_kernel(f)[0] for f in sorted((data / "kernels").glob("*.npy"))]
    given = [k for k in given if max(k.shape) <= KERNEL_SIZE]
    engine, found, half = fastem.Deblurrer(kernel_size=KERNEL_SIZE), [], KERNEL_SIZE // 2
    for number, file in enumerate(files):
        if not file.stem.startswith("kodak"):
            continue
        x = io.read_image(file).pixels.astype(np.float32) / 255
        kernel = synth.pad_kernel(given[number % len(given)], KERNEL_SIZE)
        y = synth.degrade(x, kernel, 5 / 255, number, boundary="valid")
        x = x[half : half + y.shape[0], half : half + y.shape[1]]
        restored = engine(y, sigma=5 / 255, seed=number)
        gain = metrics.psnr_aligned(restored.image, x) - metrics.psnr_aligned(y, x)
        print(f"{file.stem} {gain:+.1f} dB")
        found.append((gain, y, restored))
    return sorted(found, key=lambda item: item[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/images/before_after.png"))
    args = parser.parse_args()
    tiles: list[Image.Image] = []
    ordered = crops(args.data)
    for _, y, restored in ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1]:
        tiles += [Image.fromarray(levels(y)), with_kernel(levels(restored.image), restored.kernel)]
    photo = Path(__file__).parents[1] / "examples" / "blurred.jpg"
    restored = fastem.Deblurrer(kernel_size=DEMO_SIZE)(photo)
    wide = 2 * TILE + GAP
    large = [Image.open(photo).convert("RGB"), with_kernel(restored.image, restored.kernel)]
    large = [p.resize((wide, round(wide * p.height / p.width)), Image.LANCZOS) for p in large]
    page = Image.new("RGB", (2 * wide + GAP, large[0].height + GAP + TILE), "white")
    for i, picture in enumerate(large):
        page.paste(picture, (i * (wide + GAP), 0))
    for i, picture in enumerate(tiles):
        page.paste(picture, (i * (TILE + GAP), large[0].height + GAP))
    with io.atomic_write(args.out) as file:
        page.save(file, "PNG", optimize=True)


if __name__ == "__main__":
    main()
