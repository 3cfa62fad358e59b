"""Runs many architectures on one batch and computes once what several of them compute."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nascompile.compiler.ahead import Ahead, NoPlan
from nascompile.compiler.ambient import ambient_modes, random_states, set_random_states
from nascompile.compiler.architecture import Mask, resolve
from nascompile.compiler.errors import ArchitectureError
from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.resolving import Resolver
from nascompile.compiler.sharing import Call, Learned, Schedule, Workspace, arguments_of
from nascompile.compiler.signature import call_shape
from nascompile.compiler.space import unwrap
from nascompile.compiler.templates import Apart, Forced
from nascompile.compiler.values import key_of, numbers_in

log = logging.getLogger(__name__)

GIB = 2**30
_CHECKED = 4  # traces compared with the program; traces of one model differ in little
_TOLERANCE = 1e-3  # of that comparison: a wrong trace differs in kind


class Population:
    """Architectures of one model that are run together.

    A value that later architectures need is kept when the present one is done with it, up to `memory` bytes
    in all; beyond that the one needed last is dropped and computed again. So no more than that lives beside
    what one architecture needs by itself.

    Unless `exact`, images are computed by one plan for all architectures, where it can be had; `notes` says
    why it cannot. `apart` says by position why an architecture is run as written and shares nothing. Raises
    ArchitectureError that names all architectures that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        architectures: Sequence[str | Path | Mapping[str, Any]],
        *,
        memory: int = GIB,
        exact: bool = False,
    ) -> None:
        self.model = unwrap(model)
        self.memory = memory
        self.exact = exact
        self.positions: dict[Any, list[int]] = {}
        self.masks: list[dict[str, Mask]] = []
        for position, masks in enumerate(_resolve_all(self.model, architectures)):
            found = self.positions.setdefault(key_of(masks), [])
            if not found:
                self.masks.append(masks)
            found.append(position)
        self.apart: dict[int, str] = {}
        self.notes: list[str] = []
        self._members = list(self.positions.values())
        self._calibration: list[Call] | None = None
        self._plans: dict[Any, Plan] = {}
        self._changes: set[nn.Module] = set()
        self._gives_none: set[nn.Module] = set()

    def outputs(self, *args: Any, **kwargs: Any) -> Iterator[tuple[list[int], Any]]:
        """(positions of the architectures, their output) for one batch; each position comes once.

        In the mode the model is in. An output may share memory with others: read it before going on, and do
        not change it.
        """
        open_ = set(range(len(self.masks)))
        call = args, kwargs
        while open_:
            plan = self._plan(call)
            try:
                for members, output in plan.run(call, open_):
                    open_ -= set(members)
                    yield sorted(p for member in members for p in self._members[member]), output
            except Learned as lesson:
                self._learn(lesson)

    def calibrate(self, batches: Iterable[Call]) -> None:
        """Give each architecture BatchNorm statistics of its own, from these calls: (args, kwargs).

        The statistics are those of `torch.optim.swa_utils.update_bn`, the plain average over the batches,
        with every module but BatchNorm in the mode it is in. Two architectures share a BatchNorm's
        statistics where all that comes before it is the same for both: it sees the same numbers then. The
        model's own are left as they are.
        """
        self._calibration = list(batches)
        self._plans = {}

    def _plan(self, call: Call) -> Plan:
        is_training = any(module.training for module in self.model.modules())
        key = call_shape(*call), ambient_modes(), is_training
        if key not in self._plans:
            plan = Plan(self, call)
            while True:
                try:
                    plan.prepare()
                    break
                except Learned as lesson:
                    self._learn(lesson)
                    plan = Plan(self, call)
            self._plans[key] = plan
        return self._plans[key]

    def _learn(self, lesson: Learned) -> None:
        (self._gives_none if lesson.gives_none else self._changes).add(lesson.module)
        self._plans = {}


def _resolve_all(
    model: nn.Module, architectures: Sequence[str | Path | Mapping[str, Any]]
) -> list[dict[str, Mask]]:
    found, problems = [], []
    for position, architecture in enumerate(architectures):
        try:
            found.append(resolve(model, architecture))
        except ArchitectureError as error:
            problems.append(f"architecture {position}: {error}")
    if problems:
        raise ArchitectureError("; ".join(problems))
    return found


