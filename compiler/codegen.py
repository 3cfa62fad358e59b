"""Turns a graph into a Python function whose first argument is the model."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_numbers = itertools.count(1)


def graph_module(root: nn.Module, graph: fx.Graph, **meta: Any) -> fx.GraphModule:
    """A GraphModule over the very modules, parameters, buffers and plain tensors of `root`."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    gm.__dict__.update({name: root.__dict__[name] for name in ("_modules", "_parameters", "_buffers")})
    gm.__dict__.update({name: v for name, v in root.__dict__.items() if isinstance(v, torch.Tensor)})
    gm.meta.update(meta)
    gm.graph = graph
    return gm


def as_function(graph: fx.Graph, label: str) -> Callable[..., Any]:
    """The graph as `forward(self, ...)`; its source appears in tracebacks."""
    code = graph.python_code("self")
    filename = f"<nascompile {label} {next(_numbers)}>"
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    return scope["forward"]
