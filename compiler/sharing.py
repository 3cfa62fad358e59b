"""Computes a table of values for one batch: in which order, and how long each is kept.

Architectures are taken in the order of a trie over their computations, so that what two of them share lies
close together in time.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.resolving import Input
from nascompile.compiler.templates import Forced
from nascompile.compiler.trace import own_forward
from nascompile.compiler.values import Ref, Value, key_of, numbers_in, replace_leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]
Statistics = dict[nn.Module, dict[str, Any]]


class Learned(Exception):
    """What was found out about a module when it ran: the values have to be resolved again."""

    def __init__(self, module: nn.Module, *, gives_none: bool) -> None:
        super().__init__()
        self.module = module
        self.gives_none = gives_none


@dataclass(slots=True)
class Workspace:
    """What outlives a batch.

    `memory`: bytes kept for later architectures. `seen`: modules that have run before. `statistics`: those
    of BatchNorms, by the number of the value that collected them.
    """

    model: nn.Module
    memory: int
    seen: set[nn.Module] = field(default_factory=set)
    statistics: dict[int, Statistics] = field(default_factory=dict)


class Schedule:
    """In which order the `outputs` of architectures are computed, and when each value is read.

    `positions` are what the user calls the architectures.
    """

    def __init__(
        self, space: Workspace, table: list[Value], outputs: Sequence[Any], positions: Sequence[int]
    ) -> None:
        self.space = space
        self.table = table
        self.positions = positions
        groups: dict[Any, tuple[list[int], Any]] = {}
        for index, output in enumerate(outputs):
            groups.setdefault(key_of(output), ([], output))[0].append(index)
        lived = [(self._reach(numbers_in(output)), members, output) for members, output in groups.values()]
        # numbers grow along the program: this is the order of a walk through a trie, depth first
        lived.sort(key=lambda entry: entry[0])
        self.order = [(members, output) for _, members, output in lived]
        self.reach: list[int] = []
        """All values, in the order in which architectures first want them."""
        # when each value is read by one that is computed for the first time
        self.reads: dict[int, list[int]] = {}
        known: set[int] = set()
        for turn, (reach, _, output) in enumerate(lived):
            fresh = [number for number in reach if number not in known]
            known.update(fresh)
            self.reach += fresh
            for number in (*(i for n in fresh for i in self.table[n].inputs), *numbers_in(output)):
                turns = self.reads.setdefault(number, [])
                if not turns or turns[-1] != turn:
                    turns.append(turn)

    def _reach(self, numbers: list[int]) -> list[int]:
        found: set[int] = set()
        frontier = list(numbers)
        while frontier:
            number = frontier.pop()
            if number not in found:
                found.add(number)
                frontier.extend(self.table[number].inputs)
        return sorted(found)

    def run(
        self,
        call: Call,
        wanted: set[int],
        *,
        calibrated: set[int] | None = None,
        known: Mapping[int, Any] | None = None,
    ) -> Iterator[tuple[list[int], Any]]:
        """(members, output) for each group of equal outputs with a wanted member; `known` are values that
        are there already."""
        walk = Batch(self, call, calibrated, known or {})
        for turn, (members, output) in enumerate(self.order):
            chosen = [member for member in members if member in wanted]
            if chosen:
                position = self.positions[chosen[0]]
                try:
                    result = walk.take(turn, output)
                except Learned:
                    raise
                except Exception as error:
                    error.add_note(f"while running architecture {position}")
                    raise
                yield chosen, result
                del result


class Batch:
    """The values that live while one batch goes through."""

    def __init__(
        self,
        schedule: Schedule,
        call: Call,
        calibrated: set[int] | None = None,
        known: Mapping[int, Any] | None = None,
    ) -> None:
        self.schedule = schedule
        self.table = schedule.table
        self.space = schedule.space
        self.call = call
        self.arguments = arguments_of(self.space.model, call)
        self.calibrated = calibrated
        self.kept: dict[int, Any] = dict(known or {})
        self.kept_bytes = _size(list(self.kept.values()))

    def take(self, turn: int, output: Any) -> Any:
        """Compute an output; afterwards only what later turns need lives on."""
        wanted = numbers_in(output)
        needed = self._missing(wanted)
        uses: dict[int, int] = dict.fromkeys(wanted, 1)
        for number in needed:
            for read in self.table[number].inputs:
                uses[read] = uses.get(read, 0) + 1
        # a value in use is not counted against the limit: this architecture would need it by itself
        alive = {number: self._release(number) for number in uses if number in self.kept}
        for number in needed:
            value = self.table[number]
            alive[number] = self._compute(number, value, alive)
            for read in value.inputs:
                uses[read] -= 1
                if not uses[read]:
                    self._keep(read, alive.pop(read), turn)
        result = replace_leaves(output, lambda leaf: alive[leaf.number] if isinstance(leaf, Ref) else leaf)
        for number, held in alive.items():
            self._keep(number, held, turn)
        return result

    def _missing(self, wanted: list[int]) -> list[int]:
        found: set[int] = set()
        frontier = list(wanted)
        while frontier:
            number = frontier.pop()
            if number not in found and number not in self.kept:
                found.add(number)
                frontier.extend(self.table[number].inputs)
        return sorted(found)

    def _next_read(self, number: int, turn: int) -> int | None:
        turns = self.schedule.reads.get(number, [])
        place = bisect_right(turns, turn)
        return turns[place] if place < len(turns) else None

    def _keep(self, number: int, held: Any, turn: int) -> None:
        if self._next_read(number, turn) is None:
            return
        self.kept[number] = held
        self.kept_bytes += _size(held)
        while self.kept_bytes > self.space.memory:
            last = max(self.kept, key=lambda one: self._next_read(one, turn) or 0)
            self._release(last)

    def _release(self, number: int) -> Any:
        held = self.kept.pop(number)
        self.kept_bytes -= _size(held)
        return held

    def _compute(self, number: int, value: Value, alive: Mapping[int, Any]) -> Any:
        if isinstance(value.call, Input):
            return value.call(self.arguments)

        def given(leaf: Any) -> Any:
            return alive[leaf.number] if isinstance(leaf, Ref) else leaf

        args = tuple(replace_leaves(arg, given) for arg in value.args)
        kwargs = {name: replace_leaves(arg, given) for name, arg in (value.kwargs or {}).items()}
        if value.module is not None:
            return self._call_module(number, value, args, kwargs)
        if value.copies:
            args = (args[0].clone(), *args[1:])
        return value.call(*args, **kwargs)

    def _call_module(self, number: int, value: Value, args: Any, kwargs: Any) -> Any:
        """Call a module that was not looked into, and find out whether it changes its input."""
        module, space = value.module, self.space
        assert module is not None
        whole = module is space.model
        if whole:
            args, kwargs = self.call
        reads_input = any(isinstance(self.table[read].call, Input) for read in value.inputs)
        is_first = module not in space.seen
        if whole or value.copies or is_first or reads_input:
            args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        tensors = (
            [] if whole or value.copies else [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        )
        versions = [tensor._version for tensor in tensors]
        decided = forced_mutator(Forced(value.masks)) if value.masks else nullcontext()
        with decided, self._statistics(number, value):
            output = module(*args, **kwargs)
        space.seen.add(module)
        if versions != [tensor._version for tensor in tensors]:
            raise Learned(module, gives_none=False)
        if output is None and not whole:
            raise Learned(module, gives_none=True)
        return output

    @contextmanager
    def _statistics(self, number: int, value: Value) -> Iterator[None]:
        """Let the BatchNorms of a value take its statistics, or collect them."""
        collects = self.calibrated is not None
        if not value.norms or not (collects or value.state is not None):
            yield
            return
        own = number if value.state is None else value.state
        statistics = self.space.statistics
        if collects:
            current = statistics.get(own) or _fresh_statistics(value.norms)
            # computed a second time for the same batch: the same output, but counted once
            counts = own not in self.calibrated  # type: ignore[operator]
            current = current if counts else {n: _copied(buffers) for n, buffers in current.items()}
        else:
            current, counts = statistics[own], False
        norms: tuple[Any, ...] = value.norms
        kept = [(norm, dict(norm._buffers), norm.momentum, norm.training) for norm in norms]
        try:
            for norm in norms:
                norm._buffers.update(current[norm])
                norm.momentum = None
                norm.training = collects
            yield
        finally:
            for norm, buffers, momentum, training in kept:
                norm._buffers.update(buffers)
                norm.momentum, norm.training = momentum, training
        if counts:
            statistics[own] = current
            self.calibrated.add(own)  # type: ignore[union-attr]


def arguments_of(model: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call by name, with defaults."""
    bound = inspect.signature(own_forward(model)).bind(*call[0], **call[1])
    bound.apply_defaults()
    return bound.arguments


def _fresh_statistics(norms: Iterable[nn.Module]) -> Statistics:
    found: Statistics = {}
    for norm in norms:
        buffers = norm._buffers
        mean, var, count = (buffers[name] for name in ("running_mean", "running_var", "num_batches_tracked"))
        assert mean is not None
        assert var is not None
        found[norm] = {
            "running_mean": torch.zeros_like(mean),
            "running_var": torch.ones_like(var),
            "num_batches_tracked": None if count is None else torch.zeros_like(count),
        }
    return found


def _copied(buffers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if held is None else held.clone() for name, held in buffers.items()}


def _size(held: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(held) if isinstance(leaf, Tensor))
