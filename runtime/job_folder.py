"""The folder of one run: what is in it, and writes that are complete or did not happen."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nascompile.compiler.errors import NascompileError

SETTINGS = "job.json"
ARCHITECTURE = "architecture.json"
SUMMARY = "summary.json"
LOG = "search.log"
CHECKPOINT = "checkpoint"
RETRAIN = "retrain"
WEIGHTS = "lean.safetensors"
PLOTS = "plots"

# what a run may leave in its folder, and all that `overwrite` removes
_OURS = (SETTINGS, ARCHITECTURE, SUMMARY, LOG, CHECKPOINT, RETRAIN, WEIGHTS, PLOTS)
_OURS_BY_FORMAT = ("lean.pt", "lean.pt2", "lean.onnx", "lean.onnx.data")

# the errors of a device, a quota or a permission: the run stops, and everything written before stays good
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class JobFolderError(NascompileError):
    """The output folder cannot be used; the message says why and what to do."""


class JobFolder:
    """The output folder at `path`. Nothing is touched until `create` or `reopen` is called."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_run(self) -> bool:
        """Whether a run has been started in it."""
        return (self.path / SETTINGS).is_file()

    def check_free(self, *, overwrite: bool = False) -> None:
        """Raise JobFolderError when no run can be started here: the folder is in use, or is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise JobFolderError(f"output folder {str(self.path)!r} is a file, expected a folder or nothing")
        if self.path.is_dir() and any(self.path.iterdir()) and not (overwrite and self.is_run):
            how = (
                "continue it with --resume, start anew with --overwrite, or"
                if self.is_run
                else "it holds no run to continue;"
            )
            raise JobFolderError(
                f"output folder {str(self.path)!r} is not empty: {how} choose another with --out"
            )

    def create(self, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Start a run in an empty or new folder; with `overwrite`, what an earlier run left in it is deleted
        first.

        Raises JobFolderError for a folder that is in use, is a file, or cannot be written to.
        """
        self.check_free(overwrite=overwrite)
        if self.is_run:
            self._clear()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_json(SETTINGS, settings)

    def reopen(self) -> dict[str, Any]:
        """The settings of the run in this folder. Raises JobFolderError when there is none, or they are
        damaged.
        """
        if not self.is_run:
            raise JobFolderError(f"nothing to resume: {str(self.path)!r} holds no run (no {SETTINGS})")
        settings = self.read_json(SETTINGS)
        self.write_json(SETTINGS, settings)
        return settings

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object written earlier; raises JobFolderError when it is damaged or missing."""
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise JobFolderError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise JobFolderError(f"{path} is damaged ({error}); expected a JSON object") from error
        if not isinstance(content, dict):
            raise JobFolderError(
                f"{path} is damaged: holds a {type(content).__name__}, expected a JSON object"
            )
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON object, replacing an earlier one."""
        return write_bytes(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def publish(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let `write` fill a file of the same suffix beside `name`, then put it in its place; returns the
        path.
        """
        path = self.path / name
        partial = path.with_name(f".partial-{path.name}")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write(partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        return path

    def discard(self, name: str) -> None:
        """Remove one file or folder of the run, if it is there."""
        path = self.path / name
        with writing(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def logging_to(self, logger: logging.Logger) -> Iterator[None]:
        """Inside, what `logger` and its children say from INFO upwards is appended to the log file."""
        with writing(self.path / LOG):
            handler = _StrictFileHandler(self.path / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            with writing(self.path / LOG):
                handler.close()

    def _clear(self) -> None:
        for name in (*_OURS, *_OURS_BY_FORMAT):
            self.discard(name)


class _StrictFileHandler(logging.FileHandler):
    """Lets a write error reach the caller, where logging would print it and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file so that it is either complete or as it was before."""
    partial = path.with_name(f".partial-{path.name}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the device and of permissions into a JobFolderError about `path`."""
    try:
        yield
    except Exception as error:
        reason = storage_trouble(error)
        if reason is None:
            raise
        raise JobFolderError(f"cannot write {str(path)!r}: {reason}") from error


def out_of_room(error: BaseException | None) -> bool:
    """Whether an error, or one it was made from, says that the device or the quota is full."""
    while error is not None:
        if storage_trouble(error) in {os.strerror(number) for number in _NO_ROOM}:
            return True
        error = error.__cause__ or error.__context__
    return False


def storage_trouble(error: BaseException) -> str | None:
    """Why a write failed, when it is the device, the quota or a permission; None for every other error.

    Libraries that write by themselves hide the errno: torch says "PytorchStreamWriter failed writing", and
    others quote the system's message.
    """
    if isinstance(error, OSError) and error.errno in _NO_ROOM | _NO_PERMISSION:
        return str(error.strerror or os.strerror(error.errno))
    no_space = os.strerror(errno.ENOSPC)
    if no_space in str(error) or "PytorchStreamWriter failed writing" in str(error):
        return no_space
    return None
