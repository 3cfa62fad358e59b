"""One run of the user's model in which every choice runs all its candidates, and after which the model is as
before.

The measurements (`measure`) and the choice graph (`graph`) are both read off this run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nascompile.compiler.decision import reduce_outputs
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable, MutableScope
from nascompile.compiler.space import Choice, all_choices, candidate_names, read_space, unwrap

NOTHING = -1
"""The decision under which an InputChoice that may choose nothing does so."""


class Watcher(Protocol):
    """What is told about the run; `call` numbers the calls of choices within one run, nested ones
    included."""

    def run_starts(self, args: tuple[Any, ...], decision: int) -> contextlib.AbstractContextManager[Any]:
        """A run begins; the context manager is active during it."""
        ...

    def call_starts(self, choice: Choice, call: int, inputs: Any) -> None:
        """A choice is called with `inputs`: (args, kwargs) of a LayerChoice, the list of an InputChoice."""
        ...

    def candidate_starts(self, choice: Choice, call: int, index: int) -> None:
        """A candidate is about to run."""
        ...

    def candidate_ends(self, choice: Choice, call: int, index: int, output: Any, error: str | None) -> None:
        """A candidate has returned `output`, or raised (then `error` says what)."""
        ...

    def call_ends(self, choice: Choice, call: int, output: Any) -> Any:
        """The choice is about to return `output`; what this returns is passed on in its place."""
        ...

    def run_ends(self, output: Any, error: Exception | None) -> bool:
        """The run has ended; True asks for another one under the next decision."""
        ...


def call_arguments(example_inputs: Any) -> tuple[Any, ...]:
    """`example_inputs` as positional arguments: a tuple is taken apart, anything else is the only
    argument."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in any nesting of lists, tuples, sets, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor replaced, in any nesting of lists, tuples (also named) and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = {key: map_tensors(item, function) for key, item in value.items()}
        return mapped if type(value) is dict else _like(value, mapped)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    if isinstance(value, tuple):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _like(value: dict[Any, Any], mapped: dict[Any, Any]) -> dict[Any, Any]:
    # OrderedDict, defaultdict and the like keep their type and settings
    clone = value.copy()
    clone.update(mapped)
    return clone


def explore(model: nn.Module, example_inputs: Any, watcher: Watcher) -> None:
    """Run the model, without gradients and in eval mode, with every candidate of every choice that is called.

    A LayerChoice passes on the output of one candidate, so that the rest of the model sees what it sees in a
    search. The decisions are tried in this order until the watcher is content: candidate 0 everywhere,
    candidate 1 everywhere (the last one where there are fewer), and so on. An InputChoice passes on
    `n_chosen` inputs from there on; with `n_chosen=None` all inputs in the first run, then one, and nothing
    in a last run. A candidate that raises while another one is passed on is reported, not an error.
    Parameters, buffers, attributes, modes, random number generators and the bound mutator are afterwards what
    they were.

    Raises NascompileError when the model ran under none of the decisions, and when parameters are
    uninitialized.
    """
    model = unwrap(model)
    check_initialized(model)
    choices = all_choices(model)
    args = call_arguments(example_inputs)
    first_error: Exception | None = None
    completed = False
    for decision in _decisions(choices):
        with untouched(model), _driven_by(_Driver(watcher, decision), model):
            copies = map_tensors(args, lambda tensor: tensor.detach().clone())
            output, error = None, None
            with watcher.run_starts(copies, decision):
                try:
                    output = model(*copies)
                except Exception as problem:  # any failure of the user's code: another decision may avoid it
                    error = problem
            wants_more = watcher.run_ends(output, error)
        completed = completed or error is None
        first_error = first_error or error
        if not wants_more:
            break
    if not completed and first_error is not None:
        raise NascompileError(_does_not_run(args, choices, first_error)) from first_error


def _does_not_run(args: tuple[Any, ...], choices: list[Choice], error: Exception) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(args)) or "none"
    tried = " under any of the decisions tried; with the first candidates" if choices else ""
    reason = f"{type(error).__name__}: {error}"
    return f"the model does not run on the example inputs (shapes: {shapes}){tried}: {reason}"


def _decisions(choices: list[Choice]) -> list[int]:
    layers = [len(choice) for choice in choices if isinstance(choice, LayerChoice)]
    inputs = [choice for choice in choices if isinstance(choice, InputChoice)]
    count = max([1, *layers, *(len(choice) + 1 for choice in inputs)])
    return [*range(count), *([NOTHING] if any(choice.n_chosen is None for choice in inputs) else [])]


