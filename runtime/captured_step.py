"""A training step that is recorded once and replayed, as a CUDA graph, as long as nothing it depends on
changes."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from nascompile.compiler.fingerprint import SCALARS
from nascompile.runtime.cuda_graphs import Recorder, Recording
from nascompile.runtime.randomness import random_state, restore_random_state

logger = logging.getLogger(__name__)

WARM_UP = 3
"""Steps that are carried out before one is recorded: they set up optimizers, workspaces, compiled kernels."""
GRAPHS = 4
"""Recordings that are kept, of batches of different shapes."""
WORTH = 4
"""Replays that pay for a recording; two in a row that did not, and nothing is recorded any more."""
TOLERANCE = 0.05
"""How far off the first replay may be: of the length of the step in each group of tensors, and of the
outputs."""
CAPTURABLE = (torch.optim.SGD,)
"""Optimizers that keep nothing on the host; others say so by an option "capturable"."""


@dataclass(slots=True)
class _Kept:
    """A recording, the tensors it takes its batches from, and what it was recorded under."""

    recording: Recording
    inputs: list[Tensor]
    settings: Hashable
    replays: int = 0


class CapturedStep:
    """Calls `step(*batches)`, by replaying its recording where that does the same.

    step: moves parameters in place and returns tensors in any nesting. It is called a few times as it is for
    every shape of batches and every `stamp`, then recorded; the first replay is compared with the step
    itself, from the same state. What it returns is the caller's own.

    stamp: what else a step depends on, asked before each: a hashable, or a string that says why it cannot be
    replayed now. state: the tensors that a step changes, in groups that are compared each by itself. Settings
    of the optimizers (learning rates) may change: the step is recorded again. `reason` says why steps are not
    replayed, as far as that is for good.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        recorder: Recorder,
        optimizers: Sequence[torch.optim.Optimizer],
        stamp: Callable[..., Hashable | str],
        state: Callable[[], list[list[Tensor]]],
    ) -> None:
        self._step, self._recorder, self._optimizers = step, recorder, list(optimizers)
        self._stamp, self._state = stamp, state
        self._calls: dict[Hashable, int] = {}
        self._kept: dict[Hashable, _Kept] = {}
        self._wasted = 0
        self.replays = 0
        self.reason = next((why for o in self._optimizers if (why := why_not_optimizer(o))), None)
        if self.reason is not None:
            self._say()

    def __call__(self, *batches: Any) -> Any:
        """One step."""
        stamp = self.reason if self.reason is not None else self._stamp(*batches)
        if isinstance(stamp, str):
            return self._step(*batches)
        leaves, spec = tree_flatten(batches)
        if not all(isinstance(leaf, (Tensor, *SCALARS)) for leaf in leaves):
            return self._step(*batches)
        key = (spec, tuple(map(_look, leaves)), stamp)
        if self._calls.get(key, 0) < WARM_UP:
            if key not in self._calls and len(self._calls) >= 64:
                self._calls.clear()
            self._calls[key] = self._calls.get(key, 0) + 1
            return self._recorder.aside(lambda: self._step(*batches))
        settings = tuple(map(_settings, self._optimizers))
        kept = self._kept.pop(key, None)
        if kept is not None and kept.settings != settings:
            self._judge(kept)
            kept = None
        if self._wasted >= 2:
            self._give_up("what a step depends on changes too often (a learning rate, for one)")
            return self._step(*batches)
        if kept is None:
            return self._record(key, settings, leaves, spec, batches)
        self._kept[key] = kept
        return self._replay(kept, leaves)

    def _judge(self, kept: _Kept) -> None:
        """Count a recording that is dropped."""
        self._wasted = self._wasted + 1 if kept.replays < WORTH else 0

    def _replay(self, kept: _Kept, leaves: Sequence[Any]) -> Any:
        with torch.no_grad():
            for target, source in zip(kept.inputs, filter(_is_tensor, leaves), strict=True):
                target.copy_(source, non_blocking=True)
            kept.recording.replay()
            kept.replays += 1
            self.replays += 1
            # the next replay writes there
            return tree_map_only(Tensor, torch.clone, kept.recording.outputs)

    def _record(
        self, key: Hashable, settings: Hashable, leaves: Sequence[Any], spec: Any, batches: tuple[Any, ...]
    ) -> Any:
        inputs = [leaf.detach().clone() for leaf in leaves if _is_tensor(leaf)]
        remaining = iter(inputs)
        own = tree_unflatten([next(remaining) if _is_tensor(leaf) else leaf for leaf in leaves], spec)
        while len(self._kept) >= GRAPHS:
            self._judge(self._kept.pop(next(iter(self._kept))))
        before = random_state()
        try:
            recording = self._recorder.record(lambda: self._step(*own))
        except RuntimeError as error:
            self._give_up(" ".join(str(error).split())[:300])
            return self._step(*batches)
        if _host_states(random_state()) != _host_states(before):
            restore_random_state(before)
            self._give_up("a step draws random numbers on the host")
            return self._step(*batches)
        return self._compared(key, _Kept(recording, inputs, settings), leaves, batches)

    def _compared(self, key: Hashable, kept: _Kept, leaves: Sequence[Any], batches: tuple[Any, ...]) -> Any:
        """The step itself, after a replay from the same state; the recording is kept where they agree."""
        groups, random_numbers = list(chain(*map(_apart, self._state()))), random_state()
        before = _copies(groups)
        replayed_outputs = self._replay(kept, leaves)
        replayed = _copies(groups)
        with torch.no_grad():
            for tensor, value in zip(chain(*groups), chain(*before), strict=True):
                tensor.copy_(value)
        restore_random_state(random_numbers)
        outputs = self._recorder.aside(lambda: self._step(*batches))
        found = [*groups, _tensors(outputs)]
        moves = map(_distance, groups, before)
        lengths = [*moves, _length(found[-1])]
        away = map(_distance, found, [*replayed, _tensors(replayed_outputs)])
        if all(a <= TOLERANCE * length for a, length in zip(away, lengths, strict=True)):
            self._kept[key] = kept
        else:
            self._give_up("a replayed step gave other parameters or outputs than the step itself")
        return outputs

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._kept.clear()
        self._say()

    def _say(self) -> None:
        logger.info("steps are not replayed as CUDA graphs: %s", self.reason)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _look(leaf: Any) -> Hashable:
    """What a recording depends on in a leaf of the batches: all of it but a tensor's values."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    return type(leaf), leaf


def _settings(optimizer: torch.optim.Optimizer) -> Hashable:
    """The numbers that an optimizer's step is made with."""
    return tuple(
        # a number on the device is read by each replay
        (name, id(value) if isinstance(value, Tensor) and value.device.type != "cpu" else repr(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    )


def _host_states(state: dict[str, Any]) -> Hashable:
    """Those of the generators on the host."""
    return repr(state["python"]), repr(state["numpy"]), state["torch"].numpy().tobytes()


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Between two groups of tensors; not finite where one of them is not."""
    pairs = ((one.detach(), other) for one, other in zip(left, right, strict=True))
    # infinities that are the same are no distance
    return _length(torch.where(one == other, 0.0, one.double() - other.double()) for one, other in pairs)


def _length(tensors: Iterable[Tensor]) -> float:
    # one after another: outputs may lie on several devices, and states are large
    return sum(float(tensor.detach().double().square().sum()) for tensor in tensors) ** 0.5


def _apart(group: Sequence[Tensor]) -> list[list[Tensor]]:
    """Counters and single numbers by themselves: next to a thousand of them no other move would count."""
    is_map = [tensor.is_floating_point() and tensor.numel() > 1 for tensor in group]
    return [list(compress(group, is_map)), list(compress(group, map(operator.not_, is_map)))]


def _copies(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.detach().clone() for tensor in group] for group in groups]


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if _is_tensor(leaf)]


# ----- optimizers


def why_not_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Why steps of an optimizer cannot be replayed, or None."""
    kind = type(optimizer)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(optimizer, name, None) for name in hooks):
        return f"hooks are registered on the step of {kind.__name__}"
    is_known = kind.__module__.split(".")[:2] == ["torch", "optim"]
    if is_known and (kind in CAPTURABLE or "capturable" in optimizer.defaults):
        return None
    return f"the optimizer {kind.__name__} may keep numbers of a step on the host"


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let an optimizer count its steps on a GPU, where a graph can; on the host for other devices."""
    if "capturable" not in optimizer.defaults:
        return
    is_capturable = device.type == "cuda"
    for group in optimizer.param_groups:
        group["capturable"] = is_capturable
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device if is_capturable else "cpu")


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors in which an optimizer keeps its state."""
    return [value for state in optimizer.state.values() for value in state.values() if _is_tensor(value)]


def addresses(tensors: Sequence[Tensor]) -> Hashable:
    """Where tensors lie, and which of them want a gradient: a recording depends on both."""
    return hash((*map(Tensor.data_ptr, tensors), *map(operator.attrgetter("requires_grad"), tensors)))
