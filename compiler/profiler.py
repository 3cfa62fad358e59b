"""Watches an exploration of the model and keeps what every candidate of every choice costs and returns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from nascompile.compiler.explore import Watcher, explore, map_tensors, tensors_in
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable
from nascompile.compiler.space import Choice, all_choices, candidate_names, unwrap

Shape = Any
"""Sizes as a tuple of int for a tensor; for anything else the same nesting with tensors replaced by their
sizes."""


@dataclass(frozen=True, slots=True)
class CandidateProfile:
    """One candidate of a choice; `outputs` and `dtypes` have an entry a call, None where it did not run."""

    name: str
    parameters: int  # each counted once, nested choices with all their candidates
    flops: int  # over all calls, nested choices with all their candidates
    own_flops: int  # the same without nested choices
    outputs: tuple[Shape | None, ...]
    dtypes: tuple[torch.dtype | None, ...]
    error: str | None  # why it is not (fully) measured

    @property
    def output(self) -> Shape | None:
        """The output of the first call in which it ran."""
        return next((shape for shape in self.outputs if shape is not None), None)


@dataclass(frozen=True, slots=True)
class ChoiceProfile:
    """One choice of the model; `calls` holds the shapes of the inputs of every call in one forward pass."""

    path: str
    key: str
    kind: str  # "LayerChoice" or "InputChoice"
    reduction: str
    n_chosen: int | None  # of an InputChoice; 1 for a LayerChoice
    inside: tuple[str, str] | None  # path of the enclosing choice and name of its candidate
    calls: tuple[Shape, ...]
    candidates: tuple[CandidateProfile, ...]

    @property
    def parameters(self) -> int:
        """Of all candidates together; those shared between candidates count for each."""
        return sum(candidate.parameters for candidate in self.candidates)

    @property
    def flops(self) -> int:
        """Of all candidates over all calls."""
        return sum(candidate.flops for candidate in self.candidates)


@dataclass(slots=True)
class _Measured:
    # of one candidate; lists have an entry a call
    flops: int = 0
    own_flops: int = 0
    outputs: list[Any] = field(default_factory=list)
    dtypes: list[torch.dtype | None] = field(default_factory=list)
    error: str | None = None


@dataclass(slots=True)
class _Frame:
    # a candidate that is running
    path: str
    name: str
    start: int
    nested: int = 0


@dataclass(slots=True)
class _Run:
    # what one run showed, by path; the candidates by index
    calls: dict[str, list[Shape]] = field(default_factory=dict)
    inside: dict[str, tuple[str, str] | None] = field(default_factory=dict)
    candidates: dict[str, dict[int, _Measured]] = field(default_factory=dict)
    outside: int = 0


class Profiler(Watcher):
    """Watches an exploration and keeps what it measured; a subclass may watch more of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.choices: dict[str, Choice] = {path_of(choice): choice for choice in all_choices(self.model)}
        self._runs: list[_Run] = []
        self._run = _Run()
        self._frames: list[_Frame] = []
        self._counter = flop_counter()

    def run(self, example_inputs: Any) -> Profiler:
        """Explore the model; returns itself."""
        explore(self.model, example_inputs, self)
        return self

    def profiles(self) -> dict[str, ChoiceProfile]:
        """The profile of every choice by its path, in registration order."""
        return {path: self._profile(path, choice) for path, choice in self.choices.items()}

    def flops(self) -> int:
        """FLOPs of one pass in which everything runs: outside of choices, and all candidates of all
        choices."""
        own = (c.own_flops for profile in self.profiles().values() for c in profile.candidates)
        return self.outside_flops() + sum(own)

    def outside_flops(self) -> int:
        """FLOPs outside of all choices."""
        return self._runs[0].outside

    # the watcher

    def run_starts(self, args: tuple[Any, ...], decision: int) -> contextlib.AbstractContextManager[Any]:
        self._run, self._frames = _Run(), []
        self._counter = flop_counter()
        return self._counter

    def call_starts(self, choice: Choice, call: int, inputs: Any) -> None:
        path = path_of(choice)
        if isinstance(choice, LayerChoice):
            args, kwargs = shapes_of(inputs)
            shown = {**dict(enumerate(args)), **kwargs} if kwargs else args
            shown = args[0] if len(args) == 1 and not kwargs else shown
        else:
            shown = shapes_of(inputs)
        self._run.calls.setdefault(path, []).append(shown)
        frame = self._frames[-1] if self._frames else None
        self._run.inside.setdefault(path, (frame.path, frame.name) if frame else None)
        measured = self._run.candidates.setdefault(path, {})
        for index in range(len(choice)):
            if isinstance(choice, LayerChoice) and choice[index] is None:
                continue
            measured.setdefault(index, _Measured())
            shape = shapes_of(inputs[index]) if isinstance(choice, InputChoice) else None
            measured[index].outputs.append(shape)
            measured[index].dtypes.append(_dtype(inputs[index]) if isinstance(choice, InputChoice) else None)

    def candidate_starts(self, choice: Choice, call: int, index: int) -> None:
        name = candidate_names(choice)[index]
        self._frames.append(_Frame(path_of(choice), name, self._counter.get_total_flops()))

    def candidate_ends(self, choice: Choice, call: int, index: int, output: Any, error: str | None) -> None:
        frame = self._frames.pop()
        flops = self._counter.get_total_flops() - frame.start
        if self._frames:
            self._frames[-1].nested += flops
        else:
            self._run.outside -= flops
        measured = self._run.candidates[frame.path][index]
        measured.error = measured.error or error
        if error is None:
            measured.flops += flops
            measured.own_flops += flops - frame.nested
            measured.outputs[-1], measured.dtypes[-1] = shapes_of(output), _dtype(output)

    def call_ends(self, choice: Choice, call: int, output: Any) -> Any:
        return output

    def run_ends(self, output: Any, error: Exception | None) -> bool:
        if error is None:
            self._run.outside += self._counter.get_total_flops()
            self._runs.append(self._run)
        return any(self._is_open(path, choice) for path, choice in self.choices.items())

    # merging the runs

    def _is_open(self, path: str, choice: Choice) -> bool:
        open_ones = [index for index in range(len(choice)) if self._best(path, index) is None]
        return any(isinstance(choice, InputChoice) or choice[index] is not None for index in open_ones)

    def _best(self, path: str, index: int) -> _Measured | None:
        # the first completed run in which the candidate ran without an error
        for run in self._runs:
            measured = run.candidates.get(path, {}).get(index)
            if measured is not None and measured.error is None:
                return measured
        return None

    def _profile(self, path: str, choice: Choice) -> ChoiceProfile:
        run = next((run for run in self._runs if path in run.calls), _Run())
        calls = tuple(run.calls.get(path, ()))
        return ChoiceProfile(
            path=path,
            key=choice.key,
            kind="LayerChoice" if isinstance(choice, LayerChoice) else "InputChoice",
            reduction=choice.reduction,
            n_chosen=1 if isinstance(choice, LayerChoice) else choice.n_chosen,
            inside=run.inside.get(path),
            calls=calls,
            candidates=tuple(
                self._candidate(path, choice, index, len(calls)) for index in range(len(choice))
            ),
        )

    def _candidate(self, path: str, choice: Choice, index: int, calls: int) -> CandidateProfile:
        module = choice[index] if isinstance(choice, LayerChoice) else None
        best = self._best(path, index)
        error = None
        if best is None:
            failed = (run.candidates.get(path, {}).get(index) for run in self._runs)
            error = next((measured.error for measured in failed if measured is not None), "never called")
            if isinstance(choice, LayerChoice) and module is None:
                error = "is None"
            best = _Measured()
        outputs, dtypes = (_padded(values, calls) for values in (best.outputs, best.dtypes))
        return CandidateProfile(
            name=candidate_names(choice)[index],
            parameters=count_parameters(module),
            flops=best.flops,
            own_flops=best.own_flops,
            outputs=tuple(outputs),
            dtypes=tuple(dtypes),
            error=error,
        )


