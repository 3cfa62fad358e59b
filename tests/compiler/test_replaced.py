"""What is replaced of a model's code and structure is seen after compiling; threads share a warm model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import LayerChoice
from nascompile.random import RandomMutator


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(), nn.ReLU()])
        self.block = Block()
        self.choice = LayerChoice([nn.Sequential(nn.ReLU(), conv()), nn.Sequential(conv(), nn.ReLU())])
        self.norm = nn.BatchNorm2d(4)
        self.dilated = nn.Conv2d(4, 4, 3, padding=1)
        self.dilated.padding, self.dilated.dilation = [2, 2], [2, 2]  # type: ignore[assignment]
        self.last: nn.Module | None
        self.register_module("last", None)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = self.norm(self.dilated(self.choice(self.block(x))))
        return x if self.last is None else self.last(x)


def doubled(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * module.conv(x)  # type: ignore[operator]


def negated(module: nn.Module, x: Tensor) -> Tensor:
    return -x


def set_dilation(model: Any) -> None:
    # in place: the very same lists
    model.dilated.padding[:] = [1, 1]
    model.dilated.dilation[:] = [1, 1]


def replace_buffers(model: Any) -> None:
    model.norm._buffers = {name: torch.full_like(buffer, 2) for name, buffer in model.norm._buffers.items()}


def replace_dictionary(model: Any) -> None:
    model.block.__dict__ = {**Block().__dict__, "forward": lambda x: 2 * x}


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "a list": lambda model, patch: setattr(model, "layers", nn.ModuleList(reversed(model.layers))),
    "a block": lambda model, patch: setattr(model, "block", Block()),
    "the forward of a class": lambda model, patch: patch.setattr(Block, "forward", doubled),
    "the forward of a layer's class": lambda model, patch: patch.setattr(nn.ReLU, "forward", negated),
    "a module in the place of none": lambda model, patch: setattr(model, "last", nn.Sigmoid()),
    "the items of a setting": lambda model, patch: set_dilation(model),
    "the parameters": lambda model, patch: setattr(model.block.conv, "_parameters", conv()._parameters),
    "the buffers": lambda model, patch: replace_buffers(model),
    "the modules": lambda model, patch: setattr(model.block, "_modules", Block()._modules),
    "the modules of a list": lambda model, patch: setattr(
        model.layers, "_modules", nn.ModuleList([conv(), nn.Sigmoid()])._modules
    ),
    "the dictionary": lambda model, patch: replace_dictionary(model),
}


def compiled() -> tuple[Listed, Any, Tensor]:
    torch.manual_seed(0)
    model = Listed().eval()
    RandomMutator(model).reset()
    network, x = nascompile.compile(model), torch.randn(2, 4, 8, 8)
    network(x)
    return model, network, x


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_replaced_is_seen(
    change: Callable[[Any, pytest.MonkeyPatch], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, network, x = compiled()
    before = network(x)
    change(model, monkeypatch)
    torch.testing.assert_close(network(x), model(x))
    assert not torch.allclose(before, model(x))


def test_hooks_of_all_modules_run_inside_regions() -> None:
    _, network, x = compiled()
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        network(x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) >= 2


def test_threads_do_not_share_gradients() -> None:
    model, network, _ = compiled()
    parameters = list(model.parameters())
    images = [torch.randn(2, 4, 8, 8) for _ in range(4)]

    def gradients(number: int) -> tuple[Tensor | None, ...]:
        loss = network(images[number]).square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    alone = [gradients(number) for number in range(4)]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(150):
            pairs = zip(gradients(number), alone[number], strict=True)
            same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
            wrong.extend([] if same else [number])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
