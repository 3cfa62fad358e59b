"""What a choice becomes in a compiled graph: a callable that follows the decision at run time, without
dispatch or hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from nascompile.compiler.chains import Member
from nascompile.compiler.checks import has_hooks
from nascompile.compiler.decision import Selection, combine, reduce_outputs, weigh
from nascompile.compiler.groups import Group
from nascompile.compiler.merging import pick
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.mutator import BaseMutator, Mutator
from nascompile.compiler.patterns import Pattern
from nascompile.compiler.space import Choice, candidate_names

Body = Callable[[Any], Any]


class Shared:
    """A value that several candidates start from, computed when the first of them runs."""

    __slots__ = ("_args", "_function", "_kwargs", "_value")

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._function: Callable[..., Any] | None = function
        self._args = args
        self._kwargs = kwargs
        self._value: Any = None

    def get(self) -> Any:
        """The value; computed at most once."""
        if self._function is not None:
            args = [arg.get() if isinstance(arg, Shared) else arg for arg in self._args]
            self._value = self._function(*args, **self._kwargs)
            self._function, self._args = None, ()
        return self._value


class SharedCall:
    """`Shared` of one function, as a node target: fx cannot write a function down as an argument."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"shared_{function.__name__}"
        self.__module__ = "nascompile"

    def __call__(self, *args: Any, **kwargs: Any) -> Shared:
        return Shared(self.function, *args, **kwargs)


def is_shared(node: fx.Node) -> bool:
    """Whether the node makes a shared value."""
    return node.target is Shared or isinstance(node.target, SharedCall)


class LoweredChoice:
    """A choice as a function in the graph; `pattern` is the fusion of its weighted combination, or None."""

    def __init__(self, choice: Choice, path: str) -> None:
        self.choice = choice
        self.path = path
        self.pattern: Pattern | None = None
        # fx writes calls by these names
        kind = "layer_choice" if isinstance(choice, LayerChoice) else "input_choice"
        self.__name__ = self.__qualname__ = f"{kind}_{path.replace('.', '_') or 'root'}"
        self.__module__ = "nascompile"

    def _combine(self, outputs: list[Any], selection: Selection) -> Any:
        choice, pattern = self.choice, self.pattern
        weights = selection.weights
        fusible = len(outputs) > 1 and pattern is not None and pattern.why_not_tensors(outputs) is None
        if weights is None or pattern is None or not fusible:
            return self._combine_as_written(outputs, selection)
        if len(outputs) != len(weights):
            weights = weights[list(selection.indices)]
        return pattern.after(outputs, weights, choice.reduction)

    def _combine_as_written(self, outputs: list[Any], selection: Selection) -> Any:
        choice = self.choice
        weighted = [
            weigh(output, selection.weight(index), choice.key)
            for output, index in zip(outputs, selection.indices, strict=True)
        ]
        return reduce_outputs(weighted, choice.reduction, choice.key, self._names(selection))

    def _names(self, selection: Selection) -> list[str]:
        names = candidate_names(self.choice)
        return [names[index] for index in selection.indices]


