"""`make fuzz N=200`: trains random spaces compiled and eagerly, and prints what they held and where they
differ.

In fp64 by the reference executor, up to the order of sums; in fp32 by the native one, where the worst error
may be twice that of plain torch (tests/numerics.py). Exit status 1 when something differs.
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
from torch import Tensor, nn

import nascompile
from tests import numerics
from tests.comparing import Decided, assert_close, step, tensors
from tests.compiler.region_steps import detached, fp64_plans, regions
from tests.fuzz_spaces import Space, build, draw, smaller

IMPRECISE = 1e-2
"""Errors in fp32 below it are counted as lost digits, those above it as wrong results."""


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


def mask(kind: str, length: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A decision of the kind: "one", "many", "soft", or "some" weights of zero."""
    weights = torch.rand(length, generator=generator) + 0.1
    chosen = int(torch.randint(length, (), generator=generator))
    if kind == "one":
        return torch.arange(length) == chosen
    if kind == "many":
        return (weights > 0.5) | (torch.arange(length) == chosen)
    if kind == "some":
        weights = weights * ((weights > 0.5) | (torch.arange(length) == chosen))
    return (weights / weights.sum()).to(dtype).requires_grad_()


def train(space: Space, model: nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The steps of a space: what could be seen after each."""
    mutator = Decided(model)
    generator = torch.Generator().manual_seed(space.seed)
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=0.01)
        if space.optimizer == "sgd"
        # an epsilon this large, for Adam makes signs of the rounding errors of tiny gradients
        else torch.optim.AdamW(parameters, 1e-4, eps=1e-2)
    )
    seen = []
    for number, (batch, mode, kind) in enumerate(
        zip(space.batches, space.modes, space.decisions, strict=True)
    ):
        model.train(mode)
        choices = mutator.choices_by_key.items()
        masks = {key: mask(kind, len(choice), generator, dtype) for key, choice in choices}
        mutator.decide(masks)
        x = torch.randn(batch, 3, *space.size, generator=generator).to(dtype)
        if space.channels_last:
            x = x.to(memory_format=torch.channels_last)
        found = step(model, masks, (x.requires_grad_(number % 2 == 0),), {}, seed=number)
        found.pop("changed inputs")
        if mode:
            optimizer.step()
        found["parameters"] = {**dict(model.named_parameters())}
        seen.append(detached(found))
        if number == 0:
            # out and back in
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return seen


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
                assert_close(one[group], right[group], rtol=1e-8, atol=1e-9)
            except AssertionError as error:
                raise Failure("wrong", f"fp64, step {number}, {group}: {str(error)[-300:]}") from None
    reference = train(space, build(space), torch.float32)
    compiled = nascompile.compile(build(space))
    actual = train(space, compiled, torch.float32)
    _no_islands(compiled)
    seen.note(compiled)
    _compare_single(actual, reference, exact)
    _autocast(space, compiled)


def _no_islands(compiled: nascompile.CompiledModel) -> None:
    if compiled.islands:
        raise Failure("trace", str(compiled.islands[0]))


def _compare_single(actual: list[Any], reference: list[Any], exact: list[Any]) -> None:
    worst = (0.0, "", 0.0)
    for number, (one, plain, right) in enumerate(zip(actual, reference, exact, strict=True)):
        allowed = numerics.FACTOR * max(
            numerics.FLOORS[torch.float32], *(_error(plain[group], right[group]) for group in right)
        )
        for group in right:
            error = _error(one[group], right[group])
            if not error <= allowed and not error / allowed <= worst[0]:
                worst = error / allowed, f"fp32, step {number}, {group}: {error:.2g} > {allowed:.2g}", error
    if worst[1]:
        raise Failure("imprecise" if worst[2] < IMPRECISE else "wrong", worst[1])


def _error(value: Any, exact: Any) -> float:
    mine, right = (
        [leaf.reshape(-1) for leaf in tensors(x) if leaf.is_floating_point()] for x in (value, exact)
    )
    if [leaf.shape for leaf in mine] != [leaf.shape for leaf in right]:
        return float("inf")
    return numerics.relative_error(torch.cat(mine), torch.cat(right)) if mine else 0.0


def _autocast(space: Space, compiled: nascompile.CompiledModel) -> None:
    model = compiled._eager
    model.eval()
    x = torch.randn(2, 3, *space.size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = tensors(model(x)), tensors(compiled(x))
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
