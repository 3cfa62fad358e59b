"""Which steps of a trainer are replayed as CUDA graphs, and what they depend on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nascompile.compiler.compiled import CompiledModel
from nascompile.runtime.batches import Batch
from nascompile.runtime.captured_step import (
    CapturedStep,
    addresses,
    make_capturable,
    plain_attributes,
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


class ReplayedStep:
    """A trainer's step, a function of batches, by a recorder."""

    def __init__(self, trainer: Trainer, step: Step, recorder: Recorder) -> None:
        self.captured = CapturedStep(
            lambda *parts: step(*_batches(parts)),
            recorder,
            list(trainer.optimizers().values()),
            lambda *parts: _stamp(trainer, _batches(parts)),
            lambda: _state(trainer),
        )

    def __call__(self, *batches: Batch) -> Any:
        """One step."""
        # a batch is no nesting of tensors that torch would look into
        return self.captured(*((b.args, b.kwargs, b.target, b.size) for b in batches))


def _batches(parts: Sequence[Any]) -> list[Batch]:
    return [Batch(*part) for part in parts]


def why_not_replayed(trainer: Trainer) -> str | None:
    """Why no step of a trainer is replayed, or None."""
    if not trainer.cuda_graph:
        return "cuda_graph=False"
    if not isinstance(trainer.compiled, CompiledModel):
        return "the model is not compiled, so that nobody knows what it depends on"
    if trainer.acceleration.precision == "fp16":
        return "the host reads whether scaled gradients have overflown"
    return None


def settle_optimizers(trainer: Trainer) -> None:
    """Let optimizers count steps where the trainer needs it: checkpoints may come from another device."""
    if trainer.device.type == "cpu" or trainer.replays:
        for optimizer in trainer.optimizers().values():
            make_capturable(optimizer, trainer.device)


def _stamp(trainer: Trainer, batches: list[Batch]) -> Hashable | str:
    compiled = trainer.compiled
    assert isinstance(compiled, CompiledModel)
    traces = [compiled.trace_of(*batch.args, **batch.kwargs) for batch in batches]
    reasons = [trace for trace in traces if isinstance(trace, str)]
    if reasons:
        return reasons[0]
    return (
        tuple(map(id, traces)),
        addresses(_state(trainer)),
        plain_attributes(trainer.loss),
        trainer.aux_weight,
    )


def _state(trainer: Trainer) -> list[Tensor]:
    """All that a step changes: parameters, buffers, the mutator's, the optimizers'."""
    found = [*trainer.model.parameters(), *trainer.model.buffers()]
    found += [*trainer.mutator.parameters(), *trainer.mutator.buffers()]
    for optimizer in trainer.optimizers().values():
        found += tensors_of(optimizer)
    if isinstance(trainer.loss, torch.nn.Module):
        found += trainer.loss.state_dict(keep_vars=True).values()
    return found
