"""Drawings: what they show, where it is placed, and the files."""

from __future__ import annotations

from collections import OrderedDict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from nascompile.compiler.diagram import diagram
from nascompile.compiler.draw import draw
from nascompile.compiler.errors import ArchitectureError, NascompileError
from nascompile.compiler.graph import INPUT, OUTPUT, choice_graph
from nascompile.compiler.layout import place
from nascompile.compiler.mutables import InputChoice, LayerChoice
from nascompile.compiler.panels import Diagram, Panel


def layer(key: str) -> LayerChoice:
    named: OrderedDict[str, Any] = OrderedDict(
        small=nn.Linear(4, 4), large=nn.Linear(4, 4), none=nn.Identity()
    )
    return LayerChoice(named, key=key)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = layer("a"), layer("b")
        self.skip = InputChoice(choose_from=["a", ""], n_chosen=1, key="skip")

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.skip([x, self.b(x)])


class Cell(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.edges = nn.ModuleList(layer(f"{name}{i}") for i in range(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first = self.edges[0](x) + self.edges[1](y)
        second = self.edges[2](x) + self.edges[3](first) + self.edges[4](first)
        return torch.cat([first, second], 0)[: len(x)]


class Cells(nn.Module):
    """Eight cells of two kinds, each fed by the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Cell("reduce" if i in (2, 5) else "normal") for i in range(8))

    def forward(self, x: Tensor) -> Tensor:
        before = last = x
        for cell in self.cells:
            before, last = last, cell(before, last)
        return last


X = torch.ones(2, 4)


def drawn(model: nn.Module, masks: dict[str, list[bool]] | None = None) -> Diagram:
    return diagram(choice_graph(model, X), masks)


def links(panel: Panel) -> set[tuple[str, str]]:
    return {(link.source, link.target) for link in panel.links}


def test_a_small_space_is_one_panel_of_its_choices():
    (panel,) = drawn(Small()).panels
    assert list(panel.boxes) == [INPUT, "a", "b", "skip", OUTPUT]
    assert links(panel) == {(INPUT, "a"), ("a", "b"), ("a", "skip"), ("b", "skip"), ("skip", OUTPUT)}
    assert [line.text for line in panel.boxes["a"].lines] == ["small", "large", "none"]
    assert [line.text for line in panel.boxes["skip"].lines] == ["1 of 2 inputs"]
    assert {box.alive for box in panel.boxes.values()} == {None}


def test_an_architecture_marks_the_chosen_and_fades_the_dead():
    masks = {"a": [False, True, False], "b": [True, False, False], "skip": [True, False]}
    (panel,) = drawn(Small(), masks).panels
    assert {name: box.alive for name, box in panel.boxes.items()} == {
        INPUT: True, "a": True, "b": False, "skip": True, OUTPUT: True
    }  # fmt: skip
    assert [(line.text, line.chosen) for line in panel.boxes["a"].lines] == [
        ("small", False), ("large", True), ("none", False)
    ]  # fmt: skip
    alive = {(link.source, link.target) for link in panel.links if link.alive}
    assert alive == {(INPUT, "a"), ("a", "skip"), ("skip", OUTPUT)}


def test_nested_choices_live_with_their_candidate():
    model = LayerChoice([nn.Sequential(layer("inner"), nn.ReLU()), nn.Identity()], key="outer")
    inner = [True, False, False]
    for mask, alive in (([True, False], True), ([False, True], False)):
        (panel,) = drawn(model, {"outer": mask, "inner": inner}).panels
        assert panel.boxes["0.0"].alive is alive
        assert [link.nested for link in panel.links if link.source == "0.0"] == [True]


def test_repeated_cells_become_an_overview_and_one_panel_a_kind():
    content = drawn(Cells())
    overview, normal, reduce = content.panels
    assert list(overview.boxes) == [INPUT, *(f"cells.{i}" for i in range(8)), OUTPUT]
    assert ("cells.0", "cells.2") in links(overview)
    assert ("cells.0", "cells.3") not in links(overview)
    shades = [overview.boxes[f"cells.{i}"].shade for i in range(8)]
    assert shades == [0, 0, 1, 0, 0, 1, 0, 0]
    assert normal.title == "cells.1, and the same in cells.0, cells.3-4, cells.6-7"
    assert reduce.title == "cells.2, and the same in cells.5"
    titles = [box.title for box in normal.boxes.values() if box.kind == "layer"]
    assert titles == [f"normal{i}" for i in range(5)]
    assert {box.title for box in normal.boxes.values() if box.kind == "end"} == {
        "from input",
        "from cells.0",
        "out",
    }
    assert content.legend == {"A": ("small", "large", "none")}


def test_what_arrives_together_meets_in_a_point():
    normal = drawn(Cells()).panels[1]
    (point,) = [name for name, box in normal.boxes.items() if box.kind == "join"]
    path = "cells.1.edges.{}".format
    into = {(path(0), point), (path(1), point), (point, path(3)), (point, path(4))}
    assert into <= links(normal)
    assert (path(0), path(3)) not in links(normal)


def test_cells_that_an_architecture_decides_differently_are_shown_apart():
    class Own(Cells):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(Cell(f"c{i}_") for i in range(8))

    masks = {f"c{i}_{j}": [i == 3, i != 3, False] for i in range(8) for j in range(5)}
    assert len(drawn(Own()).panels) == 2
    assert [panel.title for panel in drawn(Own(), masks).panels[1:]] == [
        "cells.1, and the same in cells.0, cells.2, cells.4-7", "cells.3"
    ]  # fmt: skip


def test_cells_with_other_candidates_are_shown_apart():
    model = Cells()
    for index, cell in enumerate(model.cells):
        for edge in cell.edges:  # type: ignore[union-attr]
            edge._key = f"{index}.{edge.key}"
    model.cells[4].edges[0] = LayerChoice([nn.Identity(), nn.ReLU()], key="other")  # type: ignore[index]
    titles = [panel.title for panel in drawn(model).panels[1:]]
    assert titles == ["cells.1, and the same in cells.0, cells.2-3, cells.5-7", "cells.4"]


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    return abs(ax - bx) < (aw + bw) / 2 - 1e-9 and abs(ay - by) < (ah + bh) / 2 - 1e-9


@pytest.mark.parametrize("downwards", [False, True])
def test_boxes_do_not_overlap_and_links_point_one_way(downwards: bool):
    sizes = {name: (1.0 + 0.3 * (i % 3), 0.4 + 0.2 * (i % 2)) for i, name in enumerate("abcdeghf")}
    edges = [
        (edge[0], edge[1])
        for edge in ("ab", "ac", "ad", "be", "ce", "df", "ef", "ag", "gf", "ah", "hf", "af")
    ]
    placement = place(sizes, edges, downwards=downwards)
    boxes = [(*placement.centres[name], *sizes[name]) for name in sizes]
    assert not any(overlaps(a, b) for a, b in combinations(boxes, 2))
    for x, y, w, h in boxes:
        assert w / 2 - 1e-9 <= x <= placement.size[0] - w / 2 + 1e-9
        assert h / 2 - 1e-9 <= y <= placement.size[1] - h / 2 + 1e-9
    for source, target in edges:
        (x0, y0), (x1, y1) = placement.centres[source], placement.centres[target]
        assert (y1 < y0) if downwards else (x1 > x0)
    # a long link runs straight through the layers it passes, clear of their boxes
    assert len(placement.routes["a", "f"]) == 4 + 2 * 2
    for (x0, y0), (x1, y1) in list(pairwise(placement.routes["a", "f"]))[2:-1:2]:
        assert (x0 == x1) if downwards else (y0 == y1)
    for edge in edges:
        for x, y in placement.routes[edge][1:-1]:
            passed = [box for name, box in zip(sizes, boxes, strict=True) if name not in edge]
            assert not any(overlaps((x, y, 0.0, 0.0), box) for box in passed)


def test_cycles_and_loops_can_be_placed():
    placement = place({"a": (1.0, 1.0), "b": (1.0, 1.0)}, [("a", "b"), ("b", "a"), ("b", "b")])
    assert placement.routes["b", "a"] == placement.routes["a", "b"][::-1]


@pytest.mark.parametrize("model", [Small(), Cells(), layer("root"), nn.Identity()])
def test_svg_and_png_files(model: nn.Module, tmp_path: Path):
    svg = draw(model, tmp_path / "space.svg", X)
    assert svg == tmp_path / "space.svg"
    assert svg.read_text().startswith("<?xml")
    picture = imread(draw(model, tmp_path / "space.png", X))
    assert picture.min() < 0.5 < picture.max()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["space.png", "space.svg"]


def test_an_architecture_changes_the_picture_and_pictures_are_reproducible(tmp_path: Path):
    architecture = {"a": "large", "b": "small", "skip": "a"}
    plain = draw(Small(), tmp_path / "plain.svg", X).read_text()
    marked = draw(Small(), tmp_path / "marked.svg", X, architecture).read_text()
    assert "#14803c" in marked
    assert "#14803c" not in plain
    assert draw(Small(), tmp_path / "again.svg", X).read_text() == plain


def test_errors(tmp_path: Path):
    with pytest.raises(
        NascompileError, match=r"'space.jpg' has the suffix '.jpg', expected one of: .svg, .png, .pdf"
    ):
        draw(Small(), tmp_path / "space.jpg", X)
    with pytest.raises(ArchitectureError, match="Missing keys"):
        draw(Small(), tmp_path / "space.svg", X, {"a": 0})
    with pytest.raises(NascompileError, match="cannot write"):
        draw(Small(), tmp_path / "missing" / "space.svg", X)
    assert list(tmp_path.iterdir()) == []
