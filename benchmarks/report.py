"""The table of `benchmarks/README.md` from the JSON files in `benchmarks/results/`: `python benchmarks/report.py`.

Every cell is a figure from a file there; what no file holds stays empty. Where the files of a column come from several
machines, each is a letter, and the figures carry it. `--check` only says whether the table is that of the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import RESULTS

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: written by report.py -->", "<!-- end of the table -->"
FULL_STEPS = 100  # of Fast EM PiGDM


@dataclass(frozen=True)
class Results:
    """The records of one device, by kind; of several of a kind all rows count."""

    records: list[dict]
    read: set[str] = field(default_factory=set)  # places of the rows that were read since the set was emptied

    def places(self) -> dict[str, str]:
        """The machines, in words, and a letter for each if there are several."""
        found = list(dict.fromkeys(place_of(r["environment"]) for r in self.records if r.get("environment")))
        return {place: chr(ord("a") + i) if len(found) > 1 else "" for i, place in enumerate(found)}

    def marked(self, cell: Callable[[Results], str]) -> str:
        """The text of a cell, with the letters of the machines that its figures come from."""
        self.read.clear()
        text = cell(self)
        letters = sorted(filter(None, (self.places()[place] for place in self.read)))
        return f"{text} [{', '.join(letters)}]" if text and letters else text

    def of(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["kind"] == kind]

    def rows(self, kind: str, **wanted) -> Iterator[dict]:
        for record in self.of(kind):
            for row in record["rows"]:
                if all(row.get(name, record.get(name)) == value for name, value in wanted.items()):
                    if record.get("environment"):
                        self.read.add(place_of(record["environment"]))
                    yield {**{k: v for k, v in record.items() if k != "rows"}, **row}

    def ratio(self, kind: str, **wanted) -> str:
        """The ratio of the first row that fits, with its quartiles."""
        for row in self.rows(kind, **wanted):
            ratio, low, high = (f"{v:.3g}" for v in (row["ratio"], *row["ratio_quartiles"]))
            return f"{ratio}x" + (f" ({low} to {high})" if row["rounds"] > 1 else "")
        return ""


def place_of(environment: dict) -> str:
    """A machine and what ran there."""
    threads = environment["threads"]
    return (
        f"{environment['device']}, {threads} thread{'s' * (threads != 1)}, torch {environment['torch']}, "
        f"{environment['native']}"
    )


def load(folder: Path) -> dict[str, Results]:
    """Results by device type. Records of pytest-benchmark and of `fastem profile` get rows and a kind here."""
    found: dict[str, list[dict]] = {"cpu": [], "cuda": []}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in record:
            rows = [_group_row(b) for b in record["benchmarks"]]
            record = {**record["fastem"], "date": record["datetime"][:10], "rows": rows}
        elif "stages" in record:
            row = record.get("graphs") or record["step"]  # as the engine runs it, where that was measured
            record = {"kind": "profile", "device": record["workload"]["device"], "rows": [row], **record}
        found[record["device"]].append(record)
    return {device: Results(records) for device, records in found.items()}


def _group_row(benchmark: dict) -> dict:
    info = benchmark["extra_info"]
    seconds = benchmark["stats"]["median"] / info["calls_per_round"]
    return {"group": benchmark["group"], "seconds": seconds, **info}


# ------------------------------------------------------------------------------------------------ cells


def released_ratio(n: int) -> Callable[[Results], str]:
    return lambda results: results.ratio("reference", part="run", particles=n)


def throughput(results: Results) -> str:
    """Images per second at the largest batch of at least 16, and against the released program one at a time."""
    rows = [r for r in results.rows("scaling", net="ffhq-random", guidance="pigdm", size=256) if r["batch"] >= 16]
    if not rows:
        return ""
    best = max(rows, key=lambda row: row["batch"])
    rate = 1e3 * best["batch"] / (best["wall_ms"] * FULL_STEPS)
    text = f"{rate:.2f} images/s (B = {best['batch']})"
    for row in results.rows("reference", part="run", particles=1, steps=FULL_STEPS):
        text += f", {rate * row['median_ms']['released'] / 1e3:.1f}x"
    return text


def mstep_ratio(n: int) -> Callable[[Results], str]:
    """With recentring; against the released program where it ran, else against the same loop in plain torch."""
    return lambda results: (
        results.ratio("reference", part="mstep", particles=n)
        or results.ratio("mstep", particles=n, recentre=True, size=256, kernel_size=33)
    )


def sustained(batch: int) -> Callable[[Results], str]:
    def cell(results: Results) -> str:
        wanted = {"group": "unet", "net": "ffhq-random", "task": "forward + VJP", "engine": "fastem"}
        rates = [r["flops"] / r["seconds"] / 1e12 for r in results.rows("groups", **wanted) if r["B"] == batch]
        return f"{max(rates):.0f} TFLOP/s" if rates else ""

    return cell


def against_compiled(results: Results) -> str:
    """Steps with the network as fastem runs it against torch.compile, float16, by particles."""
    wanted = {"group": "step", "net": "ffhq-random", "dtype": "float16"}
    times = {(r["n"], r["engine"]): r["seconds"] for r in results.rows("groups", **wanted)}
    pairs = [(n, times[n, "compiled"] / t) for (n, engine), t in times.items()
             if engine == "fastem" and (n, "compiled") in times]  # fmt: skip
    return ", ".join(f"{ratio:.2f}x (n = {n})" for n, ratio in sorted(pairs))


def of_roofline(group: str) -> Callable[[Results], str]:
    """The time the bytes and FLOPs need at the measured peaks, as a part of the measured time; the best size."""

    def cell(results: Results) -> str:
        rows = results.rows("groups", group=group, backend="native")
        parts = [100e-6 * row["floor_us"] / row["seconds"] for row in rows]
        return f"{max(parts):.0f} %" if parts else ""

    return cell


def waits(results: Results) -> str:
    for row in results.rows("profile"):
        if row.get("syncs_per_step") is not None:
            return f"{row['syncs_per_step']:g} waits, {row['gpu_idle_percent']:.1f} % idle"
    return ""


NOT_HERE = None  # a figure that only the other device has
Cell = Callable[[Results], str] | None

ROWS: list[tuple[str, str, Cell, Cell]] = [  # what, must, on the CPU, on the GPU
    ("latency n = 1 against the released program", ">= 5x", NOT_HERE, released_ratio(1)),
    ("latency n = 4", ">= 3x", NOT_HERE, released_ratio(4)),
    ("latency n = 16", ">= 3x", NOT_HERE, released_ratio(16)),
    ("throughput, B >= 16, against the released program one at a time", ">= 10x", NOT_HERE, throughput),
    ("M-step with recentring, n = 1", ">= 15x (GPU), 4x (CPU)", mstep_ratio(1), mstep_ratio(1)),
    ("M-step with recentring, n = 16", ">= 15x (GPU), 20x (CPU)", mstep_ratio(16), mstep_ratio(16)),
    ("sustained, forward + VJP, B = 1", ">= 200 TFLOP/s", NOT_HERE, sustained(1)),
    ("sustained, forward + VJP, B = 16", ">= 300 TFLOP/s", NOT_HERE, sustained(16)),
    ("a step against torch.compile, float16, channels last", ">= 1.5x (n = 1), 1.3x", NOT_HERE, against_compiled),
    ("guidance kernel, of the roofline", "", of_roofline("guidance"), of_roofline("guidance")),
    ("update kernel, of the roofline", "", of_roofline("update"), of_roofline("update")),
    ("GroupNorm + SiLU kernel, of the roofline", "", of_roofline("groupnorm_silu"), of_roofline("groupnorm_silu")),
    ("waits for the GPU in a step, and GPU idle", "0, < 3 %", NOT_HERE, waits),
    ("small U-Net forward + VJP against eager", ">= 1.3x (CPU)",
     lambda r: r.ratio("unet", net="small-random", task="forward + VJP", threads=1), NOT_HERE),
    ("bundled prior forward against eager", "",
     lambda r: r.ratio("unet", net="natural", task="forward", size=256, threads=1), NOT_HERE),
    ("bundled prior forward + VJP against eager", "",
     lambda r: r.ratio("unet", net="natural", task="forward + VJP", size=256, threads=1), NOT_HERE),
    ("whole step against plain torch, n = 1", ">= 1.5x (CPU)",
     lambda r: r.ratio("step", particles=1, guidance="mean", size=256, threads=1), NOT_HERE),
    ("whole step against plain torch, n = 4", ">= 1.5x (CPU)",
     lambda r: r.ratio("step", particles=4, guidance="mean", size=256, threads=1), NOT_HERE),
]  # fmt: skip


def table(results: dict[str, Results]) -> str:
    lines = ["| figure | must | CPU | GPU |", "|---|---|---|---|"]
    for what, must, cpu, gpu in ROWS:
        columns = (("cpu", cpu), ("cuda", gpu))
        cells = [("-" if cell is NOT_HERE else results[device].marked(cell)) for device, cell in columns]
        lines.append(f"| {what} | {must} | {' | '.join(cells)} |")
    return "\n".join(lines + ["", *places(results)])


def places(results: dict[str, Results]) -> list[str]:
    """Where the figures of each column were measured."""
    lines = []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        records, told = results[device].records, []
        for place, letter in results[device].places().items():
            here = [r for r in records if r.get("environment") and place_of(r["environment"]) == place]
            dates = sorted({record["date"] for record in here if "date" in record})
            told.append(f"{f'[{letter}] ' * bool(letter)}{', '.join([place, *dates])}")
        lines.append(f"{name}: {'; '.join(told) or 'not measured'}.  ")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the table is another")
    args = parser.parse_args(arguments)
    text = args.readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        print(f"report: {args.readme} has no place for the table; put {BEGIN} and {END} there", file=sys.stderr)
        return 2
    head, rest = text.split(BEGIN)
    written = f"{head}{BEGIN}\n{table(load(args.results))}\n{END}{rest.split(END)[1]}"
    if args.check:
        return int(written != text)
    args.readme.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
