"""A whole region on the kernels for GPUs: in Triton's interpreter, or on a GPU where there is one.

tests/kernels/test_other_processes.py runs these tests in the interpreter; elsewhere they are skipped.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

import nascompile
from nascompile.compiler.region import region, scratch
from nascompile.compiler.region.executors import Executor
from nascompile.compiler.region.gradients import Wanted
from nascompile.compiler.region.ir import Graph
from nascompile.compiler.region.plan import Plan
from nascompile.compiler.region.settings import Settings
from nascompile.kernels.plan import cuda
from nascompile.kernels.plan.program import Program
from nascompile.kernels.plan.run import prepared
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, decision, step

# the interpreter computes in NumPy, which says what it meets; a warning in a plan sends the model op by op
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
CHANNELS = 5


def run(
    program: Program, encoded: Tensor, slab: Tensor, work: Tensor, flags: Tensor, tensors: Sequence[Tensor]
) -> None:
    work.fill_(torch.nan)
    prepared(program, encoded, slab.device).run(slab, work, flags.to(slab.device), tensors)


TRITON = Executor(
    name="triton under test",
    device=DEVICE.type,
    dtype=torch.float32,
    lane=lambda: cuda.LANE,
    chunks=lambda images: 1,
    work=cuda.work_size,
    run=run,
    why_not=lambda: cuda.why_not(DEVICE),
)


@pytest.fixture(autouse=True)
def plans_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cuda.why_not(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(region, "EXECUTORS", (TRITON,))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def convolution(inputs: int, outputs: int, kernel: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, bias=False, **options)


def separable(kernel: int, stride: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": CHANNELS}
    return nn.Sequential(
        nn.ReLU(),
        convolution(CHANNELS, CHANNELS, kernel, **options),
        convolution(CHANNELS, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS),
    )


def candidates(stride: int) -> list[nn.Module]:
    pool = nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(CHANNELS, affine=False))
    depthwise = nn.Sequential(
        convolution(CHANNELS, CHANNELS, 3, stride=stride, padding=1, groups=CHANNELS),
        nn.BatchNorm2d(CHANNELS, momentum=None),
        nn.ReLU6(),
    )
    convolutions = [separable(3, stride), separable(3, stride, 2), separable(5, stride)]
    return [*convolutions, pool, nn.AvgPool2d(3, stride, 1), depthwise]


class Network(nn.Module):
    """Two edges, one of them with stride 2; what they give is concatenated, gated and convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS))
        self.first = LayerChoice(candidates(1), key="first")
        self.second = LayerChoice(candidates(2), key="second")
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.SiLU(), nn.Conv2d(3, 8, 1), nn.Sigmoid()
        )
        self.last = nn.Sequential(nn.Hardswish(), convolution(8, 7, 1, stride=1), nn.BatchNorm2d(7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.second(x + self.first(x))
        y = torch.cat([y, y[:, 1:4] * y[:, :3]], 1)
        return self.last(y * self.squeeze(y))


WEIGHTS = [0.3, 0.1, 0.05, 0.2, 0.2, 0.15]


def one_of(index: int) -> list[bool]:
    return [number == index for number in range(len(WEIGHTS))]


DECISIONS = (
    {"first": WEIGHTS, "second": WEIGHTS[::-1]},
    {"first": one_of(0), "second": one_of(3)},
    {"first": one_of(1), "second": one_of(5)},
    # the second's gradient is where one of the first's others would be
    {"first": one_of(0), "second": one_of(1)},
    {"first": one_of(1), "second": one_of(2)},
)


def run_step(model: nn.Module, mutator: Decided, architecture: Any, x: Tensor) -> dict[str, Any]:
    masks = {key: mask.to(x.device) for key, mask in decision(architecture).items()}
    if x.dtype == torch.float32:
        masks = {k: m.detach().to(x.dtype) if m.is_floating_point() else m for k, m in masks.items()}
    for mask in masks.values():
        mask.requires_grad_(mask.is_floating_point())
    mutator.decide(masks)
    # what the comparison makes lies where the model does
    with DEVICE if DEVICE.type == "cuda" else nullcontext():
        return step(model, masks, (x,), {})


def flat(found: Any) -> dict[str, Tensor]:
    """All tensors of a step's results, by their path."""
    leaves = tree_flatten_with_path(found)[0]
    return {str(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def close(found: Tensor, expected: Tensor, name: str) -> None:
    """To five digits of the largest number, for the sums of a whole network in fp32."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    # what a BatchNorm follows has no gradient but rounding
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}")


@pytest.fixture(params=[1 << 28, 1 << 13], ids=["own images", "few images"])
def planned_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans are made for a GPU, wherever they run: on a CPU the gradients of weights take turns in memory
    that unpacking clears. Their scratch memory has room for an image of each user, or for few."""
    build, made = region.build, []
    monkeypatch.setattr(scratch, "COPIES", request.param)

    def build_for(graph: Graph, settings: Settings, wanted: Wanted | None) -> Plan:
        executor = replace(settings.executor, device="cuda")
        plan = build(graph, replace(settings, executor=executor), wanted)
        made.append(plan)
        # where it runs
        return replace(plan, settings=settings)

    monkeypatch.setattr(region, "build", build_for)
    return made


@pytest.mark.parametrize("is_training", [True, False])
def test_a_region_equals_the_network(is_training, planned_for):
    torch.manual_seed(0)
    network = Network().to(DEVICE).train(is_training)
    exact = copy.deepcopy(network).double()
    model = nascompile.compile(network)
    mutators = Decided(network), Decided(exact)
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    plans = 0
    for architecture in DECISIONS:
        found = flat(run_step(model, mutators[0], architecture, x.clone().requires_grad_()))
        expected = flat(run_step(exact, mutators[1], architecture, x.double().requires_grad_()))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            close(found[name], tensor, name)
        plans = sum(len(r.plans) for entry in model.entries for r in entry.regions)
    assert plans == len(planned_for), model.notes
    # weights, and one choice each
    assert [plan.backward is not None for plan in planned_for].count(True) == 2, model.notes


def test_the_gradients_of_an_input_alone(planned_for):
    torch.manual_seed(0)
    network = Network().to(DEVICE)
    exact = copy.deepcopy(network).double()
    mutators = Decided(network), Decided(exact)
    model = nascompile.compile(network)
    found = []
    for one, mutator, dtype in ((model, mutators[0], torch.float32), (exact, mutators[1], torch.float64)):
        mutator.decide({key: m.detach().to(DEVICE, dtype) for key, m in decision(DECISIONS[0]).items()})
        torch.manual_seed(1)
        x = torch.randn(2, 3, 6, 6).to(DEVICE, dtype).requires_grad_()
        # the parameters want gradients, but not now
        found += torch.autograd.grad(one(x).square().sum(), x)
    close(found[0], found[1], "gradient of the input")
    assert [plan.backward is not None for plan in planned_for].count(True) == 1, model.notes
