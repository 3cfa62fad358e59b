"""The supernet of a plan, written the way users write them, and inputs for it."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from tests.space_layers import LAYERS, C
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

SIZE = 5  # height and width


class NestedModule(nn.Module):
    def __init__(self, plan: Nested) -> None:
        super().__init__()
        self.first = LAYERS[plan.first]()
        self.inner = OpModule(plan.choice)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.first(x))


def layer_choice(plan: Choice) -> LayerChoice:
    """The LayerChoice of a plan."""
    modules = [LAYERS[c]() if isinstance(c, str) else NestedModule(c) for c in plan.candidates]
    candidates: Any = modules
    if plan.named:
        names = [f"{c if isinstance(c, str) else 'nested'}_{i}" for i, c in enumerate(plan.candidates)]
        candidates = OrderedDict(zip(names, modules, strict=True))
    return LayerChoice(candidates, reduction=plan.reduction, return_mask=plan.return_mask, key=plan.key)


def merge(value: Any, reduction: str) -> Any:
    """Several outputs as one value of C channels again."""
    if value is None:
        return None
    if reduction == "none":
        return torch.stack(value).mean(0)
    return value.unflatten(1, (-1, C)).mean(1) if reduction == "concat" else value


class OpModule(nn.Module):
    def __init__(self, plan: Choice) -> None:
        super().__init__()
        self.reduction = plan.reduction
        self.return_mask = plan.return_mask
        self.op = layer_choice(plan)

    def call(self, x: Tensor) -> Any:
        if self.return_mask:
            y, _mask = self.op(x)
        else:
            y = self.op(x)
        return merge(y, self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(x)
        return x if y is None else y


class ResidualModule(OpModule):
    def __init__(self, plan: Residual) -> None:
        super().__init__(plan.choice)
        self.in_place = plan.in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(x)
        if y is not None:
            if self.in_place:
                y += x
            else:
                y = y + x
            return y
        return x


class SkipModule(nn.Module):
    def __init__(self, plan: Skip, reach: int) -> None:
        super().__init__()
        self.plan = plan
        self.reach = reach
        n_chosen = None if plan.n_chosen is None else min(plan.n_chosen, reach)
        self.skip = InputChoice(
            n_candidates=reach, n_chosen=n_chosen, reduction=plan.reduction, return_mask=plan.return_mask
        )

    def forward(self, x: Tensor, history: list[Tensor]) -> Tensor:
        x0 = self.skip(history[-self.reach :])
        if self.plan.return_mask:
            x0 = x0[0]
        x0 = merge(x0, self.plan.reduction)
        if x0 is not None:
            if self.plan.in_place:
                x += x0
            else:
                x = x + x0
        return x


class CellModule(nn.Module):
    def __init__(self, plan: Cell) -> None:
        super().__init__()
        self.reduction = plan.reduction
        self.ops = nn.ModuleList([OpModule(edge) for edge in plan.edges])
        keys: Any = [op.op.key for op in self.ops]  # type: ignore[union-attr]
        self.by_name = plan.by_name and len(set(keys)) == len(keys)
        self.choose = InputChoice(choose_from=keys, n_chosen=plan.n_chosen, reduction=plan.reduction)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Any = [op(x) for op in self.ops]
        if self.by_name:
            outputs = dict(zip([op.op.key for op in self.ops], outputs, strict=True))  # type: ignore[union-attr]
        y = merge(self.choose(outputs), self.reduction)
        return x if y is None else y


class DeadModule(OpModule):
    def forward(self, x: Tensor) -> Tensor:
        if self.return_mask:
            _unused, _mask = self.op(x)
        else:
            self.op(x)
        return x


class ScopeModule(MutableScope):
    def __init__(self, plan: Scope) -> None:
        super().__init__(plan.key)
        self.inner = block_module(plan.inner, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class TwiceModule(nn.Module):
    def __init__(self, plan: Twice) -> None:
        super().__init__()
        self.inner = block_module(plan.inner, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class IslandModule(nn.Module):
    def __init__(self, plan: Island) -> None:
        super().__init__()
        self.how = plan.how
        self.calls = 0
        self.inner = block_module(plan.inner, 0)

    def forward(self, x: Tensor) -> Tensor:
        return ISLANDS[self.how](self, x)


def _branch(self: IslandModule, x: Tensor) -> Tensor:
    y = self.inner(x)
    return y * 2 if y.mean() > 0 else y - 1


def _loop(self: IslandModule, x: Tensor) -> Tensor:
    return torch.cat([self.inner(sample) for sample in x.split(1)])


def _counter(self: IslandModule, x: Tensor) -> Tensor:
    self.calls += 1
    return self.inner(x) + self.calls


def _draw(self: IslandModule, x: Tensor) -> Tensor:
    return self.inner(x) * random.random()


def _no_grad(self: IslandModule, x: Tensor) -> Tensor:
    y = self.inner(x)
    with torch.no_grad():
        scale = y.std() + 1
    return y / scale


def _function(self: IslandModule, x: Tensor) -> Tensor:
    return Double.apply(self.inner(x))


def _while_item(self: IslandModule, x: Tensor) -> Tensor:
    y = self.inner(x)
    while y.detach().abs().max().item() > 1:
        y = y / 2
    return y


ISLANDS = {
    "branch": _branch, "loop": _loop, "counter": _counter, "draw": _draw, "no_grad": _no_grad,
    "function": _function, "while": _while_item,
}  # fmt: skip


def block_module(plan: Block, position: int) -> nn.Module:
    """The module of one block; `position` is how many values come before it."""
    match plan:
        case Layer(kind):
            return LAYERS[kind]()
        case Op(choice):
            return OpModule(choice)
        case Residual():
            return ResidualModule(plan)
        case Skip():
            return SkipModule(plan, min(plan.reach, position))
        case Cell():
            return CellModule(plan)
        case Dead(choice):
            return DeadModule(choice)
        case Island():
            return IslandModule(plan)
        case Scope():
            return ScopeModule(plan)
        case Twice():
            return TwiceModule(plan)
    raise TypeError(plan)


class Net(nn.Module):
    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.inputs = plan.inputs
        self.outputs = plan.outputs
        self.stem = nn.Conv2d(C, C, 3, padding=1)
        self.side = nn.Conv2d(C, C, 1, bias=False)
        self.blocks = nn.ModuleList()
        for position, (first, block) in enumerate(resolved(plan)):
            known = first < position
            self.blocks.append(self.blocks[first] if known else block_module(block, position + 1))
        self.head = nn.Linear(C, 3)

    def run(self, x: Tensor, y: Tensor | None) -> Any:
        x = self.stem(x)
        if y is not None:
            x = x + self.side(y)
        history = [x]
        for block in self.blocks:
            x = block(x, history) if isinstance(block, SkipModule) else block(x)
            history.append(x)
        logits = self.head(x.mean((2, 3)))
        if self.outputs == "tuple":
            return logits, x
        if self.outputs == "dict":
            return {"logits": logits, "rest": [x, None, {"first": history[0]}]}
        return logits


class OneInput(Net):
    def forward(self, x: Tensor) -> Any:
        return self.run(x, None)


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.run(x, y)


class OptionalInput(Net):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.run(x, y)


class DictInput(Net):
    def forward(self, batch: dict[str, Any]) -> Any:
        return self.run(batch["image"], batch["more"][0])


class KeywordInput(Net):
    def forward(self, x: Tensor, *, scale: float = 1.0, y: Tensor) -> Any:
        return self.run(x * scale, y)


_NETS = {
    "one": OneInput, "two": TwoInputs, "given": OptionalInput, "missing": OptionalInput, "dict": DictInput,
    "keyword": KeywordInput,
}  # fmt: skip


def build(plan: Plan, seed: int = 0) -> nn.Module:
    """The supernet of a plan, in fp64; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if plan.root == "choice":
            model: nn.Module = layer_choice(root_choice(plan))
        elif plan.root == "sequential":
            model = nn.Sequential(*(block_module(block, 0) for block in chain(plan)))
        else:
            model = _NETS[plan.inputs](plan)
    return model.double()


def inputs(plan: Plan, seed: int = 0, batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments for the plan's model; every tensor wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(batch, C, SIZE, SIZE, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    if plan.root != "net":
        return (x,), {}
    forms: dict[str, Any] = {
        "one": ((x,), {}), "two": ((x, y), {}), "given": ((x, y), {}), "missing": ((x,), {}),
        "dict": (({"image": x, "more": (y, None)},), {}), "keyword": ((x,), {"y": y}),
    }  # fmt: skip
    return forms[plan.inputs]
