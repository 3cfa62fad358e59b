"""The contract of `compile`, sentence by sentence, on programs written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

import nascompile
from nascompile.compiler.errors import TraceError
from nascompile.mutables import LayerChoice
from tests.comparing import Decided, assert_same, step
from tests.compiler import programs
from tests.compiler.programs import ISLANDS, TRACED, image
from tests.compiler.stepping import assert_equal_steps, build, decide


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("program", [*TRACED, *(program for program, _ in ISLANDS)], ids=lambda p: p.__name__)
def test_equals_eager(program: Any, example: bool) -> None:
    eager, model = build(program), build(program)
    example = example and not program.kwargs()
    compiled = nascompile.compile(model, program.args() if example else None)
    assert_equal_steps(eager, compiled)
    if program in TRACED:
        assert not compiled.islands
    if program is programs.SideEffects:
        assert model.op[0].seen == eager.op[0].seen  # type: ignore[union-attr]


@pytest.mark.parametrize(("program", "reason"), ISLANDS, ids=lambda p: getattr(p, "__name__", ""))
def test_islands_name_file_line_and_reason(program: Any, reason: str) -> None:
    compiled = nascompile.compile(build(program), program.args())
    (island,) = compiled.islands
    assert island.path == ("inner" if program is programs.Nested else "")
    assert reason in island.reason
    assert island.file == programs.__file__
    lines = Path(programs.__file__).read_text().splitlines()
    marked = [
        number for number, line in enumerate(lines, 1) if line.endswith(f"# island: {program.__name__}")
    ]
    if marked:
        assert [island.line] == marked
    assert str(island).endswith(f"({island.file}:{island.line})")
    with pytest.raises(TraceError, match='require="traced" cannot be honoured'):
        nascompile.compile(build(program), program.args(), require="traced")


# ----- same object


def test_holds_the_very_same_tensors() -> None:
    model = build(programs.OwnTensors)
    compiled = nascompile.compile(model, image())
    for name, kind in (("parameters", nn.Module.named_parameters), ("buffers", nn.Module.named_buffers)):
        ours, theirs = dict(kind(compiled)), dict(kind(model))
        assert list(ours) == list(theirs), name
        assert all(ours[key] is theirs[key] for key in ours)
    assert list(compiled.state_dict()) == list(model.state_dict())
    compiled.half()
    assert model.op[0].weight.dtype == torch.float16  # type: ignore[union-attr]
    model.register_buffer("late", torch.zeros(1))
    assert "late" in compiled.state_dict()
    compiled.eval()
    assert not model.training
    assert not model.get_submodule("op").training


def test_optimizer_made_before_compiling_stays_valid() -> None:
    eager, model = build(programs.Plain), build(programs.Plain)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (eager, model)]
    compiled = nascompile.compile(model, image())
    for _ in range(3):
        for network, optimizer in zip((eager, compiled), optimizers, strict=True):
            step(network, decide(network, 0), (image(),), {})
            optimizer.step()
    assert_same(dict(compiled.state_dict()), dict(eager.state_dict()))


def test_attributes_are_those_of_the_model() -> None:
    model = build(programs.Counter)
    compiled: Any = nascompile.compile(model)
    compiled.calls = 5
    assert model.calls == 5
    assert compiled.op is model.op
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = compiled.nothing_like_this
    assert nascompile.compile(compiled).parameters().__next__() is next(model.parameters())


def test_frozen_parameters_stay_without_gradient() -> None:
    eager, model = build(programs.Plain), build(programs.Plain)
    compiled = nascompile.compile(model)
    for network in (eager, model):
        network.op[0].requires_grad_(False)  # type: ignore[union-attr]
    assert_equal_steps(eager, compiled)
    assert model.op[0].weight.grad is None  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_floating_types(dtype: torch.dtype) -> None:
    eager, model = build(programs.Plain).to(dtype), build(programs.Plain)
    compiled = nascompile.compile(model, image()).to(dtype)
    for network in (eager, compiled):
        decide(network, 0)
    expected, actual = (network(image().detach().to(dtype)) for network in (eager, compiled))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def test_distributed_data_parallel() -> None:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        eager, model = build(programs.Plain), build(programs.Plain)
        compiled = nascompile.compile(model)
        wrapped = nn.parallel.DistributedDataParallel(compiled, find_unused_parameters=True)
        for number in (0, 1, 3):
            expected = step(eager, decide(eager, number), (image(),), {})
            decide(model, number)
            image_ = image()
            outputs = wrapped(image_)
            assert_same(outputs, expected["outputs"])
            (
                outputs.sin()
                * torch.linspace(0.5, 1.5, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
            ).sum().backward()
            for name, parameter in model.named_parameters():
                wanted = expected["weights"][name]
                if wanted is not None:
                    assert_same(parameter.grad, wanted)
            model.zero_grad(set_to_none=True)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_choices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Identity(), nn.BatchNorm2d(4)).double()
    compiled = nascompile.compile(model, image(), require="fused")
    assert_same(compiled.eval()(image()), model(image()), exact=True)
    assert not compiled.islands


# ----- decisions are data


def test_no_trace_is_made_for_a_decision() -> None:
    model = build(programs.Scopes)
    compiled = nascompile.compile(model, image())
    mutator = Decided(model)
    mutator.decide({"op": torch.tensor([True, False, False])})
    compiled(image())
    entries = len(compiled.entries)
    for number in range(6):
        decide(model, number)
        compiled(image())
        compiled(torch.cat([image(), image()]))
    assert len(compiled.entries) == entries


def test_a_candidate_of_weight_zero_does_not_move() -> None:
    model = build(programs.Plain)
    compiled = nascompile.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    ran: list[int] = []
    model.op[1].register_forward_hook(lambda *_: ran.append(1))  # type: ignore[union-attr]
    step(compiled, decide(model, 0), (image(),), {})
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.op[1].state_dict().items()}  # type: ignore[union-attr]
    ran.clear()
    step(compiled, decide(model, 4), (image(),), {})
    optimizer.step()
    assert not ran
    assert_same(dict(model.op[1].state_dict()), before, exact=True)  # type: ignore[union-attr]
    assert all(p.grad is None for p in model.op[1].parameters())  # type: ignore[union-attr]


def test_weights_changed_in_place_are_followed() -> None:
    model = build(programs.Plain)
    compiled = nascompile.compile(model).eval()
    mask = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    Decided(model).decide({"op": mask})
    first = compiled(image())
    mask.copy_(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert_same(compiled(image()), image(), exact=True)
    assert not torch.equal(first, image())


class Own(nn.Module):
    """Has its own idea of what all modules can do, as frozen BatchNorm and checkpoints of adapters have."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.choice = LayerChoice([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)], key="choice")

    def forward(self, x: Tensor) -> Tensor:
        return self.choice(self.bn(x))

    def train(self, mode: bool = True) -> Own:
        super().train(mode)
        self.bn.eval()
        return self

    def parameters(self, recurse: bool = True) -> Any:
        return self.choice.parameters(recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"own.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(
            {name[4:]: value for name, value in state_dict.items()}, *args, **kwargs
        )


def test_methods_of_the_model_are_used() -> None:
    model = Own()
    compiled = nascompile.compile(model)
    assert compiled.train() is compiled
    assert [model.training, model.bn.training, compiled.bn.training] == [True, False, False]
    assert compiled.eval() is compiled
    assert not model.training
    assert [*map(id, compiled.parameters())] == [*map(id, model.choice.parameters())]
    assert list(compiled.state_dict()) == list(model.state_dict())
    compiled.load_state_dict(Own().state_dict())
    assert compiled.to(torch.float64) is compiled
    assert model.bn.weight.dtype == torch.float64


def test_items_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), LayerChoice([nn.ReLU(), nn.Identity()], key="choice"))
    compiled = nascompile.compile(model)
    assert len(compiled) == 2
    assert compiled[1] is model[1]
    assert list(compiled) == list(model)
    assert model[0] in compiled
    assert copy.deepcopy(compiled)[0] is not model[0]
    plain = nascompile.compile(Own())
    assert bool(plain)
    with pytest.raises(TypeError):
        len(plain)
