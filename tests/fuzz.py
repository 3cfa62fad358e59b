"""`make fuzz N=200`: trains random spaces compiled and eagerly, and prints what they held and where they
differ.

In fp64 by the reference executor, in fp32 by the native one. The worst error may be four times that of plain
torch, with some rounding errors more (tests/numerics.py, fuzz_training.py). Exit status 1 when something
differs.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import nascompile
from tests import numerics
from tests.comparing import assert_close, tensors
from tests.compiler.region_steps import fp64_plans, regions
from tests.fuzz_spaces import Space, build, draw, smaller
from tests.fuzz_training import images, roughly, train

IMPRECISE = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Errors below it are counted as lost digits, those above it as wrong results."""
GRADIENTS = ("inputs", "weights", "decisions")
DRAWS = 10
"""Runs with more rounding errors, at most, where the comparison with plain torch alone fails."""


@dataclass
class Failure(Exception):
    """kind: "wrong", "imprecise", "trace" or the class of an exception."""

    kind: str
    text: str


@dataclass
class Seen:
    """What the examples contained."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def note(self, compiled: nascompile.CompiledModel) -> None:
        found = regions(compiled)
        self.counts["traces"] += len(compiled.entries)
        self.counts["regions"] += len(found)
        self.counts["plans"] += sum(len(one.plans) for one in found)
        self.counts["regions without a plan"] += sum(not one.plans for one in found)
        self.counts["choices in regions"] += sum(len(one.choices) for one in found)
        for entry in compiled.entries:
            says = [reason for reason in entry.notes.values() if "op by op" in reason]
            outside = entry.graph_module.meta.get("outside", {}) if entry.graph_module is not None else {}
            self.counts["choices outside"] += len(outside)
            self.reasons.update(
                "".join("n" if c.isdigit() else c for c in r) for r in [*says, *outside.values()]
            )


def check(space: Space, seen: Seen) -> None:
    """Raise Failure where compiled and eager differ."""
    exact = train(space, build(space).double(), torch.float64)
    with fp64_plans():
        compiled = nascompile.compile(build(space).double())
        actual = train(space, compiled, torch.float64)
    _no_islands(compiled)
    for number, (one, right) in enumerate(zip(actual, exact, strict=True)):
        for group in right:
            try:
                assert_close(_form(one[group]), _form(right[group]), rtol=0, atol=0)
            except AssertionError as error:
                raise Failure("wrong", f"fp64, step {number}, {group}: {str(error)[-300:]}") from None
    # plain torch is the exact one here: what added rounding errors do to it says how far right results differ
    _compare(space, actual, [], exact, torch.float64)
    reference = train(space, build(space), torch.float32)
    compiled = nascompile.compile(build(space))
    actual = train(space, compiled, torch.float32)
    _no_islands(compiled)
    seen.note(compiled)
    _compare(space, actual, [reference], exact, torch.float32)
    _autocast(space, compiled)


def _no_islands(compiled: nascompile.CompiledModel) -> None:
    if compiled.islands:
        raise Failure("trace", str(compiled.islands[0]))


def _form(value: Any) -> Any:
    """The same nesting with shapes and types in place of floating tensors."""
    return tree_map(
        lambda leaf: (
            (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
        ),
        value,
    )


def _compare(
    space: Space, actual: list[Any], references: list[list[Any]], exact: list[Any], dtype: torch.dtype
) -> None:
    worst = _worst(actual, exact, references, dtype)
    # one eager run may be lucky: what the program does to rounding errors decides
    for number in range(DRAWS):
        if worst.ratio <= 1:
            return
        references.append(roughly(space, number, dtype))
        worst = _worst(actual, exact, references, dtype)
    if not worst.ratio <= 1:
        raise Failure("imprecise" if worst.error < IMPRECISE[dtype] else "wrong", worst.text)


@dataclass(frozen=True)
class Worst:
    """The largest error, as a multiple of what is allowed."""

    ratio: float
    error: float
    text: str


def _worst(actual: list[Any], exact: list[Any], references: list[list[Any]], dtype: torch.dtype) -> Worst:
    worst = Worst(0.0, 0.0, "")
    for number, (one, right) in enumerate(zip(actual, exact, strict=True)):
        # a gradient that cancels to zero is as exact as the sum that it is part of
        least = 0.1 * max(_size(right[group]) for group in GRADIENTS)
        for group in right:
            size = max(_size(right[group]), least if group in GRADIENTS else 0.0)
            others = (_difference(other[number][group], right[group]) for other in references)
            # twice the factor of one kernel: a model is many, and every step hands its rounding on
            allowed = 2 * numerics.FACTOR * max([numerics.FLOORS[dtype], *(d / size for d in others)])
            error = _difference(one[group], right[group]) / size
            if not error / allowed <= worst.ratio:
                text = f"{dtype}, step {number}, {group}: {error:.2g} > {allowed:.2g}"
                worst = Worst(error / allowed, error, text)
    return worst


def _size(value: Any) -> float:
    """The root mean square of all numbers, not quite zero."""
    return max(_vector(value).square().mean().sqrt().item(), 1e-30)


def _difference(value: Any, exact: Any) -> float:
    mine, right = _vector(value), _vector(exact)
    if mine.shape != right.shape:
        return float("inf")
    return (mine - right).square().mean().sqrt().item()


def _vector(value: Any) -> Tensor:
    # one zero, for a group may be empty
    leaves = [leaf.reshape(-1).double() for leaf in tensors(value) if leaf.is_floating_point()]
    return torch.cat([*leaves, torch.zeros(1, dtype=torch.float64)])


def _autocast(space: Space, compiled: nascompile.CompiledModel) -> None:
    model = compiled._eager
    model.eval()
    inputs = images(space, 2, torch.Generator().manual_seed(1), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = tensors(model(*inputs)), tensors(compiled(*inputs))
    for one, right in zip(actual, expected, strict=True):
        if one.dtype != right.dtype:
            raise Failure("wrong", f"autocast: {one.dtype} instead of {right.dtype}")
        if not numerics.relative_error(one, right) < 0.1:
            raise Failure("wrong", f"autocast: relative error {numerics.relative_error(one, right):.2g}")


def attempt(space: Space, seen: Seen) -> Failure | None:
    """The failure of a space, None where all is well."""
    try:
        check(space, seen)
    except Failure as failure:
        return failure
    except Exception as error:
        return Failure(type(error).__name__, traceback.format_exc(limit=-6))
    return None


def shrink(space: Space, kind: str, seconds: float) -> Space:
    """A smaller space that fails in the same way."""
    end, again = time.monotonic() + seconds, True
    while again:
        again = False
        for other in smaller(space):
            if time.monotonic() > end:
                return space
            found = attempt(other, Seen())
            if found is not None and found.kind == kind:
                space, again = other, True
                break
    return space


def _line(failure: Failure) -> str:
    """The first line of a difference, the last one of a traceback."""
    lines = failure.text.splitlines()
    return lines[-1 if lines[0].startswith("Traceback") else 0][:200]


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first example; the next has the next one")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop drawing after so long")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds to make the first failure small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen, failures = Seen(), []
    start = time.monotonic()
    count = 0
    for seed in range(options.seed, options.seed + options.examples):
        if time.monotonic() - start > options.seconds:
            break
        space = draw(seed)
        count += 1
        seen.counts.update(f"decisions: {kind}" for kind in space.decisions)
        failure = attempt(space, seen)
        if failure is not None:
            failures.append((seed, failure))
            print(f"seed {seed}: {failure.kind}: {_line(failure)}", flush=True)
    print(f"{count} examples in {time.monotonic() - start:.0f} s")
    for title, counter in (("contained", seen.counts), ("op by op, or outside of regions", seen.reasons)):
        print(f"{title}:", *(f"  {number:6} {what}" for what, number in counter.most_common()), sep="\n")
    print(f"failures: {dict(Counter(failure.kind for _, failure in failures))}")
    if not failures:
        return 0
    seed, first = min(failures, key=lambda one: one[1].kind == "imprecise")
    space = shrink(draw(seed), first.kind, options.shrink)
    again = attempt(space, Seen()) or first
    print(f"seed {seed}, made small:\n{space}\n{again.kind}: {again.text}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
