"""`nascompile.evaluate`: a metric of many architectures of one supernet on the same data."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.population import GIB, Population
from nascompile.compiler.space import unwrap
from nascompile.runtime.batches import Batch, split_batch, to_device
from nascompile.runtime.meters import AverageMeterGroup

Metric = Callable[[Any, Any], Any]

# the name of a value without one, which no entry of a dict has
_ALONE: Any = object()


def evaluate(
    model: nn.Module,
    architectures: Iterable[str | Path | Mapping[str, Any]],
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

    loader: is gone through once; how a batch splits is said at `nascompile.runtime.batches.split_batch`.
    metric: gives a number, a tensor of one, or a dict of them, with the same names always; batches count by
    their size. The result is a float or a dict of floats.
    recalibrate: batches on which each architecture gets BatchNorm statistics of its own (their average over
    these batches, all of which are held in memory); the model's own are left as they are.
    memory: bytes of values kept from one architecture for a later one, beside what one needs by itself; and
    of the maps of the plan that computes images.
    progress: called after every batch with the number done and the number there are (None if unknown).

    Raises ArchitectureError for all architectures that do not fit, before anything runs, and NascompileError
    when there is no data, or a batch or a value of the metric is none of these.
    """
    model = unwrap(model)
    architectures = _listed(architectures)
    _check_arguments(loader, metric, recalibrate)
    population = Population(model, architectures, memory=memory, exact=exact)
    if not population.masks:
        return []
    meters = [AverageMeterGroup() for _ in architectures]
    total = _length(loader)
    done, size = 0, 0
    names: KeysView[str] | None = None
    with _evaluating(model):
        if recalibrate is not None:
            calls = [(batch.args, batch.kwargs) for batch in _batches(recalibrate, model, "recalibrate")]
            if not calls:
                raise NascompileError("recalibrate has no batches")
            population.calibrate(calls)
        for batch in _batches(loader, model, "loader"):
            with _noting(f"in batch {done} of the loader"):
                # without examples there is nothing to average, and most metrics give nan
                outputs = population.outputs(*batch.args, **batch.kwargs) if batch.size else ()
                for positions, output in outputs:
                    with _noting(f"in the metric of architecture {positions[0]}"):
                        value = metric(output, batch.target)
                    found = _named(value, positions[0], done)
                    del output
                    names = found.keys() if names is None else names
                    _check_names(found, names, positions[0], done)
                    for position in positions:
                        meters[position].update(found, batch.size)
            done, size = done + 1, size + batch.size
            if progress is not None:
                progress(done, total)
    if not done:
        used_up = "; an iterator gives its batches once" if isinstance(loader, Iterator) else ""
        raise NascompileError(f"the loader has no batches{used_up}")
    if not size:
        raise NascompileError(f"the loader has no examples: {done} batches of size 0")
    averages = [meter.averages() for meter in meters]
    return [average[_ALONE] for average in averages] if names == {_ALONE} else averages


def _listed(architectures: Any) -> list[Any]:
    if isinstance(architectures, str | Path | Mapping) or not isinstance(architectures, Iterable):
        kind = type(architectures).__name__
        raise NascompileError(f"architectures is a {kind}, expected a list of files or dicts")
    return [*architectures]


def _check_arguments(loader: Any, metric: Any, recalibrate: Any) -> None:
    for name, value in (("loader", loader), ("recalibrate", () if recalibrate is None else recalibrate)):
        if isinstance(value, str | Mapping | Tensor) or not isinstance(value, Iterable):
            raise NascompileError(f"{name} is a {type(value).__name__}, expected an iterable of batches")
    if not callable(metric):
        raise NascompileError(
            f"metric is a {type(metric).__name__}, expected a function of output and target"
        )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        # also that of a DataLoader of a data set without one
        return None


def _named(value: Any, architecture: int, batch: int) -> dict[str, Any]:
    """What the metric gave, by name."""
    found = dict(value) if isinstance(value, Mapping) and value else {_ALONE: value}
    for name, one in found.items():
        if not _is_number(one):
            entry = "" if name is _ALONE else f" under {name!r}"
            raise NascompileError(
                f"metric gives {_described(one)}{entry} for architecture {architecture} in batch {batch}, "
                "expected a number, a tensor of one, or a dict of them"
            )
    return found


def _check_names(found: dict[str, Any], names: KeysView[str], architecture: int, batch: int) -> None:
    if found.keys() != names:
        raise NascompileError(
            f"metric gives {_entries(found)} for architecture {architecture} in batch {batch}, "
            f"expected {_entries(names)} as before"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, numbers.Number | str | bytes):
        return isinstance(value, numbers.Real)
    # numpy's arrays without dimensions
    return getattr(value, "shape", None) == ()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else f'{shown[:39]}…'} ({type(value).__name__})"


def _entries(names: Iterable[str]) -> str:
    named = [repr(name) for name in names if name is not _ALONE]
    return f"the entries {', '.join(named)}" if named else "a value without a name"


def _batches(loader: Iterable[Any], model: nn.Module, name: str) -> Iterator[Batch]:
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    signature = inspect.signature(model.forward)
    for number, raw in enumerate(loader):
        try:
            batch = split_batch(to_device(raw, None if tensor is None else tensor.device), model)
        except NascompileError as error:
            raise NascompileError(f"{name}, batch {number}: {error}") from None
        try:
            signature.bind(*batch.args, **batch.kwargs)
        except TypeError as error:
            inputs = f"{len(batch.args) + len(batch.kwargs)} inputs and the target"
            forward = f"forward({', '.join(signature.parameters)})"
            raise NascompileError(f"{name}, batch {number}: {inputs} do not fit {forward}: {error}") from None
        yield batch


@contextmanager
def _noting(place: str) -> Iterator[None]:
    """Let errors of the model and the metric say where they happened; those of nascompile do."""
    try:
        yield
    except NascompileError:
        raise
    except Exception as error:
        error.add_note(place)
        raise


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
