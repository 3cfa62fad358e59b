"""Candidates that are affine become one layer: sum_k w_k (W_k x + b_k) = (sum_k w_k W_k) x + sum_k w_k b_k.

Convolutions of different sizes and dilations are laid on one grid of taps first. It is the sum itself, not
an approximation, as long as nothing but the weights stands between the layers and the sum.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.affine import Affine, apply
from nascompile.compiler.chains import Member
from nascompile.kernels.mixed_sum import mixed_sum
from nascompile.kernels.transforms import is_forward_differentiated, is_transformed

Taps = tuple[tuple[int, int, int], ...]
"""For each spatial dimension of a kernel: its size, dilation and padding."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The kernel that holds the taps of several: size, dilation and padding, and where those of each lie."""

    size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    places: tuple[tuple[slice, ...], ...]


@lru_cache(maxsize=1024)
def common_grid(kernels: tuple[Taps, ...]) -> Grid | None:
    """The smallest grid for kernels of one stride, or None where their outputs differ in size.

    A kernel of K taps, dilation d and padding p reads at -p + d t, and an input of n gives one of
    n + 2p - d (K - 1) (before the stride): this must agree.
    """
    dims = [_common_grid(tuple(kernel[dim] for kernel in kernels)) for dim in range(len(kernels[0]))]
    if any(one is None for one in dims):
        return None
    found = [one for one in dims if one is not None]
    places = tuple(tuple(one[3][k] for one in found) for k in range(len(kernels)))
    sizes, dilations, paddings, _ = zip(*found, strict=True) if found else ((), (), (), ())
    return Grid(sizes, dilations, paddings, places)


def _common_grid(kernels: Any) -> tuple[int, int, int, tuple[slice, ...]] | None:
    growth = {2 * p - d * (size - 1) for size, d, p in kernels}
    if len(growth) != 1:
        return None
    padding = max(p for _, _, p in kernels)
    steps = [d for size, d, _ in kernels if size > 1] + [padding - p for _, _, p in kernels]
    dilation = math.gcd(*steps) or 1
    size = (2 * padding - growth.pop()) // dilation + 1
    places = []
    for count, d, p in kernels:
        start, step = (padding - p) // dilation, d // dilation if count > 1 else 1
        places.append(slice(start, start + step * (count - 1) + 1, step))
    return size, dilation, padding, tuple(places)


def taps(member: Member) -> Taps:
    """Of a convolution; of the identity and of linear layers for no dimensions."""
    if not member.layers:
        return ()
    (affine,) = member.affines
    return tuple(zip(affine.shape[2:], affine.dilation, affine.padding, strict=True))


def saves_taps(kernels: Sequence[Taps]) -> Grid | None:
    """The common grid, unless it has more taps than the kernels together."""
    grid = common_grid(tuple(kernels))
    alone = sum(math.prod(size for size, _, _ in kernel) for kernel in kernels)
    return grid if grid is not None and math.prod(grid.size) <= alone else None


# ----- before and after


def before(x: Tensor, members: Sequence[Member], weights: Tensor) -> Tensor:
    """Each candidate by itself."""
    outputs = [member.module(x) * weights[k] for k, member in enumerate(members)]
    return torch.stack(outputs).sum(0)


def after(x: Tensor, members: Sequence[Member], weights: Tensor) -> Tensor:
    """One layer with the weighted sum of all kernels; the identity is a weight on its diagonal."""
    affine = [k for k, member in enumerate(members) if member.layers]
    first = members[affine[0]].affines[0]
    grid = common_grid(tuple(taps(members[k]) for k in affine))
    assert grid is not None
    own = [members[k].affines[0].tensors() for k in affine]
    kernels = [
        _embedded(weight, grid.size, place) for (weight, _), place in zip(own, grid.places, strict=True)
    ]
    kernel = mixed_sum(kernels, pick(weights, affine))
    for k, member in enumerate(members):
        if not member.layers:
            _add_identity(kernel, grid, first.groups, weights[k])
    biased = [k for k, (_, bias) in zip(affine, own, strict=True) if bias is not None]
    bias = None
    if biased:
        biases = [bias for _, bias in own if bias is not None]
        bias = mixed_sum(biases, pick(weights, biased))
        bias = bias.to(first.layer.weight.dtype)
    kernel = kernel.to(first.layer.weight.dtype)
    settings = first.stride, grid.padding, grid.dilation, first.groups
    if bias is None or not _has_rough_bias_gradient(x, kernel):
        return apply(type(first.layer), x, kernel, bias, *settings)
    # in place: no backward pass needs the output of a convolution
    return apply(type(first.layer), x, kernel, None, *settings).add_(bias.view(-1, *[1] * len(grid.size)))


