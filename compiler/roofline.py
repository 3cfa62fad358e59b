"""What a machine needs at least for operations: two constants, memory bandwidth and FLOP rate, measured in a
fraction of a second, and the bytes and FLOPs that eager PyTorch moves and makes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nascompile.compiler.explore import tensors_in
from nascompile.compiler.profiler import flop_counter

_FLOATS = 1 << 24
_SIDE = 1024


@dataclass(frozen=True, slots=True)
class Machine:
    """bandwidth: bytes a second, read and written, of a copy of 64 MiB. rate: FLOPs a second of fp32 matrix
    products."""

    bandwidth: float
    rate: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for one operation: that of its arithmetic or of its bytes, whichever is longer."""
        return max(flops / self.rate, moved / self.bandwidth)


def measure_machine(device: torch.device | None = None) -> Machine:
    """The constants of this machine now, with the threads that torch uses."""
    source = torch.zeros(_FLOATS, device=device)
    target = torch.empty_like(source)
    square = torch.ones(_SIDE, _SIDE, device=device)
    product = torch.empty_like(square)
    copying = fastest(lambda: target.copy_(source), rounds=5)
    multiplying = fastest(lambda: torch.mm(square, square, out=product), rounds=5)
    return Machine(2 * source.nbytes / copying, 2 * _SIDE**3 / multiplying)


def fastest(function: Callable[[], object], *, rounds: int) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    return min(timed(function) for _ in range(rounds + 1))


def timed(function: Callable[[], object]) -> float:
    """Seconds of one run."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Counter(TorchDispatchMode):
    """Adds up the least time of every operator that runs inside, backward included; views cost nothing.

    Bytes are those of the tensors that an operator takes and returns, each once.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.seconds = 0.0
        self._machine = machine
        self._formulas: dict[Any, Any] = flop_counter().flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func in _FREE:
            return out
        formula = self._formulas.get(func._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        moved = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_in((args, kwargs, out))}
        self.seconds += self._machine.seconds(flops, sum(moved.values()))
        return out


_FREE = frozenset({torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default})
