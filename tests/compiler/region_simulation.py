"""Carries out a plan the hard way: image by image in any order, nan in all memory that nothing lives in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nascompile.compiler.region import plan as plans
from nascompile.compiler.region import region
from nascompile.compiler.region.executors import REFERENCE
from nascompile.compiler.region.memory import Buffer
from nascompile.compiler.region.plan import Plan
from nascompile.kernels.plan import barriers_reference, reference
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.state import State
from nascompile.kernels.plan.steps import NONE


@dataclass
class Built:
    """A plan, and the buffers that its slab and the gradients of its weights were laid out with."""

    plan: Plan
    buffers: list[Buffer]
    gradients: list[Buffer]


def lives_at(buffer: Buffer, phase: int) -> bool:
    """Whether something may be in the buffer during a phase (those of backward follow those of forward)."""
    return buffer.is_vector or buffer.first <= phase <= buffer.last


def overlaps(built: Built) -> list[tuple[str, str]]:
    """The buffers that live at one time in one place: none, or the plan is wrong."""
    images = built.plan.settings.images
    return [*_overlaps(built.buffers, images), *_overlaps(built.gradients, images)]


def _overlaps(buffers: Sequence[Buffer], images: int) -> list[tuple[str, str]]:
    used = [b for b in buffers if b.is_vector or b.last >= 0]
    # where every image has memory of its own, that of the first one
    size = {id(b): b.floats if b.image == NONE else b.floats // images for b in used}
    return [
        (one.name, other.name)
        for index, one in enumerate(used)
        for other in used[:index]
        if one.offset < other.offset + size[id(other)] and other.offset < one.offset + size[id(one)]
        if one.is_vector or other.is_vector or (one.first <= other.last and other.first <= one.last)
    ]


@contextmanager
def simulated(seed: int = 0) -> Iterator[list[Built]]:
    """Regions in fp64 are carried out by the simulation; gives the plans that are made."""
    made: list[Built] = []
    laid_out: list[list[Buffer]] = []
    original_lay_out, original_build = plans.lay_out, plans.build
    original_lay_out_images = plans.lay_out_images
    order = random.Random(seed)

    def lay_out(buffers: Any) -> int:
        laid_out.append(list(buffers))
        return original_lay_out(laid_out[-1])

    def lay_out_images(buffers: Any, images: int) -> int:
        laid_out.append(list(buffers))
        return original_lay_out_images(laid_out[-1], images)

    def build(*args: Any) -> Plan:
        laid_out.clear()
        plan = original_build(*args)
        made.append(Built(plan, laid_out[0], laid_out[1] if plan.backward is not None else []))
        return plan

    def run(
        program: Program,
        encoded: Tensor,
        slab: Tensor,
        work: Tensor,
        flags: Tensor,
        tensors: Sequence[Tensor],
    ) -> None:
        own = next(one for one in made if _direction(one, program) is not None)
        _run(program, slab, flags, tensors, own, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "lay_out", lay_out)
        patch.setattr(plans, "lay_out_images", lay_out_images)
        patch.setattr(region, "build", build)
        patch.setattr(region, "EXECUTORS", (replace(REFERENCE, name="simulated", run=run),))
        yield made


def _direction(built: Built, program: Program) -> int | None:
    """The number of phases before those of the program, None where it is not the plan's."""
    if built.plan.forward.program is program:
        return 0
    backward = built.plan.backward
    is_backward = backward is not None and backward.program is program
    return len(built.plan.forward.program.phases) if is_backward else None


class _OneImage(State):
    """The state as the steps of one image see it; the scratch is one for all."""

    def __init__(self, whole: State, image: int) -> None:
        self.__dict__.update(whole.__dict__)
        self.program = replace(whole.program, images=1)
        self.image = image
        self.tensors = [t[image : image + 1] if t.dim() == 4 else t for t in whole.tensors]
        self.whole_slab = whole.slab

    def memory(self, space: Any, image: int) -> tuple[Tensor, int]:
        memory, stride = super().memory(space, image)
        return (self.whole_slab[self.image * stride :], stride) if memory is self.slab else (memory, stride)

    def bytes(self, step: Any, shape: Sequence[int]) -> Tensor:
        shifted = replace(step, index=step.index + self.image * step.index_image)
        return super().bytes(shifted, shape)


def _run(
    program: Program, slab: Tensor, flags: Tensor, tensors: Sequence[Tensor], own: Built, order: random.Random
) -> None:
    before = _direction(own, program)
    assert before is not None
    if not before:
        slab.fill_(torch.nan)
    state = State(program, slab, flags, tensors)
    for number, phase in enumerate(program.phases):
        _poison(slab, own.buffers, before + number)
        for barrier in phase.barriers:
            if state.holds(barrier.flag):
                barriers_reference.RUN[type(barrier)](state, barrier)
        images = list(range(program.images))
        order.shuffle(images)
        for image in images:
            view = _OneImage(state, image)
            for step in phase.steps:
                if state.holds(step.flag):
                    reference.RUN[type(step)](view, step)


def _poison(slab: Tensor, buffers: Sequence[Buffer], phase: int) -> None:
    """nan wherever no buffer lives; not where every image has memory of its own, in use by steps."""
    if any(buffer.image != NONE for buffer in buffers):
        return
    lives = torch.zeros(slab.numel(), dtype=torch.bool)
    for buffer in buffers:
        if buffer.offset >= 0 and lives_at(buffer, phase):
            lives[buffer.offset : buffer.offset + buffer.floats] = True
    slab[~lives] = torch.nan