def _has_rough_bias_gradient(x: Tensor, kernel: Tensor) -> bool:
    """Whether the gradient of a bias is better left to torch's sum.

    oneDNN adds one pixel after the other: over 32,768 of them it is 6e-5 off, torch's sum 4e-7. The
    gradients of the decision are products with it.
    """
    is_fp32 = x.dtype == kernel.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    is_convolution = kernel.dim() > 2
    is_plain = not is_transformed() and not is_forward_differentiated()
    return is_convolution and is_fp32 and x.device.type == "cpu" and is_plain


def _embedded(weight: Tensor, size: tuple[int, ...], place: tuple[slice, ...]) -> Tensor:
    if tuple(weight.shape[2:]) == size:
        return weight
    kernel = weight.new_zeros(*weight.shape[:2], *size)
    if weight.dim() == 4 and not weight.is_contiguous():
        kernel = kernel.contiguous(memory_format=torch.channels_last)
    kernel[(..., *place)] = weight
    return kernel


def _add_identity(kernel: Tensor, grid: Grid, groups: int, weight: Tensor) -> None:
    # the tap that reads the output's own place
    centre = tuple(p // d for p, d in zip(grid.padding, grid.dilation, strict=True))
    tap = kernel[(..., *centre)]
    # kernel is fresh, and the operation that made it saves its inputs only
    tap.unflatten(0, (groups, -1)).diagonal(dim1=1, dim2=2).add_(weight)


def pick(weights: Tensor, indices: Sequence[int]) -> Tensor:
    """Some of the weights, ascending; neighbours without a table of indices."""
    first, last = indices[0], indices[-1]
    return weights[first : last + 1] if len(indices) == last - first + 1 else weights[list(indices)]


# ----- which candidates go together


def groups(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Candidates on one source whose layers agree in kind, stride, groups, channels and growth.

    Where one grid for all would have more taps than they have together, those of one dilation are tried.
    """
    buckets: defaultdict[Any, list[Member]] = defaultdict(list)
    for member in members:
        if len(member.layers) == 1 and member.affines:
            buckets[member.source, _key(member.affines[0])].append(member)
    found: list[tuple[Member, ...]] = []
    for bucket in buckets.values():
        if _fits(bucket):
            found.append(tuple(bucket))
            continue
        smaller: defaultdict[Any, list[Member]] = defaultdict(list)
        for member in bucket:
            smaller[member.affines[0].dilation].append(member)
        found += [tuple(one) for one in smaller.values() if _fits(one)]
    return [one for one in _with_identities(found, members) if len(one) > 1]


def _fits(bucket: Sequence[Member]) -> bool:
    return saves_taps([taps(member) for member in bucket]) is not None


def _key(affine: Affine) -> Any:
    growth = tuple(
        2 * p - d * (k - 1) for k, d, p in zip(affine.shape[2:], affine.dilation, affine.padding, strict=True)
    )
    return type(affine.layer), affine.shape[:2], affine.stride, affine.groups, growth


def _with_identities(found: list[tuple[Member, ...]], members: Sequence[Member]) -> list[tuple[Member, ...]]:
    identities = [member for member in members if not member.layers]
    answer = []
    for bucket in found:
        mine = [one for one in identities if one.source is bucket[0].source and _keeps_shape(bucket)]
        identities = [one for one in identities if one not in mine]
        answer.append(tuple(sorted((*bucket, *mine), key=lambda member: member.index)))
    return answer


def _keeps_shape(bucket: Sequence[Member]) -> bool:
    affine = bucket[0].affines[0]
    same = affine.shape[0] == affine.shape[1] * affine.groups and all(s == 1 for s in affine.stride)
    grid = common_grid(tuple(taps(member) for member in bucket))
    assert grid is not None
    sides = zip(grid.size, grid.dilation, grid.padding, strict=True)
    return same and all(2 * p == d * (size - 1) and p % d == 0 for size, d, p in sides)


def why_not_now(x: Tensor, members: Sequence[Member]) -> str | None:
    """Why these of a group's candidates are not merged for this input."""
    affines = [member.affines[0] for member in members if member.layers]
    if not affines:
        return "there is no layer to merge with"
    dtype = affines[0].layer.weight.dtype
    if len(affines) < len(members):
        if x.dtype != dtype or torch.is_autocast_enabled(x.device.type):
            return "the identity keeps another type"
        if x.device.type != "cpu":
            return "the identity would be rounded as products are"
    if len(affines) > 1 and saves_taps([taps(member) for member in members if member.layers]) is None:
        return "one kernel would have more taps than all"
    return None
