"""The types of a region's images in the program as written, and copies of its tensors in the type of plans.

A plan computes in one type, fp32 for everything up to fp32, whatever autocast says. What the program would
return is asked of torch: each operation once on images of one pixel, in the same state of autocast.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nascompile.compiler.region.ir import (
    Act,
    Arrange,
    Cat,
    Channels,
    Conv,
    Crop,
    Gate,
    Graph,
    Norm,
    Pad,
    PoolOp,
    Source,
    Spread,
    Sum,
    TensorRef,
    Unsupported,
    Value,
    Weight,
    Zero,
)
from nascompile.compiler.region.remembered import remembered
from nascompile.kernels.plan.reference import ACTIVATIONS

Dtypes = tuple[torch.dtype, ...]
TYPE_OF = operator.attrgetter("dtype")


def working_type(types: Iterable[torch.dtype]) -> torch.dtype | None:
    """The type that plans compute in for tensors of these types, or None where they do not go together."""
    found = set(types)
    if found <= {torch.float32, torch.bfloat16, torch.float16}:
        return torch.float32
    return found.pop() if len(found) == 1 else None


def autocast_type(device: str) -> torch.dtype | None:
    """The type that autocast casts to at present, or None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# ----- what torch returns


def _norm(by_batch: bool) -> Callable[..., Tensor]:
    def apply(x: Tensor, *vectors: Tensor | None) -> Tensor:
        mean, variance, gamma, beta = (None if v is None else v[:1].flatten() for v in vectors)
        return F.batch_norm(x, mean, variance, gamma, beta, by_batch)

    return apply


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "convolution": F.conv2d,
    "bias": lambda x, bias: F.conv2d(x, x, bias.flatten()),
    "PReLU": lambda x, slope: F.prelu(x, slope.flatten()[:1]),
    "BatchNorm over the batch": _norm(True),
    "BatchNorm": _norm(False),
    **{kind.name: activation for kind, activation in ACTIVATIONS.items()},
    "max pooling": lambda x: F.max_pool2d(x, 1),
    "average pooling": lambda x: F.avg_pool2d(x, 1),
    "concatenation": lambda *parts: torch.cat(parts, 1),
    "sum": lambda *terms: reduce(torch.add, terms),
    "product": lambda *factors: reduce(torch.mul, factors),
}


@cache
def _returned(
    name: str, types: tuple[torch.dtype | None, ...], device: str, autocast: torch.dtype | None
) -> torch.dtype | str:
    """The type that an operation returns at present, or what torch says where it refuses.

    `autocast` is the present state: it only tells the answers apart.
    """
    pixels = [
        None if dtype is None else torch.zeros(2, 1, 1, 1, dtype=dtype, device=device) for dtype in types
    ]
    with torch.no_grad():
        try:
            return _OPERATIONS[name](*pixels).dtype
        except RuntimeError as error:
            return next(iter(str(error).splitlines()), type(error).__name__)


Question = tuple[str, tuple[torch.dtype | None, ...]]
"""One of `_OPERATIONS`, and the types of all it takes."""


def _norm_question(op: Norm, types: Dtypes) -> Question:
    if op.running_mean is None and not op.by_batch:
        if op.beta is None:
            assert op.gamma is not None
            return "PReLU", (*types, op.gamma.value.dtype)
        return "bias", (*types, op.beta.value.dtype)
    refs = (op.running_mean, op.running_var, op.gamma, op.beta)
    vectors = (None if ref is None else ref.value.dtype for ref in refs)
    return "BatchNorm over the batch" if op.by_batch else "BatchNorm", (*types, *vectors)


QUESTIONS: dict[type, Callable[[Any, Dtypes], Question]] = {
    Conv: lambda op, types: ("convolution", (*types, op.weight.value.dtype)),
    Norm: _norm_question,
    Act: lambda op, types: (op.kind.name, types),
    PoolOp: lambda op, types: ("max pooling" if op.is_max else "average pooling", types),
    Cat: lambda op, types: ("concatenation", tuple(dict.fromkeys(types))),
    Sum: lambda op, types: ("sum", tuple(dict.fromkeys(types))),
    Gate: lambda op, types: ("product", tuple(dict.fromkeys(types))),
}
"""What to ask of torch about an operation on images of the given types."""


def is_scaled(value: Value) -> bool:
    """Whether a value is an image times and plus numbers."""
    return isinstance(value.op, Norm) and value.op.is_fixed


def is_computed(value: Value, chosen: Collection[Weight]) -> bool:
    """Whether a value is computed under a decision."""
    return value.owners is None or any(owner in chosen for owner in value.owners)


