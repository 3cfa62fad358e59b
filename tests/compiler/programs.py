"""Programs that users write around choices: each is a model and one call.

A line with `# island: NAME` is the one that the island NAME must name.
"""

from __future__ import annotations

import random
from collections import namedtuple
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from nascompile.mutables import InputChoice, LayerChoice, MutableScope

Pair = namedtuple("Pair", ["left", "right"])


def image() -> Tensor:
    """A batch of two images with four channels."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=generator).requires_grad_()


def conv(size: int = 3) -> nn.Module:
    return nn.Conv2d(4, 4, size, padding=size // 2)


class Program(nn.Module):
    """One choice of two convolutions and the identity, called `op`."""

    args: Any = staticmethod(lambda: (image(),))
    kwargs: Any = staticmethod(dict)

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice(
            [conv(3), nn.Sequential(nn.ReLU(), conv(1), nn.BatchNorm2d(4)), nn.Identity()], key="op"
        )


# ----- traced


class Plain(Program):
    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class InPlaceRelu(Program):
    def __init__(self) -> None:
        super().__init__()
        self.op[0] = nn.Sequential(nn.ReLU(inplace=True), conv(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.op(x)
        return y + x


class FunctionalDropout(Program):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.op(x), 0.5, training=self.training)


class Factories(Program):
    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        y = (
            y
            + torch.zeros(x.shape[0], 1, 1, 1, dtype=x.dtype)
            + torch.ones(x.size(1), 1, 1)
            + torch.full((5,), 2.0)
        )
        y = y * torch.arange(x.shape[-1]) + torch.rand(x.shape[0], 1, 1, 1) + torch.randn_like(x)
        return y @ torch.eye(5, dtype=x.dtype) + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) + x.new_zeros(5)


class ItemAssignment(Program):
    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x).clone()
        y[:, 0] = 0
        y[:, 1:3] += 1
        return y * 2


class TensorIndex(Program):
    def forward(self, x: Tensor) -> Tensor:
        order = torch.randperm(x.size(0))
        return self.op(x)[order] + x[:, torch.tensor([0, 1, 2, 3])]


class OptionalGiven(Program):
    args = staticmethod(lambda: (image(), image() * 2))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.op(x)
        return x if y is None else x * y


class OptionalMissing(OptionalGiven):
    args = staticmethod(lambda: (image(),))


class OptionalNone(OptionalGiven):
    args = staticmethod(lambda: (image(), None))


class Keywords(Program):
    kwargs = staticmethod(lambda: {"scale": 0.5, "times": 3, "shift": image()})

    def forward(self, x: Tensor, *, scale: float = 1.0, times: int = 1, shift: Tensor) -> Tensor:
        for _ in range(times):
            x = self.op(x) * scale
        return x + shift


class StarArguments(Program):
    args = staticmethod(lambda: (image(), image() + 1, image() + 2))
    kwargs = staticmethod(lambda: {"more": image() + 3})

    def forward(self, x: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        for other in others:
            x = x + self.op(other)
        return x * named["more"]


class Integers(Program):
    args = staticmethod(lambda: (image(), 2, "twice"))

    def forward(self, x: Tensor, steps: int, mode: str = "once") -> Tensor:
        for _ in range(steps):
            x = self.op(x)
        return x * 2 if mode == "twice" else x


class NamedTuples(Program):
    args = staticmethod(lambda: (Pair(image(), [image(), {"deep": (image(), None)}]),))

    def forward(self, pair: Any) -> Any:
        y = self.op(pair.left) + pair.right[1]["deep"][0]
        return {"pair": Pair(y, pair.right[0]), "none": None, "number": 3, "nested": [(y * 2,), []]}


class Attention(nn.Module):
    class Attend(nn.MultiheadAttention):
        def __init__(self, heads: int) -> None:
            super().__init__(8, heads, batch_first=True)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, need_weights=False, **kwargs)[0]

    args = staticmethod(
        lambda: (torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 5, 8).requires_grad_(),)
    )
    kwargs = staticmethod(dict)

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([self.Attend(n) for n in (1, 2)], key="op")
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, (hidden, _cell) = self.lstm(self.op(x, x, value=x))
        return y + hidden.transpose(0, 1)


class TwoArguments(Program):
    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5)

        def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.linear(x) + y * scale

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([self.Film(), self.Film(), self.Film()], key="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.relu(x), x, scale=2.0)


class OwnTensors(Program):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.list = nn.ParameterList([torch.randn(5), torch.randn(5)])
        self.constant = torch.tensor(2.0)
        self.parts = nn.ModuleDict({"a": conv(1), "b": conv(1)})
        self.parts["b"].weight = self.parts["a"].weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(self.op(x), self.weight, self.list[0]) + self.list[1] * self.constant
        return self.parts["a"](x) + self.parts["b"](x)


class SharedPrefixes(Program):
    """Functional and module ReLUs, poolings and paddings that several candidates begin with."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.max_pool2d(F.relu(x), 3, stride=1, padding=1))

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice(
            [self.Functional(), self.Functional(), nn.Sequential(nn.ReLU(), conv(1))], key="op"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) + self.op(x * 2)


