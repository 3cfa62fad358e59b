"""Programs that run again and again: what is found once, and what is looked at in every run."""

from __future__ import annotations

import gc

import pytest
import torch

from nascompile.kernels.plan import cpu
from nascompile.kernels.plan import run as plan_run
from nascompile.kernels.plan.program import Phase, Program, aligned, encode
from nascompile.kernels.plan.run import lane
from nascompile.kernels.plan.steps import NONE, Load, Map
from tests.kernels.plan_memory import Memory, empty, instruction_set, same, strides

__all__ = ["instruction_set"]
pytestmark = pytest.mark.usefixtures("instruction_set")


def loaded(memory: Memory, tensor: torch.Tensor, flag: int = NONE) -> tuple[Program, Map]:
    map = memory.map(16, (3, 3))
    step = Load(memory.tensor(tensor), *strides(tensor), ((0, 16, 0),), map, 0, flag=flag)
    return memory.program(Phase((), (step,))), map


def test_tensors_that_change_after_many_runs_are_seen():
    memory, tensor = Memory(images=2, chunks=2), torch.randn(2, 16, 3, 3)
    program, map = loaded(memory, tensor)
    arguments = program, encode(program), memory.slab, empty(program.work), torch.zeros(1, dtype=torch.uint8)
    for _ in range(3):
        tensor.add_(1)
        plan_run.run(*arguments, [tensor])
        same(memory.view(map), tensor)
    with pytest.raises(RuntimeError, match="tensor 0 must be fp32"):
        plan_run.run(*arguments, [tensor.double()])
    with pytest.raises(RuntimeError, match="uses tensor 0, there are 0"):
        plan_run.run(*arguments, [])
    other = tensor.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="stride 1 in dimension 1"):
        plan_run.run(*arguments, [other])
    # in another place, with another tensor of the same looks
    plan_run.run(*arguments, [tensor.clone().neg_()])
    same(memory.view(map), -tensor)


def test_flags_count_as_they_are_in_each_run():
    memory, tensor = Memory(images=2, chunks=1), torch.randn(2, 16, 3, 3)
    program, map = loaded(memory, tensor, flag=0)
    encoded, flags = encode(program), torch.zeros(1, dtype=torch.uint8)
    for value in (0, 1, 0, 1):
        flags.fill_(value)
        memory.view(map).zero_()
        plan_run.run(program, encoded, memory.slab, empty(program.work), flags, [tensor])
        same(memory.view(map), value * tensor)


def test_more_states_of_the_flags_than_are_kept():
    memory, tensor = Memory(images=1, chunks=1), torch.randn(1, 16, 3, 3)
    program, map = loaded(memory, tensor, flag=0)
    encoded = encode(program)
    for number in range(40):
        flags = torch.tensor([number % 2, *(number >> bit & 1 for bit in range(6))], dtype=torch.uint8)
        memory.view(map).zero_()
        plan_run.run(program, encoded, memory.slab, empty(program.work), flags, [tensor])
        same(memory.view(map), number % 2 * tensor)


def test_a_program_is_forgotten_with_its_words():
    memory = Memory(images=1, chunks=1)
    program, _ = loaded(memory, torch.randn(1, 16, 3, 3))
    encoded = encode(program)
    gc.collect()
    before = len(plan_run._PREPARED)
    plan_run.run(program, encoded, memory.slab, empty(0), torch.zeros(1, dtype=torch.uint8), memory.tensors)
    assert len(plan_run._PREPARED) == before + 1
    del encoded
    gc.collect()
    assert len(plan_run._PREPARED) == before


@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 0, 0), (0, 5, 0), (700, 17, 4096), (256, 512, 1024)])
def test_the_memory_of_two_chunks_lies_apart(sizes):
    """As much as the executor says it needs, and wide enough for the prefetchers of another thread."""
    sums, gradients, scratch = sizes
    program = Program((), 2, 3, lane(), sums, gradients, scratch)
    native = cpu.Prepared(encode(program)).under(torch.zeros(1, dtype=torch.uint8)).native
    assert program.work == native.work
    used = sum(aligned(part) for part in (2 * sums, gradients, scratch))
    assert program.work == 0 if not used else program.work // 3 >= used + 4096
    assert program.work // 3 % 16 == 0
    assert not used or program.work // 3 % 1024 != 0
