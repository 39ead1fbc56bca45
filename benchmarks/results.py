"""Writes docs/results.md from finished evaluations; `make results DATA=folder` runs them first.

    python benchmarks/results.py build/results/public build/results/fig4 --data folder -o docs/results.md

Pictures of images whose names do not begin with one of FREE stay out: they may not be passed on.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from fastem import io
from fastem.evaluation import report
from fastem.evaluation.cases import KEY, list_cases
from fastem.evaluation.protocol import Protocol, parse_protocol
from fastem.evaluation.run import Row, read_folder, read_run, row_files
from fastem.evaluation.statistics import bootstrap_mean

FREE = ("synthetic-sharp-kodak24",)  # Kodak's suite was released for any use; the kernels are drawn here
RELEASED = "Fast EM, released"
LOW_NOISE = ("5", "10")
NAMED = 8  # a section names its images where there are no more than these
# Tables kept beside those of all cases.
PARTS = {"public": "sigma", "recorded": "sigma", "borders": "sigma", "fig5": "images of", "pairs": "images of"}
INTRODUCTION = """# Results

Measured by `fastem evaluate` ([evaluation.md](evaluation.md) says how), and written by `benchmarks/results.py`.

```
make results DATA=folder
```

runs both on the pictures in that folder, with fewer cases where a protocol takes long (`RESULTS_PUBLIC=1/1` and its
like take more of them): each section says by which command, on which images, with which program and machine it was
measured, and how many cases there are. Some choices of the search, and up to which width of edges the guard doubts a
blur, were made on pictures measured here; what it takes for proof was chosen on others
([architecture.md](architecture.md#how-the-kernel-is-found)). A section keeps the tables of all cases and few others;
those by noise, border, images and kernels are in the `report.md` that `fastem evaluate` writes. A mean over fewer than
eight images supports no claim, whatever the last column of the first table says. The machine was shared, so read CPU
seconds."""


# ------------------------------------------------------------------------------------------------ wanted and reached


class Figure(NamedTuple):
    value: float  # compared with what is wanted
    text: str


def pick(rows: list[Row], method: str, **where: tuple[str, ...]) -> list[Row]:
    """The rows of a method; `where` lists what a column may hold."""
    return [row for row in rows if row["method"] == method and all(row[k] in v for k, v in where.items())]


def both(rows: list[Row], a: str, b: str, name: str = "psnr_aligned") -> list[tuple[Row, Row]]:
    """The rows of two methods that have a figure on the same observation; one that two protocols share counts once."""
    found = report.common_cases([row for row in rows if math.isfinite(row.get(name, math.nan))], [a, b])
    return list(zip(found[a], found[b], strict=True))


def minus(rows: list[Row], a: str, b: str) -> list[Row]:
    """The rows of a with their `difference`: aligned PSNR over that of b."""
    return [x | {"difference": x["psnr_aligned"] - y["psnr_aligned"]} for x, y in both(rows, a, b)]


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def average(rows: list[Row], name: str, form: str = "+.2f", unit: str = " dB") -> Figure | None:
    """The mean, with an interval that counts images."""
    if not (values := report.per_image(rows, name)):
        return None
    mean, low, high = bootstrap_mean(values)
    interval = "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"
    cases = counted(sum(name in row for row in rows), "case")
    if errors := sum("error" in row for row in rows):
        cases += f", and {counted(errors, 'error')}"
    return Figure(mean, f"{mean:{form}}{interval}{unit} ({counted(len(values), 'image')}, {cases})")


def difference(rows: list[Row], a: str, b: str) -> Figure | None:
    return average(minus(rows, a, b), "difference")


def share(holding: int, of: int) -> Figure | None:
    if not of:
        return None
    percent = 100 * holding / of
    return Figure(percent, f"{percent:.1f} % ({holding} of {counted(of, 'case')})")


def median_correlation(rows: list[Row]) -> Figure | None:
    if not (values := [row["kernel_correlation"] for row in rows if "kernel_correlation" in row]):
        return None
    median = statistics.median(values)
    return Figure(median, f"{median:.3f} ({counted(len(values), 'case')})")


def known_image(rows: list[Row], sigma: str) -> Figure | None:
    ours, released = (
        average(pick(rows, method, sigma=(sigma,)), "kernel_error", ".4f", "")
        for method in ("simplex", "pnp, released")
    )
    return ours and Figure(ours.value, f"{ours.text}; pnp, released: {released.text if released else 'not measured'}")


def better(rows: list[Row]) -> Figure | None:
    """An error is a loss."""
    found = report.common_cases(rows, ["fastem", RELEASED])
    pairs = [[row.get("psnr_aligned", -math.inf) for row in case] for case in zip(*found.values(), strict=True)]
    return share(sum(ours > theirs for ours, theirs in pairs), len(pairs))


def cost(rows: list[Row], method: str, released: str = RELEASED) -> Figure | None:
    """Work over that of the released program, on the cases that both have; less PSNR is no saving."""
    pairs, psnr = both(rows, method, released, "gflop"), difference(rows, method, released)
    if not pairs or psnr is None:
        return None
    ours, theirs = (statistics.mean(row["gflop"] for row in of) for of in zip(*pairs, strict=True))
    value = ours / theirs if psnr.value >= 0 else math.inf
    return Figure(value, f"{ours / theirs:.3f} ({ours:.0f} / {theirs:.0f} GFLOP); PSNR {psnr.text}")


def failures(rows: list[Row]) -> Figure | None:
    low, high = (
        share(sum(row.get("gain", -1) < 0 for row in of), len(of))  # an error is one
        for of in (pick(rows, "fastem", sigma=LOW_NOISE), pick(rows, "fastem", sigma=("20",)))
    )
    return low and Figure(low.value, f"{low.text}; sigma 20: {high.text if high else 'not measured'}")


def no_blur(rows: list[Row], method: str = "fastem") -> Figure | None:
    errors = [row | {"difference": -math.inf} for row in pick(rows, method) if "error" in row]
    if not (found := [*minus(rows, method, "denoising"), *errors]):
        return None
    worst, within = min(found, key=lambda row: row["difference"]), sum(row["difference"] >= -0.5 for row in found)
    text = f"{worst['difference']:+.2f} dB" if not errors else "an error"
    text += f" ({worst['image']}, sigma {worst['sigma']})"
    return Figure(worst["difference"], f"{text}; {within} of {counted(len(found), 'case')} hold")


def deltas(rows: list[Row]) -> Figure | None:
    found = pick(rows, "fastem")
    return share(sum(row.get("kernel_correlation", 0) > 1 - 1e-6 for row in found), len(found))


def behind(rows: list[Row], sigma: str) -> Figure | None:
    """Circular minus valid, of the same image, kernel and noise: a shard holds one of them without the other."""
    circular, valid = (
        {
            (row["image"], row["kernel"]): row
            for row in pick(rows, "fastem", sigma=(sigma,), boundary=(edge,))
            if "gain" in row
        }
        for edge in ("circular", "valid")
    )
    return average(
        [row | {"difference": row["gain"] - valid[key]["gain"]} for key, row in circular.items() if key in valid],
        "difference",
    )


def largest(rows: list[Row], a: str, b: str) -> Figure | None:
    if not (found := [abs(row["difference"]) for row in minus(rows, a, b)]):
        return None
    return Figure(max(found), f"{max(found):.3f} dB at most ({counted(len(found), 'case')})")


@dataclass(frozen=True)
class Wanted:
    """A figure that is wanted, and how it is found in the rows of its protocols, separated by blanks."""

    what: str
    wanted: str  # `>=` or `<=`, a number, a unit; empty for information
    protocols: str
    find: Callable[[list[Row]], Figure | None]

    def line(self, rows: dict[str, list[Row]]) -> list[str]:
        """A row of the table, from the rows of each protocol that was run; it names those that change the figure."""

        def found(names: list[str]) -> Figure | None:
            return self.find([row for name in names for row in rows.get(name, [])])

        names = self.protocols.split()
        figure = found(names)
        names = [name for name in names if found([n for n in names if n != name]) != figure] or names
        text, holds = (figure.text, "") if figure else ("", "not measured")
        if figure and self.wanted:
            sign, bound, *_ = self.wanted.split()
            holds = "yes" if (figure.value >= float(bound) if sign == ">=" else figure.value <= float(bound)) else "no"
        return [self.what, self.wanted or "information", text, ", ".join(names), holds]


SOURCES = {"lai_pairs": "Lai et al.", "fastdiffusionem": "published samples", "gopro_pairs": "GoPro"}
KERNELS = (("", "public"), ("recorded kernels alone: ", "recorded"))
WANTED = [
    *(Wanted(f"{prefix}gain of blind restoration over its input, sigma 5 and 10", ">= 3 dB", name,
             lambda rows: average(pick(rows, "fastem", sigma=LOW_NOISE), "gain")) for prefix, name in KERNELS),
    *(Wanted(f"{prefix}median correlation of the kernel with the true one", ">= 0.8", name,
             lambda rows: median_correlation(pick(rows, "fastem", sigma=LOW_NOISE))) for prefix, name in KERNELS),
    *(Wanted(f"relative error of the kernel, sharp image known, sigma {sigma}", f"<= {bound}", "fig4",
             partial(known_image, sigma=sigma)) for sigma, bound in (("5", 0.02), ("10", 0.05), ("20", 0.12))),
    Wanted("fastem minus Fast EM, released", ">= 1 dB", "table1 fig5 public",
           partial(difference, a="fastem", b=RELEASED)),
    Wanted("cases in which fastem is the better one", ">= 80 %", "table1 fig5 public", better),
    Wanted("PiGDM with the true kernel, minus fastem", "<= 1 dB", "table1 public",
           partial(difference, a="PiGDM, true kernel", b="fastem")),
    *(Wanted(f"{prefix}fastem with the true kernel, minus fastem", "", name,
             partial(difference, a="fastem, true kernel", b="fastem")) for prefix, name in KERNELS),
    Wanted("work over that of Fast EM, released, at no less PSNR: 6 steps", "<= 0.2", "fig1",
           partial(cost, method="6 steps", released="released, 100 steps")),
    Wanted("the same of the default", "", "table1 fig5", partial(cost, method="fastem")),
    Wanted("the same of the preset turbo", "", "robust table1 fig5", partial(cost, method="fastem, turbo")),
    *(Wanted(f"{prefix}cases worse than their input, sigma 5 and 10", "<= 2 %", name, failures)
      for prefix, name in KERNELS),
    Wanted("no blur: fastem minus denoising, worst case", ">= -0.5 dB", "noblur", no_blur),
    Wanted("no blur: kernels that are a delta", ">= 100 %", "noblur", deltas),
    Wanted("the same with the noise estimated: fastem minus denoising", ">= -0.5 dB", "noblur",
           partial(no_blur, method="fastem, sigma unknown")),
    *(Wanted(f"{prefix}gain, circular minus valid, sigma {sigma}", "<= 0.5 dB", name, partial(behind, sigma=sigma))
      for prefix, name in (*KERNELS, ("the same part of the scene in both: ", "borders")) for sigma in LOW_NOISE),
    Wanted("noise not known, minus known", ">= -0.1 dB", "robust",
           partial(difference, a="fastem, sigma unknown", b="fastem")),
    Wanted("size of the kernel not known, minus known", ">= -0.3 dB", "robust",
           partial(difference, a="fastem, kernel size auto", b="fastem")),
    Wanted("varying on uniform blur, difference from fastem", "<= 0.01 dB", "robust",
           partial(largest, a="fastem, varying", b="fastem")),
    *(Wanted(f"gain, {label}, mode {mode}", "", "pairs",
             lambda rows, source=source, method=method: average(pick(rows, method, source=(source,)), "gain"))
      for source, label in SOURCES.items() for mode, method in (("mean", "fastem"), ("sample", "fastem, sample"))),
    Wanted("preset turbo minus fastem", "", "robust", partial(difference, a="fastem, turbo", b="fastem")),
    Wanted("mode sample minus fastem", "", "robust", partial(difference, a="fastem, sample", b="fastem")),
]  # fmt: skip
HOW_TO_READ_WANTED = (
    "Means and, in brackets, 95 % intervals; the settings of one image are averaged first. What holds is the figure "
    "itself, not the end of its interval. PSNR is aligned; differences are those of two methods on the same "
    "observation."
)


def wanted_and_reached(rows: dict[str, list[Row]]) -> list[report.Block]:
    """What is wanted of the project beside what the rows of each protocol say."""
    table = report.Table(["what", "wanted", "reached", "protocol", "holds"], [wanted.line(rows) for wanted in WANTED])
    return [report.Heading("Wanted and reached"), table, HOW_TO_READ_WANTED]


# ----------------------------------------------------------------------------------------------------------- sections


def command(folder: Path, data: Path) -> str:
    """What was typed for the rows in a folder, and its images."""
    run, rows = read_run(folder), read_folder(folder)
    name, table = run["protocol"]["name"], {k: v for k, v in run["protocol"].items() if k != "name"}
    protocol = parse_protocol(table, name)
    found = [re.fullmatch(r"rows\.(\d+)of(\d+)\.csv", file.name) for file in row_files(folder)]
    shards = [(1, 1)] if None in found else [(int(m[1]), int(m[2])) for m in found]
    seen = {tuple(row[k] for k in KEY) for row in rows}
    for parts in ([(1, 1)], shards):  # all of them come to the same as one
        limit, finished = given_limit(protocol, data, parts, seen)
        if finished:
            break
    methods = [method for method in protocol.methods if method in run["configs"]]
    typed = f"fastem evaluate {name} --data folder -o results/{name}"
    typed += f" --limit {limit}" if limit else ""
    typed += f' --methods "{",".join(methods)}"' if len(methods) < len(protocol.methods) else ""
    lines = [f"`{typed} --shard {i}/{n}`" if n > 1 else f"`{typed}`" for i, n in parts]
    images = sorted({(row["set"], row["image"]) for row in rows})
    sets = Counter(of for of, _ in images)
    told = [f"{count} of {of}" for of, count in sets.items()] if len(images) > NAMED else [image for _, image in images]
    ending = "" if finished else " The run is not finished, or its pictures changed since."
    return f"{', '.join(lines)}: {counted(len(images), 'image')} ({', '.join(told)}).{ending}"


def given_limit(protocol: Protocol, data: Path, shards: list[tuple[int, int]], seen: set) -> tuple[int | None, bool]:
    """The `--limit` that leads to these cases, None for all images; and whether there is one."""
    most = 1 + max(case.number for case in list_cases(protocol, data))
    for limit in (None, *range(1, most)):
        keys = [case.key for case in list_cases(protocol, data, limit)]
        if seen == {key for i, n in shards for key in keys[i - 1 :: n]}:
            return limit, True
    return None, False


def section(folder: Path, data: Path, images: Path, most_sheets: int) -> list[report.Block]:
    """The main tables of one evaluation; pictures that may be shown are copied to `images`."""
    blocks, summary = report.build_report(folder)
    name, kept, sheets, keep, held_back = summary["run"]["protocol"]["name"], [], 0, True, False
    for block in blocks:
        match block:
            case report.Heading(text, 1):
                kept += [report.Heading(text), command(folder, data)]
            case report.Heading("Plots" | "Side by side"):
                keep = True
            case report.Heading(text):
                keep = text.lower().endswith("all cases") or text.lower().startswith(PARTS.get(name, "metrics of"))
                kept += [report.Heading(text, 3)] if keep else []
            case report.Picture(path):
                is_sheet = path.startswith("sheets/")
                if is_sheet and not Path(path).name.startswith(FREE):
                    held_back = True
                    continue
                if is_sheet and sheets == most_sheets:
                    continue
                sheets += is_sheet
                target = images / f"results_{name}_{Path(path).name}"
                shutil.copyfile(folder / path, target)
                kept.append(replace(block, path=f"images/{target.name}"))
            case _ if keep:
                kept.append(block)
    if held_back and not sheets:
        kept.append("Its pictures side by side may not be passed on; they lie where it was run, in `sheets/`.")
    return kept


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="finished evaluations, one of a protocol")
    parser.add_argument("--data", type=Path, required=True, help="what they were given with --data")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--sheets", type=int, default=2, help="pictures of restorations per evaluation")
    args = parser.parse_args(given)
    images = args.out.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for old in images.glob("results_*.png"):
        old.unlink()
    rows = {read_run(folder)["protocol"]["name"]: read_folder(folder) for folder in args.folders}
    blocks = [INTRODUCTION, *wanted_and_reached(rows)]
    blocks += [block for folder in args.folders for block in section(folder, args.data, images, args.sheets)]
    text = report.markdown([*blocks, report.Heading("How to read this"), report.HOW_TO_READ])
    with io.atomic_write(args.out) as file:
        file.write(text.encode())
    print(args.out)


if __name__ == "__main__":
    main()
