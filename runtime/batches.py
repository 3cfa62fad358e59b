"""What a batch is: how it moves to a device, and how it splits into the model's inputs and the target."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError

TARGET_NAMES = ("target", "targets", "label", "labels", "y")


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch: `model(*args, **kwargs)` is to come close to `target`; `size` is the number of examples."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    size: int


def to_device(obj: Any, device: torch.device | str | None) -> Any:
    """The same nesting of tuples, lists and dicts with every tensor on `device`.

    Whatever is no tensor (numbers, strings, None, ...) passes through, and so does everything when `device`
    is None.
    """
    if device is None:
        return obj
    if isinstance(obj, Tensor):
        return obj.to(device, non_blocking=True)
    if isinstance(obj, tuple) and hasattr(obj, "_fields"):
        return type(obj)(*(to_device(item, device) for item in obj))
    if isinstance(obj, list | tuple):
        return type(obj)(to_device(item, device) for item in obj)
    if isinstance(obj, Mapping):
        return {key: to_device(value, device) for key, value in obj.items()}
    return obj


def to_list(arr: Any) -> list[Any]:
    """A tensor, an array or a sequence as a list of plain numbers or items."""
    if hasattr(arr, "tolist"):
        return arr.tolist()
    return list(arr)


def split_batch(raw: Any, model: nn.Module) -> Batch:
    """Split what a data loader gives into inputs and target.

    - tuple or list: the last item is the target, those before it are positional arguments;
    - dict: the target is the entry called "target", "targets", "label", "labels" or "y". The rest are keyword
      arguments when `model.forward` takes all of these names; otherwise a single entry is passed
      positionally, and several as one dict;
    - tensor: it is the input and the target (reconstruction).

    Raises NascompileError for anything else, and for a dict without exactly one target.
    """
    if isinstance(raw, Tensor) and raw.dim():
        return Batch((raw,), {}, raw, len(raw))
    if isinstance(raw, Mapping):
        return _split_dict(dict(raw), model)
    if isinstance(raw, list | tuple) and len(raw) >= 2:
        items = list(raw)
        return Batch(tuple(items[:-1]), {}, items[-1], _size(raw))
    described = type(raw).__name__
    if isinstance(raw, list | tuple):
        described += f" of {len(raw)}"
    elif isinstance(raw, Tensor):
        described += " without dimensions"
    raise NascompileError(f"a batch is a {described}; expected a tensor, a dict, or (inputs, target)")


def _split_dict(raw: dict[str, Any], model: nn.Module) -> Batch:
    targets = [name for name in TARGET_NAMES if name in raw]
    if len(targets) != 1:
        found = " and ".join(targets) or "none of them"
        raise NascompileError(
            f"a batch has the entries {', '.join(map(repr, raw))}; expected exactly one of "
            f"{', '.join(TARGET_NAMES)} as the target, found {found}"
        )
    size = _size(raw)
    target = raw.pop(targets[0])
    if not raw:
        raise NascompileError(f"a batch has only the target {targets[0]!r}; expected inputs beside it")
    if _takes(model, list(raw)):
        return Batch((), raw, target, size)
    return Batch((next(iter(raw.values())),) if len(raw) == 1 else (raw,), {}, target, size)


def _takes(model: nn.Module, names: list[str]) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return True
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return set(names) <= accepted


def _size(raw: Any) -> int:
    """The number of examples: the length of the first tensor, 1 when there is none."""
    for item in raw.values() if isinstance(raw, Mapping) else raw:
        if isinstance(item, Tensor) and item.dim():
            return len(item)
        if isinstance(item, list | tuple | Mapping) and len(item):
            return _size(item)
    return 1
