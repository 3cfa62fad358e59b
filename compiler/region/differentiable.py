"""The gradients of a region as functions of everything, for a backward pass that is itself differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.decision import Selection
from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.region.decisions import Decided
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
    """The gradients as functions of everything, for `create_graph=True`: by autograd, through the region op
    by op."""
    execution = ctx.execution
    selections = dict(ctx.decisions.selections)
    for (key, is_mean), vector in zip(ctx.decisions.vectors, vectors, strict=True):
        selection = selections[key]
        # of two vectors of one key that for sums: it is the weights that the other one is made of
        if selection.weights is not None and not (is_mean and (key, False) in ctx.decisions.vectors):
            # a mean divides by the number chosen once more
            factor = len(selection.indices) if is_mean else 1
            selections[key] = Selection(selection.indices, vector * factor)
    # copies of the running statistics, for the step has updated them already; the parameters and settings of
    # the forward pass, for those of the modules may be others by now (functional_call, eval)
    statistics = [(ref, ref.value.clone()) for ref in execution.buffers]
    before = [*statistics, *zip(execution.parameters, parameters, strict=True)]
    with _put_in_place(before), execution.settings.as_they_were(), forced_mutator(Decided(selections)):
        outputs = ctx.fallback(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        # what is chosen may lead to nothing that wants a gradient
        if grad is not None and out.requires_grad
    ]
    inputs = [*vectors, *tensors, *parameters]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
