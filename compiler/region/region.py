"""A region as a function in the graph: runs its plan where it can, else its graph in parts that have plans,
or op by op."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from nascompile.compiler.candidates import Candidate, called_module
from nascompile.compiler.checks import ModuleSettings
from nascompile.compiler.lower import LoweredChoice
from nascompile.compiler.region.autograd import call
from nascompile.compiler.region.copies import Look, parameters_of
from nascompile.compiler.region.decisions import Decisions, choice_length, read_decisions
from nascompile.compiler.region.execution import Execution, Memory
from nascompile.compiler.region.executors import EXECUTORS, Executor
from nascompile.compiler.region.gradients import Wanted
from nascompile.compiler.region.ir import Unsupported, Weight
from nascompile.compiler.region.operations import settings_of
from nascompile.compiler.region.plan import Plan, build
from nascompile.compiler.region.read import read
from nascompile.compiler.region.selftest import why_not_trusted
from nascompile.compiler.region.settings import Settings, read_borders
from nascompile.compiler.region.shapes import check_shapes
from nascompile.compiler.region.types import working_type
from nascompile.kernels.registry import Row, ranked
from nascompile.kernels.transforms import is_forward_differentiated, is_transformed

PLAN_LIMIT = 8
"""Plans kept for one region; the one not used for longest goes."""


PART_LIMIT = 8
"""How often what a plan cannot have is found inside a part of a part; more would not end soon."""

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Instead:
    """What runs where a plan cannot be made, and why it cannot."""

    reason: str
    function: Function


class Rest(Protocol):
    """The nodes of a region op by op, and with regions for all but some of them."""

    def __call__(self, *tensors: Any) -> Any: ...

    def in_parts(self, outside: Collection[fx.Node]) -> tuple[Function, list[Region]]:
        """The nodes as a function in which all but `outside` are regions again, and these regions."""
        ...


class Region:
    """`nodes` of the model's graph as one call: takes the values of `inputs`, gives those of `outputs`.

    `fallback` computes the same without a plan. `notes` has, under the region's name, why the last call had
    no plan. `without`: rewrites that plans leave out.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        nodes: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        candidates: Mapping[LoweredChoice, Sequence[tuple[nn.Module, Candidate]]],
        fallback: Rest,
        notes: dict[str, str],
        without: frozenset[str] = frozenset(),
    ) -> None:
        self._without = without
        self.__name__ = self.__qualname__ = name
        self.__module__ = "nascompile"
        self.nodes, self.inputs, self.outputs = tuple(nodes), tuple(inputs), tuple(outputs)
        self.choices: tuple[LoweredChoice, ...] = tuple(
            node.target for node in nodes if isinstance(node.target, LoweredChoice)
        )
        self.fallback = fallback
        self._modules = modules
        self._candidates = candidates
        self._notes = notes
        self._said: str | None = None
        self._executions: dict[Any, Execution | Instead] = {}
        self._parts: dict[frozenset[fx.Node], tuple[Function, list[Region]]] = {}
        self._memory = Memory()
        self.settings = ModuleSettings(self._leaves(), settings_of)
        """Of the modules inside: guards of the trace, and what a differentiable backward needs again."""

    def __call__(self, *tensors: Tensor) -> Any:
        strange = strangers(tensors)
        if strange:
            readers = [node for index in strange for node in self.inputs[index].users]
            names = ", ".join(self.inputs[index].name for index in strange)
            return self._do(self._in_parts(readers, f"{names} is not an image of the batch"), tensors)
        executor = executor_for(tensors)
        decisions = executor if isinstance(executor, str) else self._decisions(executor, tensors)
        if isinstance(executor, str) or isinstance(decisions, str):
            return self._do(self._op_by_op(str(decisions)), tensors)
        found = self._execution(tensors, decisions, executor)
        if isinstance(found, Instead):
            return self._do(found, tensors)
        execution, parameters, look = found
        boundary = execution.boundary(tensors, parameters, look, decisions.chosen)
        if isinstance(boundary, str):
            return self._do(self._op_by_op(boundary), tensors)
        if self._said is not None:
            self._say(None)
        as_written = boundary.as_written(self.fallback)
        outputs = boundary.call(
            lambda wide: call(execution, decisions, wide, parameters, as_written, boundary.is_plain), tensors
        )
        return outputs[0] if len(outputs) == 1 else outputs

    def _decisions(self, executor: Executor, tensors: Sequence[Tensor]) -> Decisions | str:
        return read_decisions(self.choices, executor.dtype, tensors[0].device)

    def _do(self, instead: Instead, tensors: Sequence[Tensor]) -> Any:
        if self._said != instead.reason:
            self._say(instead.reason)
        return instead.function(*tensors)

    def _say(self, reason: str | None) -> None:
        """Note what holds now, of this region and its parts."""
        for name in list(self._notes):
            if name == self.__name__ or name.startswith(f"{self.__name__}_"):
                self._notes.pop(name, None)
        for part in self._all_parts():
            part._said = None
        self._said = reason
        if reason is not None:
            self._notes[self.__name__] = reason

    def _all_parts(self) -> list[Region]:
        parts = [part for _, regions in self._parts.values() for part in regions]
        return [*parts, *(inner for part in parts for inner in part._all_parts())]

    def _op_by_op(self, reason: str) -> Instead:
        return Instead(f"runs op by op: {reason}", self.fallback)

    def _leaves(self) -> list[nn.Module]:
        """The modules that a region reads, each once."""
        found: dict[nn.Module, None] = dict.fromkeys(self._modules.values())
        for module, candidate in (pair for pairs in self._candidates.values() for pair in pairs):
            for node in candidate.graph.nodes:
                if node.op == "call_module":
                    found[called_module(module, node)] = None
        return list(found)

    @property
    def plans(self) -> list[Plan]:
        """The plans made so far, those of its parts among them."""
        own = [found.plan for found in self._executions.values() if isinstance(found, Execution)]
        parts = [part for _, regions in self._parts.values() for part in regions]
        return [*own, *(plan for part in parts for plan in part.plans)]

    def memory(self, *tensors: Tensor) -> int | None:
        """Bytes that the plan for such tensors takes for maps and packed weights; None without a plan."""
        executor = executor_for(tensors)
        decisions = executor if isinstance(executor, str) else self._decisions(executor, tensors)
        if isinstance(executor, str) or isinstance(decisions, str):
            return None
        found = self._execution(tensors, decisions, executor)
        return None if isinstance(found, Instead) else found[0].plan.slab * executor.dtype.itemsize

    def _in_parts(self, outside: Collection[fx.Node], reason: str) -> Instead:
        """The region without some nodes, which run as they are, and the others in regions of their own."""
        if self.__name__.count("_") > PART_LIMIT:
            return self._op_by_op(reason)
        key = frozenset(outside)
        if key not in self._parts:
            self._parts[key] = self.fallback.in_parts(key)
        function, regions = self._parts[key]
        return Instead(f"runs {'in parts' if regions else 'op by op'}: {reason}", function)

    def _execution(
        self, tensors: Sequence[Tensor], decisions: Decisions, executor: Executor
    ) -> tuple[Execution, list[Tensor], Look] | Instead:
        """What carries out such a call, the parameters that it reads, and how they look."""
        grad = torch.is_grad_enabled()
        key = (
            tuple(tensor.shape for tensor in tensors),
            is_channels_last(tensors),
            decisions.is_weighted,
            tuple(grad and tensor.requires_grad for tensor in tensors),
            grad,
            grad and any(vector.requires_grad for vector in decisions.vectors.values()),
            *(executor.name, executor.chunks(tensors[0].shape[0]), executor.lane()),
            tensors[0].device,
        )
        # other threads do the same meanwhile
        known = self._executions.pop(key, None)
        if isinstance(known, Execution):
            parameters = known.dense_parameters.values()
            look = known.suiting(parameters, grad)
            if look is not None:
                self._executions[key] = known
                return known, parameters, look
            known = None
        if known is None:
            if len(self._executions) >= PLAN_LIMIT:
                self._executions.pop(next(iter(self._executions)), None)
            try:
                known = self._make(tensors, decisions, grad, executor)
            except Unsupported as reason:
                known = self._instead(reason)
        self._executions[key] = known
        if isinstance(known, Instead):
            return known
        parameters = known.dense_parameters.values()
        return known, parameters, known.dense_parameters.look(parameters)

    def _instead(self, reason: Unsupported) -> Instead:
        """What the region does where a plan cannot be made."""
        if reason.node is not None:
            return self._in_parts([reason.node], str(reason))
        return self._op_by_op(str(reason))

    def _make(
        self, tensors: Sequence[Tensor], decisions: Decisions, grad: bool, executor: Executor
    ) -> Execution:
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        weighted = dict(zip(self.choices, decisions.is_weighted, strict=True))
        graph = read(
            *(self._modules, self.nodes, self.inputs, self.outputs, self._candidates),
            *(shapes, weighted, executor, self._without),  # type: ignore[arg-type]
        )
        check_shapes(graph)
        images = tensors[0].shape[0]
        slots: dict[Weight, int] = {}
        for key, is_mean in decisions.vectors:
            for index in range(choice_length(self.choices, key)):
                slots[Weight(key, index, is_mean)] = len(slots)
        wanted = self._wanted(graph, tensors, decisions) if grad and graph.outputs else None
        if wanted is not None and not (any(wanted.inputs) or wanted.parameters or wanted.decision):
            wanted = None
        settings = Settings(
            executor=executor,
            device=tensors[0].device,
            images=images,
            chunks=executor.chunks(images),
            lane=executor.lane(),
            channels_last=is_channels_last(tensors),
            has_backward=wanted is not None,
            borders=read_borders(graph),
            slots=slots,
            without=self._without,
        )
        return Execution(build(graph, settings, wanted), wanted, self._memory, self.settings)

    def _wanted(self, graph: Any, tensors: Sequence[Tensor], decisions: Decisions) -> Wanted:
        return Wanted(
            tuple(tensor.requires_grad for tensor in tensors),
            any(ref.value.requires_grad for ref in parameters_of(graph)),
            any(vector.requires_grad for vector in decisions.vectors.values()),
        )


