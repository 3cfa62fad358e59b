"""Deriving an architecture by trying several: sample, evaluate, keep the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Masks = dict[str, Tensor]


def best_of(
    sample: Callable[[], Masks], score: Callable[[Masks], float], samples: int
) -> tuple[Masks, float]:
    """The best of `samples` different architectures and its score (higher is better, NaN is worst).

    Of equal scores the first wins. A space too small for that many is tried as far as sampling finds it.
    """
    candidates = distinct(sample, samples)
    scored = [(score(masks), masks) for masks in candidates]
    value, masks = max(scored, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])
    logger.info("best of %d architectures scores %.6f", len(scored), value)
    return masks, value


def distinct(sample: Callable[[], Masks], count: int) -> list[Masks]:
    """Up to `count` different samples, in the order they came; gives up after ten draws for each wanted."""
    found: dict[tuple[Any, ...], Masks] = {}
    for _ in range(10 * count):
        masks = sample()
        found.setdefault(identity(masks), masks)
        if len(found) == count:
            break
    return list(found.values())


def identity(masks: Masks) -> tuple[Any, ...]:
    """A hashable value that two equal architectures share."""
    return tuple((key, tuple(torch.as_tensor(mask).tolist())) for key, mask in masks.items())