class LoweredLayerChoice(LoweredChoice):
    """Runs the chosen candidates, each from its shared prefix where it has one; `groups` are computed
    together."""

    def __init__(self, choice: LayerChoice, path: str) -> None:
        super().__init__(choice, path)
        self.bodies: list[Body | None] = [None] * len(choice)
        self.groups: tuple[Group, ...] = ()

    def __call__(self, shared: Sequence[Shared | None], *args: Any, **kwargs: Any) -> Any:
        choice: LayerChoice = self.choice  # type: ignore[assignment]
        mutator = choice.require_mutator()
        if not decides_by_masks(mutator, "on_forward_layer_choice"):
            out, mask = mutator.on_forward_layer_choice(choice, *args, **kwargs)
        else:
            selection, mask = mutator.selection(choice.key, len(choice))  # type: ignore[attr-defined]
            if self.pattern is None:
                # as written: each output is weighed before the next candidate runs, which may change it
                runs = ((k, self._run(k, shared[k], args, kwargs)) for k in selection.indices)
                weighed = [weigh(output, selection.weight(k), choice.key) for k, output in runs]
                out = reduce_outputs(weighed, choice.reduction, choice.key, self._names(selection))
            else:
                out = self._run_fused(shared, args, kwargs, selection)
        return (out, mask) if choice.return_mask else out

    def _run_fused(
        self,
        shared: Sequence[Shared | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        chosen: Selection,
    ) -> Any:
        ready = [] if kwargs or len(args) != 1 else self._together(shared, args[0], chosen)
        if not ready:
            return self._combine([self._run(k, shared[k], args, kwargs) for k in chosen.indices], chosen)
        taken = {member.index for _, _, members in ready for member in members}
        rest = [k for k in chosen.indices if k not in taken]
        outputs = [self._run(k, shared[k], args, kwargs) for k in rest]
        weights: Tensor = chosen.weights  # type: ignore[assignment]
        weights = weights.to(ready[0][1].device)
        if self.choice.reduction == "mean":
            weights = weights / (len(taken) + sum(output is not None for output in outputs))
        terms = [
            group.pattern.after(x, members, pick(weights, [member.index for member in members]))
            for group, x, members in ready
        ]
        if outputs and self.pattern is not None and self.pattern.why_not_tensors([*terms, *outputs]) is None:
            return combine([*terms, self.pattern.after(outputs, pick(weights, rest), "sum")], "sum")
        key, names = self.choice.key, candidate_names(self.choice)
        weighed = [weigh(output, weights[k], key) for output, k in zip(outputs, rest, strict=True)]
        first = [members[0].index for _, _, members in ready]
        return reduce_outputs([*terms, *weighed], "sum", key, [names[k] for k in (*first, *rest)])

    def _together(
        self, shared: Sequence[Shared | None], source: Any, chosen: Selection
    ) -> list[tuple[Group, Any, list[Member]]]:
        """The groups of which several candidates take part, with the value they start from."""
        found = []
        for group in self.groups if chosen.weights is not None else ():
            members = group.chosen(chosen.indices)
            if len(members) < 2:
                continue
            prefix = shared[members[0].index]
            x = source if prefix is None else prefix.get()
            members = group.suited(x, members)
            if members:
                found.append((group, x, members))
        return found

    def _run(self, index: int, shared: Shared | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        body = self.bodies[index]
        if shared is not None and body is not None:
            return body(shared.get())
        candidate = self.choice[index]  # type: ignore[index]
        if candidate is None:
            raise ValueError(f"choice {self.choice.key!r}: candidate {index} is None and cannot be chosen")
        return candidate(*args, **kwargs)


class LoweredInputChoice(LoweredChoice):
    """Weighs and reduces the chosen inputs."""

    def __call__(self, optional_inputs: Any) -> Any:
        choice: InputChoice = self.choice  # type: ignore[assignment]
        inputs = choice.as_list(optional_inputs)
        mutator = choice.require_mutator()
        if not decides_by_masks(mutator, "on_forward_input_choice"):
            out, mask = mutator.on_forward_input_choice(choice, inputs)
        else:
            selection, mask = mutator.selection(choice.key, len(inputs))  # type: ignore[attr-defined]
            out = self._combine([inputs[k] for k in selection.indices], selection)
        return (out, mask) if choice.return_mask else out


def gives_nothing(choice: Choice) -> bool:
    """Whether the current decision chooses no candidate at all, so that the output is None."""
    mutator = choice.require_mutator()
    if not isinstance(mutator, Mutator) or choice.reduction == "none":
        return False
    return not mutator.selection(choice.key, len(choice))[0].indices


def why_not_lowered(choice: Choice) -> str | None:
    """Why a choice stays a module in the graph, or None."""
    if has_hooks(choice) or "forward" in choice.__dict__:
        return "has hooks or a replaced forward: called as a module"
    return None


def lowered(choice: Choice, path: str) -> LoweredLayerChoice | LoweredInputChoice:
    """The callable for a choice."""
    return (
        LoweredLayerChoice(choice, path)
        if isinstance(choice, LayerChoice)
        else LoweredInputChoice(choice, path)
    )


def decides_by_masks(mutator: BaseMutator, method: str) -> bool:
    """Whether a choice may be carried out from the mask alone: the mutator has not its own idea of how."""
    return getattr(type(mutator), method) is getattr(Mutator, method, None)