class Plan:
    """The values of a population for one kind of call."""

    def __init__(self, population: Population, call: Call) -> None:
        self.population = population
        self.call = call
        self.model = population.model
        self.resolver = Resolver(self.model, call)
        self.resolver.changes = population._changes
        self.resolver.gives_none = population._gives_none
        self.space = Workspace(self.model, population.memory)
        self.whole: str | None = None
        self._ahead: Ahead | None = None
        self._known: dict[int, Any] = {}
        self.schedule = self._scheduled([])

    def prepare(self) -> None:
        """Resolve all architectures, compare some with the program, and take the statistics asked for."""
        masks = self.population.masks
        calibration = self.population._calibration
        recorded: list[list[int]] = [[] for _ in masks]
        self._apart: dict[int, str] = {}
        outputs = self._resolve(recorded=recorded)
        self._check(outputs)
        if self.whole is not None:
            recorded = [[] for _ in masks]
            outputs = self._resolve(recorded=recorded)
        if calibration is not None:
            schedule = self._scheduled(outputs)
            for call in calibration:
                done: set[int] = set()
                for _ in schedule.run(call, set(range(len(masks))), calibrated=done):
                    pass
            outputs = self._resolve(statistics=recorded)
        self.schedule = self._scheduled(outputs)
        members = self.population._members
        self.population.apart = {p: why for i, why in self._apart.items() for p in members[i]}
        for why in dict.fromkeys(self._apart.values()):
            log.info("not shared, run as written: %s", why)
        self._plan_ahead()

    def run(self, call: Call, wanted: set[int]) -> Iterator[tuple[list[int], Any]]:
        """(architectures, output) for one call."""
        known, self._known = self._known, {}
        if call is not self.call or not known:
            known = {} if self._ahead is None else self._ahead(arguments_of(self.model, call))
        return self.schedule.run(call, wanted, known=known)

    def _plan_ahead(self) -> None:
        """Let one plan compute what it can, after comparing the first architecture with and without it."""
        try:
            reason = self._why_not_ahead()
            if reason is not None:
                raise NoPlan(reason)
            schedule = self.schedule
            wanted = [number for _, output in schedule.order for number in numbers_in(output)]
            ahead = Ahead(self.resolver.values.table, schedule.reach, wanted, memory=self.population.memory)
            known = ahead(arguments_of(self.model, self.call))
            first = {schedule.order[0][0][0]}
            found = next(schedule.run(self.call, first, known=known))[1]
            if not _agree(found, next(schedule.run(self.call, first))[1]):
                raise NoPlan("the plan gives other values than the model")
        except NoPlan as why:
            note = f"runs layer by layer: {why}"
            if note not in self.population.notes:
                self.population.notes.append(note)
                log.info(note)
            return
        self._ahead, self._known = ahead, known

    def _why_not_ahead(self) -> str | None:
        if self.population.exact:
            return "the eager model's very bits are asked for"
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if any(module.training for module in self.model.modules()):
            return "the model is in train mode"
        return None

    def _scheduled(self, outputs: list[Any]) -> Schedule:
        positions = [min(positions) for positions in self.population._members]
        return Schedule(self.space, self.resolver.values.table, outputs, positions)

    def _resolve(
        self, *, recorded: list[list[int]] | None = None, statistics: list[list[int]] | None = None
    ) -> list[Any]:
        found = []
        for index, masks in enumerate(self.population.masks):
            options: dict[str, Any] = {"statistics": statistics[index]} if statistics else {}
            why = self.whole if self.whole is not None else self._apart.get(index)
            try:
                if why is None:
                    own: list[int] = []
                    if recorded is not None:
                        options["recorded"] = own if self.population._calibration is not None else None
                    found.append(self.resolver.resolve(masks, **options))
                    if recorded is not None:
                        recorded[index] = own
                    continue
            except Apart as reason:
                why = str(reason)
            self._apart[index] = why
            if recorded is not None:
                recorded[index] = []
                options["recorded"] = recorded[index]
            found.append(self.resolver.whole(masks, **options))
        return found

    def _check(self, outputs: list[Any]) -> None:
        """Where the values are not what the program computes, everything is run as written."""
        by_template: dict[int, int] = {}
        for index, masks in enumerate(self.population.masks):
            if index not in self._apart:
                by_template.setdefault(id(self.resolver.template("", masks)), index)
        state = random_states()
        try:
            for index in list(by_template.values())[:_CHECKED]:
                set_random_states(state)
                args, kwargs = tree_map_only(Tensor, torch.clone, self.call)
                with forced_mutator(Forced(self.population.masks[index])):
                    expected = self.model(*args, **kwargs)
                set_random_states(state)
                found = next(iter(self._scheduled([outputs[index]]).run(self.call, {0})))[1]
                if not _agree(found, expected):
                    self.whole = "the trace gives other values than the model"
                    return
        finally:
            set_random_states(state)


def _agree(found: Any, expected: Any) -> bool:
    left, right = tree_leaves(found), tree_leaves(expected)
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if type(one) is not type(other) or one != other:
                return False
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        scale = other.double().nan_to_num().abs().max().item() if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * scale + 1e-9, equal_nan=True):
            return False
    return True
