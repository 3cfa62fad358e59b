"""Where the time of a supernet's training step goes: its plans by kind of step, beside the machine's limits.

python benchmarks/steps.py [--space darts|nb201|mbconv] [--batch-size 16] [--threads 1] [--repeats 6]

FLOPs and bytes are counted from the steps (kernels/plan/traffic.py): a map counts once for every step that
reads or writes it. Ceilings are measured in the same run: fp32 matrix products, and a sum over a map that no
cache holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nascompile
from nascompile.compiler.region.profiling import Entry, profiling
from nascompile.compiler.roofline import fastest
from nascompile.darts import DartsMutator
from nascompile.spaces import DartsNetwork, MBConvNetwork, NASBench201Network

SPACES: dict[str, Callable[[], nn.Module]] = {
    "darts": lambda: DartsNetwork(32, 3, 16, 10, 8),
    "nb201": lambda: NASBench201Network(16, 5, 10),
    "mbconv": lambda: MBConvNetwork.cifar(10),
}


def kind_of(label: str) -> str:
    """The kind of a step, from its label: the shapes left out."""
    words = label.split(" ")
    if words[0] != "convolve":
        return words[0] if words[0] not in ("max", "average") else " ".join(words[:2])
    backward = " backward" if words[1] == "backward" else ""
    separable, depthwise = "depthwise + pointwise" in label, "depthwise" in label
    what = "depthwise + pointwise" if separable else "depthwise" if depthwise else "dense"
    return f"{'pointwise' if 'pointwise' in label and not separable else what}{backward}"


def ceilings() -> tuple[float, float]:
    """GFLOP/s of matrix products, GB/s of a sum over a large tensor; of all threads together."""
    a, b = torch.randn(2, 1024, 1024)
    large = torch.ones(2**27)
    return 2 * 1024**3 / fastest(lambda: a @ b, rounds=9) / 1e9, 4 * 2**27 / fastest(
        large.sum, rounds=5
    ) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a training step goes")
    parser.add_argument("--space", choices=SPACES, default="darts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = SPACES[options.space]()
    mutator, compiled = DartsMutator(model), nascompile.compile(model)
    x, y = torch.randn(options.batch_size, 3, 32, 32), torch.randint(0, 10, (options.batch_size,))

    def step() -> None:
        mutator.reset()
        model.zero_grad()
        F.cross_entropy(compiled(x), y).backward()

    step()
    best: dict[tuple[str, str], Entry] = {}
    for _ in range(options.repeats):
        with profiling() as profile:
            step()
        for key, entry in profile.entries.items():
            if key not in best or entry.seconds < best[key].seconds:
                best[key] = entry
    flops, bandwidth = ceilings()
    kinds: dict[tuple[str, str], Entry] = {}
    for (direction, label), entry in best.items():
        row = kinds.setdefault((direction, kind_of(label)), Entry())
        row.seconds += entry.seconds
        row.calls += entry.calls
        row.flops += entry.flops
        row.bytes += entry.bytes
    whole = sum(row.seconds for row in kinds.values())
    print(f"{options.space}, batch {options.batch_size}, {options.threads} threads; rates of one thread")
    print(f"ceilings: {flops / options.threads:.0f} GFLOP/s, {bandwidth / options.threads:.1f} GB/s a thread")
    wall = fastest(step, rounds=options.repeats)
    print(f"seconds of threads in a step: {whole:.3f}; a step takes {wall:.3f} s")
    print("| step | share | GFLOP/s | GB/s |")
    print("| --- | --- | --- | --- |")
    for (direction, kind), row in sorted(kinds.items(), key=lambda item: -item[1].seconds):
        if row.seconds > whole / 200:
            rates = row.flops / row.seconds / 1e9, row.bytes / row.seconds / 1e9
            print(f"| {direction}: {kind} | {row.seconds / whole:.1%} | {rates[0]:.0f} | {rates[1]:.1f} |")


if __name__ == "__main__":
    main()
