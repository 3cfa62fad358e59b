"""What a search gained: accuracy, size and time of supernet and lean network, measured in the same way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from nascompile.compiler.measure import count
from nascompile.runtime.acceleration import Acceleration
from nascompile.runtime.batches import split_batch, to_device
from nascompile.runtime.ingredients import Ingredients, split_output
from nascompile.runtime.job_settings import Settings
from nascompile.runtime.loading import EpochLoader
from nascompile.runtime.meters import AverageMeterGroup

_SECONDS = 0.5
_LEAST, _MOST = 5, 200


@dataclass(frozen=True, slots=True)
class Figures:
    """One network: parameters, FLOPs a sample (or of the example inputs where they hold no batch), metrics on
    the validation and test set, and milliseconds of one forward and one training step with a batch.
    """

    parameters: int
    flops: float
    valid: dict[str, float]
    test: dict[str, float] | None
    forward_ms: float
    step_ms: float


def measure_network(
    model: nn.Module, *, ingredients: Ingredients, settings: Settings, acceleration: Acceleration
) -> Figures:
    """All figures of a network; of a supernet, under the current decision of its mutator."""
    device = acceleration.device
    measure = partial(
        evaluate,
        model,
        ingredients=ingredients,
        acceleration=acceleration,
        batch_size=settings.batch_size,
        workers=settings.workers,
    )
    example = to_device(ingredients.example_inputs, device)
    size = count(model, example)
    batch = next(iter(DataLoader(ingredients.dataset_train, batch_size=settings.batch_size)))
    return Figures(
        parameters=size.parameters,
        flops=size.flops if size.flops_per_sample is None else size.flops_per_sample,
        valid=measure(ingredients.dataset_valid),
        test=None if ingredients.dataset_test is None else measure(ingredients.dataset_test),
        forward_ms=forward_ms(model, to_device(batch, device), acceleration),
        step_ms=step_ms(model, to_device(batch, device), ingredients, acceleration),
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    ingredients: Ingredients,
    acceleration: Acceleration,
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """Loss and metrics over a data set in eval mode, averaged over samples; the mode is restored."""
    was_training = model.training
    model.eval()
    meters = AverageMeterGroup()
    loader = EpochLoader(
        dataset,
        batch_size=batch_size,
        workers=workers,
        generator=torch.Generator(),
        shuffle=False,
        pin_memory=acceleration.device.type == "cuda",
    )
    for raw in loader:
        batch = split_batch(to_device(raw, acceleration.device), model)
        with acceleration.autocast():
            output, _ = split_output(model(*batch.args, **batch.kwargs))
            loss = ingredients.loss(output, batch.target)
        meters.update({"loss": loss, **ingredients.measure(output, batch.target)}, batch.size)
    model.train(was_training)
    return meters.averages()


def forward_ms(model: nn.Module, batch: Any, acceleration: Acceleration) -> float:
    """Median milliseconds of one forward pass with a batch, in eval mode without gradients; the mode is
    restored.
    """
    was_training = model.training
    model.eval()
    split = split_batch(batch, model)

    @torch.no_grad()
    def once() -> None:
        with acceleration.autocast():
            model(*split.args, **split.kwargs)

    result = median_ms(once, acceleration.device)
    model.train(was_training)
    return result


def step_ms(model: nn.Module, batch: Any, ingredients: Ingredients, acceleration: Acceleration) -> float:
    """Median milliseconds of forward, loss and backward of one batch in training mode.

    Parameters, gradients, buffers and mode are as before afterwards.
    """
    was_training = model.training
    model.train()
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    split = split_batch(batch, model)

    def once() -> None:
        with acceleration.autocast():
            output = model(*split.args, **split.kwargs)
            loss = ingredients.training_loss(output, split.target)
        torch.autograd.grad(loss, parameters, allow_unused=True)

    result = median_ms(once, acceleration.device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    model.train(was_training)
    return result


def median_ms(call: Any, device: torch.device) -> float:
    """The median wall time of `call()` in milliseconds, over at least five and at most 200 calls in half a
    second.
    """
    for _ in range(2):
        call()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < _LEAST or (len(times) < _MOST and time.perf_counter() < end):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def ratio(before: float, after: float) -> str:
    """How many times less `after` is than `before`, in words; empty where that says nothing."""
    if before <= 0 or after <= 0:
        return ""
    return f"{before / after:.3g}× less" if before >= after else f"{after / before:.3g}× more"


def headline(metrics: Mapping[str, float]) -> tuple[str, float]:
    """The metric that counts: the first one, or the loss where there is none."""
    names = [name for name in metrics if name != "loss"] or ["loss"]
    return names[0], metrics[names[0]]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
