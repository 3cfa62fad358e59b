"""What the candidates of every choice cost in eager PyTorch, forward and backward: counted, and timed on
request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.decision import Selection, read_mask, reduce_outputs, weigh
from nascompile.compiler.explore import map_tensors, tensors_in
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.roofline import Counter, Machine, fastest
from nascompile.compiler.space import Choice, choices

ROUNDS = 3
"""How often something is timed; the fastest counts."""


class Soft(Mutator):
    """Decides as DARTS does, without being bound: equal weights that want a gradient for the candidates of a
    layer, every input of an InputChoice."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.masks = {key: _mask(choice) for key, choice in choices(model).items()}

    def selection(self, key: str, length: int) -> tuple[Selection, Any]:
        """The decision for a key."""
        return read_mask(self.masks[key], length, key), self.masks[key]


class Recorder(Soft):
    """Decides the same, and keeps what every choice was called with, also those inside candidates."""

    def __init__(self, decision: Soft) -> None:
        nn.Module.__init__(self)
        self.masks = decision.masks
        self.calls: list[Call] = []
        self._depth = 0

    def on_forward_layer_choice(self, mutable: LayerChoice, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Keep the call and carry it out."""
        args_kept, kwargs_kept = map_tensors((args, kwargs), _leaf)
        self.calls.append(Call(mutable, args_kept, kwargs_kept, self._depth > 0))
        self._depth += 1
        try:
            return super().on_forward_layer_choice(mutable, *args, **kwargs)
        finally:
            self._depth -= 1

    def on_forward_input_choice(self, mutable: InputChoice, tensor_list: list[Any]) -> tuple[Any, Any]:
        """Keep the call and carry it out."""
        self.calls.append(Call(mutable, (map_tensors(tensor_list, _leaf),), {}, self._depth > 0))
        return super().on_forward_input_choice(mutable, tensor_list)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a choice; of tensors that want a gradient, leaves with the same memory. `is_nested`: inside
    a candidate of another choice."""

    choice: Choice
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_nested: bool


def _mask(choice: Choice) -> Tensor:
    if isinstance(choice, InputChoice):
        return torch.ones(len(choice), dtype=torch.bool)
    usable = torch.tensor([float(candidate is not None) for candidate in choice])
    return (usable / usable.sum()).requires_grad_()


def training_step(model: nn.Module, args: Sequence[Any], decision: Soft) -> Callable[[], object]:
    """Forward, and the gradients of parameters and decision for a gradient of ones."""
    gradients = _Gradients(_wanted((list(model.parameters()), decision.masks)))
    return lambda: gradients.of(model(*args))


def eager_costs(
    calls: Sequence[Call], masks: dict[str, Tensor], machine: Machine, *, measure: bool
) -> dict[str, tuple[float, float | None]]:
    """By key, the least and the measured seconds of all its calls: every candidate alone, then their sum."""
    found: defaultdict[str, tuple[float, float | None]] = defaultdict(lambda: (0.0, 0.0 if measure else None))
    for call in calls:
        for function in _functions(call, masks[call.choice.key]):
            # the first run makes the gradients that it starts from
            function()
            with Counter(machine) as counter:
                function()
            least, seconds = found[call.choice.key]
            if seconds is not None:
                seconds += fastest(function, rounds=ROUNDS)
            found[call.choice.key] = least + counter.seconds, seconds
    return dict(found)


def _functions(call: Call, mask: Tensor) -> list[Callable[[], object]]:
    """Forward and backward of every candidate, and of the sum of what they return."""
    choice = call.choice
    if isinstance(choice, InputChoice):
        return [_summing(call, list(call.args[0]), mask)]
    chosen = [index for index in range(len(choice)) if choice[index] is not None]
    # an identity is no work
    modules = [choice[index] for index in chosen if not isinstance(choice[index], nn.Identity)]
    with torch.no_grad():
        outputs = [choice[index](*call.args, **call.kwargs) for index in chosen]
    weights = mask[chosen].detach().requires_grad_()
    return [*(_running(call, module) for module in modules), _summing(call, outputs, weights)]


def _running(call: Call, module: nn.Module) -> Callable[[], object]:
    gradients = _Gradients(_wanted((call.args, call.kwargs, list(module.parameters()))))

    def run() -> object:
        args, kwargs = map_tensors((call.args, call.kwargs), _Start.apply)
        return gradients.of(module(*args, **kwargs))

    return run


def _summing(call: Call, outputs: list[Any], mask: Tensor) -> Callable[[], object]:
    choice = call.choice
    selection = read_mask(mask, len(outputs), choice.key)
    leaves = [map_tensors(output, lambda tensor: tensor.detach().requires_grad_()) for output in outputs]
    names = [str(index) for index in range(len(outputs))]
    gradients = _Gradients(_wanted((leaves, mask)))

    def run() -> object:
        weighted = [weigh(leaf, selection.weight(index), choice.key) for index, leaf in enumerate(leaves)]
        return gradients.of(reduce_outputs(weighted, choice.reduction, choice.key, names))

    return run


class _Gradients:
    """Takes the gradients of `wanted` for ones, which are made once."""

    def __init__(self, wanted: Sequence[Tensor]) -> None:
        self._wanted = wanted
        self._ones: list[Tensor] = []

    def of(self, output: Any) -> object:
        """The gradients of all tensors in `output` together."""
        outputs = _wanted(output)
        if not outputs or not self._wanted:
            return output
        if [one.shape for one in self._ones] != [tensor.shape for tensor in outputs]:
            self._ones = [torch.ones_like(tensor) for tensor in outputs]
        return torch.autograd.grad(outputs, self._wanted, self._ones, allow_unused=True)


class _Start(torch.autograd.Function):
    """A leaf as a candidate would get it: one that may be changed in place. No copy is made."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _wanted(value: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.requires_grad]
