"""What needs a process of its own: the interpreter, the missing extension, and compilers without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = "tests/kernels/test_kernels.py"
PLANS = (
    ("tests/kernels/test_plan_triton.py", 40),
    ("tests/kernels/test_plan_triton_barriers.py", 9),
    ("tests/kernels/test_plan_triton_sums.py", 39),
    ("tests/kernels/test_plan_triton_flags.py", 2),
    ("tests/kernels/test_plan_triton_groups.py", 25),
    ("tests/compiler/test_plan_triton.py", 6),
)
CUDA_SOURCES = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / "cuda").glob("*.cu"))

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install nascompile[triton])",
)


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def passed(result: subprocess.CompletedProcess[str]) -> int:
    """How many tests passed; none may have failed or been skipped."""
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-1000:]
    found = re.search(r"(\d+) passed", result.stdout)
    assert found is not None, result.stdout[-1000:]
    return int(found.group(1))


@pytest.mark.slow
@needs_triton
def test_triton_kernels_in_the_interpreter():
    result = run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", TABLE, "-k", "triton"],
        TRITON_INTERPRET="1",
    )
    # four types twice, gradcheck, repetition: ten tests for each kernel
    assert passed(result) >= 10


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("path", "least"), PLANS)
def test_plans_in_the_interpreter(path, least):
    result = run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", path], TRITON_INTERPRET="1"
    )
    assert passed(result) >= least


@pytest.mark.slow
def test_the_table_holds_without_the_extension():
    script = f"""
import sys, pytest
sys.modules["nascompile._C"] = None
sys.exit(pytest.main(["-qx", "-p", "no:cacheprovider", "{TABLE}", "-k", "default or opcheck or compiles"]))
"""
    result = run([sys.executable, "-c", script])
    assert passed(result) >= 20


@pytest.mark.slow
@needs_triton
def test_triton_kernels_compile_for_two_gpus_without_spilling():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "benchmarks/aot.py", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    rows = json.loads(result.stdout) if result.stdout else []
    assert {row["capability"] for row in rows} == {80, 90}, result.stderr[-3000:]
    assert all(row["registers"] > 0 for row in rows), rows
    assert [row for row in rows if row["spilled"]] == []


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on this machine")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=str)
def test_cuda_kernels_compile_without_spilling(source, capability, tmp_path):
    target = tmp_path / "kernel.o"
    result = run(
        [
            "nvcc",
            "-c",
            "-O3",
            "-std=c++17",
            "-Xptxas=-v",
            f"-arch=sm_{capability}",
            "-o",
            str(target),
            str(source),
        ]
    )
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)
    assert spills, result.stderr
    assert set(spills) == {"0"}, result.stderr
