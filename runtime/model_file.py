"""Reads the Python file that the command line is given: finds the model in it and gives each of its names a
meaning.

A file may define each name as a value or as a callable without arguments. What it leaves out gets a default,
and every default used is kept in `notes`, so that it can be said aloud.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from nascompile.compiler.errors import NascompileError

NAMES = (
    "model",
    "example_inputs",
    "dataset_train",
    "dataset_valid",
    "dataset_test",
    "loss",
    "metrics",
    "reward_function",
    "optimizer",
    "search_options",
)


class ModelFileError(NascompileError):
    """The model file cannot be used; the message names the file, the line where there is one, and what is
    wrong.
    """


class ModelFile:
    """An executed model file. Raises ModelFileError when it is missing, fails, or has no single model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.notes: list[str] = []
        self._namespace = vars(_execute(self.path))
        self.model_name = self._find_model()

    def defines(self, name: str) -> bool:
        """Whether the file gives `name` a value other than None."""
        return self._namespace.get(name) is not None

    def get(self, name: str) -> Any:
        """The object under `name` as the file defines it, not called; None when it is absent."""
        return self._namespace.get(name)

    def value(self, name: str) -> Any:
        """The value of `name`: a class or a callable without required arguments is called first; None when
        absent.
        """
        found = self._namespace.get(name)
        return self.call(name, found) if found is not None and is_factory(found) else found

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call something the file defines; its errors become a ModelFileError that names file and line."""
        try:
            return function(*args)
        except NascompileError:
            raise
        except Exception as error:
            raise self.blame(error, f"{name}: ") from error

    def blame(self, error: BaseException, prefix: str = "") -> ModelFileError:
        """The one line that says where in the user's file `error` came from."""
        return ModelFileError(f"{_where(error, self.path)}: {prefix}{describe(error)}")

    def build_model(self) -> nn.Module:
        """The model: the module itself, or a new one from the class or factory."""
        found = self._namespace[self.model_name]
        model = found if isinstance(found, nn.Module) else self.call(self.model_name, found)
        if not isinstance(model, nn.Module):
            raise ModelFileError(
                f"{self.path}: {self.model_name!r} gives a {type(model).__name__}, expected a torch.nn.Module"
            )
        return model

    def contents(self) -> str:
        """The names that the file itself defines, for messages."""
        return ", ".join(sorted(_own_names(self._namespace))) or "nothing"

    def _find_model(self) -> str:
        if self.defines("model"):
            found = self._namespace["model"]
            if isinstance(found, nn.Module) or callable(found):
                return "model"
            raise ModelFileError(
                f"{self.path}: 'model' is a {type(found).__name__}, expected a torch.nn.Module, its class, "
                "or a function without arguments that makes one"
            )
        own = _own_names(self._namespace)
        candidates = [name for name in own if isinstance(self._namespace[name], nn.Module)]
        candidates = candidates or [name for name in own if _is_model_class(self._namespace[name])]
        if len(candidates) == 1:
            self.notes.append(f"model: {candidates[0]} (the file defines no `model`)")
            return candidates[0]
        if not candidates:
            raise ModelFileError(
                f"{self.path}: no model in it; define `model` (a module, its class, or a function without "
                f"arguments that makes one). The file defines: {self.contents()}"
            )
        raise ModelFileError(
            f"{self.path}: {len(candidates)} candidates for the model: {', '.join(candidates)}; say which "
            f"one, for example with `model = {candidates[-1]}`"
        )


def is_factory(found: Any) -> bool:
    """Whether `found` is to be called for its value: a class, or a callable without required arguments.

    Modules, and anything with items, are values although some can be called.
    """
    if found is None or not callable(found) or isinstance(found, nn.Module):
        return False
    if not isinstance(found, type) and hasattr(found, "__getitem__"):
        return False
    return required_arguments(found) == 0


def required_arguments(function: Callable[..., Any]) -> int | None:
    """How many positional arguments a call must give; None where the signature is unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)


def describe(error: BaseException) -> str:
    """Type and message of an error in one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    message = " ".join(str(text).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _execute(path: Path) -> types.ModuleType:
    if not path.exists():
        raise ModelFileError(f"model file {str(path)!r} does not exist")
    if not path.is_file() or path.suffix != ".py":
        raise ModelFileError(
            f"model file {str(path)!r} is not a Python file, expected a path that ends in .py"
        )
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        # as when the file is run: it may import its neighbours, and data workers can import it
        sys.path.insert(0, folder)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, NascompileError | OSError) and not _frames_in(error, path):
            raise ModelFileError(f"model file {str(path)!r} cannot be read: {describe(error)}") from error
        raise ModelFileError(f"{_where(error, path)}: {describe(error)}") from error
    return module


def _module_name(path: Path) -> str:
    # under its own name where that is free, so that worker processes find the classes it defines
    taken = path.stem in sys.stdlib_module_names or path.stem in sys.modules or not path.stem.isidentifier()
    return f"nascompile_model_file_{path.stem}" if taken else path.stem


def _frames_in(error: BaseException, path: Path) -> list[traceback.FrameSummary]:
    resolved = str(path.resolve())
    return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == resolved]


def _where(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename is not None:
        shown = path if error.filename == str(path.resolve()) else error.filename
        return f"{shown}, line {error.lineno}"
    frames = _frames_in(error, path)
    return f"{path}, line {frames[-1].lineno}" if frames else str(path)


def _own_names(namespace: dict[str, Any]) -> list[str]:
    # names imported from elsewhere are not what the file defines
    home = namespace["__name__"]
    return [
        name
        for name, value in namespace.items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (
            not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
            or value.__module__ == home
        )
        and getattr(value, "__module__", None) != "__future__"
    ]


def _is_model_class(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module) and required_arguments(found) == 0
