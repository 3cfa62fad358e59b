"""By choice: what was fused into what, and what that gains, predicted from bytes and FLOPs and measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nascompile.compiler.compiled import CompiledModel
from nascompile.compiler.edges import Call, Recorder, Soft, eager_costs, training_step
from nascompile.compiler.explore import call_arguments
from nascompile.compiler.fused import fates, shared
from nascompile.compiler.measure import batch_size
from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.region.ir import Value
from nascompile.compiler.region.owners import Part
from nascompile.compiler.region.profiling import Profile, profile
from nascompile.compiler.roofline import Counter as Operators
from nascompile.compiler.roofline import Machine, fastest, measure_machine
from nascompile.compiler.space import Choice, candidate_names, choices, unwrap
from nascompile.compiler.verify import state_kept
from nascompile.kernels.plan.traffic import cost, memory

ROUNDS = 5
"""Steps that are timed: the fastest, of operations in plans the mean."""

OUTSIDE = ""
"""In place of a key, for operations of plans that run whatever is chosen."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds in eager PyTorch and in plans; None where no plan has a part in it."""

    eager: float
    plan: float | None


@dataclass(frozen=True, slots=True)
class EdgeGain:
    """One key: candidates and what became of them, what is shared with other keys, forward and backward
    seconds of one step over all `places`, predicted and measured.

    A shared operation counts in equal parts. `is_nested`: the choice is called by candidates of another one,
    whose eager seconds contain its own.
    """

    key: str
    places: int
    is_nested: bool
    fates: tuple[tuple[str, str], ...]
    shared: tuple[str, ...]
    predicted: Pair
    measured: Pair | None

    @property
    def seconds(self) -> float:
        """What the choice costs: the measured time if there is one, that of the plan if there is one."""
        pair = self.measured or self.predicted
        return pair.eager if pair.plan is None else pair.plan


@dataclass(frozen=True, slots=True)
class Gains:
    """All keys that were called, the costliest first, and seconds outside of choices: `rest` predicted,
    `rest_measured` those of plans. `step`: of a whole step, if measured. batch: samples."""

    edges: tuple[EdgeGain, ...]
    machine: Machine
    rest: Pair
    rest_measured: float | None
    step: Pair | None
    batch: int | None


def find_gains(model: nn.Module, compiled: CompiledModel, inputs: Any, *, measure: bool) -> Gains | str:
    """Take a training step apart, eager and compiled, in the model's present mode and with soft decisions.

    A string says why that cannot be done. The model is as before afterwards.
    """
    model, args = unwrap(model), call_arguments(inputs)
    soft = Soft(model)
    recorder = Recorder(soft)
    eager, fused = training_step(model, args, soft), training_step(compiled, args, soft)
    machine, rounds = measure_machine(), ROUNDS if measure else 1
    with state_kept(model, args, {}), torch.enable_grad():
        try:
            with forced_mutator(recorder), Operators(machine) as operators:
                eager()
        except Exception as error:  # the user's own model does not train on the example inputs
            first_line = next(iter(str(error).splitlines()), "")
            return f"a training step fails: {type(error).__name__}: {first_line}"
        with forced_mutator(soft):
            found = profile(fused, rounds=rounds)
            if not found.runs:
                return "no part of the model runs in a plan in C++"
            costs = eager_costs(recorder.calls, soft.masks, machine, measure=measure)
            step = None
            if measure:
                step = Pair(fastest(eager, rounds=ROUNDS), fastest(fused, rounds=ROUNDS))
    by_choice = Profiled(found, machine, rounds)
    calls = {key: [call for call in recorder.calls if call.choice.key == key] for key in costs}
    edges = [_edge(c, calls[key], costs[key], by_choice) for key, c in choices(model).items() if key in costs]
    edges.sort(key=lambda edge: -edge.seconds)
    inside = sum(edge.predicted.eager for edge in edges if not edge.is_nested)
    rest = Pair(max(operators.seconds - inside, 0.0), by_choice.least.get(OUTSIDE))
    seconds = by_choice.seconds[OUTSIDE] if measure else None
    return Gains(tuple(edges), machine, rest, seconds, step, batch_size(inputs))


class Profiled:
    """A profile by choice: parts of the plans that ran, and all values of their graphs."""

    def __init__(self, found: Profile, machine: Machine, rounds: int) -> None:
        self.least: defaultdict[str, float] = defaultdict(float)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.serving: defaultdict[str, list[Part]] = defaultdict(list)
        seen: set[int] = set()
        self.values: dict[int, Value] = {}
        for run in found.runs:
            images, is_new = run.direction.program.images, id(run.direction) not in seen
            seen.add(id(run.direction))
            for part, seconds in run.parts():
                flops, _ = cost(part.operation)
                least = machine.seconds(images * flops, images * memory(part.operation))
                keys = part.keys or {OUTSIDE}
                for key in keys:
                    self.least[key] += least / len(keys) / rounds
                    self.seconds[key] += seconds / len(keys) / rounds
                    if is_new:
                        self.serving[key].append(part)
                if is_new:
                    self._reach(part.values)

    def _reach(self, values: Iterable[Value]) -> None:
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if id(value) not in self.values:
                self.values[id(value)] = value
                waiting += [*value.inputs, *value.users]


def _edge(
    choice: Choice, calls: Sequence[Call], costs: tuple[float, float | None], found: Profiled
) -> EdgeGain:
    key, (least, seconds) = choice.key, costs
    serving, in_plan = found.serving[key], key in found.least
    said = fates(choice, serving, list(found.values.values()), len(calls)) if in_plan else []
    labels = [name or str(index) for index, name in enumerate(candidate_names(choice))]
    return EdgeGain(
        key=key,
        places=len(calls),
        is_nested=any(call.is_nested for call in calls),
        fates=tuple(zip(labels, said, strict=False)),
        shared=tuple(shared(key, serving)),
        predicted=Pair(least, found.least.get(key)),
        measured=None if seconds is None else Pair(seconds, found.seconds.get(key)),
    )
