"""What stands in a lean network where an island used to hold a choice: plain modules without any decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nascompile.compiler.architecture import single_choice
from nascompile.compiler.decision import Selection, combine, read_mask
from nascompile.compiler.mutables import InputChoice, LayerChoice

Weight = float | None


class Combination(nn.Module):
    """Several layers on the same input, weighted by constants and reduced; none of them gives None."""

    def __init__(
        self, layers: Mapping[str, nn.Module], weights: Sequence[Weight], reduction: str, mask: Any
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.weights = list(weights)
        self.reduction = reduction
        self.mask = mask

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layers = [layer for layer in self._modules.values() if layer is not None]
        # each is weighed before the next one runs, which may change it in place
        outputs = [weighed(layer(*args, **kwargs), w) for layer, w in zip(layers, self.weights, strict=True)]
        out = reduce_fixed(outputs, self.reduction)
        return out if self.mask is None else (out, self.mask)


class FixedInputs(nn.Module):
    """Some of several inputs, at fixed positions (and `sources`, where they come by name), weighted and
    reduced."""

    def __init__(
        self,
        indices: Sequence[int],
        sources: Sequence[str],
        weights: Sequence[Weight],
        reduction: str,
        mask: Any,
    ) -> None:
        super().__init__()
        self.indices = list(indices)
        self.sources = list(sources)
        self.weights = list(weights)
        self.reduction = reduction
        self.mask = mask

    def forward(self, optional_inputs: Any) -> Any:
        by_name = isinstance(optional_inputs, dict)
        chosen = [optional_inputs[self.sources[index] if by_name else index] for index in self.indices]
        outputs = [weighed(one, weight) for one, weight in zip(chosen, self.weights, strict=True)]
        out = reduce_fixed(outputs, self.reduction)
        return out if self.mask is None else (out, self.mask)


def weighed(output: Any, weight: Weight) -> Any:
    """`output * weight`, or the output itself where there is no weight."""
    return output if weight is None or output is None else output * weight


def reduce_fixed(outputs: Sequence[Any], reduction: str) -> Any:
    """The reduction of a fixed decision's weighed outputs; works on tensors and while tracing."""
    if reduction == "none":
        return list(outputs)
    present = [output for output in outputs if output is not None]
    if len(present) < 2:
        return present[0] if present else None
    return combine(present, reduction)


def fixed_weights(selection: Selection) -> list[Weight]:
    """The weights of the chosen candidates as the eager network applies them (fp32), None for a hard
    choice."""
    if selection.weights is None:
        return [None] * len(selection.indices)
    return [float(selection.weights.detach()[index].to(torch.float32)) for index in selection.indices]


def fix_choices(module: nn.Module, masks: Mapping[str, Sequence[Any]]) -> nn.Module:
    """Replace every choice inside `module`, in place, by plain modules; gives what stands for `module`
    itself."""
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = fix_choices(child, masks)
    if isinstance(module, LayerChoice):
        return _fixed_layers(module, masks[module.key])
    if isinstance(module, InputChoice):
        mask = masks[module.key]
        selection = read_mask(mask, len(module), module.key)
        returned = mask if module.return_mask else None
        return FixedInputs(
            selection.indices, module.choose_from, fixed_weights(selection), module.reduction, returned
        )
    return module


def _fixed_layers(choice: LayerChoice, mask: Sequence[Any]) -> nn.Module:
    chosen = single_choice(choice, mask)
    if chosen is not None:
        return choice[chosen]
    selection = read_mask(mask, len(choice), choice.key)
    layers = {choice.names[index]: choice[index] for index in selection.indices}
    return Combination(
        layers, fixed_weights(selection), choice.reduction, mask if choice.return_mask else None
    )
