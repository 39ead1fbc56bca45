"""Writes docs/results.md from finished evaluations; `make results DATA=folder` runs them first.

    python benchmarks/results.py build/results/quick build/results/fig4 -o docs/results.md

Pictures of images whose names do not begin with one of FREE stay out: they may not be passed on.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from fastem import io
from fastem.evaluation import report
from fastem.evaluation.run import read_rows, row_files

FREE = ("synthetic-sharp-kodak24",)  # Kodak's suite was released for any use; the kernels are drawn here
INTRODUCTION = """# Results

Measured by `fastem evaluate` ([evaluation.md](evaluation.md) says how), and written by

```
make results DATA=folder
```

which runs the reduced protocols below on the pictures in that folder (`RESULTS_LIMIT` images each, 8 by default). Each
section says which images, which program and which machine were behind it, and how many images: fewer than eight show
that the machinery works and support no claim. The machine was shared, so read CPU seconds.
"""


def section(folder: Path, images: Path, most_sheets: int) -> list[report.Block]:
    """The report of one evaluation without its closing notes; pictures that may be shown are copied to `images`."""
    blocks, summary = report.build_report(folder)
    name, kept, sheets = summary["run"]["protocol"]["name"], [], 0
    seen = sorted({row["image"] for row in read_rows(row_files(folder))})
    command = f"`fastem evaluate {name} --data folder -o results/{name} --limit {len(seen)}`"
    for block in blocks:
        match block:
            case report.Heading("How to read this" | "Plots" | "Side by side"):
                continue
            case report.Heading(text, level):
                kept.append(report.Heading(text, level + 1))
                if level == 1:
                    kept.append(f"{command}: {len(seen)} images ({', '.join(seen)}).")
            case report.Picture(path):
                is_sheet = path.startswith("sheets/")
                if is_sheet and (sheets == most_sheets or not Path(path).name.startswith(FREE)):
                    continue
                sheets += is_sheet
                target = images / f"results_{name}_{Path(path).name}"
                shutil.copyfile(folder / path, target)
                kept.append(replace(block, path=f"images/{target.name}"))
            case str() if block == report.HOW_TO_READ:
                continue
            case _:
                kept.append(block)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="finished evaluations")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--sheets", type=int, default=2, help="pictures of restorations per evaluation")
    args = parser.parse_args()
    images = args.out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob("results_*.png"):
        old.unlink()
    blocks = [block for folder in args.folders for block in section(folder, images, args.sheets)]
    text = "\n".join([INTRODUCTION, report.markdown([*blocks, report.Heading("How to read this"), report.HOW_TO_READ])])
    with io.atomic_write(args.out) as file:
        file.write(text.encode())
    print(args.out)


if __name__ == "__main__":
    main()
