"""Candidates of two layers with an activation between become two layers over all their hidden units:

    sum_k w_k (V_k f(U_k x + a_k) + b_k)
        = [w_1 V_1 ... w_n V_n] f([U_1; ...; U_n] x + [a_1; ...; a_n]) + sum_k w_k b_k

No candidate's output is stored, weighed or kept for backward. It is the sum itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.chains import Activation, Member
from nascompile.compiler.merging import pick
from nascompile.kernels.mixed_sum import mixed_sum

WIDEST = 1.5  # hidden units per output unit; wider ones spend their time in the products, which stay the same


def after(x: Tensor, members: Sequence[Member], weights: Tensor) -> Tensor:
    """One layer up, one activation (one for each candidate where they differ), one layer down."""
    ups, downs = zip(*(member.affines for member in members), strict=True)
    dtype = ups[0].layer.weight.dtype
    channels = -1 - ups[0].dims if ups[0].dims > 0 else -1
    upward = [up.tensors() for up in ups]
    hidden = ups[0].call(x, torch.cat([w for w, _ in upward]).to(dtype), _stacked(upward, dtype))
    hidden = _activated(hidden, members, [len(w) for w, _ in upward], channels)
    downward = [down.tensors() for down in downs]
    down = torch.cat([w * weights[k] for k, (w, _) in enumerate(downward)], 1).to(dtype)
    biased = [k for k, (_, bias) in enumerate(downward) if bias is not None]
    bias = None
    if biased:
        biases = [bias for _, bias in downward if bias is not None]
        bias = mixed_sum(biases, pick(weights, biased)).to(dtype)
    return downs[0].call(hidden, down, bias)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype) -> Tensor | None:
    if all(bias is None for _, bias in pairs):
        return None
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in pairs]).to(dtype)


def _activated(hidden: Tensor, members: Sequence[Member], sizes: list[int], channels: int) -> Tensor:
    activations = [member.layers[1] for member in members]
    first = activations[0]
    assert isinstance(first, Activation)
    if all(isinstance(one, Activation) and one.key == first.key for one in activations):
        return first.apply(hidden)
    parts = hidden.split(sizes, channels)
    return torch.cat(
        [
            one.apply(part)
            for one, part in zip(activations, parts, strict=True)
            if isinstance(one, Activation)
        ],
        channels,
    )


def groups(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Candidates on one source of equal geometry, ungrouped and no wider inside than pays."""
    buckets: defaultdict[Any, list[Member]] = defaultdict(list)
    for member in members:
        if len(member.layers) == 3 and isinstance(member.layers[1], Activation) and len(member.affines) == 2:
            up, down = member.affines
            narrow = up.shape[0] <= WIDEST * down.shape[0]
            if up.groups == down.groups == 1 and narrow and up.shape[0] == down.shape[1]:
                key = up.geometry, down.geometry, up.shape[1], down.shape[0]
                buckets[member.source, key].append(member)
    return [tuple(bucket) for bucket in buckets.values() if len(bucket) > 1]


def why_not_now(x: Tensor, members: Sequence[Member]) -> str | None:
    """Nothing besides what holds for every group."""
    return None
