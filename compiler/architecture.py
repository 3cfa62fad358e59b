"""Architecture files: reading, validating as a whole, fixing a model to one, and the search space as NNI
writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nascompile.compiler.decision import read_mask
from nascompile.compiler.errors import ArchitectureError
from nascompile.compiler.mutables import LayerChoice
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.space import Choice, candidate_names, choices, unwrap

Mask = list[bool] | list[float]


def load_architecture(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """An architecture from a JSON file or a mapping, not yet checked against a model.

    Raises ArchitectureError when the file is missing or is not a JSON object.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArchitectureError(
            f"architecture file {str(path)!r} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ArchitectureError(f"architecture file {str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ArchitectureError(
            f"architecture file {str(path)!r} holds a {type(content).__name__}, expected an object of keys"
        )
    return content


def resolve(
    model: nn.Module, architecture: str | Path | Mapping[str, Any], *, ignore_unexpected: bool = False
) -> dict[str, Mask]:
    """A mask for every key of the model.

    A value may be a candidate's name or index, a list of either, a full-length list of booleans (multi-hot)
    or of floats (weights). Everything is checked before anything is returned; ArchitectureError lists all
    that is wrong.
    """
    raw = load_architecture(architecture)
    space = choices(model)
    problems: list[str] = []
    missing = [key for key in space if key not in raw]
    unexpected = [key for key in raw if key not in space]
    if missing:
        problems.append(f"Missing keys in fixed architecture: {', '.join(missing)}")
    if unexpected and not ignore_unexpected:
        problems.append(f"Unexpected keys found in fixed architecture: {', '.join(map(str, unexpected))}")
    masks: dict[str, Mask] = {}
    for key, choice in space.items():
        if key in raw:
            try:
                masks[key] = _mask(choice, _plain(raw[key]))
            except ArchitectureError as error:
                problems.append(str(error))
    if problems:
        raise ArchitectureError("; ".join(problems))
    return masks


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _mask(choice: Choice, value: Any) -> Mask:
    length = len(choice)
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        if kinds == {bool}:
            return _full_length(choice, value)
        if kinds == {float}:
            return _full_length(choice, value)
        indices = [_index(choice, item) for item in value]
    else:
        indices = [_index(choice, value)]
    for index in indices:
        if indices.count(index) > 1:
            raise ArchitectureError(
                f"key {choice.key!r}: {value!r} names candidate {index} more than once; "
                "write true and false for a mask, or every index once"
            )
    return [index in indices for index in range(length)]


def _full_length(choice: Choice, value: list[Any]) -> Mask:
    if len(value) != len(choice):
        raise ArchitectureError(
            f"key {choice.key!r}: {value!r} has {len(value)} entries, "
            f"expected one for each of {len(choice)} candidates"
        )
    if any(item != item or item in (float("inf"), float("-inf")) for item in value):
        raise ArchitectureError(f"key {choice.key!r}: {value!r} has weights that are not finite")
    return list(value)


def _index(choice: Choice, item: Any) -> int:
    names = list(choice.names) if isinstance(choice, LayerChoice) else list(choice.choose_from)
    if isinstance(item, str):
        if names.count(item) == 1:
            return names.index(item)
        known = ", ".join(repr(name) for name in names)
        how = "names several inputs" if item in names else "is not a candidate"
        raise ArchitectureError(f"key {choice.key!r}: {item!r} {how}; candidates: {known}")
    if isinstance(item, int) and not isinstance(item, bool):
        if not 0 <= item < len(choice):
            raise ArchitectureError(
                f"key {choice.key!r}: index {item} is out of range, expected 0 to {len(choice) - 1}"
            )
        return item
    raise ArchitectureError(
        f"key {choice.key!r}: {item!r} is a {type(item).__name__}; expected a name, an index, "
        f"a list of either, or a list of {len(choice)} booleans or floats"
    )


class FixedArchitecture(Mutator):
    """A mutator that always decides for one architecture (a JSON path or a mapping).

    With `strict=False`, keys that the model does not have are ignored. Raises ArchitectureError before
    anything is bound when the architecture does not fit.
    """

    def __init__(
        self, model: nn.Module, fixed_arc: str | Path | Mapping[str, Any], strict: bool = True
    ) -> None:
        masks = resolve(model, fixed_arc, ignore_unexpected=not strict)
        super().__init__(model)
        self._fixed_arc = masks

    def sample_search(self) -> dict[str, Any]:
        """The fixed decision."""
        return dict(self._fixed_arc)

    def sample_final(self) -> dict[str, Any]:
        """The fixed decision."""
        return dict(self._fixed_arc)

    def replace_layer_choice(self) -> None:
        """Put the chosen candidate in the place of its LayerChoice, everywhere it is registered.

        Where several are chosen, or weights or the mask are needed, the choice stays and loses the others.
        """
        replace_layer_choices(self.__dict__["model"], self._fixed_arc)


def replace_layer_choices(model: nn.Module, masks: Mapping[str, Sequence[Any]]) -> None:
    """In place: every LayerChoice with one hard-chosen candidate becomes that candidate (`a.1.weight` ->
    `a.weight`)."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LayerChoice) and child.key in masks:
                chosen = single_choice(child, masks[child.key])
                if chosen is not None:
                    parent._modules[name] = _follow(child._modules[chosen], masks)
    for module in model.modules():
        if isinstance(module, LayerChoice) and module.key in masks:
            chosen_now = read_mask(masks[module.key], len(module), module.key).indices
            for index, name in enumerate(module.names):
                if index not in chosen_now:
                    module._modules[name] = None


def single_choice(choice: LayerChoice, mask: Sequence[Any]) -> str | None:
    """The candidate that can stand for the whole choice: chosen alone, by a hard decision, without
    `return_mask`."""
    selection = read_mask(mask, len(choice), choice.key)
    if choice.return_mask or choice.reduction == "none" or len(selection.indices) != 1:
        return None
    index = selection.indices[0]
    if selection.weights is not None and float(selection.weights[index]) != 1.0:
        return None
    return choice.names[index]


def _follow(module: nn.Module | None, masks: Mapping[str, Sequence[Any]]) -> nn.Module | None:
    # a chosen candidate may itself be a choice
    while isinstance(module, LayerChoice) and module.key in masks:
        chosen = single_choice(module, masks[module.key])
        if chosen is None:
            break
        module = module._modules[chosen]
    return module


def apply_fixed_architecture(
    model: nn.Module, fixed_arc: str | Path | Mapping[str, Any]
) -> FixedArchitecture:
    """Fix `model` to an architecture in place and return the mutator that drives what remains of its choices.

    For a network without any choice left, see `nascompile.prune`.
    """
    mutator = FixedArchitecture(unwrap(model), fixed_arc)
    mutator.reset()
    mutator.replace_layer_choice()
    return mutator


def search_space(model: nn.Module) -> dict[str, Any]:
    """The search space in the JSON form of NNI's `ss_gen`."""
    space: dict[str, Any] = {}
    for key, choice in choices(model).items():
        if isinstance(choice, LayerChoice):
            space[key] = {"_type": "layer_choice", "_value": list(choice.names)}
        else:
            value = {"candidates": list(choice.choose_from), "n_chosen": choice.n_chosen}
            space[key] = {"_type": "input_choice", "_value": value}
    return space


def format_architecture(model: nn.Module, masks: Mapping[str, Sequence[Any]]) -> str:
    """One line a key, for logs and tables."""
    lines = []
    for key, choice in choices(model).items():
        selection = read_mask(masks[key], len(choice), key)
        names = candidate_names(choice)
        lines.append(f"{key}: {', '.join(names[index] for index in selection.indices) or 'nothing'}")
    return "\n".join(lines)


def masks_as_tensors(masks: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
    """Masks as tensors: boolean for a hard choice, float32 for weights."""
    return {key: torch.as_tensor(mask) for key, mask in masks.items()}