class Checkpointed(Program):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.op, x, use_reentrant=False)  # island: Checkpointed


class ShapeBranch(Program):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor) and y is None:
            x = self.op(x)
        batch, channels = x.shape[:2]
        return x.reshape(batch, channels * 25).view(batch, -1, 5, 5)


class Scopes(Program):
    class Inside(MutableScope):
        def __init__(self) -> None:
            super().__init__("scope")
            self.op = LayerChoice([conv(3), conv(1), nn.Identity()], key="op")

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x) * 2

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.Inside()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.op(x))


class Inputs(Program):
    def __init__(self) -> None:
        super().__init__()
        self.choose = InputChoice(choose_from=["op", "op", ""], n_chosen=None, key="choose", return_mask=True)

    def forward(self, x: Tensor) -> Any:
        y, mask = self.choose([self.op(x), self.op(x + 1), None if self.training else x])
        return y, mask


# ----- islands


class Branch(Program):
    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        if y.mean() > 0:  # island: Branch
            return y * 2
        return y - 1


class ElementBranch(Program):
    args = staticmethod(lambda: (image(), torch.tensor([True, False])))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = []
        for i in range(2):
            rows.append(self.op(x[i : i + 1]) if mask[i] else x[i : i + 1])  # island: ElementBranch
        return torch.cat(rows)


class Loop(Program):
    def forward(self, x: Tensor) -> Tensor:
        total = x * 0
        for row in x:  # island: Loop
            total = total + self.op(row[None])
        return total


class Length(Program):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):  # island: Length
            x = self.op(x)
        return x


class NoGrad(Program):
    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        with torch.no_grad():
            scale = y.std()  # island: NoGrad
        return y / scale


class NoAutocast(Program):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.op(x)  # island: NoAutocast
        return y + x


class Function(Program):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] * grads[0]

    def forward(self, x: Tensor) -> Any:
        return self.Square.apply(self.op(x))  # island: Function


class PythonRandom(Program):
    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) * random.random()


class NumpyRandom(Program):
    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) * float(numpy.random.default_rng(int(x.shape[0])).random())  # island: NumpyRandom


class Counter(Program):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # island: Counter
        return self.op(x) * self.calls


class Log(Program):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x.detach())
        return self.op(x) * len(self.log)


class Registered(Program):
    """A module kept in a plain list is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [conv(1).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.op(x))  # island: Registered


class MovingBuffer(Program):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 2, 3)).view(4, 1, 1)  # island: MovingBuffer
        return y - self.mean


class Answer:
    """An output that no graph can hold."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Nested(Program):
    """The part that cannot be traced is an island, the rest is not."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([conv(3), conv(1), nn.Identity()], key="op")

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:  # island: Nested
                return x
            return self.op(x)

    def __init__(self) -> None:
        super().__init__()
        self.before = LayerChoice([conv(3), conv(1), nn.Identity()], key="op")
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.before(x)) + self.op(x)


# ----- noted: a module is called as it is


class Parametrized(Program):
    def __init__(self) -> None:
        super().__init__()
        self.op[0] = parametrizations.weight_norm(conv(3))
        self.op[1] = parametrizations.spectral_norm(conv(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Scripted(Program):
    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(conv(1), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(self.op(x))


class SideEffects(Program):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(1)
            self.calls = 0
            self.seen: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(float(x.detach().mean()))
            return self.conv(x) * self.calls

    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice([self.Counting(), nn.Sequential(nn.ReLU(), conv(1)), nn.ReLU()], key="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ReplacedForward(Program):
    def __init__(self) -> None:
        super().__init__()
        candidate = conv(1)
        candidate.forward = lambda x: x * 3
        self.op[1] = candidate

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class OwnCall(Program):
    class Doubled(nn.Conv2d):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    def __init__(self) -> None:
        super().__init__()
        self.op[1] = self.Doubled(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


TRACED: tuple[type[nn.Module], ...] = (
    Plain,
    InPlaceRelu,
    FunctionalDropout,
    Factories,
    ItemAssignment,
    TensorIndex,
    OptionalGiven,
    OptionalMissing,
    OptionalNone,
    Keywords,
    StarArguments,
    Integers,
    NamedTuples,
    Attention,
    TwoArguments,
    OwnTensors,
    SharedPrefixes,
    ShapeBranch,
    Scopes,
    Inputs,
    Parametrized,
    Scripted,
    SideEffects,
    ReplacedForward,
    OwnCall,
)
ISLANDS: tuple[tuple[type[nn.Module], str], ...] = (
    (Branch, "branch on a tensor"),
    (ElementBranch, "branch on a tensor"),
    (Loop, "loop over a tensor"),
    (Length, "length of a tensor"),
    (NoGrad, "gradient, inference or autocast mode"),
    (NoAutocast, "gradient, inference or autocast mode"),
    (Function, "autograd function Square"),
    (PythonRandom, "random numbers in Python"),
    (NumpyRandom, ""),
    (Counter, "assigns Counter.calls"),
    (Log, "changes Log.log"),
    (Registered, "not part of the model"),
    (MovingBuffer, "assigns MovingBuffer.mean"),
    (Nested, "branch on a tensor"),
    (Checkpointed, "hooks on saved tensors"),
)
