"""The images of a population as one plan: what a region understands of the table of values is computed ahead,
image after image, for all architectures together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from nascompile.compiler.candidates import Candidate, called_module, read_once
from nascompile.compiler.region.members import why_not_operations
from nascompile.compiler.region.region import Region
from nascompile.compiler.resolving import Input, Method, Reduction
from nascompile.compiler.values import Ref, Value, replace_leaves

IMAGES = 8
"""Images for each thread in one run of a plan: packing weights for one run costs as much as half an image."""

Outputs = dict[int, Tensor]


class NoPlan(Exception):
    """The region cannot run as one plan, because of `nodes` if there are some; the text says why."""

    def __init__(self, reason: str, nodes: Collection[fx.Node] = ()) -> None:
        super().__init__(reason)
        self.nodes = nodes


class Ahead:
    """Computes those of the values `reach` that one plan can have, all of them from inputs alone.

    table: the values. reach: numbers in the order in which they are wanted. wanted: the numbers that are
    outputs of architectures. memory: bytes that the plan's maps may take. Raises NoPlan where nothing is
    left to compute. `why` says by number why a value is outside that had its inputs inside.
    """

    def __init__(
        self, table: Sequence[Value], reach: Sequence[int], wanted: Collection[int], *, memory: int
    ) -> None:
        self.table, self.reach, self.wanted = table, reach, set(wanted)
        self.memory = memory
        self.why: dict[int, str] = {}
        self._read: dict[Any, Candidate | str] = {}
        self._make()

    def __call__(self, arguments: Mapping[str, Any]) -> Outputs:
        """The values that others than the plan read, by number, for one batch. Raises NoPlan."""
        while True:
            try:
                return self._run([value.call(arguments) for value in self._inputs])
            except NoPlan as reason:
                outside = {self._graph.origin[node] for node in reason.nodes}
                if not outside:
                    raise
                self.why.update(dict.fromkeys(outside, str(reason)))
                self._make()

    def _make(self) -> None:
        self._graph = graph = _Graph(self.table, self._read, self.why)
        for number in self.reach:
            graph.enter(number)
        read = {i for number in self.reach if number not in graph.inside for i in self.table[number].inputs}
        last = {graph.nodes[number] for number in graph.inside & (read | self.wanted)}
        places = [node for node in graph.fx.nodes if node.op == "placeholder" and node.users]
        steps = [node for node in graph.fx.nodes if node.op != "placeholder" and node not in graph.dropped]
        outputs = [node for node in steps if node in last]
        if not outputs:
            raise NoPlan(next(iter(self.why.values()), "there is nothing to compute"))
        self._inputs = [self.table[graph.origin[node]] for node in places]
        self._numbers = {node: [] for node in outputs}
        for number in sorted(graph.inside):
            if graph.nodes[number] in self._numbers:
                self._numbers[graph.nodes[number]].append(number)
        self._notes: dict[str, str] = {}
        rest = _Rest(self._notes)
        self._region = Region(*("population", graph.modules, steps, places, outputs, {}, rest, self._notes))
        self._outputs = outputs
        self._images: int | None = None

    def _run(self, tensors: list[Any]) -> Outputs:
        batch = _batch(tensors)
        if self._images is None:
            self._images = self._fitting([x[:1] for x in tensors], batch)
        size = min(self._images, batch)
        # the last piece goes over some images again: another size would need another plan
        starts = [min(start, batch - size) for start in range(0, batch, size)]
        pieces = [self._region(*(x[start : start + size] for x in tensors)) for start in starts]
        columns = [pieces] if len(self._outputs) == 1 else list(zip(*pieces, strict=True))
        found: Outputs = {}
        for node, column in zip(self._outputs, columns, strict=True):
            parts = list(column)
            parts[-1] = parts[-1][size * len(starts) - batch :]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            found.update(dict.fromkeys(self._numbers[node], joined))
        return found

    def _fitting(self, example: list[Tensor], batch: int) -> int:
        """How many images at a time fit into the memory."""
        images = min(batch, IMAGES * torch.get_num_threads())
        while True:
            needs = self._region.memory(*(x.expand(images, *x.shape[1:]) for x in example))
            if needs is None or needs <= self.memory:
                return images
            if images == 1:
                raise NoPlan(f"one image needs {needs} bytes, memory is {self.memory}")
            images = max(1, images // 2)


def _batch(tensors: Sequence[Any]) -> int:
    sizes = {x.shape[0] if isinstance(x, Tensor) and x.dim() == 4 else -1 for x in tensors}
    if len(sizes) != 1 or sizes <= {-1, 0}:
        raise NoPlan("the inputs are not images of one batch")
    return sizes.pop()


class _Graph:
    """Values as nodes of one graph, modules looked into; `inside` are those a region may hold."""

    def __init__(
        self, table: Sequence[Value], read: dict[Any, Candidate | str], outside: dict[int, str]
    ) -> None:
        self.table, self.read, self.why = table, read, outside
        self.fx = fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.inside: set[int] = set()
        self.dropped: set[fx.Node] = set()
        self.origin: dict[fx.Node, int] = {}
        self.modules: dict[str, nn.Module] = {}
        self._paths: dict[nn.Module, str] = {}

    def get_submodule(self, path: str) -> nn.Module:
        return self.modules[path]

    def enter(self, number: int) -> None:
        """Add a value whose inputs are there already."""
        value = self.table[number]
        if isinstance(value.call, Input):
            self.nodes[number] = self._note(number, self.fx.placeholder(f"input_{number}"))
            return
        if number in self.why or not value.inputs or not all(i in self.nodes for i in value.inputs):
            return
        count = len(self.origin)
        result = self._expand(number, value)
        made = list(self.origin)[count:]
        if not isinstance(result, str):
            result = why_not_operations(self, made) or result
        if isinstance(result, str):
            self.why[number] = result
            self.dropped.update(made)
            for node in reversed(made):
                self.fx.erase_node(node)
            return
        self.nodes[number] = result
        self.inside.add(number)

    def _note(self, number: int, node: fx.Node) -> fx.Node:
        self.origin[node] = number
        return node

    def _expand(self, number: int, value: Value) -> fx.Node | str:
        if value.copies or value.state is not None or value.masks:
            return "changes its input, holds choices, or has statistics of its own"

        def given(leaf: Any) -> Any:
            return self.nodes[leaf.number] if isinstance(leaf, Ref) else leaf

        args = tuple(replace_leaves(arg, given) for arg in value.args)
        kwargs = {name: replace_leaves(arg, given) for name, arg in (value.kwargs or {}).items()}
        module = value.call if isinstance(value.call, nn.Module) else value.module
        if module is not None:
            return self._module(number, module, args, kwargs)
        if isinstance(value.call, Reduction):
            return self._sum(number, value.call, args[0])
        if isinstance(value.call, Method):
            return self._note(number, self.fx.call_method(value.call.name, args, kwargs))
        if not hasattr(value.call, "__name__"):
            return f"{type(value.call).__name__} is not understood by plans"
        return self._note(number, self.fx.call_function(value.call, args, kwargs))

    def _module(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> fx.Node | str:
        candidate = read_once(module, self.read)
        if isinstance(candidate, str):
            return candidate
        if len(args) != 1 or kwargs or not isinstance(args[0], fx.Node):
            return "does not take one image"
        known: dict[fx.Node, fx.Node] = {}
        for node in candidate.graph.nodes:
            if node.op == "placeholder":
                known.setdefault(node, args[0])
            elif node.op == "output":
                result = node.args[0]
                return known[result] if isinstance(result, fx.Node) else "does not return one image"
            elif node.op == "get_attr":
                return "reads an attribute"
            else:
                copied = known[node] = self._note(number, self.fx.node_copy(node, known.__getitem__))
                if node.op == "call_module":
                    copied.target = self._path(called_module(module, node))
        raise AssertionError("a graph without an output")

    def _path(self, module: nn.Module) -> str:
        path = self._paths.setdefault(module, f"layer_{len(self._paths)}")
        self.modules[path] = module
        return path

    def _sum(self, number: int, reduction: Reduction, terms: list[fx.Node]) -> fx.Node | str:
        if reduction.choice.reduction != "sum":
            return f"reduction {reduction.choice.reduction!r} is not a sum"
        total = terms[0]
        for term in terms[1:]:
            total = self._note(number, self.fx.call_function(operator.add, (total, term)))
        return total


class _Rest:
    """What a region of a population does without a plan: nothing, for its values can be computed one by
    one."""

    def __init__(self, notes: Mapping[str, str]) -> None:
        self._notes = notes

    def __call__(self, *tensors: Any) -> Any:
        raise NoPlan(next(iter(self._notes.values()), "no plan"))

    def in_parts(self, outside: Collection[fx.Node]) -> tuple[Callable[..., Any], list[Region]]:
        """A function that says which nodes no plan can have."""

        def function(*tensors: Any) -> Any:
            raise NoPlan(next(iter(self._notes.values()), "no plan"), outside)

        return function, []