def is_channels_last(tensors: Sequence[Tensor]) -> bool:
    """Whether the inputs lie in memory channels last, so that the outputs should."""
    return all(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in tensors
    )


def strangers(tensors: Sequence[Any]) -> list[int]:
    """Which of the values a plan could not take, if it could take the others: those that are no images, or of
    another batch."""
    images = [i for i, tensor in enumerate(tensors) if isinstance(tensor, Tensor) and tensor.dim() == 4]
    batch = max((tensors[i].shape[0] for i in images), default=0)
    fitting = {i for i in images if tensors[i].shape[0] == batch}
    return [i for i in range(len(tensors)) if i not in fitting] if fitting else []


def executor_for(tensors: Sequence[Any]) -> Executor | str:
    """Who can run a plan on these values in the present state of torch; a string says why nobody can."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"takes a {type(tensor).__name__}"
        if tensor.dim() != 4 or tensor.layout != torch.strided or tensor.numel() == 0:
            return f"takes a tensor of shape {tuple(tensor.shape)}"
    if len({(tensor.shape[0], tensor.device) for tensor in tensors}) != 1:
        return "takes batches of different sizes or on different devices"
    device = tensors[0].device.type
    reason = _why_not_now()
    if reason is not None:
        return reason
    types = list(dict.fromkeys(tensor.dtype for tensor in tensors))
    working = working_type(types)
    suitable = [e for e in EXECUTORS if (e.device, e.dtype) == (device, working)]
    if not suitable:
        found = " and ".join(map(str, types))
        return f"there is no plan for images in {found} on {device}: plans are for fp32, bf16 and fp16"
    reasons = [_why_not_here(executor, tensors[0].device) for executor in suitable]
    return next((e for e, why in zip(suitable, reasons, strict=True) if why is None), reasons[0] or "")


def plan_rows() -> list[Row]:
    """What carries out plans on this machine, on the CPU and on each GPU; a GPU takes its test for it."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for device in (torch.device("cpu"), *gpus):
        suitable = [e for e in EXECUTORS if e.device == device.type]
        reasons = {e.name: _why_not_now() or _why_not_here(e, device) for e in suitable}
        rows += ranked("plans", device, {**reasons, "op by op": None})
    return rows


def _why_not_here(executor: Executor, device: torch.device) -> str | None:
    return executor.why_not(device) or why_not_trusted(device)


def _why_not_now() -> str | None:
    """Why no plan can run in the present state of torch, or None."""
    if is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return "a transformation of functions or a dispatch mode is active"
    if is_forward_differentiated():
        return "forward-mode differentiation is active"
    if nn.modules.module._has_any_global_hook():
        return "hooks of all modules are active"
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return "the program is being traced"
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    if autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors are active"
    return None
