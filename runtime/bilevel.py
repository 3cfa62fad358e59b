"""DARTS' second order: how the validation loss after one training step depends on the architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nascompile.runtime.randomness import random_state, restore_random_state

#: the finite difference steps eps = RADIUS / ||v|| (DARTS, section 2.3, footnote 2)
RADIUS = 0.01


@dataclass(frozen=True, slots=True)
class _Move:
    """What a step does to one parameter w with gradient g: `w + offset`, and d(step)/dg = `-rate`."""

    offset: Tensor
    rate: float


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
    kept = [w.detach().clone() for w in weights]
    kept_buffers = [b.detach().clone() for b in buffers]
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
    moves = _moves(optimizer, dict(zip(weights, grads, strict=True)))
    _set(weights, [w + moves[p].offset if p in moves else w for p, w in zip(weights, kept, strict=True)])

    at_step = torch.autograd.grad(valid_loss(), [*weights, *alphas], allow_unused=True)
    after = random_state()
    direct = [_or_zero(g, a) for g, a in zip(at_step[len(weights) :], alphas, strict=True)]
    top = max((move.rate for move in moves.values()), default=0.0)
    direction = [
        g * (moves[p].rate / top) if g is not None and top and p in moves else None
        for p, g in zip(weights, at_step[: len(weights)], strict=True)
    ]
    norm = _norm(direction)
    if norm == 0.0:
        return direct

    eps = radius / norm
    sides = []
    for sign in (eps, -eps):
        _set(weights, [w if v is None else w + sign * v for w, v in zip(kept, direction, strict=True)])
        restore_random_state(before)
        sides.append(torch.autograd.grad(train_loss(), alphas, allow_unused=True))
    restore_random_state(after)
    return [
        d - top * (_or_zero(p, a) - _or_zero(n, a)) / (2 * eps)
        for d, p, n, a in zip(direct, *sides, alphas, strict=True)
    ]


def _moves(
    optimizer: torch.optim.Optimizer, grads: dict[nn.Parameter, Tensor | None]
) -> dict[nn.Parameter, _Move]:
    moves: dict[nn.Parameter, _Move] = {}
    plain = not isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        momentum = 0.0 if plain else float(group["momentum"])
        sign = -1.0 if group.get("maximize", False) else 1.0
        for parameter in group["params"]:
            gradient = grads.get(parameter)
            if gradient is None:
                continue
            change = sign * gradient + decay * parameter.detach()
            share = 1.0
            if momentum:
                velocity = optimizer.state[parameter].get("momentum_buffer")
                # the first step takes the gradient itself, without dampening
                fresh = 1.0 if velocity is None else 1.0 - float(group["dampening"])
                moving = fresh * change if velocity is None else momentum * velocity + fresh * change
                nesterov = group["nesterov"]
                share = 1.0 + momentum * fresh if nesterov else fresh
                change = change + momentum * moving if nesterov else moving
            moves[parameter] = _Move(-rate * change, sign * rate * share)
    return moves


def _norm(tensors: Sequence[Tensor | None]) -> float:
    present = [t for t in tensors if t is not None]
    return float(torch.nn.utils.get_total_norm(present)) if present else 0.0


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


@torch.no_grad()
def _set(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
