"""Runs the plan of a region: memory, tensors and flags."""

from __future__ import annotations

import contextlib
import mmap
import operator
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.checks import ModuleSettings
from nascompile.compiler.region.copies import (
    Copies,
    DenseTensors,
    Look,
    buffers_of,
    fixed_of,
    parameters_of,
    running_of,
)
from nascompile.compiler.region.executors import NATIVE
from nascompile.compiler.region.flags import NEVER, WITH_PARAMETERS, as_tensor, gradient_of_output
from nascompile.compiler.region.gradients import Wanted
from nascompile.compiler.region.ir import Weight
from nascompile.compiler.region.kept import Kept, kept
from nascompile.compiler.region.plan import Direction, Plan
from nascompile.compiler.region.profiling import active
from nascompile.compiler.region.reached import GradientMemory, Reached, reached
from nascompile.compiler.region.remembered import remembered
from nascompile.compiler.region.types import Boundaries, Boundary
from nascompile.kernels.plan.program import ALIGNMENT
from nascompile.kernels.plan.run import run_timed

_WANTS_GRADIENT = operator.attrgetter("requires_grad")
LARGE = 1 << 22
"""Bytes from which on memory is asked for in large pages."""

KEPT = 4
"""Pieces of memory that a region keeps between steps: what a program works in, the maps of three graphs."""


