"""The tables of fusions: two ordinary functions, before and after, and in words when the second may not be
used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nascompile.compiler import batching, merging
from nascompile.compiler.chains import Member
from nascompile.compiler.decision import reduce_outputs, weigh
from nascompile.compiler.space import Choice
from nascompile.kernels.mixed_sum import mixed_sum

Combine = Callable[[Sequence[Tensor], Tensor, str], Tensor]
Compute = Callable[[Tensor, Sequence[Member], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A rewrite of the weighted combination of a choice.

    `before` and `after` take the outputs of the candidates that take part, their weights (one each) and the
    reduction, and compute the same. `why_not` says why a choice does not match; `why_not_tensors` why
    particular outputs do not.
    """

    name: str
    before: Combine
    after: Combine
    why_not: Callable[[Choice], str | None]
    why_not_tensors: Callable[[Sequence[object]], str | None]


@dataclass(frozen=True, slots=True)
class GroupPattern:
    """A rewrite of several candidates of a layer choice together with their part of the weighted sum.

    `before` and `after` take the value that the candidates start from, those that are chosen, and their
    weights, and compute the same. `groups` says which candidates go together; `why_not_now` why some of a
    group do not for one value.
    """

    name: str
    before: Compute
    after: Compute
    groups: Callable[[Sequence[Member]], list[tuple[Member, ...]]]
    why_not_now: Callable[[Tensor, Sequence[Member]], str | None]


def weighted_sum(outputs: Sequence[Tensor], weights: Tensor, reduction: str) -> Tensor:
    """One multiplication and one addition for every candidate."""
    weighted = [weigh(output, weights[index], "") for index, output in enumerate(outputs)]
    return reduce_outputs(weighted, reduction, "", [str(index) for index in range(len(outputs))])


def fused_weighted_sum(outputs: Sequence[Tensor], weights: Tensor, reduction: str) -> Tensor:
    """One pass over all candidates; the mean is a sum with scaled weights."""
    weights = weights.to(outputs[0].device)
    return mixed_sum(outputs, weights / len(outputs) if reduction == "mean" else weights)


def _why_not_sum(choice: Choice) -> str | None:
    if choice.reduction not in ("sum", "mean"):
        return f'reduction "{choice.reduction}" is not a sum'
    if len(choice) < 2:
        return "there is only one candidate"
    return None


def _why_not_tensors(outputs: Sequence[object]) -> str | None:
    first = outputs[0]
    for output in outputs:
        if not isinstance(output, Tensor) or not isinstance(first, Tensor):
            return f"a candidate returns a {type(output).__name__}"
        if output.shape != first.shape or output.device != first.device:
            return "the candidates' outputs differ in shape or device"
        if output.dtype != first.dtype or not output.is_floating_point():
            return f"the candidates' outputs are of type {output.dtype} and {first.dtype}"
    if first.is_sparse or first.is_quantized:  # type: ignore[union-attr]
        return "the candidates' outputs are not dense"
    return None


PATTERNS = (
    Pattern(
        name="mixed_sum",
        before=weighted_sum,
        after=fused_weighted_sum,
        why_not=_why_not_sum,
        why_not_tensors=_why_not_tensors,
    ),
)

# in this order: a candidate belongs to the first that takes it
GROUPS = (
    GroupPattern(
        name="merge",
        before=merging.before,
        after=merging.after,
        groups=merging.groups,
        why_not_now=merging.why_not_now,
    ),
    GroupPattern(
        name="batch",
        before=merging.before,
        after=batching.after,
        groups=batching.groups,
        why_not_now=batching.why_not_now,
    ),
)
