"""What a compiled model owes those around it: the caller's tensors, later changes, other transformations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import nascompile
from nascompile.compiler.region import execution
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, assert_close
from tests.compiler.region_steps import regions

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def unit() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))


class Net(nn.Module):
    """Two choices between ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.a: Any = LayerChoice([unit(), unit(), nn.MaxPool2d(3, 1, 1), nn.Identity()], key="a")
        self.b = LayerChoice([unit(), nn.AvgPool2d(3, 1, 1), nn.Identity()], key="b")
        self.tail: Any = nn.Sequential(unit())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.tail(self.b(self.a(x) + x)).mean((2, 3)))


def decided() -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Net()
    mutator = Decided(model)
    weights = {
        key: torch.full((len(choice),), 1 / len(choice), requires_grad=True)
        for key, choice in mutator.choices_by_key.items()
    }
    mutator.decide(weights)
    return model, weights


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_images_that_cannot_be_written_to(tmp_path: Path) -> None:
    file = tmp_path / "images"
    images().numpy().tofile(file)
    x = torch.from_numpy(numpy.memmap(file, dtype="f4", mode="r", shape=(4, 3, 8, 8)))
    model, _ = decided()
    model.eval()
    assert_close(nascompile.compile(model)(x), model(x), **TOLERANCE)


def test_the_first_call_of_a_kind_leaves_versions_alone() -> None:
    model, _ = decided()
    compiled, teacher, x = nascompile.compile(model), nn.Conv2d(3, 4, 3), images()
    other = teacher(x).sum()
    (other + compiled(x).sum()).backward()
    assert x._version == 0
    loss = compiled(x).sum()
    compiled.eval()
    with torch.no_grad():
        compiled(x)
    compiled.train()
    loss.backward()


def second_order(swapped: bool, change: Callable[[Net], object] | None) -> Callable[[bool], list[Any]]:
    def run(compiled: bool) -> list[Any]:
        model, weights = decided()
        parameters = {
            name: (value * 1.5).detach().requires_grad_() for name, value in model.named_parameters()
        }
        called = nascompile.compile(model) if compiled else model
        given: Mapping[str, Tensor] = parameters if swapped else dict(model.named_parameters())
        out = functional_call(called, given, (images(),)) if swapped else called(images())
        if change is not None:
            change(model)
        wanted = [*given.values(), *weights.values()]
        first = torch.autograd.grad(out.square().mean(), wanted, create_graph=True)
        size = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return [*first, *torch.autograd.grad(size, list(weights.values()), allow_unused=True)]

    return run


@pytest.mark.parametrize(
    ("swapped", "change"),
    [
        (True, None),
        (False, lambda model: model.eval()),
        (False, lambda model: setattr(model.stem[1], "eps", 1.0)),
    ],
    ids=["functional_call", "eval", "eps"],
)
def test_second_derivatives_are_those_of_the_forward_pass(
    swapped: bool, change: Callable[[Net], object] | None
) -> None:
    """What the modules hold by the time of backward is another matter; the statistics are restored too."""
    run = second_order(swapped, change)
    expected, actual = run(False), run(True)
    if change is None:
        assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    else:
        # eager differentiates BatchNorm's own backward by its mode now: the first derivatives count
        count = len(expected) - 2
        assert_close(actual[:count], expected[:count], rtol=1e-3, atol=1e-5)


def remove_statistics(model: Net) -> None:
    norm = model.a[0][2]
    norm.running_mean = norm.running_var = None


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.tail.append(unit().eval()),
        lambda model: model.a[0].append(nn.Sigmoid()),
        lambda model: setattr(model.tail, "forward", lambda y: y * 2),
        lambda model: setattr(model.a, "forward", lambda y: y * 2),
        lambda model: setattr(model.a[0][0], "__class__", nn.Sigmoid),
        remove_statistics,
    ],
    ids=["append", "append to a candidate", "forward", "forward of a choice", "class", "no statistics"],
)
def test_changes_after_compiling_count(change: Callable[[Net], object]) -> None:
    model, _ = decided()
    model.eval()
    compiled, x = nascompile.compile(model), images()
    before = compiled(x).detach()
    change(model)
    after = model(x)
    assert not torch.allclose(before, after, **TOLERANCE)
    assert_close(compiled(x), after, **TOLERANCE)


