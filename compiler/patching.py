"""Replaces attributes of torch, of Python and of nn.Module while a program is traced, for the thread that
traces it: others go on as if nothing had happened."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

PATIENCE = 600.0
"""Seconds that a thread which wants to trace waits for another one: that one may be waiting for it."""

_TRACING = threading.RLock()
_ABSENT = object()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """What one thread does at a time, and may do inside of itself. Raises TimeoutError after `PATIENCE`."""
    if not _TRACING.acquire(timeout=PATIENCE):
        raise TimeoutError(f"another thread has been tracing a model for {PATIENCE:g} s")
    try:
        yield
    finally:
        _TRACING.release()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Meanwhile `owner.name` is `value`, for all threads."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def replaced_here(owner: Any, name: str, value: Any) -> AbstractContextManager[None]:
    """The same for this thread; others find what `owner.name` is now. Both are functions, or both class
    methods."""
    before = vars(owner).get(name, getattr(owner, name))
    if isinstance(value, classmethod):
        return replaced(owner, name, classmethod(_by_thread(value.__func__, before.__func__)))
    return replaced(owner, name, _by_thread(value, before))


def _by_thread(mine: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    thread = threading.get_ident()

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (mine if threading.get_ident() == thread else others)(*args, **kwargs)

    return choose
