"""A region as one operation of autograd: runs its plans, keeps what backward needs, and falls back on the
program where a backward pass asks for more than a plan can give."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.region.decisions import Decisions
from nascompile.compiler.region.differentiable import differentiable, goes_on_to
from nascompile.compiler.region.execution import Execution, slab_of
from nascompile.compiler.region.flags import WITH_PARAMETERS, WITHOUT_PARAMETERS, gradient_of_output
from nascompile.compiler.region.ir import Weight
from nascompile.kernels.transforms import is_batched

_VERSION = operator.attrgetter("_version")
_NOT_TENSORS = (None,) * 5
"""What `RunPlan.backward` gives for the arguments before the tensors."""


def call(
    execution: Execution,
    decisions: Decisions,
    tensors: Sequence[Tensor],
    parameters: list[Tensor],
    fallback: Callable[..., Any],
    is_plain: bool,
) -> tuple[Tensor, ...]:
    """The outputs of a region, with gradients where autograd wants them; is_plain: as in Boundary."""
    vectors = list(decisions.vectors.values())
    if execution.wanted is not None:
        # autograd is told of what the decision leads to: others have no hooks to call, and no gradient
        reached = execution.kept(decisions.chosen).reached_of(parameters)
        first = (execution, decisions, fallback, parameters, is_plain)
        return RunPlan.apply(*first, *vectors, *tensors, *reached)
    chosen, lease = decisions.chosen, execution.lease()
    with torch.no_grad():
        known = _known(execution, chosen, vectors, tensors, parameters, is_plain)
        fixed = execution.fixed.now(chosen)
        outputs = execution.forward(slab_of(lease), chosen, known, fixed, is_plain=is_plain)
    lease.give_back()
    return tuple(outputs)


def _known(
    execution: Execution,
    chosen: frozenset[Weight],
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    parameters: list[Tensor],
    is_plain: bool = False,
) -> list[Tensor]:
    """Decision, inputs and parameters as the executor wants them in memory, the decision last."""
    decision = torch.cat(list(vectors)) if vectors else torch.empty(0, **execution.options)
    inputs = [tensor.contiguous(memory_format=execution.memory_format) for tensor in tensors]
    own = parameters if is_plain else execution.dense_parameters.of(parameters, chosen)
    return [*inputs, *own, decision]


class RunPlan(torch.autograd.Function):
    """The region as one operation of autograd. A second backward recomputes, and so does one that is itself
    differentiated or gets its gradients in batches."""

    @staticmethod
    def forward(
        ctx: Any,
        execution: Execution,
        decisions: Decisions,
        fallback: Any,
        parameters: list[Tensor],
        is_plain: bool,
        *args: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.execution, ctx.decisions, ctx.fallback = execution, decisions, fallback
        chosen = decisions.chosen
        kept = execution.kept(chosen)
        ctx.ends = (len(decisions.vectors), len(args) - sum(kept.reached))
        vectors, tensors = _parts(ctx, args)
        known = _known(execution, chosen, vectors, tensors, parameters, is_plain)
        fixed = execution.fixed.now(chosen)
        ctx.lease = execution.lease()
        outputs = execution.forward(slab_of(ctx.lease), chosen, known, fixed, is_plain=is_plain)
        ctx.save_for_backward(*vectors, *tensors, *kept.factors_of(parameters))
        # what only a second run needs must not fail the first; the statistics may have moved on by then
        ctx.parameters, ctx.fixed = parameters, execution.fixed.flat(fixed, chosen)
        ctx.versions = list(map(_VERSION, kept.others_of(parameters)))
        ctx.mark_non_differentiable(*(outputs[index] for index in execution.constant))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        vectors, tensors = _parts(ctx, ctx.saved_tensors)
        execution, chosen, parameters = ctx.execution, ctx.decisions.chosen, ctx.parameters
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or is_batched(grads):
            _require_unchanged(ctx)
            return (*_NOT_TENSORS, *differentiable(ctx, vectors, tensors, parameters, grads))
        known = _known(execution, chosen, vectors, tensors, parameters)
        if ctx.lease.slab is None:
            # the first backward has used the memory up
            _require_unchanged(ctx)
            ctx.lease = execution.lease()
            fixed = execution.fixed.restored(ctx.fixed, chosen)
            execution.forward(slab_of(ctx.lease), chosen, known, fixed, updates=False)
        chosen |= asked_for(ctx.next_functions[ctx.ends[1] :], grads)
        decision, inputs, weights = execution.backward(slab_of(ctx.lease), chosen, known, grads)
        ctx.lease.give_back()
        reached = execution.kept(ctx.decisions.chosen).reached_of(weights)
        found = [*_by_key(execution, ctx.decisions, chosen, decision), *inputs, *reached]
        needed = ctx.needs_input_grad[len(_NOT_TENSORS) :]
        # autograd casts to the types of the parameters
        return (*_NOT_TENSORS, *(g if needs else None for g, needs in zip(found, needed, strict=True)))


def _require_unchanged(ctx: Any) -> None:
    """Raise RuntimeError where the region cannot run again as it did: a bias has been changed in place."""
    execution, kept = ctx.execution, ctx.execution.kept(ctx.decisions.chosen)
    refs, tensors = kept.others_of(execution.parameters), kept.others_of(ctx.parameters)
    for ref, tensor, version in zip(refs, tensors, ctx.versions, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                f"a region has to run again for these gradients, but {ref.name!r} of {ref.module} has been "
                f"modified by an inplace operation: it is at version {tensor._version}; expected {version}"
            )


def _parts(ctx: Any, args: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The decision's vectors and the inputs, with which `args` begin."""
    first, second = ctx.ends
    return args[:first], args[first:second]


def asked_for(parameters: Sequence[Any], grads: Sequence[Tensor | None]) -> frozenset[Weight]:
    """What the backward pass that is running chooses, by the parameters it goes on to (edges of autograd's
    graph) and the gradients it has."""
    wants = any(goes_on_to(node) for node, _ in parameters)
    given = (gradient_of_output(index) for index, grad in enumerate(grads) if grad is not None)
    return frozenset((WITH_PARAMETERS if wants else WITHOUT_PARAMETERS, *given))


def _by_key(
    execution: Execution, decisions: Decisions, chosen: frozenset[Weight], gradient: Tensor | None
) -> list[Tensor | None]:
    """The decision's gradient, one piece for each vector; None where no candidate of it is reached."""
    if gradient is None:
        return [None] * len(decisions.vectors)
    values = execution.flags(chosen)[1]
    pieces = gradient.split([vector.numel() for vector in decisions.vectors.values()])
    return [
        piece if execution.is_reached(("decision", *key), values) else None
        for key, piece in zip(decisions.vectors, pieces, strict=True)
    ]
