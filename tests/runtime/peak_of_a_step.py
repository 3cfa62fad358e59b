"""Prints the peak memory in MiB of a step whose peak is known: for test_bench, in a process of its own.

What other tests leave behind, and how they set up malloc, would count as well.
"""

from __future__ import annotations

import torch

from nascompile.runtime.bench_memory import map_large_blocks, peak_bytes

MIB = 2**18
"""Floats."""


def step() -> None:
    """32 MiB at its peak, which is over at the end."""
    one = torch.ones(16 * MIB)
    two = one + 1
    del one
    three = two + 1
    del two, three
    torch.ones(8 * MIB)


def main() -> None:
    map_large_blocks()
    own = torch.ones(64 * MIB)
    step()
    for size in (0, 8):
        kept = [torch.ones(size * MIB)]
        found = peak_bytes(step, [own], torch.device("cpu"))
        print("unknown" if found is None else found / 2**20)
        del kept


if __name__ == "__main__":
    main()
