"""Compile every Triton kernel ahead of time, without a GPU: its registers, spills and shared memory.

    python benchmarks/aot.py [--capability 80 --capability 90] [--json]

The exit status is 1 when a kernel spills.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nascompile.kernels import ALL
from nascompile.kernels.triton_support import compile_ahead


def collect(capabilities: list[int]) -> list[dict[str, Any]]:
    """One row per kernel, case and compute capability. A kernel's cases are in kernels/<name>_triton.py."""
    rows = []
    for module in (*(f"{kernel.name}_triton" for kernel in ALL), "plan.triton_compilations"):
        cases = importlib.import_module(f"nascompile.kernels.{module}").compilations()
        for capability in capabilities:
            rows += [
                {"kernel": case.name, "capability": capability, **asdict(compile_ahead(case, capability))}
                for case in cases
            ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, action="append", help="default: 80 and 90")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    options = parser.parse_args()
    rows = collect(options.capability or [80, 90])
    if options.json:
        print(json.dumps(rows))
    else:
        print(f"{'kernel':36} {'sm':>4} {'registers':>10} {'spilled':>8} {'shared':>7}")
        for row in rows:
            print(
                f"{row['kernel']:36} {row['capability']:>4} {row['registers']:>10} {row['spilled']:>8} "
                f"{row['shared']:>7}"
            )
    return 1 if any(row["spilled"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
