"""Graphs for tests of passes, as the compiler hands them to its passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from nascompile.compiler.codegen import as_function, graph_module
from nascompile.compiler.space import read_space
from nascompile.compiler.trace import ModelTracer
from tests.comparing import assert_same, step


def traced(model: nn.Module) -> fx.GraphModule:
    """The traced graph of a model, before any pass."""
    read_space(model)
    tracer = ModelTracer(model)
    assert tracer.trace_guessed(""), tracer.islands
    return graph_module(model, tracer.graph, guards=tracer.guards, notes=tracer.notes, tracer=tracer)


def targets(gm: fx.GraphModule) -> list[str]:
    """What the nodes call, in order."""
    return [getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op.startswith("call")]


class Runs(nn.Module):
    """A graph as a model that holds the parameters of the original."""

    def __init__(self, model: nn.Module, gm: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__.update({name: model.__dict__[name] for name in ("_modules", "_parameters", "_buffers")})
        self.__dict__["original"] = model
        self.__dict__["function"] = as_function(gm.graph, "test")

    def forward(self, *args: Any) -> Any:
        return self.__dict__["function"](self.original, *args)


def assert_pass_keeps_results(
    model: nn.Module,
    passes: Callable[[fx.GraphModule], Any],
    *args: Tensor,
    masks: dict[str, Tensor] | None = None,
) -> fx.GraphModule:
    """Outputs and gradients are those of the model itself; gives the rewritten graph."""
    gm = traced(model)
    passes(gm)
    expected = step(model, masks or {}, args, {})
    gradients = {key: mask.grad for key, mask in (masks or {}).items()}
    for mask in (masks or {}).values():
        mask.grad = None
    actual = step(Runs(model, gm), masks or {}, args, {})
    for name in ("outputs", "inputs", "changed inputs", "weights"):
        assert_same(actual[name], expected[name])
    assert_same(actual["decisions"], gradients)
    torch.manual_seed(0)
    return gm
