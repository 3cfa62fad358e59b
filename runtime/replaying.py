"""Which steps of a trainer are replayed as CUDA graphs, and what they depend on."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nascompile.compiler.compiled import CompiledModel
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.fingerprint import SCALARS
from nascompile.runtime.batches import Batch
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.captured_step import (
    CapturedStep,
    addresses,
    make_capturable,
    tensors_of,
)
from nascompile.runtime.cuda_graphs import CudaRecorder, Recorder

if TYPE_CHECKING:
    from nascompile.runtime.trainer import Trainer

logger = logging.getLogger(__name__)

Step = Callable[..., Any]


def replayed(trainer: Trainer, step: Step, reason: str | None = None) -> Step:
    """`step`, a function of batches that moves parameters, replayed where that does the same; `step` itself
    on other devices and where the trainer or the caller has a reason against it."""
    if trainer.device.type != "cuda":
        return step
    reason = reason or why_not_replayed(trainer)
    if reason is not None:
        logger.info("steps are not replayed as CUDA graphs: %s", reason)
        return step
    trainer.replays = True
    settle_optimizers(trainer)
    return ReplayedStep(trainer, step, CudaRecorder(trainer.device))


def checked(cuda_graph: Any) -> bool | None:
    """The choice of a user; NascompileError where it is none."""
    if cuda_graph not in (None, True, False):
        raise NascompileError(f"cuda_graph is {cuda_graph!r}, expected None, True or False")
    return cuda_graph


class ReplayedStep:
    """A trainer's step, a function of batches, by a recorder."""

    def __init__(self, trainer: Trainer, step: Step, recorder: Recorder) -> None:
        tensors = _Tensors(trainer)
        stamps = _Stamps(trainer, tensors)
        self.captured = CapturedStep(
            lambda *parts: step(*_batches(parts)),
            recorder,
            list(trainer.optimizers().values()),
            lambda *parts: stamps.now(_batches(parts)),
            tensors.now,
        )

    def __call__(self, *batches: Batch) -> Any:
        """One step."""
        # a batch is no nesting of tensors that torch would look into
        return self.captured(*((b.args, b.kwargs, b.target, b.size) for b in batches))


def _batches(parts: Sequence[Any]) -> list[Batch]:
    return [Batch(*part) for part in parts]


def why_not_replayed(trainer: Trainer) -> str | None:
    """Why no step of a trainer is replayed, or None."""
    if trainer.cuda_graph is False:
        return "cuda_graph=False"
    if not isinstance(trainer.compiled, CompiledModel):
        return "the model is not compiled, so that nobody knows what it depends on"
    if trainer.acceleration.precision == "fp16":
        return "the host reads whether scaled gradients have overflown"
    return None if trainer.cuda_graph else _own_code(trainer)


def _own_code(trainer: Trainer) -> str | None:
    """What code of the user's a step runs, which may depend on anything."""
    for what in (trainer, trainer.mutator):
        if not type(what).__module__.startswith("nascompile."):
            return (
                f"{type(what).__name__} is code of your own; cuda_graph=True says that its steps are the same"
            )
    if not _is_of_torch(trainer.loss):
        return "the loss is code of your own; cuda_graph=True says that it depends on its arguments only"
    for callback in trainer.callbacks:
        if type(callback).on_batch_begin is not Callback.on_batch_begin:
            return f"{type(callback).__name__} acts before the weights move, within a step"
    return None


def _is_of_torch(loss: Any) -> bool:
    if not isinstance(loss, nn.Module):
        return getattr(loss, "__module__", None) == "torch.nn.functional"
    return all(
        type(m).__module__.startswith("torch.nn.modules.") and "forward" not in vars(m) and not _has_hooks(m)
        for m in loss.modules()
    )


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def settle_optimizers(trainer: Trainer) -> None:
    """Let optimizers count steps where the trainer needs it: checkpoints may come from another device."""
    if trainer.device.type == "cpu" or trainer.replays:
        for optimizer in trainer.optimizers().values():
            make_capturable(optimizer, trainer.device)


class _Tensors:
    """All that a step changes: parameters, buffers, the mutator's, the loss', the optimizers'.

    Where a model keeps them is looked up once for each of its traces: a supernet has thousands of modules.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._places: list[tuple[list[dict[str, Any]], list[str]]] = []

    def look_up(self) -> None:
        """Find out where the tensors are kept."""
        owners = [self._trainer.model, self._trainer.mutator, self._trainer.loss]
        self._places = [
            _places(vars(module)[kind] for module in owner.modules())
            for owner in owners
            if isinstance(owner, nn.Module)
            for kind in ("_parameters", "_buffers")
        ]

    def now(self) -> list[list[Tensor]]:
        """The tensors at present: those of modules by their owner, parameters apart from buffers, then those
        of each optimizer."""
        try:
            found = [list(map(operator.getitem, dicts, names)) for dicts, names in self._places]
        except KeyError:
            self.look_up()
            return self.now()
        found += [tensors_of(optimizer) for optimizer in self._trainer.optimizers().values()]
        return [[tensor for tensor in group if tensor is not None] for group in found]


def _places(dicts: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    pairs = [(kept, name) for kept in dicts for name, value in kept.items() if value is not None]
    return [kept for kept, _ in pairs], [name for _, name in pairs]


class _Stamps:
    """What a step depends on, but for its batches."""

    def __init__(self, trainer: Trainer, tensors: _Tensors) -> None:
        self._trainer, self._tensors = trainer, tensors
        self._traces: list[int] = []
        # all of them: an id must not come again
        self._seen: dict[int, Any] = {}

    def now(self, batches: Sequence[Batch]) -> Hashable | str:
        """It at present; a string says why a step cannot be replayed."""
        compiled, reason = self._trainer.compiled, why_not_replayed(self._trainer)
        if reason is not None:
            # a loss or a callback may have come since
            return reason
        assert isinstance(compiled, CompiledModel)
        traces = [compiled.trace_of(*batch.args, **batch.kwargs) for batch in batches]
        reasons = [trace for trace in traces if isinstance(trace, str)]
        if reasons:
            return reasons[0]
        known, self._traces = self._traces, list(map(id, traces))
        loss = self._trainer.loss
        parts = list(loss.modules()) if isinstance(loss, nn.Module) else [loss]
        self._seen.update((id(one), one) for one in (*traces, *parts))
        # another trace may be that of a model with other modules
        if known != self._traces:
            self._tensors.look_up()
        where = addresses([*chain(*self._tensors.now())])
        return (*self._traces, where, *map(id, parts), _plain_attributes(parts), self._trainer.aux_weight)


def _plain_attributes(parts: Sequence[Any]) -> Hashable:
    """The numbers and strings that the modules of a loss carry."""
    return tuple(
        (name, repr(value))
        for part in parts
        if isinstance(part, nn.Module)
        for name, value in vars(part).items()
        if isinstance(value, SCALARS)
    )
