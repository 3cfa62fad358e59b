"""Streams and captures of GPUs: what is copied is there for what follows on its stream, and what a CUDA graph
reads has to be kept as long as the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# not by thread: autograd runs backward passes for GPUs in threads of its own
_HOLDERS: list[list[Any]] = []
_FOREVER: list[Any] = []
"""What graphs read that were captured without a holder: nobody says when they go."""


def is_capturing(device: torch.device) -> bool:
    """Whether what this thread asks of the device goes into a CUDA graph, and is not carried out now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> int:
    """A number of the stream on which this thread asks things of the device; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextmanager
def holding() -> Iterator[list[Any]]:
    """Collects what graphs captured inside read and nobody else need keep: keep the list as long as they
    live."""
    things: list[Any] = []
    _HOLDERS.append(things)
    try:
        yield things
    finally:
        # by identity: lists that are equal are not the same
        _HOLDERS[:] = [one for one in _HOLDERS if one is not things]


def hold(*things: Any) -> None:
    """Keep things as long as the graph that is being captured, or for ever where nobody collects them."""
    for holder in _HOLDERS or [_FOREVER]:
        holder.extend(things)
