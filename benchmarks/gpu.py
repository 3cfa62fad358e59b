"""Everything there is to do with a GPU that is lent for minutes, in one call and without a network:

    python3 benchmarks/gpu.py [--out folder] [--skip-build] [--skip-ncu]

1. build the extension in place, with the CUDA kernels where nvcc is there;
2. compare every Triton and CUDA kernel with its reference, over all samples and types;
3. time them against the plain expression and torch.compile, in fp32 and bf16, next to the time of a copy;
4. profile the slowest of our kernels with ncu, where it is installed;
5. with --plans: check and time whole networks, see benchmarks/gpu_plans.py (up to eight minutes more).

Results: gpu.csv, gpu.txt (the log) and ncu.txt in the folder. The exit status is 1 where a comparison fails;
then no ratio is printed.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TIMES = ("median_ms", "p20_ms", "p80_ms", "gb_per_s", "ratio")
COLUMNS: list[str] = ["name", "case", "dtype", "peer", *TIMES, "gpu", "versions"]
SHAPES = ((8, (256, 16, 32, 32)), (8, (256, 64, 8, 8)), (8, (64, 64, 56, 56)), (3, (256, 16, 32, 32)))


class Log:
    """Prints, and keeps what was printed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        self.file.write(text + "\n")
        self.file.flush()


def build(log: Log) -> None:
    """Build the extension in place; what the build says goes to the log where it fails."""
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (result.stdout + result.stderr).splitlines()
    for line in lines[-40:] if result.returncode else [line for line in lines if "nascompile:" in line]:
        log(line)
    log(f"build: exit status {result.returncode}")


