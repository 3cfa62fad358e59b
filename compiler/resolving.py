"""Follows one architecture through the traced model and enters what it computes into a table of values.

The model is traced once; it is traced again only for decisions that choose nothing somewhere, because the
program may go another way then (`if x is not None`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nascompile.compiler.architecture import Mask
from nascompile.compiler.checks import has_hooks
from nascompile.compiler.decision import Selection, read_mask, reduce_outputs, weigh
from nascompile.compiler.errors import SpaceError
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable
from nascompile.compiler.signature import required_parameters
from nascompile.compiler.space import Choice, candidate_names
from nascompile.compiler.templates import Apart, Template
from nascompile.compiler.trace import is_builtin, own_forward, why_whole
from nascompile.compiler.values import Ref, Value, Values, replace_leaves


class Resolver:
    """Enters architectures of one model into `values`, for calls like `example` (args, kwargs).

    `changes` holds the modules found to change their input in place, `gives_none` the candidates found to
    return None: who runs the values adds to them and resolves again.
    """

    def __init__(self, model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        self.model = model
        self.example = example
        self.values = Values()
        self.changes: set[nn.Module] = set()
        self.gives_none: set[nn.Module] = set()
        self.paths = {module: path for path, module in reversed(list(model.named_modules()))}
        self._inside: dict[nn.Module, tuple[Choice, ...]] = {}
        self._norms: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._templates: dict[Any, Template | Apart] = {}

    @property
    def templates(self) -> list[Template]:
        """All traces made so far."""
        return [template for template in self._templates.values() if isinstance(template, Template)]

    def resolve(
        self,
        masks: Mapping[str, Mask],
        *,
        recorded: list[int] | None = None,
        statistics: list[int] | None = None,
    ) -> Any:
        """The model's output under the decision, with a Ref for each tensor in it.

        Calls of modules with BatchNorm are appended to `recorded`, or take `statistics` of such a list in
        their order. Raises Apart when the model has to be run as written.
        """
        if isinstance(self.model, LayerChoice | InputChoice):
            raise Apart("the model itself is a choice: there is no graph around it")
        template = self.template("", masks)
        walk = _Walk(self, masks, recorded, iter(statistics) if statistics is not None else None)
        given = {
            node: walk.ref(("input", str(node.target)), Value(Input(str(node.target), node.args)))
            for node in template.nodes
            if node.op == "placeholder"
        }
        return walk.graph(template, given)

    def whole(
        self,
        masks: Mapping[str, Mask],
        *,
        recorded: list[int] | None = None,
        statistics: list[int] | None = None,
    ) -> Ref:
        """The model's output as one value, computed as written."""
        walk = _Walk(self, masks, recorded, iter(statistics) if statistics is not None else None, alone=True)
        return walk.module(self.model, (), {})

    def template(self, path: str, masks: Mapping[str, Mask]) -> Template:
        """The trace of the module at `path` for such a decision."""
        inside = self.choices_in(self.model.get_submodule(path))
        nothing = frozenset(choice.key for choice in inside if _gives_nothing(choice, masks))
        if (path, nothing) not in self._templates:
            try:
                example = self.example if not path else None
                self._templates[path, nothing] = Template(self.model, path, masks, nothing, example)
            except Apart as reason:
                self._templates[path, nothing] = reason
        found = self._templates[path, nothing]
        if isinstance(found, Apart):
            raise found
        return found

    def choices_in(self, module: nn.Module) -> tuple[Choice, ...]:
        """The choices in a module, itself included."""
        if module not in self._inside:
            self._inside[module] = tuple(
                child for child in module.modules() if isinstance(child, LayerChoice | InputChoice)
            )
        return self._inside[module]

    def norms_in(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """The BatchNorms with running statistics in a module, itself included."""
        if module not in self._norms:
            self._norms[module] = tuple(
                child
                for child in module.modules()
                if isinstance(child, _BatchNorm) and child.running_mean is not None
            )
        return self._norms[module]


def _gives_nothing(choice: Choice, masks: Mapping[str, Mask]) -> bool:
    return choice.reduction != "none" and not any(masks[choice.key])


class Input:
    """Takes an argument of the call by name."""

    def __init__(self, name: str, default: tuple[Any, ...]) -> None:
        self.name = name.lstrip("*")
        self.default = default

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        return arguments[self.name] if self.name in arguments or not self.default else self.default[0]


class _Walk:
    """One architecture on its way through the graph."""

    def __init__(
        self,
        resolver: Resolver,
        masks: Mapping[str, Mask],
        recorded: list[int] | None,
        statistics: Any,
        *,
        alone: bool = False,
    ) -> None:
        self.resolver = resolver
        self.model = resolver.model
        self.masks = masks
        self.recorded = recorded
        self.statistics = statistics
        self.alone = alone
        self._times: Counter[Any] = Counter()
        self._norms: set[nn.Module] = set()

    def ref(self, key: Any, value: Value) -> Ref:
        # the same call a second time is a second value: it may draw random numbers
        found = self.resolver.values.ref((key, 0), value)
        times = self._times[found.number]
        self._times[found.number] += 1
        return self.resolver.values.ref((key, times), value) if times else found

    def graph(self, template: Template, given: Mapping[fx.Node, Any]) -> Any:
        known: dict[fx.Node, Any] = dict(given)
        for node in template.nodes:
            if node.op == "placeholder":
                continue
            args, kwargs = (
                replace_leaves(tree, lambda leaf: known[leaf] if isinstance(leaf, fx.Node) else leaf)
                for tree in (tuple(node.args), dict(node.kwargs))
            )
            if node.op == "output":
                return args[0]
            known[node] = self.node(template, node, args, kwargs)
        raise AssertionError("a graph without an output")

    def node(self, template: Template, node: fx.Node, args: Any, kwargs: Any) -> Any:
        copies = node in template.copies
        if node.op == "get_attr":
            return self.ref(("attribute", node.target), Value(_Attribute(self.model, str(node.target))))
        if node.op == "call_method":
            return self.ref(("method", node.target), Value(Method(str(node.target)), args, kwargs, copies))
        if node.op == "call_function":
            if node.target is operator.getitem and isinstance(args[0], list | tuple | dict):
                return args[0][args[1]]
            call = _set_item if node.target is operator.setitem else node.target
            assert callable(call)
            return self.ref(("function", call), Value(call, args, kwargs, copies))
        module = template.modules[node]
        if isinstance(module, LayerChoice | InputChoice) and why_whole(module) is None:
            if isinstance(module, LayerChoice):
                return self.layer_choice(template, node, module, args, kwargs)
            if len(args) == 1 and isinstance(args[0], list | tuple | dict):
                return self.reduced(module, self.selection(module), module.as_list(args[0]))
        is_operation = is_builtin(module) and not has_hooks(module) and not module._modules
        if is_operation and not isinstance(module, _BatchNorm):
            path = self.resolver.paths[module]
            return self.ref(("module", path), Value(module, args, kwargs, copies))
        if module in self.resolver.changes and template.is_seen_later(node):
            raise Apart(f"{node.target!r} changes its input in place, which is seen later")
        return self.module(module, args, kwargs)

    def layer_choice(
        self, template: Template, node: fx.Node, choice: LayerChoice, args: Any, kwargs: Any
    ) -> Any:
        selection = self.selection(choice)
        outputs: list[Any] = [None] * len(choice)
        for index in selection.indices:
            name, candidate = choice.names[index], choice[index]
            if candidate is None:
                raise SpaceError(f"choice {choice.key!r}: candidate {name!r} is None and cannot be chosen")
            if candidate in self.resolver.changes and (
                len(selection.indices) > 1 or template.is_seen_later(node)
            ):
                raise Apart(
                    f"candidate {name!r} of {choice.key!r} changes its input in place, which is seen later"
                )
            if candidate in self.resolver.gives_none:
                raise Apart(f"candidate {name!r} of {choice.key!r} returns None")
            outputs[index] = self.candidate(candidate, args, kwargs)
        return self.reduced(choice, selection, outputs)

    def candidate(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A chosen layer: one value, or what is in it where it has choices of its own."""
        if type(module) is nn.Identity and not has_hooks(module) and len(args) == 1 and not kwargs:
            return args[0]
        if (
            self.resolver.choices_in(module)
            and not kwargs
            and why_whole(module) is None
            and not isinstance(module, Mutable)
        ):
            names = [parameter.name for parameter in required_parameters(own_forward(module))]
            try:
                inner = self.resolver.template(self.resolver.paths[module], self.masks)
            except Apart:
                return self.module(module, args, kwargs)
            places = [node for node in inner.nodes if node.op == "placeholder"]
            if len(places) == len(args) == len(names):
                return self.graph(inner, dict(zip(places, args, strict=True)))
        return self.module(module, args, kwargs)

    def module(self, module: nn.Module, args: Any, kwargs: Any) -> Ref:
        """A module that is called as it is."""
        inside = {choice.key: self.masks[choice.key] for choice in self.resolver.choices_in(module)}
        norms = self.resolver.norms_in(module)
        value = Value(module, args, kwargs, module in self.resolver.changes, module, inside or None, norms)
        if norms and self.statistics is not None:
            value.state = next(self.statistics)
        key = "whole" if self.alone else "call"
        ref = self.ref((key, self.resolver.paths[module], _decisions(inside)), value)
        if norms and self.recorded is not None:
            self.recorded.append(ref.number)
            if self._norms & set(norms):
                raise Apart("calls a BatchNorm twice: its statistics belong to this architecture alone")
            self._norms |= set(norms)
        return ref

    def selection(self, choice: Choice) -> Selection:
        return read_mask(self.masks[choice.key], len(choice), choice.key)

    def reduced(self, choice: Choice, selection: Selection, outputs: list[Any]) -> Any:
        """The chosen outputs, weighed and reduced."""
        terms = [self.weighed(choice, selection, index, outputs[index]) for index in selection.indices]
        names = candidate_names(choice)
        out: Any = terms
        if choice.reduction != "none":
            out = terms[0] if len(terms) == 1 else None
            if len(terms) > 1:
                reduce = Reduction(choice, [names[index] for index in selection.indices])
                out = self.ref(("reduce", choice.reduction), Value(reduce, (terms,)))
        return (out, list(self.masks[choice.key])) if choice.return_mask else out

    def weighed(self, choice: Choice, selection: Selection, index: int, output: Any) -> Any:
        weight = selection.weight(index)
        if weight is None or output is None:
            return output
        key = ("weigh", float(weight).hex())
        return self.ref(key, Value(_Weighing(weight, choice.key), (output,)))


def _decisions(masks: Mapping[str, Mask]) -> Any:
    return tuple(
        (key, tuple((type(value), float(value).hex()) for value in mask)) for key, mask in masks.items()
    )


def _set_item(value: Any, index: Any, item: Any) -> Any:
    value[index] = item
    return value


class _Attribute:
    def __init__(self, model: nn.Module, path: str) -> None:
        owner, _, self.name = path.rpartition(".")
        self.owner = model.get_submodule(owner)

    def __call__(self) -> Any:
        return getattr(self.owner, self.name)


class Method:
    """Calls a method by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, self.name)(*args, **kwargs)


class _Weighing:
    def __init__(self, weight: torch.Tensor, key: str) -> None:
        self.weight, self.key = weight, key

    def __call__(self, output: Any) -> Any:
        return weigh(output, self.weight, self.key)


class Reduction:
    """Reduces the chosen outputs of a choice."""

    def __init__(self, choice: Choice, names: list[str]) -> None:
        self.choice, self.names = choice, names

    def __call__(self, outputs: list[Any]) -> Any:
        return reduce_outputs(outputs, self.choice.reduction, self.choice.key, self.names)
