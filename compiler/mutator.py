"""The mutator's part without randomness: it is bound to a model, holds the current decision and carries it
out eagerly.

This eager execution is the definition of what every compiled form has to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.decision import Selection, read_mask, read_weights, reduce_outputs, weigh
from nascompile.compiler.errors import ArchitectureError, SpaceError
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable, MutableScope
from nascompile.compiler.space import Choice, StructuredMutableTreeNode, candidate_names, read_space, unwrap


class BaseMutator(nn.Module):
    """Bound to the mutables of one model; subclasses say what a choice does when it is called.

    Raises RuntimeError when the model is already bound, and SpaceError when the search space is inconsistent;
    in both cases nothing is bound.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # kept out of the sub-modules: the mutator's parameters are its own
        self.__dict__["model"] = unwrap(model)
        self.__dict__["_released"] = False
        self._structured_mutables = read_space(model)
        bound = [m for m in self.undedup_mutables if m.bound_mutator is not None]
        for mutable in bound:
            mutable.set_mutator(self)
        for mutable in self.undedup_mutables:
            mutable.set_mutator(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            raise AttributeError("`model` is bound when the mutator is made and cannot be replaced")
        super().__setattr__(name, value)

    @property
    def is_released(self) -> bool:
        """Whether the model has been freed for another mutator."""
        return bool(self.__dict__["_released"])

    def release(self) -> None:
        """Free the model (and copies of it), so that another mutator can be bound."""
        self.__dict__["_released"] = True
        for mutable in self.undedup_mutables:
            if mutable.__dict__["mutator"] is self:
                mutable.__dict__["mutator"] = None

    @property
    def mutables(self) -> StructuredMutableTreeNode:
        """The tree of mutables; iterating it gives one mutable a key, scopes included, in registration
        order."""
        return self._structured_mutables

    @property
    def undedup_mutables(self) -> list[Mutable]:
        """All mutables, also those that share a key."""
        return list(self._structured_mutables.traverse(deduplicate=False))

    @property
    def choices_by_key(self) -> dict[str, Choice]:
        """The first choice of every key, in registration order."""
        return {m.key: m for m in self.mutables if isinstance(m, LayerChoice | InputChoice)}

    def forward(self, *inputs: Any) -> Any:
        raise RuntimeError("A mutator has no forward; call the model")

    def enter_mutable_scope(self, mutable_scope: MutableScope) -> None:
        """Called when the forward pass enters a scope."""

    def exit_mutable_scope(self, mutable_scope: MutableScope) -> None:
        """Called when the forward pass leaves a scope."""

    def on_forward_layer_choice(self, mutable: LayerChoice, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Carry out a layer choice: the output, and the mask."""
        raise NotImplementedError(f"{type(self).__name__} must define on_forward_layer_choice")

    def on_forward_input_choice(self, mutable: InputChoice, tensor_list: list[Any]) -> tuple[Any, Any]:
        """Carry out an input choice: the output, and the mask."""
        raise NotImplementedError(f"{type(self).__name__} must define on_forward_input_choice")

    def export(self) -> dict[str, Any]:
        """The final architecture."""
        raise NotImplementedError(f"{type(self).__name__} must define export")


class SoftDecision(dict[str, Any]):
    """A decision whose weights are those of a softmax, say: on a GPU all candidates take part, for nobody
    waits to read which weights are zero. What is put in or changed later is read as any other mask."""

    def __init__(self, masks: Mapping[str, Any]) -> None:
        super().__init__(masks)
        self._given = {key: (m, m._version) for key, m in masks.items() if isinstance(m, Tensor)}

    def needs_no_reading(self, key: str) -> bool:
        """Whether all candidates of a key take part, whatever their weights."""
        mask, version = self._given.get(key, (None, 0))
        if mask is None or self[key] is not mask or mask._version != version:
            return False
        return mask.is_floating_point() and mask.device.type != "cpu"


class Mutator(BaseMutator):
    """A mutator that decides by masks: a dict from key to a boolean or weight for every candidate.

    `reset()` draws a decision with `sample_search()`; `export()` gives the one of `sample_final()`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._cache: dict[str, Any] = {}
        self._selections: dict[str, tuple[Any, int, Selection]] = {}

    def sample_search(self) -> dict[str, Any]:
        """A decision for one step of the search."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_search")

    def sample_final(self) -> dict[str, Any]:
        """The decision to export."""
        raise NotImplementedError(f"{type(self).__name__} must define sample_final")

    def reset(self) -> None:
        """Decide anew; the decision holds until the next reset."""
        self.decide(self.sample_search())

    def decide(self, masks: dict[str, Any]) -> None:
        """Set the decision: a mask for every key."""
        self._cache = masks
        self._selections = {}

    @property
    def decision(self) -> dict[str, Any]:
        """The current mask of every key; empty before the first reset."""
        return self._cache

    def selection(self, key: str, length: int) -> tuple[Selection, Any]:
        """The current decision for a key, read, and the mask as it was given; raises ValueError without
        one."""
        if key not in self._cache:
            raise ValueError(
                f'"{key}" not found in decision cache; call reset() on the {type(self).__name__} first'
            )
        mask = self._cache[key]
        if not isinstance(mask, Tensor):
            return read_mask(mask, length, key), mask
        known = self._selections.get(key)
        # a tensor may have been changed in place since it was read
        if known is None or known[0] is not mask or known[1] != mask._version:
            is_soft = isinstance(self._cache, SoftDecision) and self._cache.needs_no_reading(key)
            reads = read_weights if is_soft else read_mask
            known = (mask, mask._version, reads(mask, length, key))
            self._selections[key] = known
        return known[2], mask

    def on_forward_layer_choice(self, mutable: LayerChoice, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run the chosen candidates only, weigh and reduce their outputs."""
        selection, mask = self.selection(mutable.key, len(mutable))
        names = [mutable.names[index] for index in selection.indices]
        outputs = [
            weigh(_call(mutable, name, args, kwargs), selection.weight(index), mutable.key)
            for name, index in zip(names, selection.indices, strict=True)
        ]
        return reduce_outputs(outputs, mutable.reduction, mutable.key, names), mask

    def on_forward_input_choice(self, mutable: InputChoice, tensor_list: list[Any]) -> tuple[Any, Any]:
        """Weigh and reduce the chosen inputs."""
        selection, mask = self.selection(mutable.key, len(tensor_list))
        all_names = candidate_names(mutable)
        outputs = [weigh(tensor_list[i], selection.weight(i), mutable.key) for i in selection.indices]
        names = [all_names[index] for index in selection.indices]
        return reduce_outputs(outputs, mutable.reduction, mutable.key, names), mask

    def export(self) -> dict[str, Any]:
        """The final architecture in the form people read and edit: names where they are unique, else indices.

        A single chosen candidate stands without brackets, none is `[]`, and weights are a list of floats.
        """
        final = self.sample_final()
        unknown = set(final) - set(self.choices_by_key)
        if unknown:
            raise ArchitectureError(f"decision has unknown keys: {', '.join(sorted(unknown))}")
        return {
            key: readable(choice, final[key]) for key, choice in self.choices_by_key.items() if key in final
        }

    def status(self) -> dict[str, list[float]]:
        """The current decision as a list of floats for every key."""
        return {
            key: [float(value) for value in torch.as_tensor(mask).tolist()]
            for key, mask in self._cache.items()
        }


def readable(choice: Choice, mask: Any) -> Any:
    """A mask in the form of an architecture file; raises SpaceError when its length is wrong."""
    values = torch.as_tensor(mask).detach().cpu().tolist()
    if len(values) != len(choice):
        raise SpaceError(f"choice {choice.key!r}: mask has {len(values)} entries, expected {len(choice)}")
    if any(value not in (0, 1) for value in values):
        return [float(value) for value in values]
    chosen: list[Any] = [index for index, value in enumerate(values) if value]
    labels: Sequence[str] = choice.names if isinstance(choice, LayerChoice) else choice.choose_from
    if len(set(labels)) == len(labels) and not all(label.isdigit() for label in labels) and "" not in labels:
        chosen = [labels[index] for index in chosen]
    return chosen[0] if len(chosen) == 1 else chosen


def _call(mutable: LayerChoice, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    candidate = mutable._modules[name]
    if candidate is None:
        raise SpaceError(f"choice {mutable.key!r}: candidate {name!r} is None and cannot be chosen")
    return candidate(*args, **kwargs)
