"""The runner of the passes, the rules between them, and the printed graphs of three tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import nascompile
from nascompile.compiler import pipeline, spec
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.lower import LoweredLayerChoice, Shared, SharedCall, lowered
from nascompile.mutables import InputChoice, LayerChoice
from tests.compiler.graphs import traced

GOLDEN = Path(__file__).parent / "golden"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = LayerChoice(
            [nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), nn.Sequential(nn.ReLU(), nn.Linear(3, 3))]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) + 1


def test_every_pass_counts_its_rewrites() -> None:
    gm = traced(Model())
    rewrites = pipeline.run(gm)
    assert list(rewrites) == pipeline.names()
    assert rewrites["lower_choices"] == 1
    assert rewrites["share_prefixes"] == 1
    assert rewrites["fuse_weighted_sums"] == 1


def test_skipping_by_name() -> None:
    rewrites = pipeline.run(traced(Model()), skip=("share_prefixes",))
    assert "share_prefixes" not in rewrites
    compiled = nascompile.compile(Model(), torch.ones(2, 3), skip=("fuse_weighted_sums",))
    assert compiled.entries[0].lowered[0].pattern is None


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(NascompileError, match="there is no pass 'share'; passes: drop_identity, "):
        pipeline.run(traced(Model()), skip=("share",))
    with pytest.raises(NascompileError, match="there is no pass"):
        nascompile.compile(Model(), torch.ones(2, 3), skip=("share",))


def test_the_runner_checks_what_a_pass_left_behind() -> None:
    def breaks_the_graph(gm: fx.GraphModule) -> int:
        next(node for node in gm.graph.nodes if node.op == "call_module").target = "missing"
        return 1

    with pytest.raises((AssertionError, RuntimeError), match="missing"):
        pipeline.run(traced(Model()), (breaks_the_graph,))


def test_a_choice_that_was_not_lowered_is_illegal() -> None:
    gm = traced(Model())
    spec.check(gm, "traced", "tracing")
    with pytest.raises(AssertionError, match="choice 'op' has not been lowered"):
        spec.check(gm, "lowered", "nothing")


def _lowered(gm: fx.GraphModule) -> fx.Node:
    pipeline.run(gm)
    return next(node for node in gm.graph.nodes if isinstance(node.target, LoweredLayerChoice))


def _without_prefixes(node: fx.Node) -> None:
    node.args = node.args[1:]


def _without_bodies(node: fx.Node) -> None:
    node.target.bodies = [None, None]  # type: ignore[union-attr]


def _with_something_else(node: fx.Node) -> None:
    node.args = ((node.args[1], None), *node.args[1:])


def _changing_the_source(node: fx.Node) -> None:
    with node.graph.inserting_before(node):
        node.graph.call_method("add_", (node.args[1], 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_prefixes, "one shared prefix, or None, for every candidate"),
        (_without_bodies, "has a shared prefix but no body"),
        (_with_something_else, "prefix 0 is not a shared value"),
        (_changing_the_source, "add_ changes the source of a shared value in place"),
    ],
)
def test_violations_of_lowered_calls(change: Any, words: str) -> None:
    gm = traced(Model())
    change(_lowered(gm))
    with pytest.raises(AssertionError, match=words):
        spec.check(gm, "lowered", "a pass")


def test_an_input_choice_takes_one_argument() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(lowered(InputChoice(2), "choose"), (x, x)))
    with pytest.raises(AssertionError, match="takes one list or dict"):
        spec.check(fx.GraphModule(nn.Module(), graph), "lowered", "a pass")


def test_a_graph_ends_in_its_output() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.relu, (x,)))
    gm = fx.GraphModule(nn.Module(), graph)
    gm.graph.erase_node(next(reversed(gm.graph.nodes)))
    with pytest.raises(AssertionError, match="does not end in an output"):
        spec.check(gm, "traced", "a pass")


def test_a_shared_value_is_computed_once_and_late() -> None:
    calls: list[float] = []

    def double(value: float) -> float:
        calls.append(value)
        return 2 * value

    first = Shared(double, 3.0)
    second = SharedCall(double)(first)
    assert calls == []
    assert (second.get(), second.get(), first.get()) == (12.0, 12.0, 6.0)
    assert calls == [3.0, 6.0]


# ----- golden graphs


class Cell(nn.Module):
    """Two edges of DARTS candidates on one source, and a choice of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        edges = []
        for _ in range(2):
            convolutions = [nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, k, padding=k // 2)) for k in (1, 3)]
            edges.append(LayerChoice([nn.MaxPool2d(3, 1, 1), nn.Identity(), *convolutions]))
        self.edges = nn.ModuleList(edges)
        self.choose = InputChoice(choose_from=[edge.key for edge in edges], n_chosen=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.choose([edge(x) for edge in self.edges])


class Skip(nn.Module):
    """An optional skip connection, an identity, and arithmetic in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1)
        self.identity = nn.Identity()
        self.op = LayerChoice([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)], reduction="concat")
        self.skip = InputChoice(n_candidates=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.identity(self.stem(x))
        x = torch.relu(self.op(h))
        x0 = self.skip([h])
        if x0 is not None:
            x += x0
        return x


class Island(nn.Module):
    """A part that cannot be traced between two that can."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.op(x) if x.mean() > 0 else x

    def __init__(self) -> None:
        super().__init__()
        self.first = LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)], key="first")
        self.inner = self.Inner()
        self.last = LayerChoice([nn.Linear(4, 4), nn.Linear(4, 4)], key="first")

    def forward(self, x: Tensor, *, scale: float = 2.0) -> dict[str, Tensor]:
        return {"out": self.last(self.inner(self.first(x))) * scale}


@pytest.mark.parametrize("model", [Cell, Skip, Island], ids=lambda m: m.__name__.lower())
def test_printed_graphs(model: type[nn.Module], request: pytest.FixtureRequest) -> None:
    image = torch.randn(2, 4, 5, 4)
    code = nascompile.compile(model(), image).code
    path = GOLDEN / f"{model.__name__.lower()}.py.txt"
    if request.config.getoption("--update-golden", default=False):
        path.write_text(code)
    assert code == path.read_text(), (
        f"after looking at it: pytest tests/compiler --update-golden ({path.name})"
    )
