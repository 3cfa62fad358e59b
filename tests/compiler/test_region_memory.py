"""The slabs that a region lends: to one run at a time, whatever threads and the garbage collector do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nascompile.compiler.region import execution
from nascompile.compiler.region.execution import KEPT, Memory
from nascompile.compiler.region.reached import GradientMemory, reached

DTYPE, CPU = torch.float64, torch.device("cpu")
FLOATS = 64
LONG = 20.0
"""Seconds in which anything but a deadlock has happened."""


class Watched(Tensor):
    """A slab during whose inspection something happens."""

    meanwhile: Callable[[], object]

    def numel(self) -> int:
        self.meanwhile()
        return super().numel()


def watched(meanwhile: Callable[[], object]) -> Tensor:
    slab = torch.empty(FLOATS, dtype=DTYPE).as_subclass(Watched)
    slab.meanwhile = meanwhile
    return slab


def test_two_threads_never_get_one_slab() -> None:
    memory = Memory()
    both = threading.Barrier(2)

    def wait_for_the_other() -> None:
        # under the lock nobody else comes
        try:
            both.wait(0.5)
        except threading.BrokenBarrierError:
            return

    memory.take_back(watched(wait_for_the_other))
    with ThreadPoolExecutor(2) as pool:
        leases = list(pool.map(lambda _: memory.lease(FLOATS, DTYPE, CPU), range(2)))
    places = {lease.slab.data_ptr() for lease in leases if lease.slab is not None}
    assert len(places) == 2


def test_the_garbage_collector_may_give_back_in_the_middle_of_a_lease() -> None:
    memory = Memory()
    forgotten = [memory.lease(FLOATS, DTYPE, CPU)]
    memory.take_back(watched(forgotten.clear))
    found = []
    # a daemon: where the lock is not reentrant the thread never ends
    thread = threading.Thread(target=lambda: found.append(memory.lease(FLOATS, DTYPE, CPU)), daemon=True)
    thread.start()
    thread.join(LONG)
    assert len(found) == 1
    assert isinstance(found[0].slab, Watched)
    # and what it gave back is lent next
    assert len(memory._free) == 1


def test_no_more_is_kept_than_a_step_needs() -> None:
    memory = Memory()
    leases = [memory.lease(FLOATS, DTYPE, CPU) for _ in range(KEPT + 2)]
    for lease in leases:
        lease.give_back()
        lease.give_back()
    assert len(memory._free) == KEPT


def test_memory_of_gpus_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps it in the order of streams, and apart for graphs that are being captured."""
    monkeypatch.setattr(execution, "new_memory", lambda floats, dtype, device: torch.empty(floats))
    memory = Memory()
    lease = memory.lease(FLOATS, DTYPE, torch.device("cuda"))
    assert lease.slab is not None
    lease.give_back()
    assert memory._free == []


def test_gradients_on_gpus_are_left_to_torch() -> None:
    wanted = reached([torch.Size([3])], [True], [False], [])
    for device, is_kept in ((CPU, True), (torch.device("meta"), False)):
        gradients = GradientMemory(dtype=DTYPE, device=device)
        (found,) = gradients.take(wanted, 1, torch.empty(0, device=device))
        assert found.shape == (3,)
        assert (gradients._flat is not None) == is_kept
