"""Runs two forms of a model on the same step and compares everything that a user could see."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from nascompile.mutator import Mutator

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # fp64: only the order of sums may differ
EXACT = {"rtol": 0.0, "atol": 0.0}


class Decided(Mutator):
    """Decides what it is told."""


def decision(architecture: dict[str, list[Any]]) -> dict[str, Tensor]:
    """Masks as a search gives them: booleans, or weights that want a gradient."""
    return {key: _mask(values) for key, values in architecture.items()}


def _mask(values: list[Any]) -> Tensor:
    if isinstance(values[0], float):
        return torch.tensor(values, dtype=torch.float64, requires_grad=True)
    return torch.tensor(values)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in any nesting, in order."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def replaced(value: Any, fresh: list[Tensor]) -> Any:
    """The same nesting with other tensors."""
    following = iter(fresh)
    return tree_map(lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf, value)


def step(
    model: nn.Module, masks: dict[str, Tensor], args: Any, kwargs: Any, *, seed: int = 0
) -> dict[str, Any]:
    """Outputs, all gradients (None where there is none), and the buffers afterwards."""
    torch.manual_seed(seed)
    random.seed(seed)
    model.zero_grad(set_to_none=True)
    # not the leaves themselves, which nobody may change in place
    fresh = [leaf * 1 if leaf.requires_grad else leaf.clone() for leaf in tensors((args, kwargs))]
    for leaf in fresh:
        if leaf.requires_grad:
            leaf.retain_grad()
    args, kwargs = replaced((args, kwargs), fresh)
    outputs = model(*args, **kwargs)
    losses = [
        (out.sin() * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()
        for out in tensors(outputs)
        if out.requires_grad
    ]
    if losses:
        torch.stack([loss.double() for loss in losses]).sum().backward()
    return {
        "outputs": outputs,
        "inputs": [leaf.grad if leaf.requires_grad else None for leaf in fresh],
        "changed inputs": fresh,
        "weights": {name: parameter.grad for name, parameter in model.named_parameters()},
        "decisions": {key: mask.grad for key, mask in masks.items()},
        "buffers": dict(model.named_buffers()),
    }


def assert_same(actual: Any, expected: Any, *, exact: bool = False) -> None:
    """Equal nesting, types and None; equal tensors, bit for bit or up to the order of sums."""
    assert_close(actual, expected, **(EXACT if exact else CLOSE))


def assert_close(actual: Any, expected: Any, **tolerance: Any) -> None:
    """Equal nesting, types and None; tensors within the tolerance."""
    left, left_spec = tree_flatten(actual)
    right, right_spec = tree_flatten(expected)
    assert left_spec == right_spec
    for one, other in zip(left, right, strict=True):
        assert type(one) is type(other), f"{one} instead of {other}"
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, equal_nan=True, **tolerance)
        else:
            assert one == other
