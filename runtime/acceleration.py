"""Device, precision and backward passes, on accelerate, without sharing state between trainers.

accelerate keeps one state per process, in dicts that its state classes hold. Here every trainer has dicts of
its own, put in place only while accelerate runs; a user's own Accelerator in the same process is not touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from nascompile.compiler.errors import NascompileError

PRECISIONS = ("no", "bf16", "fp16")
_STATES: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """`device`, or CUDA where there is one; raises NascompileError when it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise NascompileError(f"device {str(device)!r} cannot be used: {reason}") from error
    return resolved


class Acceleration:
    """accelerate for one trainer: `precision` is "no", "bf16" or "fp16" (CUDA only, with a scaled loss).

    Raises NascompileError for an unusable device or precision, and in a launch of several processes.
    """

    def __init__(self, device: torch.device | str | None, precision: str) -> None:
        self.device = resolve_device(device)
        if precision not in PRECISIONS:
            raise NascompileError(f"precision is {precision!r}, expected one of: {', '.join(PRECISIONS)}")
        if precision == "fp16" and self.device.type != "cuda":
            raise NascompileError(
                f'precision "fp16" needs a CUDA device, this is {str(self.device)!r}; "bf16" runs here'
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != 1:
            raise NascompileError(f"WORLD_SIZE is {processes}: a trainer runs in one process on one device")
        self.precision = precision
        self._own: tuple[dict[str, Any], ...] = tuple({} for _ in _STATES)
        with self._active():
            self._accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=precision)
            # accelerate always takes the current CUDA device
            self._accelerator.state.__dict__["device"] = self.device

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        outside = [state._shared_state for state in _STATES]
        for state, own in zip(_STATES, self._own, strict=True):
            state._shared_state = own
        try:
            yield
        finally:
            for state, shared in zip(_STATES, outside, strict=True):
                state._shared_state = shared

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Runs the forward pass in the chosen precision."""
        with self._active(), self._accelerator.autocast():
            yield

    def prepare(self, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
        """The optimizer as accelerate steps it: unscaled, without overflows. The original stays valid."""
        with self._active():
            prepared = self._accelerator.prepare_optimizer(optimizer)
        assert isinstance(prepared, AcceleratedOptimizer)
        return prepared

    def backward(self, loss: Tensor, inputs: Sequence[Tensor]) -> None:
        """Add the (scaled) gradient of `loss` to `.grad` of `inputs`, and to nothing else."""
        with self._active():
            self._accelerator.backward(loss, inputs=list(inputs))

    def clip(self, optimizer: AcceleratedOptimizer, parameters: Sequence[Tensor], max_norm: float) -> None:
        """Unscale the gradients that `optimizer` will use and clip the norm of those of `parameters`."""
        with self._active():
            self._accelerator.unscale_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scaler; empty without one."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        scaler = self._accelerator.scaler
        if scaler is not None and state:
            scaler.load_state_dict(state)
