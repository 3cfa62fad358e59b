"""Regions under autocast and in bf16 and fp16: what eager mode returns, from plans in fp32."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.region import ir, types
from nascompile.mutables import LayerChoice
from nascompile.spaces import (
    DartsNetwork,
    ENASMicroNetwork,
    MBConvNetwork,
    NASBench201Network,
    ShuffleNetSpace,
)
from nascompile.spaces.mbconv import Stage
from tests.comparing import Decided, step, tensors
from tests.compiler import region_patterns, region_vectors
from tests.compiler.region_models import CASES, Case, Nothing, SepConv, Unit
from tests.compiler.region_pairs import NET, Pair
from tests.compiler.region_steps import ROUNDS, build, images, regions
from tests.compiler.region_types import (
    AUTOCAST_BF16,
    AUTOCAST_FP16,
    BF16,
    FP16,
    SETTINGS,
    Setting,
    Under,
    assert_as_eager,
    compared,
)

PLANNED = [
    case
    for case in (*CASES, *region_patterns.CASES, *region_vectors.CASES)
    if case.regions and case.op_by_op is None
]
SOME = (
    "orders",
    "mean",
    "darts",
    "several inputs and outputs",
    "norms without weights, statistics or momentum",
)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "darts": lambda: DartsNetwork(32, 3, 16, 10, n_layers=3, n_nodes=2),
    "enas_micro": lambda: ENASMicroNetwork(3, 16, 10, n_layers=2, n_nodes=2),
    "nasbench201": lambda: NASBench201Network(channels=16, n_cells=1),
    "mbconv": lambda: MBConvNetwork(10, stages=[Stage(16, 2, 2), Stage(16, 2, 1)], stem_stride=1),
    "shuffle": lambda: ShuffleNetSpace(10, stage_channels=(32, 64), stage_blocks=(2, 2), last_channels=32,
                                       dropout_rate=0.0),
}  # fmt: skip
NETWORKS_IN_FP16 = [("darts", AUTOCAST_FP16), ("mbconv", FP16)]


def check_case(case: Case, setting: Setting) -> None:
    rows = [images(case, torch.float32, seed=20 + number) for number in range(len(ROUNDS))]
    actual, expected, exact, compiled = compared(lambda: build(case), rows, ROUNDS, setting)
    assert_as_eager(actual, expected, exact, setting.low)
    assert compiled.islands == []
    assert regions(compiled)
    assert all(found.plans for found in regions(compiled))


@pytest.mark.parametrize("case", PLANNED, ids=lambda case: case.name)
def test_under_autocast(case: Case) -> None:
    check_case(case, AUTOCAST_BF16)


@pytest.mark.parametrize("setting", SETTINGS[1:], ids=lambda setting: setting.name)
@pytest.mark.parametrize("name", SOME)
def test_in_other_low_precisions(name: str, setting: Setting) -> None:
    check_case(next(case for case in CASES if case.name == name), setting)


@pytest.mark.parametrize(
    ("name", "setting"),
    [*((name, setting) for name in NETWORKS for setting in (AUTOCAST_BF16, BF16)), *NETWORKS_IN_FP16],
    ids=lambda part: getattr(part, "name", part),
)
def test_networks(name: str, setting: Setting) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return NETWORKS[name]()

    rounds = (("soft", True), ("one", True), ("soft", False), ("one", False))
    rows = [(torch.randn(4, 3, 16, 16),) for _ in rounds]
    actual, expected, exact, compiled = compared(make, rows, rounds, setting)
    assert_as_eager(actual, expected, exact, setting.low)
    # the nodes of ENAS are islands in any precision
    assert not [island for island in compiled.islands if "trace" in island.reason]
    assert any(found.plans for found in regions(compiled)), compiled.notes


# ----- types


class Kinds(nn.Module):
    """What `one` returns has the type of its image or that of convolutions, as the decision goes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice([Unit("acb", 16), nn.Identity(), Nothing(), nn.MaxPool2d(3, 1, 1)])
        self.two = LayerChoice([SepConv(16, 3), nn.AvgPool2d(3, 1, 1)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        one = self.one(x)
        two = self.two(torch.relu(one))
        return {"one": one, "sum": one + two, "both": torch.cat([two, x], 1), "two": two}


DECISIONS: tuple[tuple[list[Any], list[Any]], ...] = (
    ([True, False, False, False], [True, False]),
    ([False, True, False, False], [True, False]),
    ([False, False, False, True], [False, True]),
    ([True, False, False, False], [False, True]),
    ([True, True, False, False], [False, True]),
    ([True, False, True, False], [False, True]),
    ([0.2, 0.0, 0.0, 0.0], [0.5, 0.0]),
    ([0.0, 0.3, 0.1, 0.0], [0.0, 0.2]),
    ([0.2, 0.3, 0.1, 0.1], [0.5, 0.2]),
)


def masks_of(rows: tuple[list[Any], ...], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"LayerChoice{k}": torch.tensor(row, dtype=dtype, requires_grad=True)
        if isinstance(row[0], float)
        else torch.tensor(row)
        for k, row in enumerate(rows, 1)
    }


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_types_follow_the_decision(setting: Setting, weights: torch.dtype) -> None:
    torch.manual_seed(0)
    eager = setting.prepared(Kinds())
    model = copy.deepcopy(eager)
    compiled = nascompile.compile(model)
    (x,) = (torch.randn(2, 16, 5, 4).to(setting.inputs).requires_grad_(),)
    mutators = Decided(eager), Decided(model)
    kinds = set()
    for rows in DECISIONS:
        seen = []
        for mutator, runs in zip(mutators, (eager, compiled), strict=True):
            masks = masks_of(rows, weights)
            mutator.decide(masks)
            seen.append(step(Under(runs, setting.autocast), masks, (x,), {}))
        expected, actual = ([None if t is None else t.dtype for t in leaves(one)] for one in seen)
        assert actual == expected, rows
        kinds.add(tuple(tensor.dtype for tensor in tensors(seen[1]["outputs"])))
    assert all(found.plans for found in regions(compiled)), compiled.notes
    assert not compiled.notes
    # autocast leaves what is not convolved as it was
    assert (len(kinds) > 1) == (setting.autocast is not None and setting.inputs != setting.autocast)


def leaves(seen: dict[str, Any]) -> list[Tensor | None]:
    found: list[Tensor | None] = list(seen["outputs"].values())
    for group in ("inputs", "weights", "decisions", "buffers"):
        found += seen[group].values() if isinstance(seen[group], dict) else seen[group]
    return found


def test_the_type_of_every_operation_is_known() -> None:
    keep = {ir.Source, ir.Zero, ir.Crop, ir.Channels, ir.Pad, ir.Arrange, ir.Spread}
    assert set(typing.get_args(ir.Op)) == keep | set(types.QUESTIONS)


REFUSED = (
    (torch.bfloat16, torch.float32, None),
    (torch.float32, torch.bfloat16, None),
    (torch.bfloat16, torch.float16, None),
    (torch.float16, torch.bfloat16, torch.bfloat16),
)


@pytest.mark.parametrize(("inputs", "weights", "norms"), REFUSED)
def test_what_torch_refuses_is_refused(inputs: Any, weights: Any, norms: Any) -> None:
    pair = Pair(Setting("", weights, inputs, None, norms).prepared, weights)
    pair.each(lambda model, masks: model(*images(NET, weights)) if norms is None else None, "one")

    def refusal(model: nn.Module, masks: Any) -> str:
        with pytest.raises(RuntimeError) as problem:
            model(*images(NET, inputs))
        return str(problem.value)

    expected, actual = pair.each(refusal, "one")
    assert actual == expected
    assert "op by op: torch refuses a" in pair.notes
