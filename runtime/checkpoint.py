"""One checkpoint file: written whole or not at all, and read without running anything that is in it."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nascompile.compiler.errors import NascompileError

NAME = "checkpoint.pt"
_FORMAT = "nascompile checkpoint"
_VERSION = 1


def write_checkpoint(folder: str | Path, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, lists, dicts) into `folder`, which is made if need be.

    Raises NascompileError, with an earlier checkpoint intact, when it cannot be written or holds something
    that could not be read back.
    """
    path = Path(folder) / NAME
    content = {"format": _FORMAT, "version": _VERSION, **state}
    replace_whole(path, lambda stream: torch.save(content, stream), "checkpoint", verify=_load_lazily)
    return path


def _load_lazily(path: Path) -> None:
    # torch pickles more than it unpickles: found out now, not when the run is to be resumed
    torch.load(path, weights_only=True, map_location="cpu", mmap=True)


def replace_whole(
    path: str | Path, write: Callable[[Any], None], what: str, *, verify: Callable[[Path], None] | None = None
) -> None:
    """Let `write` fill a new file, which takes the place of `path` when it is complete, synced and verified.

    Raises NascompileError saying that `what` cannot be written and why; an earlier file is then untouched.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as stream:
            _write_through(write, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if verify is not None:
            verify(partial)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        raise NascompileError(f"{what} {str(path)!r} cannot be written: {error.strerror or error}") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, pickle.PickleError) as error:
        raise NascompileError(f"{what} {str(path)!r} cannot be written: {_first_line(error)}") from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink()


class _Watched:
    """Remembers why a write failed: torch's writer raises a RuntimeError without the reason."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


def _write_through(write: Callable[[Any], None], stream: Any) -> None:
    watched = _Watched(stream)
    try:
        write(watched)
    except Exception:
        if watched.error is not None:
            raise watched.error from None
        raise


def read_checkpoint(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file and its content; `source` is the file or its folder. All tensors are on the CPU.

    Raises NascompileError naming the file when it is missing, damaged, or was not written by
    `write_checkpoint`.
    """
    path = Path(source)
    path = path / NAME if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise NascompileError(
                f"checkpoint {str(path)!r} is damaged: the checksum of {damaged!r} is wrong"
            )
        state = torch.load(path, weights_only=True, map_location="cpu")
    except NascompileError:
        raise
    except OSError as error:
        raise NascompileError(
            f"checkpoint {str(path)!r} cannot be read: {error.strerror or error}"
        ) from error
    except Exception as error:
        # what torch's and zipfile's readers raise on damaged input is not documented and not one class
        raise NascompileError(
            f"checkpoint {str(path)!r} is damaged or no checkpoint: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise NascompileError(f"{str(path)!r} is not a checkpoint written by nascompile")
    if state.get("version") != _VERSION:
        raise NascompileError(
            f"checkpoint {str(path)!r} has version {state.get('version')!r}, this nascompile reads {_VERSION}"
        )
    return path, state


def write_text(path: str | Path, text: str, what: str) -> None:
    """Write a text file whole or not at all; raises NascompileError saying that `what` cannot be written."""
    replace_whole(path, lambda stream: stream.write(text.encode()), what)


def why_not_tensors(saved: dict[str, Any], current: dict[str, Any], what: str) -> str | None:
    """Why the tensors `saved` do not fit in the place of `current`, in words, or None."""
    for name in current:
        if name not in saved:
            return f"{what} has {name!r}, the checkpoint has not"
    for name, value in saved.items():
        if name not in current:
            return f"the checkpoint has {name!r}, {what} has not"
        shape, wanted = getattr(value, "shape", None), getattr(current[name], "shape", None)
        if shape != wanted:
            return f"{what}: {name!r} has shape {_shape(wanted)}, in the checkpoint {_shape(shape)}"
    return None


def _shape(shape: Any) -> str:
    return "none" if shape is None else str(tuple(shape))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
