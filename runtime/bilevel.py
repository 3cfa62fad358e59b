"""DARTS' second order: how the validation loss after one training step depends on the architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.runtime.randomness import random_state, restore_random_state

#: the finite difference steps eps = RADIUS / ||v|| (DARTS, section 2.3, footnote 2)
RADIUS = 0.01

_LISTS: Any = torch
"""Its operations on lists of tensors, which it does not export: a supernet has thousands of small ones."""


@dataclass(frozen=True, slots=True)
class _Moves:
    """What a step does to some of the weights: number k becomes w + offset, and d(step)/dg = -rate."""

    numbers: list[int]
    offsets: list[Tensor]
    rates: list[float]


def unrolled_gradient(
    train_loss: Callable[[], Tensor],
    valid_loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    alphas: Sequence[nn.Parameter],
    buffers: Sequence[Tensor] = (),
    *,
    radius: float = RADIUS,
) -> list[Tensor]:
    """d L_valid(w'(alpha), alpha) / d alpha, where w' is w after one training step (DARTS, section 2.3).

    `train_loss()` and `valid_loss()` compute the losses with the current weights, those of `optimizer`. The
    step is that of torch.optim.SGD, momentum, dampening, Nesterov, weight decay and learning rates of all
    groups included; for any other optimizer it is plain gradient descent with the group's learning rate and
    weight decay. Gradient clipping is not part of it, and a parameter that has no part in the training loss
    does not move. The product with the mixed second derivative is a central difference, eps = radius/||v||,
    where v is the gradient of the validation loss at w', scaled by the relative rates when groups differ.

    All three forward passes on the training loss see the same random numbers (otherwise the difference of two
    dropout masks would drown the derivative). Afterwards weights and `buffers` (BatchNorm's statistics) are
    bit for bit what they were. The result is a tensor for each of `alphas`.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    kept, kept_buffers = _copies(weights), _copies(buffers)
    try:
        return _gradient(train_loss, valid_loss, optimizer, weights, list(alphas), kept, radius)
    finally:
        _set(weights, kept)
        _set(buffers, kept_buffers)


def _gradient(
    train_loss: Callable[[], Tensor],
    valid_loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    weights: list[nn.Parameter],
    alphas: list[nn.Parameter],
    kept: list[Tensor],
    radius: float,
) -> list[Tensor]:
    before = random_state()
    grads = torch.autograd.grad(train_loss(), weights, allow_unused=True)
    moves = _moves(optimizer, weights, grads)
    # the next pass finds its memory free
    del grads
    _add(weights, moves.numbers, moves.offsets)

    at_step = torch.autograd.grad(valid_loss(), [*weights, *alphas], allow_unused=True)
    after = random_state()
    direct = [_or_zero(g, a) for g, a in zip(at_step[len(weights) :], alphas, strict=True)]
    top = max(moves.rates, default=0.0)
    moved = [(k, rate / top) for k, rate in zip(moves.numbers, moves.rates, strict=True) if top]
    moved = [(k, share) for k, share in moved if at_step[k] is not None]
    numbers = [k for k, _ in moved]
    direction = _times([at_step[k] for k in numbers], [share for _, share in moved])
    norm = _norm(direction)
    if norm == 0.0:
        return direct

    eps = radius / norm
    sides = []
    for sign in (eps, -eps):
        _set(weights, kept)
        _add(weights, numbers, direction, sign)
        restore_random_state(before)
        sides.append(torch.autograd.grad(train_loss(), alphas, allow_unused=True))
    restore_random_state(after)
    return [
        d - top * (_or_zero(p, a) - _or_zero(n, a)) / (2 * eps)
        for d, p, n, a in zip(direct, *sides, alphas, strict=True)
    ]


@torch.no_grad()
def _moves(
    optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], grads: Sequence[Tensor | None]
) -> _Moves:
    """The step of all weights that have a gradient."""
    number_of = {weight: k for k, weight in enumerate(weights)}
    found = _Moves([], [], [])
    for group in optimizer.param_groups:
        present = [k for p in group["params"] if (k := number_of.get(p)) is not None and grads[k] is not None]
        momentum = float(group["momentum"]) if isinstance(optimizer, torch.optim.SGD) else 0.0
        buffers = [optimizer.state[weights[k]].get("momentum_buffer") if momentum else None for k in present]
        # those with a velocity and those without, each at once
        for has_velocity in (False, True):
            chosen = [j for j, buffer in enumerate(buffers) if (buffer is not None) == has_velocity]
            if not chosen:
                continue
            numbers = [present[j] for j in chosen]
            ascends = bool(group.get("maximize", False))
            given = [grads[k] for k in numbers]
            changes = _changes(group, [weights[k] for k in numbers], given)
            share = 1.0
            if momentum:
                velocities = [buffers[j] for j in chosen] if has_velocity else None
                changes, share = _with_momentum(group, momentum, changes, velocities)
            rate = float(group["lr"])
            found.numbers.extend(numbers)
            if any(change is gradient for change, gradient in zip(changes, given, strict=True)):
                changes = _LISTS._foreach_mul(changes, -rate)
            else:
                _LISTS._foreach_mul_(changes, -rate)
            found.offsets.extend(changes)
            found.rates.extend([(-rate if ascends else rate) * share] * len(numbers))
    return found


def _changes(group: dict[str, Any], weights: list[Any], grads: list[Any]) -> list[Tensor]:
    """Gradients, downhill, with weight decay."""
    changes: Any = _LISTS._foreach_neg(grads) if group.get("maximize", False) else grads
    decay = float(group.get("weight_decay", 0.0))
    return list(_LISTS._foreach_add(changes, weights, alpha=decay) if decay else changes)


def _with_momentum(
    group: dict[str, Any], momentum: float, changes: list[Tensor], velocities: list[Any] | None
) -> tuple[list[Tensor], float]:
    """What momentum makes of changes, and how much a change counts. Without velocities it is the first step,
    which takes the change itself, without dampening."""
    fresh = 1.0 if velocities is None else 1.0 - float(group["dampening"])
    moving = changes
    if velocities is not None:
        moving = _LISTS._foreach_add(_LISTS._foreach_mul(velocities, momentum), changes, alpha=fresh)
    if group["nesterov"]:
        return list(_LISTS._foreach_add(changes, moving, alpha=momentum)), 1.0 + momentum * fresh
    return list(moving), fresh


@torch.no_grad()
def _times(tensors: list[Any], factors: list[float]) -> list[Tensor]:
    return list(_LISTS._foreach_mul(tensors, factors)) if any(f != 1.0 for f in factors) else tensors


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors)) if tensors else 0.0


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


@torch.no_grad()
def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    found = [torch.empty_like(tensor) for tensor in tensors]
    _set(found, tensors)
    return found


@torch.no_grad()
def _set(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if targets:
        _LISTS._foreach_copy_(list(targets), list(values))


@torch.no_grad()
def _add(weights: Sequence[Tensor], numbers: list[int], steps: list[Tensor], by: float = 1.0) -> None:
    """Add `by` times a step to some of the weights."""
    if numbers:
        _LISTS._foreach_add_([weights[k] for k in numbers], steps, alpha=by)