class _Driver:
    """Stands in for the bound mutator during a run."""

    is_released = False

    def __init__(self, watcher: Watcher, decision: int) -> None:
        self.watcher = watcher
        self.decision = decision
        self.calls = 0

    def enter_mutable_scope(self, mutable_scope: MutableScope) -> None:
        """Scopes are read off the tree of mutables."""

    def exit_mutable_scope(self, mutable_scope: MutableScope) -> None:
        """Scopes are read off the tree of mutables."""

    def on_forward_layer_choice(self, choice: LayerChoice, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run every candidate, pass one on."""
        call, self.calls = self.calls, self.calls + 1
        self.watcher.call_starts(choice, call, (args, kwargs))
        usable = [index for index, name in enumerate(choice.names) if choice[name] is not None]
        if not usable:
            raise NascompileError(f"choice {choice.key!r}: every candidate is None")
        passed = usable[min(max(self.decision, 0), len(usable) - 1)]
        kept: Any = None
        for index in usable:
            self.watcher.candidate_starts(choice, call, index)
            try:
                output = choice[index](*args, **kwargs)
            except Exception as problem:
                self.watcher.candidate_ends(choice, call, index, None, f"{type(problem).__name__}: {problem}")
                if index == passed:
                    raise
                continue
            self.watcher.candidate_ends(choice, call, index, output, None)
            kept = output if index == passed else kept
        reduced = reduce_outputs([kept], choice.reduction, choice.key, [choice.names[passed]])
        return self.watcher.call_ends(choice, call, reduced), _mask(len(choice), [passed])

    def on_forward_input_choice(self, choice: InputChoice, tensor_list: list[Any]) -> tuple[Any, Any]:
        """Pass some inputs on."""
        call, self.calls = self.calls, self.calls + 1
        self.watcher.call_starts(choice, call, tensor_list)
        chosen = self._chosen(choice)
        names = candidate_names(choice)
        outputs = [tensor_list[index] for index in chosen]
        reduced = reduce_outputs(outputs, choice.reduction, choice.key, [names[index] for index in chosen])
        return self.watcher.call_ends(choice, call, reduced), _mask(len(choice), chosen)

    def _chosen(self, choice: InputChoice) -> list[int]:
        count = len(choice)
        if choice.n_chosen is None:
            if self.decision == NOTHING:
                return []
            return list(range(count)) if self.decision == 0 else [min(self.decision, count) - 1]
        start = min(max(self.decision, 0), count - choice.n_chosen)
        return list(range(start, start + choice.n_chosen))


def _mask(length: int, chosen: Iterable[int]) -> Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    for index in chosen:
        mask[index] = True
    return mask


@contextlib.contextmanager
def _driven_by(driver: _Driver, model: nn.Module) -> Iterator[None]:
    # the slot is swapped rather than bound: a model has one mutator, and it must not notice
    mutables: list[Mutable] = list(read_space(model).traverse(deduplicate=False))
    bound = [mutable.__dict__["mutator"] for mutable in mutables]
    try:
        for mutable in mutables:
            mutable.__dict__["mutator"] = driver
        yield
    finally:
        for mutable, mutator in zip(mutables, bound, strict=True):
            mutable.__dict__["mutator"] = mutator


def check_initialized(model: nn.Module) -> None:
    """Raise NascompileError naming the parameters of lazy modules that have no shape yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in named if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise NascompileError(
            f"parameters of lazy modules are not initialized: {', '.join(lazy)}; run the model once before"
        )


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on exit, modes, attributes, buffers and random number generators are as
    before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    attributes = [_Attributes(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generators = _save_generators(model)
    try:
        model.eval()
        # the fast paths of attention layers are single operators whose FLOPs nobody counts
        with torch.no_grad(), _no_attention_fast_path():
            yield
    finally:
        for saved in attributes:
            saved.restore()
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:
                module.training = mode
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.resize_(value.shape).copy_(value)
        generators()


class _Attributes:
    """The attributes of a module, its tables of parameters, buffers and children, shallowly."""

    TABLES = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = dict(module.__dict__)
        self.tables = {name: dict(module.__dict__[name]) for name in self.TABLES}

    def restore(self) -> None:
        """Put everything back."""
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for name, content in self.tables.items():
            table = self.module.__dict__[name]
            table.clear()
            table.update(content)


@contextlib.contextmanager
def _no_attention_fast_path() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _save_generators(model: nn.Module) -> Callable[[], None]:
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    cpu, plain, numeric = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(plain)
        np.random.set_state(numeric)
        for device, state in cuda:
            torch.cuda.set_rng_state(state, device)

    return restore