class Memory:
    """The slabs of a region's plans, and copies of its tensors, used again and again: fresh pages are slow,
    and plans take turns."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        # models are used by several threads, and leases are given back by whichever collects them
        self._lock = threading.RLock()
        self.copies = Copies()

    def lease(self, floats: int, dtype: torch.dtype, device: torch.device) -> Lease:
        """Memory of at least so many elements, until the lease is given back or forgotten."""
        if device.type != "cpu":
            # torch itself keeps the memory of GPUs, in the order of streams, and apart for captured graphs
            return Lease(None, new_memory(floats, dtype, device))
        with self._lock:
            fitting = [slab for slab in self._free if slab.dtype == dtype and slab.numel() >= floats]
            if fitting:
                slab = min(fitting, key=Tensor.numel)
                self._free = [other for other in self._free if other is not slab]
                return Lease(self, slab)
            # what is too small will be so again
            self._free = []
        return Lease(self, new_memory(floats, dtype, device))

    def take_back(self, slab: Tensor) -> None:
        """Keep a slab for the next lease, and no more than a step in the usual order needs."""
        with self._lock:
            self._free = [*self._free, slab][-KEPT:]


class Lease:
    """Memory in use; `memory`: who takes it back."""

    def __init__(self, memory: Memory | None, slab: Tensor) -> None:
        self._memory = memory
        self.slab: Tensor | None = slab

    def give_back(self) -> None:
        """Let others use the memory; its content is lost."""
        slab, self.slab = self.slab, None
        if slab is not None and self._memory is not None:
            self._memory.take_back(slab)

    def __del__(self) -> None:
        self.give_back()


def slab_of(lease: Lease) -> Tensor:
    """The memory of a lease that has not been given back."""
    assert lease.slab is not None
    return lease.slab


def _allocate(floats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fresh memory: of a CPU in large pages where Linux grants them, for a plan goes over more memory than
    small ones can be remembered."""
    size = floats * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or size < LARGE:
        return torch.empty(floats, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a kernel without large pages refuses
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def new_memory(floats: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory aligned as programs need it."""
    memory = _allocate(floats + ALIGNMENT, dtype, device)
    skip = -memory.data_ptr() // memory.element_size() % ALIGNMENT
    return memory[skip : skip + floats]


class Execution:
    """A plan, and everything that is the same in all its runs.

    The tensors of a run stand in one list: inputs, parameters, running statistics, decision, then outputs, or
    the outputs' gradients and all that is asked for. `_forward` and `_backward` are the programs' tensors by
    their place in it.
    """

    def __init__(self, plan: Plan, wanted: Wanted | None, memory: Memory, settings: ModuleSettings) -> None:
        self.plan, self.wanted, self.settings = plan, wanted, settings
        self.parameters = parameters_of(plan.graph)
        self.buffers = buffers_of(plan.graph)
        self.shapes = [ref.value.shape for ref in self.parameters]
        self.executor = plan.settings.executor
        self._memory = memory
        directions = [d for d in (plan.forward, plan.backward) if d is not None]
        device = plan.settings.device
        self._work = max(self.executor.work(way.program, way.encoded, device) for way in directions)
        self.options: dict[str, Any] = {"dtype": self.executor.dtype, "device": device}
        self._flags: dict[frozenset[Weight], tuple[Tensor, list[bool]]] = {}
        self._boundaries = Boundaries(plan.graph, [*self.parameters, *running_of(plan.graph)])
        self._suiting: Look | None = None
        sources = [("input", index) for index in range(len(plan.graph.sources))]
        fixed = fixed_of(plan.graph)
        self.dense_parameters, self._dense_buffers, self.fixed = (
            DenseTensors(plan.graph, refs, memory.copies, plan.settings.device)
            for refs in (self.parameters, self.buffers, fixed)
        )
        self._counters = [k for k, ref in enumerate(self.buffers) if ref.is_counter]
        common = [*sources, *self.parameters, *self.buffers, *fixed, "decision"]
        outputs = range(len(plan.graph.outputs))
        self._forward = _places([*common, *(("output", index) for index in outputs)], plan.forward)
        self._gradients = GradientMemory(**self.options)
        self._reached_by: dict[frozenset[Weight], Reached] = {}
        self._kept: dict[frozenset[Weight], Kept] = {}
        if plan.backward is not None:
            asked = [("grad", ref) for ref in self.parameters] + [("grad input", i) for _, i in sources]
            names = [*common, *(("grad output", index) for index in outputs), *asked, "grad decision"]
            self._backward = _places(names, plan.backward)
            loaded = set(plan.backward.tensors)
            self.constant = [index for index in outputs if ("grad output", index) not in loaded]
            """The outputs that lead to nothing that wants a gradient, whatever is decided."""

    def lease(self) -> Lease:
        """A slab for one run forward and backward."""
        return self._memory.lease(self.plan.slab, **self.options)

    def suiting(self, parameters: Sequence[Tensor], grad: bool) -> Look | None:
        """How the parameters look, if they are still what the plan was made for."""
        look = self.dense_parameters.look(parameters)
        if look is not self._suiting:
            wants = grad and any(map(_WANTS_GRADIENT, parameters))
            has = self.wanted is not None and self.wanted.parameters
            if wants != has or list(map(Tensor.size, parameters)) != self.shapes:
                return None
            self._suiting = look
        return look

    def boundary(
        self, tensors: Sequence[Tensor], parameters: Sequence[Tensor], look: Look, chosen: frozenset[Weight]
    ) -> Boundary | str:
        """The boundary of a call, given how its parameters look; a string says why the program as written has
        to run, or fail."""
        is_plain = look.fits
        reason = None if is_plain else self.dense_parameters.misshapen(parameters)
        if reason is not None:
            return reason
        running = [(dense, dense.values()) for dense in (self._dense_buffers, self.fixed)]
        for dense, values in running:
            look = dense.look(values)
            if dense is self._dense_buffers and not look.facts.distinct:
                # written by all of them, in the order of the program
                return "several BatchNorms share their running statistics"
            if not look.fits:
                is_plain = False
                reason = dense.misshapen(values)
                if reason is not None:
                    return reason
        return self._boundaries.of(tensors, chosen, is_plain=is_plain)

    def flags(self, chosen: frozenset[Weight]) -> tuple[Tensor, list[bool]]:
        """The flags under a decision."""

        def find() -> tuple[Tensor, list[bool]]:
            values = self.plan.flags.evaluate(chosen)
            return as_tensor(values), values

        return remembered(self._flags, chosen, find)

    def forward(
        self,
        slab: Tensor,
        chosen: frozenset[Weight],
        known: Sequence[Tensor],
        fixed: Sequence[Tensor],
        *,
        is_plain: bool = False,
        updates: bool = True,
    ) -> list[Tensor]:
        """Run the forward program on inputs, parameters and decision, and the running statistics that it
        leaves as they are; without `updates` on copies of the others. is_plain: as in Boundary."""
        outputs = [self._new_like(value.shape) for value in self.plan.graph.outputs]
        values = self._dense_buffers.values()
        buffers = values if is_plain else self._dense_buffers.of(values, chosen)
        buffers = buffers if updates else [buffer.clone() for buffer in buffers]
        tensors = [*known[:-1], *buffers, *fixed, known[-1], *outputs]
        self._run(self.plan.forward, self._forward, slab, chosen, tensors)
        if updates and self.buffers:
            self._dense_buffers.write_back(values, buffers, chosen)
            # as torch: the counters get a new version, the statistics that a BatchNorm writes to do not
            torch.autograd.graph.increment_version([values[k] for k in self._counters])
        return outputs

    def _new_like(self, shape: tuple[int, ...]) -> Tensor:
        size = (self.plan.settings.images, *shape)
        return torch.empty(size, memory_format=self.memory_format, **self.options)

    @property
    def memory_format(self) -> torch.memory_format:
        """That of inputs and outputs."""
        return torch.channels_last if self.plan.settings.channels_last else torch.contiguous_format

    def backward(
        self,
        slab: Tensor,
        chosen: frozenset[Weight],
        known: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
        """Run the backward program: the gradients of the decision, the inputs and the parameters, None for
        those that nothing reaches. `chosen`: the decision and `asked_for`; grads: None for the outputs
        without a gradient."""
        direction = self.plan.backward
        assert direction is not None
        dense = [
            # the program loads them all; the flags leave out what only missing ones would need
            self._new_like(value.shape).zero_()
            if grad is None
            else grad.contiguous(memory_format=self.memory_format)
            for grad, value in zip(grads, self.plan.graph.outputs, strict=True)
        ]
        wanted, empty = self._reached(chosen), torch.empty(0, **self.options)
        weights = self._gradients.take(wanted, len(self.parameters), empty)
        inputs = [
            self._new_like(value.shape) if there else empty
            for value, there in zip(self.plan.graph.sources, wanted.inputs, strict=True)
        ]
        decision = torch.zeros(len(self.plan.settings.slots), **self.options)
        # no step of a backward program reads running statistics
        running = [empty] * (len(self.buffers) + len(self.fixed.refs))
        tensors = [*known[:-1], *running, known[-1], *dense, *weights, *inputs, decision]
        self._run(direction, self._backward, slab, chosen, tensors)
        asks = self.wanted is not None and self.wanted.decision
        found, trained = (
            [None if gradient is empty else gradient for gradient in some] for some in (inputs, weights)
        )
        return decision if asks else None, found, trained

    def _reached(self, chosen: frozenset[Weight]) -> Reached:
        """What has a gradient under a decision."""

        def find() -> Reached:
            values = self.flags(chosen)[1]
            sources = range(len(self.plan.graph.sources))
            return reached(
                self.shapes,
                [self.is_reached(ref, values) for ref in self.parameters],
                [ref in self.plan.whole for ref in self.parameters],
                [self.is_reached(("input", index), values) for index in sources],
            )

        return remembered(self._reached_by, chosen, find)

    def kept(self, chosen: frozenset[Weight]) -> Kept:
        """The parameters that a backward pass under a decision depends on."""

        def find() -> Kept:
            asks = self.wanted is not None and self.wanted.parameters
            outputs = map(gradient_of_output, range(len(self.plan.graph.outputs)))
            values = self.flags(chosen.union((WITH_PARAMETERS, *outputs)))[1]
            return kept(
                *(self.plan.graph, self.parameters, chosen),
                (lambda ref: self.is_reached(ref, values)) if asks else None,
            )

        return remembered(self._kept, chosen, find)

    def is_reached(self, what: Any, values: Sequence[bool]) -> bool:
        """Whether there is a gradient of a parameter, an input or a decision under flags of these values."""
        flag = self.plan.reached.get(what, NEVER)
        return flag != NEVER and (flag < 0 or values[flag])

    def _run(
        self,
        direction: Direction,
        places: Sequence[int],
        slab: Tensor,
        chosen: frozenset[Weight],
        tensors: Sequence[Tensor],
    ) -> None:
        taken = [tensors[place] for place in places]
        flags = self.flags(chosen)[0]
        work = self._memory.lease(self._work, **self.options)
        arguments = (direction.program, direction.encoded, slab, slab_of(work), flags, taken)
        profile = active()
        if profile is not None and self.executor is NATIVE:
            name = "forward" if direction is self.plan.forward else "backward"
            profile.add(name, direction, run_timed(*arguments))
        else:
            self.executor.run(*arguments)
        work.give_back()


def _places(names: Sequence[Any], direction: Direction) -> list[int]:
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[what] for what in direction.tensors]
