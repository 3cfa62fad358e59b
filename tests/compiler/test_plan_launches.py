"""Plans for a GPU, without one: users of scratch memory that have an image of their own share launches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import nascompile
from nascompile.compiler.region import region, scratch
from nascompile.compiler.region.executors import TRITON
from nascompile.compiler.region.gradients import Wanted
from nascompile.compiler.region.ir import Graph
from nascompile.compiler.region.plan import Plan
from nascompile.compiler.region.scratch import Scratch
from nascompile.compiler.region.settings import Settings
from nascompile.darts import DartsMutator
from nascompile.kernels.plan.program import Phase, Program
from nascompile.kernels.plan.steps import Combine, ConvolveBackward, Map, Space, Stage
from nascompile.kernels.plan.traffic import count
from nascompile.kernels.plan.triton_table import lower
from nascompile.spaces import DartsNetwork

NOTHING = replace(TRITON, name="nothing", device="cpu", run=lambda *_: None, why_not=lambda device: None)
Planned = Callable[[bool, int], Plan]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan of a cell that has a backward program, for images in turn or not, with room for copies."""
    build = region.build

    def make(in_turn: bool, room: int) -> Plan:
        made: list[Plan] = []

        def build_and_keep(graph: Graph, settings: Settings, wanted: Wanted | None) -> Plan:
            made.append(build(graph, settings, wanted))
            return made[-1]

        monkeypatch.setattr(region, "EXECUTORS", (replace(NOTHING, in_turn=in_turn),))
        monkeypatch.setattr(region, "build", build_and_keep)
        monkeypatch.setattr(scratch, "COPIES", room)
        torch.manual_seed(0)
        network = DartsNetwork(8, 3, 16, 10, 2, n_nodes=2)
        mutator = DartsMutator(network)
        model = nascompile.compile(network)
        mutator.reset()
        x = torch.zeros(2, 3, 8, 8)
        # nothing is computed that could be compared with the program
        model._entry((x,), {}).is_checked = True
        model(x).sum().backward()
        assert not model.islands
        return next(plan for plan in made if plan.backward is not None)

    return make


def programs(plan: Plan) -> list[Program]:
    assert plan.backward is not None
    return [plan.forward.program, plan.backward.program]


def staged(phase: Phase) -> dict[tuple[int, int, int], list[Map]]:
    """Where the images that are staged go, by their sizes."""
    found = defaultdict(list)
    for step in phase.steps:
        if isinstance(step, Stage):
            place = step.target
            found[place.channels, place.height, place.width].append(place)
    return found


def launches(program: Program) -> int:
    return len(lower(program).launches)


def test_every_user_of_a_geometry_has_an_image(planned):
    found = [places for p in programs(planned(False, 1 << 28)) for phase in p.phases for places in
             staged(phase).values()]  # fmt: skip
    assert max(map(len, found)) > 3
    assert all(len(places) == len(set(places)) for places in found)


@pytest.mark.parametrize("in_turn", [True, False])
def test_without_room_they_take_turns(planned, in_turn):
    found = [places for p in programs(planned(in_turn, 0)) for phase in p.phases for places in
             staged(phase).values()]  # fmt: skip
    assert max(map(len, found)) > 3
    assert all(len(set(places)) == 1 for places in found)


def test_images_do_not_overlap():
    made = Scratch(False, 1)
    places = [made.get("x", 16, 4, 5, (2, 1)) for _ in range(3)]
    ends = [place.offset + 6 * place.row for place in places]
    starts = [place.offset - 2 * place.row - place.pixel for place in places]
    assert starts[0] >= 0
    assert ends[0] <= starts[1] < ends[1] <= starts[2] < ends[2] <= made.floats


def test_a_phase_begins_with_the_same_images():
    made = Scratch(False, 1)
    first = [made.get("x", 16, 4, 5, (2, 1)) for _ in range(3)]
    made.begin_phase()
    assert [made.get("x", 16, 4, 5, (2, 1)) for _ in range(3)] == first


def test_memory_for_images_is_limited(monkeypatch):
    monkeypatch.setattr(scratch, "COPIES", 4 * 2 * 1000)
    made = Scratch(False, images=2)
    # of 480 floats: one in any case, and two for which there is room
    assert len({made.get("x", 16, 5, 5, (0, 0)) for _ in range(7)}) == 3
    assert made.several(2, "dx", 16, 9, 9) == made.several(1, "dx", 16, 9, 9)
    assert made.floats == 3 * 480 + 1440


def test_few_images_make_more_launches(planned):
    own, little, none = (planned(False, room) for room in (1 << 28, 1 << 17, 0))
    counted = [[launches(program) for program in programs(plan)] for plan in (own, little, none)]
    assert counted[0][0] <= counted[1][0] <= counted[2][0]
    assert counted[0][1] < counted[1][1] < counted[2][1]
    steps = [sum(len(phase.steps) for phase in program.phases) for program in programs(own)]
    # a step has one launch at least, and barrier operations have some
    assert all(few < 0.8 * many for few, many in zip(counted[0], steps, strict=True))


def gradients(plan: Plan) -> list[ConvolveBackward]:
    steps: Any = [step for phase in programs(plan)[1].phases for step in phase.steps]
    return [step for step in steps if isinstance(step, ConvolveBackward) and step.needs_input]


def test_gradients_of_a_staged_image_are_written_apart_and_then_summed(planned):
    plan = planned(False, 1 << 28)
    assert {step.adds for step in gradients(plan)} == {0}
    for phase in programs(plan)[1].phases:
        own = Counter(step.dx for step in phase.steps if isinstance(step, ConvolveBackward))
        sums = [step for step in phase.steps if isinstance(step, Combine) and step.terms]
        summed = [term.map for s in sums for term in s.terms if term.map.space == Space.scratch]
        assert set(summed) <= set(own)
        assert set(own.values()) <= {1}


def test_gradients_with_and_without_those_of_weights_are_one_step(planned):
    ours, cpu = gradients(planned(False, 1 << 28)), gradients(planned(True, 0))
    assert len(cpu) == 2 * len(ours)
    assert all(step.gradient_flag >= 0 for step in ours)
    assert all(step.gradient_flag < 0 and step.adds for step in cpu)


def test_launches_are_counted_as_they_are(planned):
    for program in programs(planned(False, 1 << 28)):
        found = count(program)
        assert sum(traffic.launches for traffic in found.values()) == launches(program)
        assert found["stage"].bytes > 0
