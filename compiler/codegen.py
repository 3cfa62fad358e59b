"""Turns a graph into a Python function whose first argument is the model."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch import fx

_numbers = itertools.count(1)


def as_function(graph: fx.Graph, label: str) -> Callable[..., Any]:
    """The graph as `forward(self, ...)`; its source appears in tracebacks."""
    code = graph.python_code("self")
    filename = f"<nascompile {label} {next(_numbers)}>"
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    return scope["forward"]
