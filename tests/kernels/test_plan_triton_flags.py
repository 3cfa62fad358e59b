"""What a decision leaves out is not launched on a GPU.

test_other_processes.py runs these tests in the interpreter; without it and a GPU they are skipped.
"""

from __future__ import annotations

import pytest
import torch

from nascompile.kernels import capturing
from nascompile.kernels.plan import cuda
from nascompile.kernels.plan.program import Phase
from nascompile.kernels.plan.steps import NONE, Activation, Combine, Term
from tests.kernels.plan_memory import Memory
from tests.kernels.plan_triton import DEVICE, compare, wide_lanes
from tests.kernels.test_plan_convolve import Made
from tests.kernels.test_plan_triton import CASES

__all__ = ["wide_lanes"]
SIZE = (6, 5)


def test_what_flags_leave_out_is_not_launched():
    """The records of a launch that others share it with are left out alone."""
    memory = Memory(images=2)
    on, off = memory.flag(1), memory.flag(0)
    maps = [memory.filled(16, SIZE) for _ in range(6)]
    one, two, three = (
        Combine((Term(maps[2 * k], NONE, NONE),), NONE, Activation.none, maps[2 * k + 1], 0, NONE, flag=flag)
        for k, flag in enumerate((on, off, NONE))
    )
    relu = Combine(one.terms, NONE, Activation.none, maps[3], 0, memory.summed(32), flag=off)
    program = memory.program(Phase((), (one, two, three)), Phase((), (relu,)))
    prepared = cuda.prepare(program, DEVICE, "ieee")
    assert [len(launch.records) for launch in prepared.launches] == [3, 1, 1]
    flags = torch.tensor([*memory.flags, 0], dtype=torch.uint8)
    under = prepared.under(flags)
    assert len(under.calls) == 1
    listed = under.table[prepared.launches[-1].first + 1 :].tolist()
    assert listed == [prepared.launches[0].records[k][0] for k in (0, 2)]
    assert prepared.under(flags.clone()) is under
    compare(memory, *program.phases)


def test_a_decision_that_is_new_cannot_be_captured(monkeypatch):
    memory = Memory(images=2)
    prepared = cuda.prepare(memory.program(Phase((), Made(CASES[0]).forward)), DEVICE)
    flags = torch.tensor([*memory.flags, 0], dtype=torch.uint8)
    with monkeypatch.context() as patches:
        patches.setattr(capturing, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="once under this decision before"):
            prepared.under(flags)
    found = prepared.under(flags)
    monkeypatch.setattr(capturing, "is_capturing", lambda device: True)
    assert prepared.under(flags) is found