def path_of(choice: Mutable) -> str:
    """The dotted path that reading the space gave to the choice; "" when it is the model itself."""
    return choice._name or ""


def _padded(values: Iterable[Any], length: int) -> list[Any]:
    # runs under different decisions may call a choice a different number of times
    known = list(values)[:length]
    return known + [None] * (length - len(known))


def _dtype(value: Any) -> torch.dtype | None:
    first = next(tensors_in(value), None)
    return None if first is None else first.dtype


def count_parameters(module: nn.Module | None) -> int:
    """Scalars in the parameters of a module, each parameter counted once, however often it is registered."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def shapes_of(value: Any) -> Shape:
    """Sizes as tuples of int in the nesting of `value`; what is no tensor stays."""
    return map_tensors(value, lambda tensor: tuple(tensor.shape))


def flop_counter() -> FlopCounterMode:
    """Torch's counter, extended by operators that layers become on a CPU or in eval mode."""
    return FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _mv_flops(matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _addmv_flops(_added: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _onednn_rnn_flops(inputs: Shape, weight_in: Shape, weight_hidden: Shape, *_: Any, **__: Any) -> int:
    # one layer and direction; every step of every sequence multiplies with both weights
    return 2 * math.prod(inputs[:-1]) * (math.prod(weight_in) + math.prod(weight_hidden))


def _cudnn_rnn_flops(inputs: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    # all layers and directions; biases have one dimension
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


_aten = torch.ops.aten
_MORE_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten.mv: _mv_flops,
    _aten.dot: _mv_flops,
    _aten.addmv: _addmv_flops,
    _aten.mkldnn_rnn_layer: _onednn_rnn_flops,
    _aten._cudnn_rnn: _cudnn_rnn_flops,
}
