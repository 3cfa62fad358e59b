"""The gradients of a region by autograd, for a backward pass that is itself differentiated or vectorised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.decision import Selection
from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.region.decisions import Decided, Decisions
from nascompile.compiler.region.ir import TensorRef


@contextmanager
def _put_in_place(tensors: Sequence[tuple[TensorRef, Tensor]]) -> Iterator[None]:
    """Let modules have these tensors meanwhile."""
    kept = [(ref.dictionary, ref.name, ref.value) for ref, _ in tensors]
    try:
        for ref, tensor in tensors:
            ref.dictionary[ref.name] = tensor
        yield
    finally:
        for dictionary, name, tensor in kept:
            dictionary[name] = tensor


def differentiable(
    ctx: Any,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Any]:
    """The gradients that the backward pass goes on to, through the region op by op: functions of everything
    for `create_graph=True`, batched where `grads` are."""
    execution, is_differentiated = ctx.execution, torch.is_grad_enabled()
    asked = [goes_on_to(node) for node, _ in ctx.next_functions]
    with torch.enable_grad():
        # by themselves: one of them may have been computed from another
        vectors, tensors, parameters = (
            [tensor.view_as(tensor) if tensor.requires_grad else tensor for tensor in some]
            for some in (vectors, tensors, parameters)
        )
    # copies of the running statistics, for the step has updated them already; all else as it was, for modules
    # may have other parameters, statistics and settings by now (functional_call, eval)
    statistics = [(ref, ref.value.clone()) for ref in execution.buffers]
    fixed = execution.fixed.restored(ctx.fixed, ctx.decisions.chosen)
    statistics += [
        (ref, piece.to(ref.value.dtype)) for ref, piece in zip(execution.fixed.refs, fixed, strict=True)
    ]
    before = [*statistics, *zip(execution.parameters, parameters, strict=True)]
    with (
        torch.enable_grad(),
        _put_in_place(before),
        execution.settings.as_they_were(),
        forced_mutator(Decided(_selections(ctx.decisions, vectors))),
    ):
        outputs = ctx.fallback(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        # what is chosen may lead to nothing that wants a gradient
        if grad is not None and out.requires_grad
    ]
    reached = execution.kept(ctx.decisions.chosen).reached_of(parameters)
    wanted = list(compress([*vectors, *tensors, *reached], asked))
    if not pairs or not wanted:
        return [None] * len(asked)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=is_differentiated,
            allow_unused=True,
        )
    )
    return [next(found) if is_wanted else None for is_wanted in asked]


def _selections(decisions: Decisions, vectors: Sequence[Tensor]) -> dict[str, Selection]:
    """The decisions, made of the weights that autograd knows."""
    selections = dict(decisions.selections)
    for (key, is_mean), vector in zip(decisions.vectors, vectors, strict=True):
        selection = selections[key]
        # of two vectors of one key that for sums: it is the weights that the other one is made of
        if selection.weights is not None and not (is_mean and (key, False) in decisions.vectors):
            # a mean divides by the number chosen once more
            factor = len(selection.indices) if is_mean else 1
            selections[key] = Selection(selection.indices, vector * factor)
    return selections


def goes_on_to(node: Any) -> bool:
    """Whether the backward pass that is running goes on to this node of autograd's graph; `autograd.grad` may
    name others. None stands for what wants no gradient."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # torch answers so for a leaf that autograd.grad was asked for
        return True