def random_arguments(count: int, shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    import torch

    maps = [torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(count)]
    return maps, torch.randn(count, device="cuda").softmax(0).detach().requires_grad_()


def steps(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> dict[str, tuple[Callable[[], object], int]]:
    """Forward, and forward with backward: each with the bytes that have to move at least."""
    import torch

    maps, weights = arguments
    size, count = maps[0].nbytes, len(maps)
    grad = torch.randn_like(maps[0])
    leaves = [*maps, weights]

    def forward() -> object:
        with torch.no_grad():
            return function(maps, weights)

    def both() -> object:
        return torch.autograd.grad(function(maps, weights), leaves, grad)

    # forward reads the maps and writes one; backward reads the gradient and the maps, writes their gradients
    return {"forward": (forward, (count + 1) * size), "both": (both, (count + 1 + 2 * count + 1) * size)}


def measure(log: Log, *, wrong: bool) -> list[dict[str, Any]]:
    """One row per shape, type, direction and peer."""
    import torch

    from benchmarks.timing import time_on_gpu
    from nascompile.kernels.mixed_sum import KERNEL, eager, mixed_sum

    device = torch.device("cuda")
    ours = [found.name for found in KERNEL.implementations if found.why_not(device) is None]
    ours.remove("reference")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for count, shape in SHAPES:
            torch._dynamo.reset()
            arguments = random_arguments(count, shape, dtype)
            functions: dict[str, Callable[..., Any]] = {
                **{f"nascompile {name}": bind(mixed_sum, name) for name in ours},
                "eager": eager,
                "torch.compile": torch.compile(eager, dynamic=False),
            }
            prepared = {name: steps(function, arguments) for name, function in functions.items()}
            for direction in ("forward", "both"):
                case = f"{direction} {count} x {'x'.join(map(str, shape))}"
                calls = {name: found[direction][0] for name, found in prepared.items()}
                moved = prepared["eager"][direction][1]
                source = torch.empty(moved // 2, dtype=torch.int8, device="cuda")
                target = torch.empty_like(source)
                calls["copy of as many bytes"] = bind_copy(target, source)
                timings = time_on_gpu(calls)
                others = [timings[name].median for name in ("eager", "torch.compile")]
                for name, timing in timings.items():
                    is_ours = name.startswith("nascompile")
                    rows.append(
                        {
                            "name": "mixed_sum",
                            "case": case,
                            "dtype": str(dtype).removeprefix("torch."),
                            "peer": name,
                            "median_ms": f"{timing.median:.4f}",
                            "p20_ms": f"{timing.p20:.4f}",
                            "p80_ms": f"{timing.p80:.4f}",
                            "gb_per_s": f"{moved / timing.median / 1e6:.0f}",
                            "ratio": f"{min(others) / timing.median:.2f}" if is_ours and not wrong else "",
                        }
                    )
                    row = rows[-1]
                    log(
                        f"{case:32} {row['dtype']:9} {name:22} {row['median_ms']:>9} ms [{row['p20_ms']}, "
                        f"{row['p80_ms']}] {row['gb_per_s']:>6} GB/s {row['ratio']}"
                    )
    return rows


def bind(function: Callable[..., Any], implementation: str) -> Callable[..., Any]:
    return lambda maps, weights: function(maps, weights, implementation=implementation)


def bind_copy(target: Any, source: Any) -> Callable[[], object]:
    return lambda: target.copy_(source)


def compare(log: Log) -> list[str]:
    """What is wrong with the kernels on this GPU."""
    import torch

    from benchmarks.correctness import failures
    from nascompile.kernels import ALL, doctor_report

    device = torch.device("cuda")
    for row in doctor_report():
        log(f"{row.operation:12} {row.device:5} {row.implementation:10} {row.reason}")
    wrong = []
    for kernel in ALL:
        names = [found.name for found in kernel.implementations if found.why_not(device) is None]
        problems = failures(kernel, device, names)
        log(f"{kernel.name}: {', '.join(names)} compared with fp64: {len(problems)} of the comparisons fail")
        wrong += problems
    for problem in wrong:
        log(f"WRONG: {problem}")
    return wrong


def profile(log: Log, rows: list[dict[str, Any]], out: Path) -> None:
    """Run ncu on the case in which ours moves the fewest bytes per second."""
    mine = [row for row in rows if row["peer"].startswith("nascompile")]
    slowest = min(mine, key=lambda row: float(row["gb_per_s"]))
    log(f"slowest: {slowest['peer']}, {slowest['case']}, {slowest['dtype']}: {slowest['gb_per_s']} GB/s")
    ncu = shutil.which("ncu")
    if ncu is None:
        log("ncu is not installed: no profile")
        return
    implementation = slowest["peer"].split()[1]
    direction, count, _, shape = slowest["case"].split()
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from benchmarks.gpu import bind, random_arguments, steps
from nascompile.kernels.mixed_sum import mixed_sum
arguments = random_arguments({count}, {tuple(map(int, shape.split("x")))}, torch.{slowest["dtype"]})
step = steps(bind(mixed_sum, {implementation!r}), arguments)[{direction!r}][0]
for _ in range(3):
    step()
torch.cuda.synchronize()
"""
    result = subprocess.run(
        [
            *(ncu, "--clock-control", "none", "--set", "basic", "--section", "MemoryWorkloadAnalysis"),
            *("--kernel-name", "regex:forward|backward|add_partials", "--launch-count", "9"),
            *(sys.executable, "-c", script),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    (out / "ncu.txt").write_text(result.stdout + result.stderr)
    log(f"ncu: exit status {result.returncode}, see ncu.txt")
    for line in result.stdout.splitlines():
        if any(
            word in line for word in ("Context", "Duration", "DRAM Throughput", "Registers", "Achieved Occ")
        ):
            log(line.rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--skip-build", action="store_true", help="use the extension that is there")
    parser.add_argument("--skip-ncu", action="store_true", help="no profile")
    parser.add_argument("--plans", action="store_true", help="whole networks too")
    options = parser.parse_args()
    log = Log(options.out / "gpu.txt")
    if not options.skip_build:
        build(log)

    import torch

    if not torch.cuda.is_available():
        log("torch sees no GPU; without one: python benchmarks/aot.py, python benchmarks/run.py")
        return 2
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "missing"
    gpu = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton_version}"
    log(f"{gpu}, {versions}, python {sys.version.split()[0]}")
    wrong = compare(log)
    rows = measure(log, wrong=bool(wrong))
    with (options.out / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "gpu": gpu, "versions": versions} for row in rows)
    if not options.skip_ncu:
        profile(log, rows, options.out)
    if options.plans:
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_plans.py"), "--out", str(options.out)]
        wrong += ["plans"] if subprocess.run(command, check=False).returncode else []
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
