"""Random search spaces: a plan as plain data, the model a user would write for it, and what its parts should be.

`plans()` draws plans, `build` turns one into a supernet, `architectures` draws decisions for it, and `handwritten` says,
by following the data through the plan without torch.fx and without any choice, which layers a network of that
architecture needs.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nascompile.compiler.space import all_choices, choices
from nascompile.mutables import InputChoice, LayerChoice, MutableScope

C = 4  # channels everywhere, so that any two values can be added
SIZE = 5  # height and width

# ----- layers: what a candidate is made of


class Separable(nn.Module):
    """ReLU, depthwise, 1x1, BatchNorm, with the functional ReLU that users write."""

    def __init__(self, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.depthwise = nn.Conv2d(C, C, kernel, padding=padding, dilation=dilation, groups=C, bias=False)
        self.pointwise = nn.Conv2d(C, C, 1, bias=False)
        self.bn = nn.BatchNorm2d(C, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(F.relu(x))))


class Zero(nn.Module):
    """DARTS's "none"."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0)


class SqueezeExcite(nn.Module):
    """Uses its input twice, and reads a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.gate(x.mean((2, 3))))
        return x * scale.view(x.size(0), C, 1, 1)


class Scale(nn.Module):
    """A parameter of its own, and a buffer that counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((C, 1, 1), 0.5))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.factor, 0.5)
        self.calls.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.factor


