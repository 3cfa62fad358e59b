"""What follows from a decision is found once: decisions come again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

LIMIT = 4096
"""Answers that are kept of one kind."""


def remembered(known: dict[K, V], key: K, find: Callable[[], V]) -> V:
    """The answer under a key, found when it is not known."""
    answer = known.get(key)
    if answer is None:
        if len(known) >= LIMIT:
            known.clear()
        answer = known[key] = find()
    return answer
