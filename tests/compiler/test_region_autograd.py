"""Backward passes of regions that come twice, in batches or after changes in place: as in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.mutables import LayerChoice
from tests.comparing import CLOSE, Decided, assert_close, assert_same
from tests.compiler.region_models import Case, SepConv, Unit
from tests.compiler.region_pairs import NET, Pair, Unreached
from tests.compiler.region_steps import fp64_plans, images, regions


@pytest.fixture(autouse=True)
def plans_in_fp64() -> Iterator[None]:
    with fp64_plans():
        yield


# ----- in batches


def _batched(y: Tensor, wanted: list[Tensor], rows: Tensor) -> Any:
    return torch.autograd.grad(y, wanted, rows, is_grads_batched=True, allow_unused=True)


def _mapped(y: Tensor, wanted: list[Tensor], rows: Tensor) -> Any:
    def one(row: Tensor) -> Any:
        return torch.autograd.grad(y, wanted, row, retain_graph=True)

    return torch.func.vmap(one)(rows)


def _differentiated(y: Tensor, wanted: list[Tensor], rows: Tensor) -> Any:
    first = torch.autograd.grad(y, wanted, rows, is_grads_batched=True, create_graph=True)
    second = torch.autograd.grad(torch.stack([g.sin().sum() for g in first]).sum(), wanted)
    return first, second


WAYS = {"is_grads_batched": _batched, "vmap": _mapped, "create_graph": _differentiated}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["soft", "one"])
def test_gradients_in_batches(way: str, kind: str, training: bool) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        (x,) = images(NET, torch.float64)
        y = model(x)
        chosen = [model.stem[0].weight, model.stem[1].bias, model.op[0].conv.weight]
        wanted = [x, *chosen, *(mask for mask in masks.values() if mask.requires_grad)]
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(3, *y.shape, generator=generator, dtype=y.dtype)
        return [WAYS[way](y, wanted, rows), list(model.buffers())]

    pair = Pair(lambda model: model.train(training))
    expected, actual = pair.each(act, kind)
    assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert pair.plans


@pytest.mark.parametrize("create_graph", [True, False])
def test_a_vectorized_jacobian(create_graph: bool) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        def few(x: Tensor) -> Tensor:
            return model(x).mean((2, 3))

        (x,) = images(NET, torch.float64)
        return torch.autograd.functional.jacobian(few, x.detach(), vectorize=True, create_graph=create_graph)

    pair = Pair()
    expected, actual = pair.each(act)
    assert actual.requires_grad == create_graph
    assert_same(actual.detach(), expected.detach())
    assert pair.plans


def test_only_what_is_asked_for_is_differentiated_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of gradients of all weights is larger than the model by the size of the batch."""
    pair = Pair()
    seen: list[int] = []
    original = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(inputs))
        return original(outputs, inputs, *args, **kwargs)

    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        (x,) = images(NET, torch.float64)
        y = model(x)
        monkeypatch.setattr(torch.autograd, "grad", counted)
        found = counted(y, [x], torch.ones(2, *y.shape, dtype=y.dtype), is_grads_batched=True)
        monkeypatch.undo()
        return found

    expected, actual = pair.each(act)
    assert_same(actual, expected)
    assert seen == [1] * 3


@pytest.mark.parametrize("kind", ["soft", "one"])
def test_every_gradient_can_be_asked_for_alone(kind: str) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        y = model(*images(NET, torch.float64)).sin().sum()
        wanted = [*(mask for mask in masks.values() if mask.requires_grad), *model.parameters()]
        return [torch.autograd.grad(y, one, retain_graph=True, allow_unused=True) for one in wanted]

    pair = Pair()
    expected, actual = pair.each(act, kind)
    assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert pair.plans


# ----- as autograd sees it


