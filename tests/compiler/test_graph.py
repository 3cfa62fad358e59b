"""Which choice feeds which, in models of every form, traceable or not."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.graph import INPUT, OUTPUT, choice_graph
from nascompile.compiler.mutables import InputChoice, LayerChoice, MutableScope


def choice(key: str | None = None) -> LayerChoice:
    # identity first: it is passed on, and must not make its input look like its output
    return LayerChoice([nn.Identity(), nn.Linear(4, 4)], key=key)


def edges(model: nn.Module, *inputs: Any) -> set[tuple[str, str]]:
    return set(choice_graph(model, inputs or (torch.ones(2, 4),)).edges)


class Diamond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (choice() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        left, right = self.b(x), self.c(x * 2)
        return self.d(torch.cat([left, right], 0).softmax(0))


def test_chain_through_plain_layers():
    model = nn.Sequential(nn.Linear(4, 4), choice(), nn.ReLU(), nn.BatchNorm1d(4), choice(), nn.Linear(4, 2))
    assert edges(model) == {(INPUT, "1"), ("1", "4"), ("4", OUTPUT)}


def test_diamond():
    expected = {(INPUT, "a"), ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", OUTPUT)}
    assert edges(Diamond()) == expected


def test_attributes():
    graph = choice_graph(Diamond(), torch.ones(2, 4))
    assert nx.is_directed_acyclic_graph(graph)
    node = graph.nodes["a"]
    assert node["key"] == "LayerChoice1"
    assert node["kind"] == "LayerChoice"
    assert node["candidates"][1] == {
        "name": "1", "type": "Linear", "params": 20, "flops": 2 * 2 * 16, "output": (2, 4), "error": None
    }  # fmt: skip
    assert (node["calls"], node["n_chosen"], node["scopes"], node["shared"]) == (1, 1, [], [])
    assert [graph.nodes[path]["order"] for path in "abcd"] == [0, 1, 2, 3]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = choice(), choice()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


def test_a_value_beside_a_choice_keeps_its_own_sources():
    assert edges(Residual()) == {
        (INPUT, "a"), (INPUT, "b"), ("a", "b"), (INPUT, OUTPUT), ("a", OUTPUT), ("b", OUTPUT)
    }  # fmt: skip


class Island(nn.Module):
    """Item assignment, a branch on data, a loop over a tensor: nothing that symbolic tracing accepts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = choice(), choice(), choice()

    def forward(self, x: Tensor) -> Tensor:
        buffer = torch.zeros_like(self.c(x))
        buffer[:, :2] = self.a(x)[:, :2]
        if bool(x.sum() > 0):
            rows = [row + 1 for row in buffer]
        return self.b(torch.stack(rows).add_(1))


def test_untraceable_code_is_followed_and_sizes_are_no_dependency():
    assert edges(Island()) == {(INPUT, "a"), (INPUT, "c"), ("a", "b"), ("b", OUTPUT)}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = LayerChoice([nn.Identity(), nn.Sequential(choice(), nn.ReLU(), choice())])
        self.after = choice()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.outer(x))


def test_nested_choices_feed_the_choice_around_them():
    graph = choice_graph(Nested(), torch.ones(2, 4))
    assert set(graph.edges) == {
        (INPUT, "outer"), (INPUT, "outer.1.0"), ("outer.1.0", "outer.1.2"), ("outer.1.2", "outer"),
        ("outer", "after"), ("after", OUTPUT),
    }  # fmt: skip
    assert graph.nodes["outer.1.0"]["inside"] == ("outer", "1")
    assert graph.nodes["outer"]["inside"] is None


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([choice("same"), choice("other"), choice("same")])
        self.again = self.layers[1]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.again(x)


def test_shared_keys_containers_and_repeated_calls():
    graph = choice_graph(Shared(), torch.ones(2, 4))
    assert graph.nodes["layers.0"]["shared"] == ["layers.2"]
    assert graph.nodes["layers.1"]["shared"] == []
    assert graph.nodes["layers.1"]["calls"] == 2
    assert set(graph.edges) == {
        (INPUT, "layers.0"), ("layers.0", "layers.1"), ("layers.1", "layers.2"), ("layers.2", "layers.1"),
        ("layers.1", OUTPUT),
    }  # fmt: skip


class Scope(MutableScope):
    def __init__(self, key: str, inner: nn.Module) -> None:
        super().__init__(key)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_scopes_from_the_outermost():
    graph = choice_graph(Scope("cell", nn.Sequential(Scope("node", choice()), choice())), torch.ones(2, 4))
    assert graph.nodes["inner.0.inner"]["scopes"] == ["cell", "node"]
    assert graph.nodes["inner.1"]["scopes"] == ["cell"]


class Inputs(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named = named
        self.a, self.b = choice("a"), choice("b")
        self.switch = InputChoice(choose_from=["a", "b", InputChoice.NO_KEY], n_chosen=1, key="switch")
        self.last = choice("last")

    def forward(self, batch: dict[str, list[Tensor]]) -> dict[str, Any]:
        x, z = batch["x"][0], batch["z"][0]
        values = {"a": self.a(x), "b": self.b(x).t().t(), InputChoice.NO_KEY: z}
        out = self.switch(values if self.named else list(values.values()))
        return {"out": [self.last(out)], "aux": (None, z)}


@pytest.mark.parametrize("named", [True, False])
def test_input_choice_fed_by_choices_with_inputs_in_dicts(named: bool):
    graph = choice_graph(Inputs(named), {"x": [torch.ones(2, 4)], "z": (torch.ones(2, 4),)})
    assert set(graph.edges) == {
        (INPUT, "a"), (INPUT, "b"), (INPUT, "switch"), ("a", "switch"), ("b", "switch"), ("switch", "last"),
        ("last", OUTPUT), (INPUT, OUTPUT),
    }  # fmt: skip
    into = {source: data["candidates"] for source, _, data in graph.in_edges("switch", data=True)}
    assert into == {"a": [0], "b": [1], INPUT: [2]}
    assert graph.nodes["switch"]["n_chosen"] == 1


def test_the_model_itself_and_choices_never_called():
    graph = choice_graph(choice(), torch.ones(2, 4))
    assert set(graph.edges) == {(INPUT, ""), ("", OUTPUT)}

    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead = choice()

        def forward(self, x: Tensor) -> Tensor:
            return x

    graph = choice_graph(Dead(), torch.ones(2, 4))
    assert set(graph.edges) == {(INPUT, OUTPUT)}
    assert graph.nodes["dead"]["order"] is None
    assert graph.nodes["dead"]["calls"] == 0


def test_return_mask_and_sparse_values():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = LayerChoice([nn.Identity(), nn.Linear(4, 4)], return_mask=True)
            self.b = choice()

        def forward(self, x: Tensor) -> Tensor:
            y, _mask = self.a(x)
            return self.b(torch.sparse.mm(y.to_sparse(), torch.eye(4)))

    assert edges(Odd()) == {(INPUT, "a"), ("a", "b"), ("b", OUTPUT)}


def test_operators_that_write_to_their_arguments_and_return_nothing():
    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = choice(), choice()

        def forward(self, x: Tensor) -> Tensor:
            total = torch.zeros(2, 4)
            torch.ops.aten._foreach_add_([total], [self.a(x)])
            return self.b(total)

    assert edges(Each()) == {(INPUT, "a"), ("a", "b"), ("b", OUTPUT)}
