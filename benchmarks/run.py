"""Run the benchmarks of this machine: a table on the terminal, a CSV and a picture in benchmarks/results/.

    python benchmarks/run.py [--suite kernels] [--threads 2] [--no-compile] [--out benchmarks/results]
    python benchmarks/run.py --suite spaces --rows darts16,nb201 [--small] [--device cuda]
    python benchmarks/run.py --suite population --rows darts,mbconv [--small]

Correctness comes first: where a comparison fails no ratio is printed, and the exit status is 1. A ratio is
the time of the fastest other peer over ours, so 2.0 means twice as fast as the best of them. Times stand
relative to the fastest median of their case, and memory to the leanest peer: times of a CPU say nothing on
another one. Of a GPU, times are milliseconds and memory is MiB.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import kernels, lean, linear_choices, population, spaces
from benchmarks.timing import keep_memory, machine

RESULTS = Path(__file__).resolve().parent / "results"
# every suite yields the rows of a case as soon as it is measured, with the columns below; a new suite is one
# file and one line
SUITES: dict[str, Callable[..., Iterator[list[dict[str, Any]]]]] = {
    "kernels": kernels.rows,
    "lean": lean.rows,
    "linear_choices": linear_choices.rows,
    "population": population.rows,
    "spaces": spaces.rows,
}
TIMES = ("median", "p20", "p80")
COLUMNS = ("suite", "name", "case", "peer", *TIMES, "ratio", "wrong")
# of the suites that measure them; compiling stands in seconds, so only where times are absolute
MORE = ("memory", "memory_ratio", "arithmetic", "compiling", "note")


def show(row: dict[str, Any]) -> None:
    line = f"{row['name']:18} {row['case']:22} {row['peer']:30} {number(row['median'], '6.2f')}"
    spread = "" if row["median"] is None else f"[{row['p20']:.2f}, {row['p80']:.2f}]"
    memory = f"memory {row['memory']:.2f}" if row.get("memory") else ""
    ratios = [f"{row[name]:.2f}x" for name in ("ratio", "memory_ratio") if row.get(name) is not None]
    print(
        *(part for part in (line, spread, memory, *ratios, row["wrong"], row.get("note")) if part), flush=True
    )


def number(value: float | None, form: str) -> str:
    """A number in a form; nothing where there is none."""
    return "" if value is None else format(value, form)


def relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one case with times and memory in units of its smallest; without seconds of compiling."""
    units = {name: smallest(rows, "median") for name in TIMES} | {"memory": smallest(rows, "memory")}
    return [
        {
            **row,
            **{name: row[name] / unit for name, unit in units.items() if row.get(name) is not None},
            "compiling": None,
        }
        for row in rows
    ]


def smallest(rows: list[dict[str, Any]], name: str) -> float:
    """The smallest number under a name, 1 where there is none."""
    return min((row[name] for row in rows if row.get(name)), default=1.0)


def save_table(rows: list[dict[str, Any]], path: Path, where: str) -> None:
    """CSV, one row per peer; the machine stands in every row."""
    more = [name for name in MORE if any(row.get(name) not in (None, "") for row in rows)]
    columns = [*COLUMNS, *more, "machine"]
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items() if v is not None}
            writer.writerow({**cells, "machine": where})
    partial.replace(path)


