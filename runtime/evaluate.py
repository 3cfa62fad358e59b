"""`nascompile.evaluate`: a metric of many architectures of one supernet on the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.population import GIB, Population
from nascompile.compiler.space import unwrap
from nascompile.runtime.batches import Batch, split_batch, to_device
from nascompile.runtime.meters import AverageMeterGroup

Metric = Callable[[Any, Any], Any]


def evaluate(
    model: nn.Module,
    architectures: Sequence[str | Path | Mapping[str, Any]],
    loader: Iterable[Any],
    metric: Metric,
    *,
    recalibrate: Iterable[Any] | None = None,
    memory: int = GIB,
    exact: bool = False,
    progress: Callable[[int, int | None], object] | None = None,
) -> list[Any]:
    """The mean of `metric(output, target)` over `loader` for each architecture, in the order given.

    The model runs in eval mode without gradients, on the device it is on; what architectures have in common
    is computed once for each batch. The outputs are those of the model decided for one architecture at a
    time, in eager mode: up to the rounding of sums, or bit for bit with `exact`, which is slower.

    metric: gives a number, a 0-d tensor, or a dict of them; batches count by their size. The result is a
    float or a dict of floats.
    recalibrate: batches on which each architecture gets BatchNorm statistics of its own (their average over
    these batches, all of which are held in memory); the model's own are left as they are.
    memory: bytes of values kept from one architecture for a later one, beside what one needs by itself; and
    of the maps of the plan that computes images.
    progress: called after every batch with the number done and the number there are (None if unknown).

    Raises ArchitectureError for all architectures that do not fit, before anything runs, and NascompileError
    when there is no data.
    """
    model = unwrap(model)
    population = Population(model, architectures, memory=memory, exact=exact)
    if not population.masks:
        return []
    meters = [AverageMeterGroup() for _ in architectures]
    total = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
    done, is_dict = 0, False
    with _evaluating(model):
        if recalibrate is not None:
            calls = [(batch.args, batch.kwargs) for batch in _batches(recalibrate, model)]
            if not calls:
                raise NascompileError("recalibrate has no batches")
            population.calibrate(calls)
        for batch in _batches(loader, model):
            for positions, output in population.outputs(*batch.args, **batch.kwargs):
                value = metric(output, batch.target)
                del output
                is_dict = isinstance(value, Mapping)
                for position in positions:
                    meters[position].update(value if is_dict else {"": value}, batch.size)
            done += 1
            if progress is not None:
                progress(done, total)
    if not done:
        raise NascompileError("the loader has no batches")
    averages = [meter.averages() for meter in meters]
    return averages if is_dict else [average[""] for average in averages]


def _batches(loader: Iterable[Any], model: nn.Module) -> Iterator[Batch]:
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    for raw in loader:
        yield split_batch(to_device(raw, None if tensor is None else tensor.device), model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        # inference mode hides from whom a value was changed in place
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
