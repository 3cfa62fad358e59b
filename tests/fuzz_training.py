"""Trains a random space: what could be seen after each step, or with more rounding errors than those of the
type. See fuzz.py."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from tests.comparing import Decided, tensors
from tests.compiler.region_steps import detached
from tests.fuzz_spaces import Space, build

ROUNDINGS = 4
"""Relative error that `roughly` puts into weights, into what layers return and into its gradients, in largest
roundings of the type."""


def mask(kind: str, length: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A decision of the kind: "one", "many", "soft", or "some" weights of zero."""
    weights = torch.rand(length, generator=generator) + 0.1
    chosen = int(torch.randint(length, (), generator=generator))
    if kind == "one":
        return torch.arange(length) == chosen
    if kind == "many":
        return (weights > 0.5) | (torch.arange(length) == chosen)
    if kind == "some":
        weights = weights * ((weights > 0.5) | (torch.arange(length) == chosen))
    return (weights / weights.sum()).to(dtype).requires_grad_()


def roughly(space: Space, draw: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The eager steps with more rounding errors than those of the type itself.

    Where a program is ill-conditioned (a ReLU near zero, a BatchNorm over two values, a sum that cancels) two
    right results differ by more than a few roundings: by as much as these.
    """
    model = build(space).to(dtype)
    error = ROUNDINGS * torch.finfo(dtype).eps / 2
    generator = torch.Generator().manual_seed(draw)

    def rounded(tensor: Tensor) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        return tensor * (1 + error * (2 * noise - 1))

    def returned(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        # where it comes from, the gradient is rounded once more
        if out.requires_grad:
            out.register_hook(rounded)
        out = rounded(out)
        if out.requires_grad:
            out.register_hook(rounded)
        return out

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter))
    for module in model.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(returned)
    return train(space, model, dtype)


def train(space: Space, model: nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The steps of a space: what could be seen after each."""
    mutator = Decided(model)
    generator = torch.Generator().manual_seed(space.seed)
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=0.01)
        if space.optimizer == "sgd"
        # an epsilon this large, for Adam makes signs of the rounding errors of tiny gradients
        else torch.optim.AdamW(parameters, 1e-4, eps=1e-2)
    )
    seen = []
    for number, (batch, mode, kind) in enumerate(
        zip(space.batches, space.modes, space.decisions, strict=True)
    ):
        model.train(mode)
        _freeze(space, model, number)
        optimizer.zero_grad(set_to_none=space.gradients != "zeroed")
        passes = []
        for _ in range(2 if space.gradients == "accumulated" else 1):
            choices = mutator.choices_by_key.items()
            masks = {key: mask(kind, len(choice), generator, dtype) for key, choice in choices}
            mutator.decide(masks)
            inputs = images(space, batch, generator, dtype)
            passes.append(_pass(space, model, masks, inputs, seed=number, wants=number % 2 == 0))
        found: dict[str, Any] = {group: [one[group] for one in passes] for group in passes[0]}
        found["weights"] = {name: parameter.grad for name, parameter in model.named_parameters()}
        found = detached(found)
        if mode:
            optimizer.step()
        found["buffers"] = detached(dict(model.named_buffers()))
        found["parameters"] = detached(dict(model.named_parameters()))
        seen.append(found)
        if number == 0:
            # out and back in
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return seen


def _freeze(space: Space, model: nn.Module, number: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        free = {
            "none": True,
            "some": index % 3 > 0,
            "all": False,
            "by turns": (index + number) % 2 > 0,
            "at last": number == 0,
        }
        parameter.requires_grad_(free[space.frozen])


def images(space: Space, batch: int, generator: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    """The inputs of one pass."""
    shapes = [(3, *space.size)]
    if space.second:
        shapes.append((space.channels, *space.inner_size))
    format = torch.channels_last if space.channels_last else torch.contiguous_format
    return [
        torch.randn(batch, *shape, generator=generator).to(dtype).to(memory_format=format) for shape in shapes
    ]


def _pass(
    space: Space, model: nn.Module, masks: dict[str, Tensor], inputs: list[Tensor], *, seed: int, wants: bool
) -> dict[str, Any]:
    """Forward and backward: outputs, and the gradients of the inputs and the decisions."""
    torch.manual_seed(seed)
    random.seed(seed)
    for image in inputs:
        image.requires_grad_(wants)
    outputs = model(*inputs)
    found = tensors(outputs)
    # whether an output wants a gradient is not compared: that of a region does where any decision would let
    # it, in eager mode this one has to; nothing comes of it but None
    losses = [
        (out.sin() * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).double().sum()
        for out in {"first": found[:1], "last": found[-1:]}.get(space.loss, found)
        if out.requires_grad
    ]
    if space.loss == "one by one":
        for index, loss in enumerate(losses):
            loss.backward(retain_graph=index + 1 < len(losses))
    elif losses:
        torch.stack(losses).sum().backward()
    return {
        "outputs": outputs,
        "inputs": [image.grad for image in inputs],
        "decisions": {key: mask.grad for key, mask in masks.items()},
    }
