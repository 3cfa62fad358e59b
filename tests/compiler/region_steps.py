"""Trains a model of `region_models` for a few steps, and compares what two forms of it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.region import region
from nascompile.compiler.region.executors import NATIVE, REFERENCE
from nascompile.compiler.region.region import Region
from nascompile.mutables import InputChoice
from tests import numerics
from tests.comparing import Decided, step, tensors
from tests.compiler.region_models import Case

Rounds = list[dict[str, Any]]
ROUNDS = (("soft", True), ("one", True), ("some", True), ("soft", False), ("another", False))
"""The decisions that are tried one after another, and whether in training."""


@contextmanager
def fp64_plans() -> Iterator[None]:
    """Regions have plans in fp64 too: the reference carries them out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region, "EXECUTORS", (NATIVE, REFERENCE))
        yield


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Whoever reads what nobody has written finds nan: torch fills new memory so when deterministic."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)


def build(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model of a case; the same weights, exactly, in every type."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = case.make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_var):
                    if tensor is not None:
                        tensor.detach().uniform_(0.5, 1.5)
    return model.to(dtype)


def images(case: Case, dtype: torch.dtype, *, seed: int = 0, batch: int | None = None) -> tuple[Tensor, ...]:
    """Inputs that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    count = case.batch if batch is None else batch
    return tuple(
        torch.randn(count, *shape, generator=generator).to(dtype).requires_grad_() for shape in case.shapes
    )


def mask(kind: str, length: int, number: int, dtype: torch.dtype) -> Tensor:
    """A decision for the choice of that number: "soft" weights, "some" of them zero, "one" or "another"."""
    if kind in ("one", "another"):
        chosen = (number + (kind == "another")) % length
        return torch.tensor([index == chosen for index in range(length)])
    weights = torch.tensor([0.2 + 0.3 * ((index + number) % 3) for index in range(length)])
    if kind == "some":
        weights[(number + 1) % length] = 0.0
        weights[number % length] = -0.75
    return weights.to(dtype).requires_grad_()


def decide(mutator: Decided, kind: str, dtype: torch.dtype, shift: int = 0) -> dict[str, Tensor]:
    """Decide for every key; returns the masks."""
    choices = mutator.choices_by_key.items()
    masks = {key: mask(kind, len(c), n + shift, dtype) for n, (key, c) in enumerate(choices)}
    for number, (key, choice) in enumerate(choices):
        if isinstance(choice, InputChoice):
            # what an unchosen input leaves without a gradient has a test of its own
            kinds = {"some": "soft", "another": "one"}
            masks[key] = mask(kinds.get(kind, kind), len(choice), number, dtype)
    mutator.decide(masks)
    return masks


def train(model: nn.Module, mutator: Decided, case: Case, dtype: torch.dtype) -> Rounds:
    """All of ROUNDS, with SGD: what could be seen after each."""
    weights = [*model.parameters(), nn.Parameter(torch.zeros(()))]
    optimizer = torch.optim.SGD(weights, 1e-3, momentum=0.9, weight_decay=0.01)
    rounds = []
    for number, (kind, mode) in enumerate(ROUNDS):
        model.train(mode)
        masks = decide(mutator, kind, dtype)
        seen = step(model, masks, images(case, dtype, seed=number), {}, seed=number)
        seen.pop("changed inputs")
        if mode:
            optimizer.step()
        seen["parameters"] = dict(model.named_parameters())
        rounds.append(detached(seen))
    return rounds


def detached(value: Any) -> Any:
    """The same nesting, the tensors copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: detached(item) for key, item in value.items()}
    return [detached(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def eagerly(case: Case, dtype: torch.dtype, layout: Any = torch.contiguous_format) -> Rounds:
    """What the model itself does; other layouts sum in other orders."""
    model: Any = build(case, dtype)
    model.to(memory_format=layout)
    return train(model, Decided(model), case, dtype)


def compiled_of(case: Case, dtype: torch.dtype) -> tuple[nascompile.CompiledModel, Decided]:
    """The compiled model, and what decides for it."""
    model = build(case, dtype)
    return nascompile.compile(model), Decided(model)


def regions(compiled: nascompile.CompiledModel) -> list[Region]:
    """The regions of all traces."""
    return [found for entry in compiled.entries for found in entry.regions]


def assert_regions(compiled: nascompile.CompiledModel, case: Case) -> None:
    """The model became what the table says: so many regions, or the reason why not."""
    assert compiled.islands == []
    assert compiled.entries
    for entry in compiled.entries:
        assert entry.graph_module is not None
        # the first is that of training
        is_fine = case.evaluated and entry is compiled.entries[1]
        outside, op_by_op = (None, None) if is_fine else (case.outside, case.op_by_op)
        reasons = entry.graph_module.meta.get("outside", {})
        assert bool(reasons) == (outside is not None), reasons
        assert all((outside or "") in reason for reason in reasons.values()), reasons
        assert len(entry.regions) == (1 if is_fine else case.regions)
        says = [reason for reason in entry.notes.values() if "op by op" in reason]
        assert bool(says) == (op_by_op is not None), says
        assert all((op_by_op or "") in reason for reason in says), says
        assert all(bool(found.plans) == (op_by_op is None) for found in entry.regions)
        parts = [reason for reason in entry.notes.values() if "in parts" in reason]
        assert bool(parts) == (case.in_parts is not None), parts
        assert all((case.in_parts or "") in reason for reason in parts), parts


GROUPS = ("outputs", "inputs", "weights", "decisions", "buffers", "parameters")


def assert_rounds_closer(actual: Rounds, references: Sequence[Rounds], exact: Rounds) -> None:
    """As good as plain torch in the same type, whatever the order of its sums.

    Every group of tensors counts as one vector and the worst group of torch as its error: a ReLU near zero
    may fall to either side, and a model is a chain of operations, not one.
    """
    for number, (one, right) in enumerate(zip(actual, exact, strict=True)):
        worst = numerics.FLOORS[torch.float32]
        for group in GROUPS:
            for reference in references:
                worst = max(worst, _error(reference[number][group], right[group]))
        for group in GROUPS:
            mine, theirs = _leaves(one[group]), _leaves(right[group])
            name = f"round {number} {ROUNDS[number]}: {group}"
            assert [leaf is None for leaf in mine] == [leaf is None for leaf in theirs], name
            assert _counters(mine) == _counters(theirs), name
            # twice the factor of one kernel: the steps before this one hand their rounding on
            error, allowed = _error(one[group], right[group]), 2 * numerics.FACTOR * worst
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


def _error(value: Any, exact: Any) -> float:
    return numerics.relative_error(_vector(_leaves(value)), _vector(_leaves(exact)))


def _leaves(value: Any) -> list[Tensor | None]:
    if value is None or isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [leaf for item in items for leaf in _leaves(item)]


def _counters(leaves: list[Tensor | None]) -> list[list[int]]:
    return [leaf.tolist() for leaf in tensors(leaves) if not leaf.is_floating_point()]


def _vector(leaves: list[Tensor | None]) -> Tensor:
    floating = [leaf.reshape(-1) for leaf in tensors(leaves) if leaf.is_floating_point()]
    return torch.cat(floating) if floating else torch.zeros(0, dtype=torch.float64)