def save_picture(rows: list[dict[str, Any]], path: Path, where: str, unit: str) -> None:
    """One panel per case: a bar per peer at its median, with a line from the 20th to the 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((row["suite"], row["name"], row["case"]) for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(9, 1.1 + 1.6 * len(cases)), squeeze=False)
    for panel, case in zip(panels[:, 0], cases, strict=True):
        mine = [row for row in rows if (row["suite"], row["name"], row["case"]) == case]
        medians = [row["median"] or 0.0 for row in mine]
        spread = [
            [max(0.0, row["median"] - row["p20"]) if row["median"] else 0.0 for row in mine],
            [max(0.0, row["p80"] - row["median"]) if row["median"] else 0.0 for row in mine],
        ]
        colours = ["tab:blue" if row["peer"].startswith("nascompile") else "tab:grey" for row in mine]
        panel.barh([row["peer"] for row in mine], medians, xerr=spread, color=colours)
        for index, row in enumerate(mine):
            text = label(row)
            end = medians[index] + spread[1][index]
            panel.annotate(
                text, (end, index), (4, 0), textcoords="offset points", va="center", fontsize=7, color="0.3"
            )
        panel.set_xlim(0, 1.3 * max([m + s for m, s in zip(medians, spread[1], strict=True)] + [1e-9]))
        panel.invert_yaxis()
        panel.set_title(f"{case[1]}: {case[2]}", loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel(f"{unit}: median, 20th to 80th percentile")
    figure.suptitle(where, fontsize=8)
    figure.tight_layout()
    partial = path.with_name(f".partial-{path.name}")
    figure.savefig(partial, dpi=120)
    partial.replace(path)
    pyplot.close(figure)


def label(row: dict[str, Any]) -> str:
    """What stands beside a bar: why there is none, or ratio and memory."""
    if row["wrong"]:
        return "WRONG RESULT"
    if row["median"] is None:
        return row.get("note", "")[:80]
    parts = [] if row["ratio"] is None else [f"{row['ratio']:.2f}x as fast as the fastest other"]
    if row.get("memory"):
        parts.append(f"memory {row['memory']:.2f}")
    return ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="default: all of them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile as a peer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    of_both = parser.add_argument_group("of the suites spaces and population")
    names = f"some of {','.join(spaces.CASES)} (spaces), {','.join(population.SPACES)} (population)"
    of_both.add_argument("--rows", help=f"{names}; default: all of them")
    of_both.add_argument("--small", action="store_true", help="small models: whether all works, not how fast")
    of_spaces = parser.add_argument_group("of the suite spaces")
    of_spaces.add_argument("--device", default="cpu")
    of_spaces.add_argument("--seconds", type=float, default=10.0, help="of timed steps, for each peer")
    of_spaces.add_argument("--compile-limit", type=float, default=900.0, help="seconds")
    of_spaces.add_argument("--samples", type=int, default=spaces.SAMPLES, help="paths drawn to count plans")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"the load average is {load:.1f}: other programs are running, do not trust these times",
            file=sys.stderr,
        )
    suites = options.suite or list(SUITES)
    try:
        names = choose(options.rows, suites, small=options.small)
    except ValueError as problem:
        parser.error(str(problem))
    arguments: dict[str, dict[str, Any]] = {
        "population": {"names": names["population"], "small": options.small},
        "spaces": {
            "names": names["spaces"],
            "small": options.small,
            "seconds": options.seconds,
            "limit": options.compile_limit,
            "threads": options.threads,
            "device": options.device,
            "samples": options.samples,
            "say": lambda line: print(line, file=sys.stderr, flush=True),
        },
    }
    on_gpu = options.device.startswith("cuda")
    where = machine() if on_gpu or not torch.cuda.is_available() else f"CPU of: {machine()}"
    print(where)
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    for stem, mine in files(suites).items():
        rows: list[dict[str, Any]] = []
        path = options.out / f"{'gpu' if on_gpu else 'cpu'}{stem}"
        for suite in mine:
            found = SUITES[suite](compiled=not options.no_compile, **arguments.get(suite, {}))
            for case in found:
                for row in case if on_gpu else relative(case):
                    show(row)
                    rows.append(row)
                # after every case: what has been measured is kept when the rest is interrupted
                save_table(rows, path.with_suffix(".csv"), where)
        unit = "milliseconds" if on_gpu else "time relative to the fastest peer"
        save_picture(rows, path.with_suffix(".png"), where, unit)
        print(f"written: {path.with_suffix('.csv')}, {path.with_suffix('.png')}")
        wrong += sorted({row["wrong"] for row in rows if row["wrong"]})
    for problem in wrong:
        print(f"WRONG, no ratio: {problem}", file=sys.stderr)
    return 1 if wrong else 0


def choose(rows: str | None, suites: list[str], *, small: bool) -> dict[str, list[str] | None]:
    """For every suite with rows that have names, those to run; None for all.

    Raises ValueError for a name that none of the suites has.
    """
    known = {"spaces": [*(spaces.SMALL if small else spaces.CASES)], "population": [*population.SPACES]}
    if not rows:
        return dict.fromkeys(known)
    names = rows.split(",")
    there = [name for suite in suites for name in known.get(suite, ())]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}; rows of {', '.join(suites)}: {', '.join(there)}")
    return {suite: [name for name in names if name in own] for suite, own in known.items()}


def files(suites: list[str]) -> dict[str, list[str]]:
    """The suites by the end of the name of their files: spaces take hours, and have files of their own."""
    found: dict[str, list[str]] = {}
    for suite in suites:
        found.setdefault("_spaces" if suite == "spaces" else "", []).append(suite)
    return found


if __name__ == "__main__":
    sys.exit(main())
