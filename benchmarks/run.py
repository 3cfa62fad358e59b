"""Run the benchmarks of this machine: a table on the terminal, a CSV and a picture in benchmarks/results/.

    python benchmarks/run.py [--suite kernels] [--threads 2] [--no-compile] [--out benchmarks/results]

Correctness comes first: where a comparison fails no ratio is printed, and the exit status is 1. A ratio is
the time of the fastest other peer over ours, so 2.0 means twice as fast as the best of them. Times stand
relative to the fastest median of their case: times of a CPU say nothing on another one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import kernels, lean, linear_choices
from benchmarks.timing import keep_memory, machine

RESULTS = Path(__file__).resolve().parent / "results"
# every suite yields rows with the columns below; a new suite is one file and one line
SUITES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "kernels": kernels.rows,
    "lean": lean.rows,
    "linear_choices": linear_choices.rows,
}
TIMES = ("median", "p20", "p80")
COLUMNS = ("suite", "name", "case", "peer", *TIMES, "ratio", "wrong")


def show(row: dict[str, Any]) -> None:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    line = f"{row['name']:14} {row['case']:22} {row['peer']:30} {row['median']:6.2f}"
    print(f"{line} [{row['p20']:.2f}, {row['p80']:.2f}] {ratio:>7} {row['wrong']}", flush=True)


def relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one case with times in units of its fastest median."""
    fastest = min(row["median"] for row in rows)
    return [{**row, **{name: row[name] / fastest for name in TIMES}} for row in rows]


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """CSV, one row per peer; the machine stands in every row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*COLUMNS, "machine"])
        writer.writeheader()
        for row in rows:
            numbers = {key: f"{row[key]:.3f}" for key in TIMES}
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
            writer.writerow({**row, **numbers, "ratio": ratio, "machine": machine()})


def save_picture(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per case: a bar per peer at its median, with a line from the 20th to the 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((row["suite"], row["name"], row["case"]) for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(9, 1.1 + 1.6 * len(cases)), squeeze=False)
    for panel, case in zip(panels[:, 0], cases, strict=True):
        mine = [row for row in rows if (row["suite"], row["name"], row["case"]) == case]
        medians = [row["median"] for row in mine]
        spread = [
            [max(0.0, row["median"] - row["p20"]) for row in mine],
            [max(0.0, row["p80"] - row["median"]) for row in mine],
        ]
        colours = ["tab:blue" if row["peer"].startswith("nascompile") else "tab:grey" for row in mine]
        panel.barh([row["peer"] for row in mine], medians, xerr=spread, color=colours)
        panel.invert_yaxis()
        panel.set_title(f"{case[1]}: {case[2]}", loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel("time relative to the fastest peer: median, 20th to 80th percentile")
    figure.suptitle(machine(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="default: all of them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile as a peer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    print(machine())
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"the load average is {load:.1f}: other programs are running, do not trust these times",
            file=sys.stderr,
        )
    rows = []
    for suite in options.suite or SUITES:
        found = SUITES[suite](compiled=not options.no_compile)
        for _, case in itertools.groupby(found, key=lambda row: (row["name"], row["case"])):
            for row in relative(list(case)):
                show(row)
                rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    save_table(rows, options.out / "cpu.csv")
    save_picture(rows, options.out / "cpu.png")
    print(f"written: {options.out / 'cpu.csv'}, {options.out / 'cpu.png'}")
    wrong = sorted({row["wrong"] for row in rows if row["wrong"]})
    for problem in wrong:
        print(f"WRONG, no ratio: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
