"""Runs the plan of a region: memory, tensors, flags, and the one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.region.backward import Wanted
from nascompile.compiler.region.decisions import Decided, Decisions
from nascompile.compiler.region.flags import NEVER, as_tensor
from nascompile.compiler.region.ir import Conv, Graph, Norm, TensorRef, Weight
from nascompile.compiler.region.plan import Direction, Plan
from nascompile.kernels.plan.program import ALIGNMENT
from nascompile.kernels.plan.run import run

FLAG_LIMIT = 4096
"""Decisions whose flags are kept."""


class Memory:
    """Slabs of one size; one that is not in use any more is used again, for fresh pages are slow."""

    def __init__(self, floats: int) -> None:
        self._floats = floats
        self._free: list[Tensor] = []

    def lease(self) -> Lease:
        """A slab, until the lease is given back or forgotten."""
        return Lease(self._free, self._free.pop() if self._free else new_memory(self._floats))


class Lease:
    """A slab in use."""

    def __init__(self, free: list[Tensor], slab: Tensor) -> None:
        self._free = free
        self.slab: Tensor | None = slab

    def give_back(self) -> None:
        """Let others use the slab; its content is lost."""
        slab, self.slab = self.slab, None
        if slab is not None:
            self._free.append(slab)

    def __del__(self) -> None:
        self.give_back()


def new_memory(floats: int) -> Tensor:
    """fp32 memory, aligned as programs need it."""
    memory = torch.empty(floats + ALIGNMENT, dtype=torch.float32)
    skip = -memory.data_ptr() // 4 % ALIGNMENT
    return memory[skip : skip + floats]


def parameters_of(graph: Graph) -> list[TensorRef]:
    """The parameters that a region reads, each once."""
    found: dict[TensorRef, None] = {}
    for value in graph.values:
        op = value.op
        refs = (op.weight,) if isinstance(op, Conv) else (op.gamma, op.beta) if isinstance(op, Norm) else ()
        found.update(dict.fromkeys(ref for ref in refs if ref is not None))
    return list(found)


def buffers_of(graph: Graph) -> list[TensorRef]:
    """The running statistics that a region updates, each once."""
    found: dict[TensorRef, None] = {}
    for value in graph.values:
        op = value.op
        if isinstance(op, Norm) and op.updates:
            refs = (op.running_mean, op.running_var, op.counter)
            found.update(dict.fromkeys(ref for ref in refs if ref is not None))
    return list(found)


class Execution:
    """A plan, and everything that is the same in all its runs."""

    def __init__(self, plan: Plan, wanted: Wanted | None) -> None:
        self.plan, self.wanted = plan, wanted
        self.parameters = parameters_of(plan.graph)
        self.buffers = buffers_of(plan.graph)
        self.shapes = [ref.value.shape for ref in self.parameters]
        self.memory = Memory(plan.slab)
        directions = [d for d in (plan.forward, plan.backward) if d is not None]
        self.work = new_memory(max(direction.program.work for direction in directions))
        self._flags: dict[frozenset[Weight], tuple[Tensor, list[bool]]] = {}

    def suits(self, grad: bool) -> bool:
        """Whether the parameters are still what the plan was made for."""
        wants = grad and any(ref.value.requires_grad for ref in self.parameters)
        has = self.wanted is not None and self.wanted.parameters
        shapes = [ref.value.shape for ref in self.parameters]
        return wants == has and shapes == self.shapes

    def flags(self, chosen: frozenset[Weight]) -> tuple[Tensor, list[bool]]:
        """The flags under a decision."""
        found = self._flags.get(chosen)
        if found is None:
            values = self.plan.flags.evaluate(chosen)
            found = as_tensor(values), values
            if len(self._flags) >= FLAG_LIMIT:
                self._flags.clear()
            self._flags[chosen] = found
        return found

    def forward(
        self, slab: Tensor, chosen: frozenset[Weight], tensors: dict[Any, Tensor], buffers: dict[Any, Tensor]
    ) -> list[Tensor]:
        """Run the forward program; `buffers` are the running statistics, updated in place."""
        outputs = [self._new_like(value.shape) for value in self.plan.graph.outputs]
        known = {**tensors, **buffers, **{("output", index): out for index, out in enumerate(outputs)}}
        self._run(self.plan.forward, slab, chosen, known)
        return outputs

    def _new_like(self, shape: tuple[int, ...]) -> Tensor:
        settings = self.plan.settings
        memory = torch.channels_last if settings.channels_last else torch.contiguous_format
        return torch.empty((settings.images, *shape), dtype=torch.float32, memory_format=memory)

    def backward(
        self,
        slab: Tensor,
        chosen: frozenset[Weight],
        tensors: dict[Any, Tensor],
        grads: Sequence[Tensor],
    ) -> dict[Any, Tensor]:
        """Run the backward program: the gradients by TensorRef, ("input", i) and "decision"; absent ones are None."""
        direction = self.plan.backward
        assert direction is not None
        known: dict[Any, Tensor] = dict(tensors)
        found: dict[Any, Tensor] = {}
        settings = self.plan.settings
        memory = torch.channels_last if settings.channels_last else torch.contiguous_format
        for index, grad in enumerate(grads):
            known["grad output", index] = grad.contiguous(memory_format=memory)
        values = self.flags(chosen)[1]
        for what, flag in self.plan.reached.items():
            if flag == NEVER or (flag >= 0 and not values[flag]):
                continue
            if isinstance(what, TensorRef):
                found[what] = torch.empty(self._shape_of[what], dtype=torch.float32)
            else:
                found[what] = self._new_like(self.plan.graph.sources[what[1]].shape)
        if "grad decision" in direction.tensors:
            found["decision"] = torch.zeros(len(settings.slots), dtype=torch.float32)
        empty = torch.empty(0)
        for what in direction.tensors:
            if isinstance(what, tuple) and what[0] in ("grad", "grad input"):
                key = what[1] if what[0] == "grad" else ("input", what[1])
                known[what] = found.get(key, empty)
            elif what == "grad decision":
                known[what] = found["decision"]
        self._run(direction, slab, chosen, known)
        return found

    @property
    def _shape_of(self) -> dict[TensorRef, torch.Size]:
        return dict(zip(self.parameters, self.shapes, strict=True))

    def _run(
        self, direction: Direction, slab: Tensor, chosen: frozenset[Weight], known: dict[Any, Tensor]
    ) -> None:
        tensors = [known[what] if what in known else what.value for what in direction.tensors]
        run(direction.program, direction.encoded, slab, self.work, self.flags(chosen)[0], tensors)


def call(
    execution: Execution, decisions: Decisions, tensors: Sequence[Tensor], fallback: Callable[..., Any]
) -> tuple[Tensor, ...]:
    """The outputs of a region, with gradients where autograd wants them."""
    vectors = [decisions.vectors[key] for key in decisions.vectors]
    decision = torch.cat(vectors) if vectors else torch.empty(0)
    parameters = [ref.value for ref in execution.parameters]
    if execution.wanted is None:
        lease = execution.memory.lease()
        known = _known(execution, tensors, parameters, decision)
        assert lease.slab is not None
        with torch.no_grad():
            outputs = execution.forward(lease.slab, decisions.chosen, known, _running(execution))
        _mark_changed(execution)
        lease.give_back()
        return tuple(outputs)
    return RunPlan.apply(execution, decisions, fallback, decision, *tensors, *parameters)


def _known(
    execution: Execution, tensors: Sequence[Tensor], parameters: Sequence[Tensor], decision: Tensor
) -> dict[Any, Tensor]:
    settings = execution.plan.settings
    memory = torch.channels_last if settings.channels_last else torch.contiguous_format
    known: dict[Any, Tensor] = {"decision": decision.detach()}
    for index, tensor in enumerate(tensors):
        known["input", index] = tensor.detach().contiguous(memory_format=memory)
    for ref, parameter in zip(execution.parameters, parameters, strict=True):
        known[ref] = parameter.detach() if parameter.is_contiguous() else parameter.detach().contiguous()
    return known


def _running(execution: Execution) -> dict[Any, Tensor]:
    return {ref: ref.value for ref in execution.buffers}


def _mark_changed(execution: Execution) -> None:
    """The executor wrote to the running statistics behind autograd's back."""
    changed = [ref.value for ref in execution.buffers]
    if changed:
        torch.autograd.graph.increment_version(changed)


