"""Islands: modules that cannot be traced, and why, with the user's own line."""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.fx.proxy import TraceError as FxTraceError

from nascompile.compiler.constructors import why_constructor
from nascompile.compiler.guards import NotTraceable

FOREIGN = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    "<frozen",
)
"""Where code lies that is not the user's."""


@dataclass(frozen=True, slots=True)
class Island:
    """A module whose own forward runs eagerly, as written; the choices inside it are compiled all the
    same."""

    path: str
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path or '(the whole model)'}: {self.reason} ({self.file}:{self.line})"


def describe(error: Exception, path: str, module: nn.Module) -> Island:
    """The island for a module whose trace failed, with the user's own line."""
    file, line = where_defined(module)
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(FOREIGN):
            file, line = frame.filename, frame.lineno or line
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    constructor = why_constructor(error)
    if constructor is not None:
        reason = constructor
    elif isinstance(error, FxTraceError) or "'len' is not supported" in reason:
        reason = "needs a value that is known only when it runs: " + _short(reason)
    elif not isinstance(error, NotTraceable):
        reason = f"{type(error).__name__} while tracing: {reason}"
    return Island(path, file, line, reason)


def _short(reason: str) -> str:
    for known, words in (
        ("iterated", "a loop over a tensor"),
        ("'len'", "the length of a tensor"),
        ("control flow", "a branch on a tensor"),
    ):
        if known in reason:
            return words
    return reason


def where_defined(module: nn.Module) -> tuple[str, int]:
    """File and line of the forward of the module's class."""
    code = type(module).forward.__code__ if inspect.isfunction(type(module).forward) else None
    return (code.co_filename, code.co_firstlineno) if code is not None else ("?", 0)