class DropPath(nn.Module):
    """Python branches on an attribute and on the mode; random numbers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.probability = 0.3

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.probability > 0:
            keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device) >= self.probability
            x = x * keep / (1 - self.probability)
        return F.dropout(x + 0.25, 0.2, training=self.training)


def _conv_bn(relu: nn.Module) -> nn.Sequential:
    return nn.Sequential(relu, nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))


LAYERS: dict[str, Any] = {
    "conv1": lambda: nn.Conv2d(C, C, 1, bias=False),
    "conv3": lambda: nn.Conv2d(C, C, 3, padding=1),
    "relu_conv_bn": lambda: _conv_bn(nn.ReLU()),
    "relu_conv_bn_": lambda: _conv_bn(nn.ReLU(inplace=True)),
    "separable3": lambda: Separable(3),
    "dilated5": lambda: Separable(5, 2),
    "max_pool": lambda: nn.MaxPool2d(3, 1, 1),
    "avg_pool_bn": lambda: nn.Sequential(
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(C, affine=False)
    ),
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu_": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "dropout": lambda: nn.Dropout(0.3),
    "bn": lambda: nn.BatchNorm2d(C),
    "zero": Zero,
    "squeeze": SqueezeExcite,
    "scale": Scale,
    "drop_path": DropPath,
}
# counted by hand: weights and biases of each layer
PARAMETERS = {
    "conv1": 16, "conv3": 148, "relu_conv_bn": 152, "relu_conv_bn_": 152, "separable3": 52, "dilated5": 116,
    "max_pool": 0, "avg_pool_bn": 0, "identity": 0, "relu": 0, "relu_": 0, "gelu": 0, "dropout": 0, "bn": 8, "zero": 0,
    "squeeze": 20, "scale": 4, "drop_path": 0, "stem": 148, "side": 16, "head": 15,
}  # fmt: skip
IN_PLACE = frozenset({"relu_"})  # gives its input back, changed

# ----- plans


@dataclass(frozen=True)
class Nested:
    """A candidate with a choice of its own: `x + op(first(x))`."""

    first: str
    choice: Choice


@dataclass(frozen=True)
class Choice:
    """A LayerChoice; `key` None for an automatic one."""

    candidates: tuple[str | Nested, ...]
    named: bool = False
    reduction: str = "sum"
    return_mask: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Layer:
    """One plain layer."""

    kind: str


@dataclass(frozen=True)
class Op:
    """A choice in place of a layer; nothing chosen leaves the value as it is."""

    choice: Choice


@dataclass(frozen=True)
class Residual:
    """`y = op(x); if y is not None: y = y + x` (or `y += x`)."""

    choice: Choice
    in_place: bool = False


@dataclass(frozen=True)
class Skip:
    """An InputChoice among up to `reach` earlier values, added if there is one."""

    reach: int
    n_chosen: int | None
    reduction: str = "sum"
    in_place: bool = False
    return_mask: bool = False


@dataclass(frozen=True)
class Cell:
    """Choices on the same value whose outputs feed an InputChoice, by list or by dict."""

    edges: tuple[Choice, ...]
    n_chosen: int | None
    reduction: str = "sum"
    by_name: bool = False


@dataclass(frozen=True)
class Dead:
    """A choice whose result nobody uses."""

    choice: Choice


@dataclass(frozen=True)
class Island:
    """Code that cannot be traced around a block; `how` is a key of ISLANDS."""

    how: str
    inner: Op | Residual


@dataclass(frozen=True)
class Scope:
    """A block inside a MutableScope."""

    key: str
    inner: Op | Residual


@dataclass(frozen=True)
class Twice:
    """The same module called two times in a row."""

    inner: Op | Residual


@dataclass(frozen=True)
class Again:
    """An earlier block (its index modulo the number of them), registered and called again."""

    index: int


Block = Layer | Op | Residual | Skip | Cell | Dead | Island | Scope | Twice | Again


@dataclass(frozen=True)
class Plan:
    """A search space. `root`: "net", "sequential" or "choice"; `inputs` and `outputs`: how it is called and answers."""

    blocks: tuple[Block, ...]
    root: str = "net"
    inputs: str = "one"
    outputs: str = "tensor"


INPUTS = ("one", "two", "given", "missing", "dict", "keyword")
OUTPUTS = ("tensor", "tuple", "dict")

# ----- modules, as users write them


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
        candidates = OrderedDict((f"{c if isinstance(c, str) else 'nested'}_{i}", m)
                                 for i, (c, m) in enumerate(zip(plan.candidates, modules, strict=True)))  # fmt: skip
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
        keys = [op.op.key for op in self.ops]  # type: ignore[union-attr]
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
    return Double.apply(self.inner(x))  # type: ignore[return-value]


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


def resolved(plan: Plan) -> list[tuple[int, Block]]:
    """For every block the index of the one it is (itself, except for Again), and the block."""
    found: list[tuple[int, Block]] = []
    for index, block in enumerate(plan.blocks):
        if isinstance(block, Again):
            usable = [i for i, b in found if not isinstance(b, Skip)]
            first = usable[block.index % len(usable)] if usable else None
            found.append((index, Layer("identity")) if first is None else (first, found[first][1]))
        else:
            found.append((index, block))
    return found


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
            model: nn.Module = layer_choice(_root_choice(plan))
        elif plan.root == "sequential":
            model = nn.Sequential(*(block_module(block, 0) for block in _chain(plan)))
        else:
            model = _NETS[plan.inputs](plan)
    return model.double()


def _root_choice(plan: Plan) -> Choice:
    for block in plan.blocks:
        if isinstance(block, Op | Residual | Dead):
            return block.choice
    return Choice(("conv1", "conv3"))


def _chain(plan: Plan) -> list[Block]:
    return [block for block in plan.blocks if not isinstance(block, Skip | Again)]


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


# ----- decisions


def space(plan: Plan) -> dict[str, LayerChoice | InputChoice]:
    """The choices of a plan by key."""
    return choices(build(plan))


@st.composite
def masks(draw: Any, length: int, *, kinds: tuple[str, ...]) -> list[Any]:
    """A decision for one choice: "one" hot, "many" hot (perhaps none), or "weights" (perhaps zero)."""
    kind = draw(st.sampled_from(kinds))
    if kind == "one":
        chosen = draw(st.integers(0, length - 1))
        return [index == chosen for index in range(length)]
    if kind == "many":
        return draw(st.lists(st.booleans(), min_size=length, max_size=length))
    weight = st.sampled_from([0.0, 0.25, 0.5, 1.0, -0.75])
    return draw(st.lists(weight, min_size=length, max_size=length))


KINDS = ("one", "one", "many", "weights")


@st.composite
def architectures(draw: Any, plan: Plan, kinds: tuple[str, ...] = KINDS) -> dict[str, list[Any]]:
    """A decision for every key of the plan's space. A list that must not be empty ("none") has something chosen."""
    found = {}
    for key, choice in space(plan).items():
        mask = draw(masks(len(choice), kinds=kinds))
        if not any(mask):
            mask = _filled(mask, _needs_one(plan))
        found[key] = mask
    return found