class Dependent(nn.Module):
    """A region with two inputs, one of which is computed from the other."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = LayerChoice([SepConv(8, 3), nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 1))], key="choice")

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(x + torch.sin(x))


@pytest.mark.parametrize("kind", ["soft", "one"])
def test_inputs_that_depend_on_each_other(kind: str) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        (x,) = images(NET, torch.float64)
        x.requires_grad_()
        (first,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.sin().sum(), [x, *model.parameters()], allow_unused=True)
        y = model(x)
        rows = torch.ones(2, *y.shape, dtype=y.dtype)
        return [first.detach(), second, torch.autograd.grad(y, x, rows, is_grads_batched=True)]

    pair = Pair(case=Case("dependent", Dependent))
    expected, actual = pair.each(act, kind)
    assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert pair.plans


@pytest.mark.parametrize("kind", ["soft", "one"])
def test_hooks_of_parameters_are_called_where_gradients_arrive(kind: str) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> Any:
        called: dict[str, list[str]] = {"before": [], "after": []}
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda g, name=name: (called["before"].append(name), 2 * g)[1])
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: called["after"].append(f"{name} {p.grad is not None}")
            )
        model(*images(NET, torch.float64)).sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return [gradients, {when: sorted(names) for when, names in called.items()}]

    pair = Pair()
    expected, actual = pair.each(act, kind)
    assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert pair.plans


def test_what_has_no_gradient_to_give_wants_none() -> None:
    frozen = Unit("acb", 8).requires_grad_(False)
    model = nn.Sequential(LayerChoice([SepConv(8, 3), nn.Identity(), frozen], key="choice")).double()
    mutator, compiled = Decided(model), nascompile.compile(model)
    for index, wants in enumerate((True, False, False)):
        mutator.decide({"choice": torch.arange(3) == index})
        assert compiled(images(NET, torch.float64)[0].detach()).requires_grad == wants
    assert regions(compiled)[0].plans


# ----- twice


def _replaced(model: Any) -> None:
    model.stem[1].running_mean = model.stem[1].running_mean + 1
    model.op[0].bn.running_var = model.op[0].bn.running_var * 2
    model.end[1].bias = nn.Parameter(model.end[1].bias.detach() + 1)


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("kind", ["soft", "one"])
def test_a_second_backward_has_the_statistics_of_forward(kind: str, create_graph: bool) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> list[Any]:
        (x,) = images(NET, torch.float64)
        loss = model(x).sin().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)
        _replaced(model)
        second = torch.autograd.grad(loss, x, create_graph=create_graph)
        return [first, [gradient.detach() for gradient in second]]

    pair = Pair(lambda model: model.eval())
    expected, actual = pair.each(act, kind)
    assert_same(actual, expected)
    assert_same(list(actual[0]), actual[1])
    assert pair.plans


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("change", ["in place", "by training"])
def test_statistics_that_move_on_before_a_second_backward(
    change: str, create_graph: bool, dtype: torch.dtype
) -> None:
    """Eager mode raises, or takes the new ones."""
    pair = Pair(lambda model: model.eval(), dtype)
    pair.each(lambda model, masks: None)
    (x,) = images(NET, dtype)
    loss = pair.compiled(x).sin().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    if change == "in place":
        pair.model.stem[1].running_mean.add_(1)
    else:
        pair.compiled.train()(x.detach() + 1)
        pair.compiled.eval()
    second = torch.autograd.grad(loss, x, create_graph=create_graph)
    # op by op everything is rounded
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else CLOSE
    assert_close([gradient.detach() for gradient in second], list(first), **tolerance)
    assert pair.plans


# ----- after something has changed in place


BIASES = ("stem.0.bias", "stem.1.bias", "op.0.bn.bias", "end.1.bias")
UNCHOSEN = ("op.1.op.1.weight", "op.1.op.3.weight", "op.2.body.0.weight", "op.2.body.1.bias")


@pytest.mark.parametrize("name", [*BIASES, *UNCHOSEN])
@pytest.mark.parametrize("training", [True, False])
def test_what_backward_does_not_need_may_change_before_it(name: str, training: bool) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> list[Any]:
        (x,) = images(NET, torch.float64)
        loss = model(x).sin().sum()
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        loss.backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters())]

    pair = Pair(lambda model: model.train(training))
    assert_same(*reversed(pair.each(act, "one")))
    assert pair.plans


NEEDED = ("op.0.conv.weight", "op.0.bn.weight", "stem.0.weight", "stem.1.weight")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("frozen", [True, False])
def test_what_backward_needs_may_not(name: str, frozen: bool) -> None:
    def act(model: Any, masks: dict[str, Tensor]) -> None:
        loss = model(*images(NET, torch.float64)).sin().sum()
        with torch.no_grad():
            model.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    pair = Pair(lambda model: model.requires_grad_(not frozen))
    pair.each(act, "one")
    assert pair.plans


@pytest.mark.parametrize("compile_it", [True, False])
def test_what_another_decision_leaves_out_may_change(compile_it: bool) -> None:
    model: Any = Unreached().double()
    Decided(model).decide(
        {
            "LayerChoice1": torch.tensor([True, False]),
            "LayerChoice2": torch.tensor([True, False]),
            "InputChoice3": torch.tensor([True, False]),
        }
    )
    compiled = nascompile.compile(model) if compile_it else model
    loss = compiled(torch.randn(2, 8, 5, 4, dtype=torch.float64)).sin().sum()
    with torch.no_grad():
        model.two[0].conv.weight.mul_(2)
    loss.backward()
    assert model.one[0].conv.weight.grad is not None
    assert model.two[0].conv.weight.grad is None
    assert not isinstance(compiled, nascompile.CompiledModel) or regions(compiled)[0].plans


def _again(loss: Tensor, x: Tensor) -> None:
    torch.autograd.grad(loss, x, retain_graph=True)


def _not_at_all(loss: Tensor, x: Tensor) -> None:
    return


@pytest.mark.parametrize("first", [_again, _not_at_all])
def test_a_bias_that_a_region_needs_to_run_again(first: Callable[[Tensor, Tensor], None]) -> None:
    pair = Pair()
    pair.each(lambda model, masks: None)
    (x,) = images(NET, torch.float64)
    loss = pair.compiled(x).sin().sum()
    first(loss, x)
    with torch.no_grad():
        pair.model.op[0].bn.bias.mul_(2)
    create_graph = first is _not_at_all
    with pytest.raises(RuntimeError, match=r"'bias' of BatchNorm2d\(.*modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=create_graph)


def test_a_plan_fails_no_backward_pass_of_the_program() -> None:
    """What the program saved for backward may be statistics that a plan updates, as BatchNorm itself does."""

    def act(model: Any, masks: dict[str, Tensor]) -> list[Any]:
        (x,) = images(NET, torch.float32)
        hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
        loss = model(x).sin().sum()
        hook.remove()
        (loss + model(x).cos().sum()).backward()
        return [x.grad, list(model.buffers())]

    # in the type of the executor that users have: the reference writes by operations that autograd knows
    pair = Pair(dtype=torch.float32)
    expected, actual = pair.each(act)
    assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert pair.plans
