"""An object in a process of its own: what it compiles, keeps, breaks and needs is nobody else's.

The parent asks, the process answers; only one of them has something to do at any time. A process that does
not answer in time is killed with everything it started.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.model_file import describe

START_LIMIT = 600.0
"""Seconds for whatever has no limit of its own: importing, building the model, one round of steps."""

MOST_LETTERS = 160
"""Of the line that says why a peer failed; compilers quote whole programs."""

# not -m: the classes of this file would be those of __main__, which the parent does not know
_PROGRAM = "from nascompile.runtime.bench_process import main; main()"
_OUT_OF_MEMORY_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True, slots=True)
class Problem:
    """An exception on its way to the parent, which need not know its class.

    line: type and message, shortened. message: the whole message, where the user can mend it. is_memory:
    whether there was too little memory.
    """

    line: str
    message: str | None
    is_memory: bool
    trace: str

    @staticmethod
    def of(error: Exception) -> Problem:
        """The problem that an exception is."""
        message = str(error) if isinstance(error, NascompileError) else None
        # torch has a type of its own for GPUs, and none for CPUs
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            "can't allocate memory" in str(error)
        )
        trace = "".join(traceback.format_exception(error))
        return Problem(_shortened(describe(error)), message, is_memory, trace)


class WorkerFailed(Exception):
    """The process ended, or the peer cannot run the model; the message says why in one line."""


class WorkerTimeout(WorkerFailed):
    """No answer in time; the process has been killed."""


class WorkerRaised(WorkerFailed):
    """What was asked raised an exception in the process."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.line)
        self.problem = problem


class Process:
    """`make(**arguments)`, made and asked in a process of its own; both are pickled.

    environment: what the process has besides that of this one. Raises WorkerFailed when it cannot be started.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *,
        environment: Mapping[str, str],
        limit: float | None,
        **arguments: Any,
    ) -> None:
        ours, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # a process group of its own: compilers that it started end with it
                start_new_session=True,
            )
        self._connection = ours
        self.ask("__init__", limit=limit, make=make, **arguments)

    def ask(self, what: str, *, limit: float | None = START_LIMIT, **arguments: Any) -> Any:
        """The answer of a method of the object. After WorkerFailed the process is gone.

        limit: the seconds that it may take; None for any.
        """
        try:
            return self._ask(what, limit, arguments)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process and what it started."""
        if self._connection.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()

    def _ask(self, what: str, limit: float | None, arguments: dict[str, Any]) -> Any:
        try:
            self._connection.send((what, arguments))
            if not self._connection.poll(limit):
                raise WorkerTimeout(f"stopped after {limit:.3g} s")
            done, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerFailed(_how_it_ended(self._process.wait())) from None
        if not done:
            raise WorkerRaised(answer)
        return answer


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    if code == -signal.SIGKILL:
        return "its process was killed by signal 9, as the system does when memory runs out"
    return f"its process was killed by signal {-code}"


def serve(connection: Connection) -> None:
    """Answer until the parent hangs up."""
    served: Any = None
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            if what == "__init__":
                served, answer = arguments.pop("make")(**arguments), None
            else:
                answer = getattr(served, what)(**arguments)
        except Exception as error:  # whatever a compiler or a model raises is the parent's to tell
            connection.send((False, Problem.of(error)))
        else:
            connection.send((True, answer))


def go_first() -> None:
    """Where memory runs out, Linux shall end this process and not the one that waits for it."""
    if _OUT_OF_MEMORY_SCORE.exists():
        _OUT_OF_MEMORY_SCORE.write_text("1000")


def _shortened(line: str) -> str:
    return line if len(line) <= MOST_LETTERS else f"{line[: MOST_LETTERS - 1]}…"


def main() -> None:
    """The program of the process."""
    go_first()
    serve(Connection(int(sys.argv[1])))