class RunPlan(torch.autograd.Function):
    """The region as one operation of autograd. A second backward, and one that is itself differentiated, recompute."""

    @staticmethod
    def forward(ctx: Any, execution: Execution, decisions: Decisions, fallback: Any, *args: Tensor) -> Any:
        decision, *rest = args
        count = len(rest) - len(execution.parameters)
        ctx.execution, ctx.decisions, ctx.fallback, ctx.count = execution, decisions, fallback, count
        ctx.lease = execution.memory.lease()
        known = _known(execution, rest[:count], rest[count:], decision)
        outputs = execution.forward(ctx.lease.slab, decisions.chosen, known, _running(execution))
        _mark_changed(execution)
        ctx.save_for_backward(*args)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        decision, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiable(ctx, decision, rest, grads)
            return (None, None, None, *found)
        execution, chosen = ctx.execution, ctx.decisions.chosen
        known = _known(execution, rest[: ctx.count], rest[ctx.count :], decision)
        if ctx.lease.slab is None:
            # the first backward has used the memory up
            ctx.lease = execution.memory.lease()
            execution.forward(
                ctx.lease.slab, chosen, known, {ref: ref.value.clone() for ref in execution.buffers}
            )
        found = execution.backward(ctx.lease.slab, chosen, known, grads)
        ctx.lease.give_back()
        needed = ctx.needs_input_grad[3:]
        keys = ["decision", *(("input", i) for i in range(ctx.count)), *execution.parameters]
        results = (found.get(key) if needs else None for key, needs in zip(keys, needed, strict=True))
        return (None, None, None, *results)


def _differentiable(ctx: Any, decision: Tensor, rest: list[Tensor], grads: Sequence[Tensor]) -> list[Any]:
    """The gradients as functions of everything, for `create_graph=True`: by autograd, through the region op by op."""
    execution = ctx.execution
    selections, at = {}, 0
    for key, selection in ctx.decisions.selections.items():
        if key in ctx.decisions.vectors and selection.weights is not None:
            length = selection.weights.numel()
            selections[key] = type(selection)(selection.indices, decision[at : at + length])
            at += length
        else:
            at += ctx.decisions.vectors[key].numel() if key in ctx.decisions.vectors else 0
            selections[key] = selection
    kept = [(ref.value, ref.value.clone()) for ref in execution.buffers]
    with forced_mutator(Decided(selections)):
        outputs = ctx.fallback(*rest[: ctx.count])
    with torch.no_grad():
        for tensor, before in kept:
            tensor.copy_(before)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    inputs = [decision, *rest]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, list(grads), create_graph=True, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
