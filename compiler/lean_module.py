"""A GraphModule with one graph for training and one for evaluation, for networks that take two ways."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn


class LeanModule(fx.GraphModule):
    """`graph` is that of the current mode; `train()` and `eval()` switch it."""

    def __init__(self, root: dict[str, Any], graphs: dict[bool, fx.Graph]) -> None:
        super().__init__(root, graphs[True])
        for target in _targets(graphs[False]):
            _place(self, target, root[target])
        self.__dict__["_graphs"] = graphs

    def train(self, mode: bool = True) -> LeanModule:
        """Set the mode, and with it the graph."""
        super().train(mode)
        wanted = self.__dict__["_graphs"][mode]
        if self.graph is not wanted:
            self.graph = wanted
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LeanModule:
        graphs = {mode: copy.deepcopy(graph, memo) for mode, graph in self.__dict__["_graphs"].items()}
        targets = [target for graph in graphs.values() for target in _targets(graph)]
        parts = {target: copy.deepcopy(_get(self, target), memo) for target in targets}
        clone = LeanModule(parts, graphs)
        memo[id(self)] = clone
        clone.meta.update(copy.deepcopy(self.meta, memo))
        super(LeanModule, clone).train(self.training)
        for (_, one), (_, other) in zip(clone.named_modules(), self.named_modules(), strict=True):
            one.training = other.training
        clone.graph = graphs[self.training]
        return clone


def same_graph(left: fx.Graph, right: fx.Graph) -> bool:
    """Whether two graphs are the same program."""
    return _describe(left) == _describe(right)


def _describe(graph: fx.Graph) -> list[Any]:
    number = {node: index for index, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            node.target,
            *fx.map_arg((node.args, tuple(node.kwargs.items())), lambda n: f"%{number[n]}"),
        )
        for node in graph.nodes
    ]


def _targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]


def _get(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _place(root: nn.Module, path: str, part: Any) -> None:
    module = root
    *owners, name = path.split(".")
    for owner in owners:
        if owner not in module._modules:
            module.add_module(owner, nn.Module())
        module = module.get_submodule(owner)
    if hasattr(module, name):
        return
    if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
        module.register_buffer(name, part)
    else:
        setattr(module, name, part)