def _needs_one(plan: Plan) -> bool:
    return any(choice.reduction == "none" for choice in all_choices(build(plan)))


def _filled(mask: list[Any], needed: bool) -> list[Any]:
    # torch.stack of nothing is an error in every mode
    if not needed:
        return mask
    return [type(mask[0])(1), *mask[1:]]


# ----- the same network without choices


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
            choice = _root_choice(self.plan)
            self.name_keys((0,), choice)
            y = self.choice((0,), choice, _Value({}))
            return {} if y is None else y.needs
        net = self.plan.root == "net"
        blocks = resolved(self.plan) if net else list(enumerate(_chain(self.plan)))
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


# ----- strategies

_kinds = st.sampled_from(sorted(LAYERS))
_reductions = st.sampled_from(["sum", "sum", "mean", "concat", "none"])
_key_sizes = {"shared_two": 2, "shared_three": 3}


@st.composite
def layer_choices(draw: Any, depth: int = 1) -> Choice:
    """A LayerChoice with two to four candidates, one of them perhaps with a choice of its own."""
    key = draw(st.sampled_from([None, None, None, *_key_sizes]))
    length = _key_sizes[key] if key else draw(st.integers(1, 4))
    candidates: list[Any] = [draw(_kinds) for _ in range(length)]
    if depth and draw(st.integers(0, 4)) == 0:
        candidates[-1] = Nested(draw(_kinds), draw(layer_choices(depth=depth - 1)))
    return Choice(
        tuple(candidates), draw(st.booleans()), draw(_reductions), draw(st.integers(0, 4)) == 0, key
    )  # fmt: skip


def blocks(islands: bool = True) -> st.SearchStrategy[Block]:
    """One block of a network."""
    choice = layer_choices()
    inner: Any = st.one_of(st.builds(Op, choice), st.builds(Residual, choice, st.booleans()))
    n_chosen = st.sampled_from([None, 0, 1, 2])
    found: list[Any] = [
        st.builds(Layer, _kinds),
        st.builds(Op, choice),
        st.builds(Residual, choice, st.booleans()),
        st.builds(Skip, st.integers(1, 3), n_chosen, st.sampled_from(["sum", "mean", "concat"]), st.booleans(), st.booleans()),
        st.builds(
            Cell,
            st.lists(choice, min_size=2, max_size=3).map(tuple),
            st.sampled_from([None, 1, 2]), st.sampled_from(["sum", "mean", "concat", "none"]), st.booleans(),
        ),
        st.builds(Dead, choice),
        st.builds(Scope, st.sampled_from(["scope_a", "scope_b"]), inner),
        st.builds(Twice, inner),
        st.builds(Again, st.integers(0, 3)),
    ]  # fmt: skip
    if islands:
        found.append(st.builds(Island, st.sampled_from(sorted(ISLANDS)), inner))
    return st.one_of(found)


def plans(islands: bool = True) -> st.SearchStrategy[Plan]:
    """Search spaces of one to four blocks."""
    return st.builds(
        Plan,
        st.lists(blocks(islands), min_size=1, max_size=4).map(tuple),
        st.sampled_from(["net", "net", "net", "net", "sequential", "choice"]),
        st.sampled_from(INPUTS),
        st.sampled_from(OUTPUTS),
    )
