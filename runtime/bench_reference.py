"""What every peer is held against: eager PyTorch in fp32, three times, and in fp64.

fp64 needs twice the memory of a step. It is computed in a process of its own, which ends before the
peers start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.measure import count
from nascompile.runtime.bench_compare import (
    Error,
    Values,
    cloned,
    errors,
    exact_values,
    is_random,
    move_by_one_rounding,
    put_back,
    quiet_dropout,
    values,
)
from nascompile.runtime.bench_memory import give_back_memory
from nascompile.runtime.bench_peers import PEERS, Decision, arranged, build_call
from nascompile.runtime.bench_process import Process, WorkerRaised
from nascompile.runtime.bench_subject import Call, Recipe, Subject


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a subject before anything is computed. flops: of one forward."""

    has_maps: bool
    flops: int | None
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Reference:
    """The values that a step has, and whether they are those without dropout."""

    is_random: bool
    eager: list[Values]
    exact: Values

    def errors(self, found: Values) -> list[Error]:
        """How far something is from fp64."""
        return errors(found, self.eager, self.exact)


class ReferenceBench:
    """What the process of the reference holds."""

    def __init__(self, recipe: Recipe, kind: str, seed: int, threads: int | None, device: str) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.subject = recipe().to(torch.device(device))
        self.decision = Decision(self.subject.model, kind, seed=seed)

    def facts(self) -> Facts:
        """What is known of the subject."""
        subject = self.subject
        has_maps = any(isinstance(v, torch.Tensor) and v.dim() == 4 for v in subject.inputs)
        return Facts(has_maps, _flops(subject, self.decision), list(subject.notes))

    def save(self, path: str) -> None:
        """Compute the values and write them.

        Raises NascompileError for a model whose runs differ. Leaves the subject in fp64.
        """
        subject, decision = self.subject, self.decision
        call, _ = build_call(PEERS["eager"], subject.model, decision, subject.inputs)
        random = _is_random(subject, call, decision)
        if random:
            quiet_dropout(subject.model)
            if _is_random(subject, call, decision):
                raise NascompileError(
                    "the model draws random numbers in train mode, and not by dropout layers: no two runs "
                    "can be compared"
                )
        eager = _eager_values(subject, call, decision)
        # fp64 takes twice as much
        give_back_memory()
        exact = exact_values(subject, call, decision, with_inputs=True)
        torch.save({"is_random": random, "eager": eager, "exact": exact}, path)


class ReferenceProcess(Process):
    """A process that holds a `ReferenceBench`.

    Raises NascompileError where the recipe or the model does, RuntimeError with the traceback for every other
    exception, WorkerFailed when the process ends or memory does.
    """

    def __init__(self, recipe: Recipe, *, path: Path, **settings: object) -> None:
        self._path = path
        with _as_here():
            super().__init__(ReferenceBench, environment={}, limit=None, recipe=recipe, **settings)

    def facts(self) -> Facts:
        """What is known of the subject."""
        with _as_here():
            return self.ask("facts", limit=None)

    def compute(self) -> Reference:
        """The values."""
        with _as_here():
            self.ask("save", limit=None, path=str(self._path))
        return Reference(**torch.load(self._path))


@contextlib.contextmanager
def _as_here() -> Iterator[None]:
    """Raise what the process raised as if it had happened here."""
    try:
        yield
    except WorkerRaised as failure:
        if failure.problem.message is not None:
            raise NascompileError(failure.problem.message) from None
        if failure.problem.is_memory:
            raise
        raise RuntimeError(failure.problem.trace) from None


def _is_random(subject: Subject, call: Call, decision: Decision) -> bool:
    return is_random(*(values(subject, call, decision, seed=seed) for seed in (1, 2)))


def _eager_values(subject: Subject, call: Call, decision: Decision) -> list[Values]:
    """In both memory layouts, and with every parameter moved by one rounding."""
    found = [values(subject, call, decision, with_inputs=True)]
    subject.model = arranged(PEERS["eager-channels-last"], subject.model)
    given = subject.inputs
    subject.inputs = tuple(arranged(PEERS["eager-channels-last"], value) for value in given)
    found.append(values(subject, call, decision, with_inputs=True))
    subject.inputs = given
    parameters = list(subject.model.parameters())
    before = cloned(parameters)
    move_by_one_rounding(subject.model)
    found.append(values(subject, call, decision, with_inputs=True))
    put_back(parameters, before)
    return found


def _flops(subject: Subject, decision: Decision) -> int | None:
    if subject.step is not None:
        return None
    architecture = None if decision.kind == "soft" else decision.architecture
    return count(subject.model, subject.inputs, architecture).flops
