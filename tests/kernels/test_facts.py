"""How tensors look: every difference is seen, with torch's own guards and without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nascompile.kernels import facts
from nascompile.kernels.facts import Facts


@pytest.fixture(params=["guards", "plain"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(facts, "_KNOWN", ())
    return request.param


def tensors() -> list[Tensor]:
    return [torch.zeros(3, 2), nn.Parameter(torch.zeros(4)), torch.zeros(1, dtype=torch.int64)]


def test_known_versions_use_the_guards_of_torch(way: str) -> None:
    known = torch.__version__.startswith(("2.11.", "2.12.", "2.13."))
    assert (Facts(tensors())._guards is not None) == (way == "guards" and known)


def test_others_that_look_the_same_hold() -> None:
    assert Facts(tensors()).hold([tensor + 0 if not tensor.requires_grad else tensor for tensor in tensors()])
    assert Facts([]).hold([])


CHANGES: dict[str, Callable[[list[Tensor]], object]] = {
    "type": lambda some: some.__setitem__(0, some[0].double()),
    "size": lambda some: some.__setitem__(0, torch.zeros(2, 2)),
    "dimensions": lambda some: some.__setitem__(0, torch.zeros(3, 2, 1)),
    "strides": lambda some: some.__setitem__(0, torch.zeros(2, 3).t()),
    "in place, strides": lambda some: setattr(some[0], "data", torch.zeros(2, 3).t()),
    "in place, type": lambda some: setattr(some[1], "data", torch.zeros(4, dtype=torch.bfloat16)),
    "in place, size": lambda some: setattr(some[1], "data", torch.zeros(5)),
    "resized": lambda some: some[2].resize_(2),
    "wants no gradient": lambda some: some[1].requires_grad_(False),
    "wants a gradient": lambda some: some[0].requires_grad_(),
    "no parameter": lambda some: some.__setitem__(1, torch.zeros(4, requires_grad=True)),
    "device": lambda some: some.__setitem__(0, some[0].to("meta")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_seen(change: str) -> None:
    some = tensors()
    looks = Facts(some)
    assert looks.hold(some)
    CHANGES[change](some)
    assert not looks.hold(some)
    assert Facts(some).hold(some)


def test_modes_of_autograd_make_no_difference() -> None:
    some = tensors()
    with torch.no_grad():
        looks = Facts(some)
    assert looks.hold(some)
    with torch.no_grad():
        assert looks.hold(some)


def test_a_tensor_may_come_twice() -> None:
    """As the parameters of two modules that share them do."""
    shared, other = torch.zeros(2), torch.zeros(2)
    looks = Facts([shared, other, shared])
    assert looks.hold([shared, other, shared])
    assert not looks.hold([shared, torch.zeros(3), shared])
    assert not looks.hold([torch.zeros(3), other, torch.zeros(3)])
    # what is one tensor once says nothing of two
    assert not looks.hold([shared, other, torch.zeros(3)])
    assert not looks.hold([shared, other])
    assert not looks.hold([shared, other, shared, other])


def test_a_tensor_that_comes_twice_from_now_on_is_seen() -> None:
    looks = Facts([torch.zeros(2), torch.zeros(2)])
    assert looks.distinct
    assert not looks.hold([torch.zeros(2)] * 2)
    assert not Facts([torch.zeros(2)] * 2).distinct
