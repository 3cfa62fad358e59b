"""What surrounds a trace: torch's modes and the random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def ambient_modes() -> tuple[Any, ...]:
    """The modes of torch that a forward may ask for; a trace holds only for those it was made in."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
    )


def random_states() -> tuple[Any, ...]:
    """The states of torch's, NumPy's and Python's global generators."""
    return torch.get_rng_state(), numpy.random.get_state(legacy=False), random.getstate()


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put all generators into the given states."""
    torch.set_rng_state(states[0])
    numpy.random.set_state(states[1])
    random.setstate(states[2])


def same_random_states(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between the two."""
    one, other = left[1]["state"], right[1]["state"]
    numpy_same = one["pos"] == other["pos"] and bool((one["key"] == other["key"]).all())
    return torch.equal(left[0], right[0]) and numpy_same and left[2] == right[2]
