"""The memory that gradients of a region share: used again, but never under somebody's hands."""

from __future__ import annotations

import torch
from torch import Tensor

from nascompile.compiler.region.reached import GradientMemory, reached

SHAPES = [torch.Size((2, 3)), torch.Size((4,)), torch.Size(())]
ABSENT = torch.empty(0)


def zeros(memory: GradientMemory, *has: bool) -> list[Tensor]:
    return memory.take(reached(SHAPES, has, [False] * 3, []), len(SHAPES), ABSENT)


def test_what_is_not_reached_is_absent() -> None:
    found = zeros(GradientMemory(dtype=torch.float64), True, False, True)
    assert [piece.shape for piece in found] == [SHAPES[0], ABSENT.shape, SHAPES[2]]
    assert found[1] is ABSENT
    assert found[0].dtype == torch.float64
    assert not found[0].any()


def test_every_gradient_has_its_shape_and_elements_of_its_own() -> None:
    shapes = [torch.Size(size) for size in ((2, 1, 3), (4,), (2, 1, 3), (), (4,), (2, 1, 3), (6, 1))]
    whole = [True, False, False, True, True, True, False]
    found = GradientMemory().take(reached(shapes, [True] * 7, whole, []), 7, ABSENT)
    assert [piece.shape for piece in found] == shapes
    for number, piece in enumerate(found):
        assert piece.is_contiguous()
        piece.fill_(number)
    assert [piece.unique().tolist() for piece in found] == [[number] for number in range(7)]


def test_memory_that_nobody_holds_is_used_again() -> None:
    memory = GradientMemory()
    found = zeros(memory, True, True, True)
    place = found[0].data_ptr()
    found[0].fill_(1.0)
    del found
    again = zeros(memory, True, True, True)
    assert again[0].data_ptr() == place
    assert not again[0].any()


def test_memory_that_someone_holds_is_left_alone() -> None:
    memory = GradientMemory()
    # what .grad becomes, what a hook may keep, and a view by way of numpy
    for keep in (Tensor.detach, lambda piece: piece[0], lambda piece: piece.numpy()):
        kept = keep(zeros(memory, True, True, True)[0].fill_(1.0))
        zeros(memory, True, True, True)[0].fill_(2.0)
        assert (kept == 1.0).all()


def test_other_sizes_get_other_memory() -> None:
    memory = GradientMemory()
    zeros(memory, True, True, True)
    assert [piece.numel() for piece in zeros(memory, False, True, True)] == [0, 4, 1]


def test_what_the_program_writes_as_a_whole_is_left_as_it_is() -> None:
    memory = GradientMemory()
    wanted = reached(SHAPES, [True] * 3, [False, True, False], [])
    found = memory.take(wanted, len(SHAPES), ABSENT)
    for k in range(len(found)):
        found[k].fill_(1.0)
    del found
    again = memory.take(wanted, len(SHAPES), ABSENT)
    assert [piece.shape for piece in again] == SHAPES
    assert [piece.unique().tolist() for piece in again] == [[0.0], [1.0], [0.0]]
