"""What each rewrite inside plans is worth: the DARTS supernet without it, beside the one with all of them.

python benchmarks/ablation.py [--batch-size 16] [--repeats 9]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nascompile
from nascompile.compiler.region.rewrites import REWRITES
from nascompile.darts import DartsMutator
from nascompile.spaces import DartsNetwork

ALL = "(all)"


def step(model: nn.Module, mutator: DartsMutator, x: Tensor, y: Tensor) -> list[Tensor]:
    """The gradients of one step with soft weights."""
    mutator.reset()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of all gradients as one vector."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(actual, expected, strict=True))
    return (difference / sum(float(b.square().sum()) for b in expected)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="What each rewrite inside plans is worth")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = DartsNetwork(32, 3, 16, 10, 8)
    mutator = DartsMutator(model)
    x, y = torch.randn(options.batch_size, 3, 32, 32), torch.randint(0, 10, (options.batch_size,))
    compiled = {
        name: nascompile.compile(model, skip=() if name == ALL else (name,)) for name in (ALL, *REWRITES)
    }
    expected: list[Tensor] = []
    errors, memory = {}, {}
    for name, one in compiled.items():
        gradients = [gradient.clone() for gradient in step(one, mutator, x, y)]
        expected = expected or gradients
        errors[name] = relative_error(gradients, expected)
        memory[name] = max(plan.slab for entry in one.entries for r in entry.regions for plan in r.plans)
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(options.repeats):
        for name, one in compiled.items():
            start = time.perf_counter()
            step(one, mutator, x, y)
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times[ALL])
    print(
        f"batch {options.batch_size}, {torch.get_num_threads()} threads; ratios to the plan with all rewrites"
    )
    print("| left out | time | memory | gradients differ by |")
    print("| --- | --- | --- | --- |")
    for name in compiled:
        row = statistics.median(times[name]) / base, memory[name] / memory[ALL], errors[name]
        print(f"| `{name}` | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.0e} |")


if __name__ == "__main__":
    main()
