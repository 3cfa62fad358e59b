"""The network of one architecture without torch.fx and without choices: follows the data through a plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.space_layers import IN_PLACE, LAYERS, PARAMETERS, C
from tests.space_plans import (
    Block,
    Cell,
    Choice,
    Dead,
    Island,
    Layer,
    Nested,
    Op,
    Plan,
    Residual,
    Scope,
    Skip,
    Twice,
    chain,
    resolved,
    root_choice,
)


class Handwritten(nn.Module):
    """The layers that a network of one architecture consists of."""

    def __init__(self, layers: dict[tuple[Any, ...], str]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_plain(kind) for kind in layers.values()])


def _plain(kind: str) -> nn.Module:
    extra = {
        "stem": lambda: nn.Conv2d(C, C, 3, padding=1),
        "side": lambda: nn.Conv2d(C, C, 1, bias=False),
        "head": lambda: nn.Linear(C, 3),
    }
    return {**LAYERS, **extra}[kind]()


class _Value:
    """A tensor, as the layers it depends on; changed when it is changed in place."""

    def __init__(self, needs: dict[tuple[Any, ...], str]) -> None:
        self.needs = needs

    def plus(self, *others: _Value) -> _Value:
        needs = dict(self.needs)
        for other in others:
            needs.update(other.needs)
        return _Value(needs)


class _Walk:
    """Follows the data through a plan in one mode."""

    def __init__(self, plan: Plan, architecture: dict[str, Any], training: bool) -> None:
        self.plan = plan
        self.architecture = architecture
        self.training = training
        self.keys = iter(_automatic_keys())
        self.key_of: dict[tuple[Any, ...], str] = {}

    def layer(self, path: tuple[Any, ...], kind: str, x: _Value) -> _Value:
        if kind == "identity" or kind in IN_PLACE or (kind == "dropout" and not self.training):
            return x
        return x.plus(_Value({path: kind} if PARAMETERS[kind] else {}))

    def mask(self, path: tuple[Any, ...]) -> list[Any]:
        return self.architecture[self.key_of[path]]

    def reduce(self, outputs: list[Any], mask: list[Any], reduction: str) -> Any:
        weighted = any(isinstance(weight, float) for weight in mask)
        outputs = [output.plus() if weighted else output for output in outputs]
        if not outputs:
            return None
        if len(outputs) == 1 and reduction not in ("none", "concat"):
            return outputs[0]
        return outputs[0].plus(*outputs[1:])

    def choice(self, path: tuple[Any, ...], choice: Choice, x: _Value) -> Any:
        mask = self.mask(path)
        outputs = []
        for index, (weight, candidate) in enumerate(zip(mask, choice.candidates, strict=True)):
            if weight:
                here = (*path, index)
                outputs.append(
                    self.layer(here, candidate, x)
                    if isinstance(candidate, str)
                    else self.nested(here, candidate, x)
                )
        return self.reduce(outputs, mask, choice.reduction)

    def nested(self, path: tuple[Any, ...], nested: Nested, x: _Value) -> _Value:
        first = self.layer((*path, "first"), nested.first, x)
        y = self.choice((*path, "inner"), nested.choice, first)
        return x.plus(first if y is None else y)

    def block(self, path: tuple[Any, ...], block: Block, x: _Value, history: list[_Value]) -> _Value:
        match block:
            case Layer(kind):
                return self.layer(path, kind, x)
            case Op(choice):
                y = self.choice(path, choice, x)
                return x if y is None else y
            case Residual(choice, in_place):
                y = self.choice(path, choice, x)
                if y is not None and in_place:
                    y.needs.update(x.needs)
                    return y
                return x if y is None else y.plus(x)
            case Dead(choice):
                return x
            case Skip():
                return self.skip(path, block, x, history)
            case Cell():
                outputs = []
                for index, edge in enumerate(block.edges):
                    y = self.choice((*path, index), edge, x)
                    outputs.append(x if y is None else y)
                mask = self.mask((*path, "choose"))
                chosen = [output for weight, output in zip(mask, outputs, strict=True) if weight]
                y = self.reduce(chosen, mask, block.reduction)
                return x if y is None else y
            case Island(_, inner) | Scope(_, inner):
                y = self.block((*path, "inner"), inner, x, history)
                return y.plus() if isinstance(block, Island) else y
            case Twice(inner):
                y = self.block((*path, "inner"), inner, x, history)
                return self.block((*path, "inner"), inner, y, history)
        raise TypeError(block)

    def skip(self, path: tuple[Any, ...], block: Skip, x: _Value, history: list[_Value]) -> _Value:
        mask = self.mask(path)
        sources = history[-len(mask) :]
        chosen = [source for weight, source in zip(mask, sources, strict=True) if weight]
        x0 = self.reduce(chosen, mask, block.reduction)
        if x0 is None:
            return x
        if block.in_place:
            x.needs.update(x0.needs)
            return x
        return x.plus(x0)

    def name_keys(self, path: tuple[Any, ...], block: Block | Choice | Nested) -> None:
        """Give every choice its key, in the order in which modules are registered."""
        match block:
            case Choice():
                self.key_of[path] = block.key or f"LayerChoice{next(self.keys)}"
                for index, candidate in enumerate(block.candidates):
                    if isinstance(candidate, Nested):
                        self.name_keys((*path, index, "inner"), candidate.choice)
            case Op(choice) | Dead(choice) | Residual(choice, _):
                self.name_keys(path, choice)
            case Skip():
                self.key_of[path] = f"InputChoice{next(self.keys)}"
            case Cell():
                for index, edge in enumerate(block.edges):
                    self.name_keys((*path, index), edge)
                self.key_of[(*path, "choose")] = f"InputChoice{next(self.keys)}"
            case Island(_, inner) | Scope(_, inner) | Twice(inner):
                self.name_keys((*path, "inner"), inner)

    def run(self) -> dict[tuple[Any, ...], str]:
        if self.plan.root == "choice":
            choice = root_choice(self.plan)
            self.name_keys((0,), choice)
            y = self.choice((0,), choice, _Value({}))
            return {} if y is None else y.needs
        net = self.plan.root == "net"
        blocks = resolved(self.plan) if net else list(enumerate(chain(self.plan)))
        for position, (first, block) in enumerate(blocks):
            if first == position:
                self.name_keys((first,), block)
        x = _Value({("stem",): "stem"} if net else {})
        if net and self.plan.inputs not in ("one", "missing"):
            x = x.plus(_Value({("side",): "side"}))
        history = [x]
        for first, block in blocks:
            x = self.block((first,), block, x, history)
            history.append(x)
        if not net:
            return x.needs
        needs = {**x.needs, ("head",): "head"}
        return {**needs, **history[0].needs} if self.plan.outputs == "dict" else needs


def _automatic_keys() -> Any:
    return range(1, 1000)


def handwritten(plan: Plan, architecture: dict[str, Any]) -> nn.Module:
    """The network of an architecture, written without choices: all layers that its outputs depend on."""
    needs: dict[tuple[Any, ...], str] = {}
    for training in (True, False):
        needs.update(_Walk(plan, architecture, training).run())
    return Handwritten(needs)