def output_types(graph: Graph, inputs: Sequence[torch.dtype], chosen: frozenset[Weight]) -> Dtypes:
    """The types of the outputs under a decision, in the present state of autocast.

    A weight of the decision has no dimensions, so that it never widens what it is multiplied with. Raises
    Unsupported where torch refuses the types, or where an operation is not known here.
    """
    autocast = autocast_type(graph.device)
    found: dict[Value, torch.dtype] = {}
    for value in graph.values:
        if not is_computed(value, chosen):
            continue
        op = value.op
        if isinstance(op, Source):
            found[value] = inputs[op.index]
        elif isinstance(op, Zero):
            found[value] = found[graph.values[op.like]]
        elif isinstance(op, Crop | Pad | Channels | Arrange | Spread) or is_scaled(value):
            # numbers of the program do not widen what they are multiplied with
            found[value] = found[value.inputs[0]]
        elif isinstance(op, Sum | Gate) and op.like is not None:
            found[value] = found[value.inputs[op.like]]
        else:
            question = QUESTIONS.get(type(op))
            if question is None:
                raise Unsupported(f"regions do not know the type of what {type(op).__name__} returns")
            name, types = question(op, tuple(found[x] for x in _taken(value, chosen)))
            returned = _returned(name, types, graph.device, autocast)
            if isinstance(returned, str):
                raise Unsupported(f"torch refuses a {name} of {', '.join(map(str, types))}: {returned}")
            found[value] = returned
    return tuple(found[value] for value in graph.outputs)


def _taken(value: Value, chosen: frozenset[Weight]) -> Sequence[Value]:
    if not isinstance(value.op, Sum):
        return value.inputs
    pairs = zip(value.op.terms, value.inputs, strict=True)
    return [x for info, x in pairs if chosen.issuperset(info.needs)]


# ----- the boundary of a region


@dataclass(frozen=True, slots=True)
class Boundary:
    """The types of a region's inputs and outputs in one call, and the state of autocast.

    is_plain: all is as the executor wants it, the region's own tensors too; no copy of one is needed.
    """

    inputs: Dtypes
    outputs: Dtypes
    device: str
    autocast: torch.dtype | None
    is_plain: bool = False

    def call(self, run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of `run`, which computes in the type of plans, on these inputs. Autograd casts their
        gradients."""
        working = working_type(self.inputs)
        outputs = run([tensor.to(working) for tensor in tensors])
        return tuple(output.to(dtype) for output, dtype in zip(outputs, self.outputs, strict=True))

    def as_written(self, fallback: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        """The region op by op, from and to the type of plans, with the types in between as in this call."""
        working = working_type(self.inputs)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            narrow = [tensor.to(dtype) for tensor, dtype in zip(tensors, self.inputs, strict=True)]
            with torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None):
                outputs = fallback(*narrow)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(output.to(working) for output in outputs)

        return run


class Boundaries:
    """The boundaries of a region's calls by decision, types of all tensors and state of autocast."""

    def __init__(self, graph: Graph, refs: Sequence[TensorRef]) -> None:
        self._graph = graph
        own = [ref for ref in refs if not ref.is_counter]
        self._holders, self._names = [ref.holder for ref in own], [ref.name for ref in own]
        self._known: dict[Any, Boundary | str] = {}

    def of(self, tensors: Sequence[Tensor], chosen: frozenset[Weight], *, is_plain: bool) -> Boundary | str:
        """The boundary of a call; a string says why the program as written has to run, or fail.

        is_plain: the region's own tensors are known to be as the executor wants them.
        """
        inputs = tuple(tensor.dtype for tensor in tensors)
        autocast = autocast_type(self._graph.device)
        working = self._graph.dtype
        if is_plain and autocast is None and set(inputs) == {working}:
            outputs = (working,) * len(self._graph.outputs)
            return Boundary(inputs, outputs, self._graph.device, None, is_plain=True)
        own = tuple(map(TYPE_OF, map(operator.getitem, self._holders, self._names)))
        key = (inputs, own, autocast, chosen)
        return remembered(self._known, key, lambda: self._read(inputs, autocast, chosen))

    def _read(
        self, inputs: Dtypes, autocast: torch.dtype | None, chosen: frozenset[Weight]
    ) -> Boundary | str:
        try:
            outputs = output_types(self._graph, inputs, chosen)
        except Unsupported as reason:
            return str(reason)
        return Boundary(inputs, outputs, self._graph.device, autocast)