def test_transformations_of_functions() -> None:
    model, _ = decided()
    model.eval()
    compiled, x = nascompile.compile(model), images()
    assert_close(vmap(compiled)(torch.stack([x, 2 * x]))[1], model(2 * x), **TOLERANCE)
    expected = grad(lambda y: model(y).sum())(x)
    assert_close(grad(lambda y: compiled(y).sum())(x), expected, **TOLERANCE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [forward_ad.unpack_dual(each(dual)).tangent for each in (compiled, model)]
    assert_close(tangents[0], tangents[1], **TOLERANCE)


def test_memory_of_many_graphs_is_not_kept() -> None:
    model, _ = decided()
    compiled = nascompile.compile(model)
    outputs = [compiled(images()) for _ in range(7)]
    del outputs
    (region,) = regions(compiled)
    assert len(region._memory._free) == execution.KEPT


class Doubled(nn.Module):
    """Holds a model and calls it as a module, or in `way`."""

    def __init__(self, inner: nn.Module, way: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner, self.way = inner, way

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) if self.way is None else self.way(self.inner, x)) * 2


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def branching(inner: Any, x: Tensor) -> Tensor:
    return inner(x) if x.sum() > -1e9 else x


WAYS: dict[str, Any] = {
    "module": None,
    "forward": lambda inner, x: inner.forward(x),
    "part": lambda inner, x: inner.stem(x),
    "island": branching,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("change", ["none", "hook", "hook inside", "used before"])
def test_a_compiled_model_inside_of_another(way: Any, change: str) -> None:
    x, results = images(), []
    untouched = dict(nn.Module.__dict__)
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Net()
        # `forward` of a compiled model runs the hooks of its model
        inner = net if way is None and not compiled else nascompile.compile(net)
        big: Any = Doubled(inner, way)
        mutator = Decided(big)
        called = nascompile.compile(big) if compiled else big
        if change.startswith("hook"):
            (net if change == "hook inside" else inner).register_forward_hook(doubled)
        found = []
        for values in ([0.1, 0.2, 0.3, 0.4], [True, False, False, False], [False, False, False, True]):
            given = x.clone().requires_grad_()
            masks = {
                key: torch.tensor(values[: len(choice)], requires_grad=isinstance(values[0], float))
                for key, choice in mutator.choices_by_key.items()
            }
            masks["b"] = masks["b"] if isinstance(values[0], float) else torch.tensor([False, True, False])
            mutator.decide(masks)
            if change == "used before":
                inner(x)
            big.zero_grad()
            out = called(given)
            out.square().mean().backward()
            gradients = [given.grad, *(p.grad for p in net.parameters()), *(m.grad for m in masks.values())]
            found.append((out, gradients, [buffer.clone() for buffer in net.buffers()]))
        results.append(found)
        if compiled and way is None and "hook" not in change:
            assert not called.islands
            assert regions(called)
    assert dict(nn.Module.__dict__) == untouched
    nn.Linear(2, 2)
    assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


def test_who_else_watches_attributes_goes_on_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    def watching(module: nn.Module, name: str) -> Any:
        return object.__getattribute__(module, name)

    monkeypatch.setattr(nn.Module, "__getattribute__", watching, raising=False)
    model, _ = decided()
    assert not nascompile.compile(model, images()).islands
    assert nn.Module.__getattribute__ is watching


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(8, 8, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.relu()) * self.scale


def test_a_candidate_that_is_a_compiled_model() -> None:
    inner = Scaled()
    model, _ = decided()
    model.a[0] = nascompile.compile(inner)
    compiled, x = nascompile.compile(model), images()
    for scale in (1.0, 3.0):
        inner.scale = scale
        assert_close(compiled(x), model(x), **TOLERANCE)


def test_attributes_of_a_compiled_model_inside_of_another_count() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    big = Doubled(nascompile.compile(net))
    called, x = nascompile.compile(big), torch.ones(2, 4)
    called(x)
    big.eval()
    assert_close(called(x), 2 * net[1](x))
    net.append(nn.ReLU())
    assert_close(called(x), 2 * net[1](x).relu())
    net.register_forward_hook(doubled)
    assert_close(called(x), 4 * net[1](x).relu())
