"""What is benchmarked: a model, a batch, a loss; and how to get them from a model file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.batches import split_batch, to_device
from nascompile.runtime.bench_peers import Decision
from nascompile.runtime.ingredients import build_supernet, example_of, gather
from nascompile.runtime.model_file import ModelFile
from nascompile.runtime.randomness import seed_everything

DEFAULT_BATCH = 64

Call = Callable[..., Any]
Step = Callable[["Subject", Call, Decision], object]


@dataclass
class Subject:
    """A supernet in train mode, the arguments of its forward, and the loss of its output.

    step: a training step, which leaves gradients behind; by default forward, loss and backward.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Any], Tensor]
    notes: list[str] = field(default_factory=list)
    step: Step | None = None

    def run(self, call: Call, decision: Decision) -> None:
        """One training step."""
        if self.step is not None:
            self.step(self, call, decision)
        else:
            self.forward_backward(call, decision)

    def forward_backward(self, call: Call, decision: Decision) -> Any:
        """Decide, forward, loss, backward; the output."""
        decision.renew()
        output = call(*self.inputs)
        self.loss(output).backward()
        return output

    def to(self, device: torch.device) -> Subject:
        """Move model and inputs, in place."""
        self.model.to(device)
        self.inputs = to_device(self.inputs, device)
        return self


Recipe = Callable[[], Subject]
"""Makes the subject, in each process anew: picklable, and the same whenever it is called."""


def squared(output: Any) -> Tensor:
    """A loss for outputs of which nothing is known: the mean square of all floating point tensors in it."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if not tensors:
        raise NascompileError(f"the model returns a {type(output).__name__} without floating point tensors")
    return torch.stack([tensor.square().mean() for tensor in tensors]).sum()


def from_file(path: Path, batch_size: int | None, seed: int) -> Subject:
    """The subject of a model file; its data and loss, or example_inputs and the mean square of the output.

    Raises NascompileError for a file that cannot be used.
    """
    seed_everything(seed)
    file = ModelFile(path)
    if file.defines("dataset_train"):
        return _with_data(file, batch_size or DEFAULT_BATCH, seed)
    model = build_supernet(file).train()
    inputs = example_of(file, model)
    if batch_size is not None:
        inputs = _resized(inputs, batch_size)
    notes = [*file.notes, "loss: the mean square of the output (the file defines no `dataset_train`)"]
    return Subject(model, inputs, squared, notes)


def _with_data(file: ModelFile, batch_size: int, seed: int) -> Subject:
    found = gather(file, seed=seed, batch_size=1)
    data, count = found.dataset_train, len(found.dataset_train)  # type: ignore[arg-type]
    samples = [file.call("dataset_train", lambda i=i: data[i % count]) for i in range(batch_size)]
    batch = split_batch(default_collate(samples), found.model)
    inputs = batch.args
    if batch.kwargs:
        inputs = inspect.signature(found.model.forward).bind(*batch.args, **batch.kwargs).args

    def loss(output: Any) -> Tensor:
        device = next(t.device for t in tree_leaves(output) if isinstance(t, Tensor))
        return file.call("loss", found.training_loss, output, to_device(batch.target, device))

    notes = [note for note in file.notes if note.split(":")[0] in ("model", "loss")]
    return Subject(found.model.train(), inputs, loss, notes)


def _resized(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), None)
    if first is None:
        raise NascompileError("--batch-size: example_inputs hold no batch")

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != len(first):
            return value
        rows = torch.arange(size, device=value.device) % len(value)
        # the same rows again, but not the same numbers
        copies = value[rows].clone()
        return copies + 0.01 * torch.randn_like(copies) if copies.is_floating_point() else copies

    return tree_map(resize, inputs)


def tensors_of(subject: Subject, decision: Decision) -> Iterator[Tensor]:
    """The tensors that are there before a step begins."""
    yield from subject.model.parameters()
    yield from subject.model.buffers()
    yield from (value for value in tree_leaves(subject.inputs) if isinstance(value, Tensor))
    yield from decision.logits.values()
    yield from decision.picked.values()
