"""The contract of `compile`, sentence by sentence, on programs written by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.errors import TraceError
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from tests.comparing import Decided, assert_same, decision, step
from tests.compiler import programs
from tests.compiler.programs import ISLANDS, TRACED, conv, image

DECISIONS: tuple[list[Any], ...] = (
    [0.2, 0.5, 0.3],
    [True, False, False],
    [False, True, False],
    [0.0, 0.6, 0.4],
    [True, False, True],
    [0.0, 1.0, 0.0],
)


def build(program: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return program().double()


def decide(model: nn.Module, number: int) -> dict[str, Tensor]:
    """Bind a mutator that follows one of DECISIONS for every key."""
    mutator = next((m.bound_mutator for m in model.modules() if getattr(m, "bound_mutator", None)), None)
    mutator = Decided(model) if mutator is None else mutator
    masks = decision({key: DECISIONS[number][: len(c)] for key, c in mutator.choices_by_key.items()})
    if not all(bool(mask.detach().any()) for mask in masks.values()):
        masks = {key: torch.ones(len(mask), dtype=torch.bool) for key, mask in masks.items()}
    mutator.decide(masks)
    return masks


def assert_equal_steps(eager: nn.Module, compiled: nn.Module, numbers: Any = range(6)) -> None:
    """Same steps in training and evaluation under several decisions."""
    for number in numbers:
        for mode in (True, False):
            results = []
            for model in (eager, compiled):
                model.train(mode)
                masks = decide(model, number)
                random.seed(number)
                numpy.random.seed(number)
                torch.manual_seed(number)
                results.append(step(model, masks, type(eager).args(), type(eager).kwargs(), seed=number))
            assert_same(results[1], results[0])


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
    assert not model.op.training


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
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
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


# ----- what changes after compiling


@pytest.mark.parametrize("where", ["model", "choice", "candidate", "candidate's part", "backward"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run(where: str, when: str) -> None:
    def hook(model: nn.Module) -> None:
        calls: list[int] = []
        model.__dict__["hook_calls"] = calls
        target: Any = {
            "model": "",
            "choice": "op",
            "candidate": "op.1",
            "candidate's part": "op.1.1",
            "backward": "op.1",
        }
        module = model.get_submodule(target[where])
        if where == "backward":
            module.register_full_backward_hook(lambda module, *_: calls.append(1))
        else:
            module.register_forward_hook(lambda module, args, output: (calls.append(1), output * 2)[1])
            module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    eager, model = build(programs.SharedPrefixes), build(programs.SharedPrefixes)
    for network in (eager, model):
        network.op[1] = nn.Sequential(nn.ReLU(), conv(1)).double()  # type: ignore[index]
        network.op[1].load_state_dict(network.op[2].state_dict())  # type: ignore[index]
    hook(eager)
    if when == "before":
        hook(model)
    compiled = nascompile.compile(model, image())
    if when == "after":
        step(compiled, decide(model, 0), (image(),), {})
        hook(model)
    model.__dict__["hook_calls"].clear()
    assert_equal_steps(eager, compiled)
    assert model.__dict__["hook_calls"] == eager.__dict__["hook_calls"]
    assert eager.__dict__["hook_calls"]
    if where == "choice":
        assert "hooks" in compiled.notes["op"]


def test_hooks_on_the_compiled_model_run() -> None:
    compiled = nascompile.compile(build(programs.Plain), image())
    decide(compiled, 1)
    compiled.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(compiled(image()), torch.zeros(1))


class DropPath(programs.Program):
    class Config:
        scale = 1.0

        def __init__(self) -> None:
            self.shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.drop_path_prob = 0.0
        self.config = self.Config()
        self.table = {"factor": [1.0]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x)
        if self.drop_path_prob > 0 and self.training:
            x = x * (torch.rand(x.size(0), 1, 1, 1) > self.drop_path_prob)
        return (x + self.config.shift) * self.table["factor"][0]


def test_attributes_may_change_between_calls() -> None:
    eager, model = build(DropPath), build(DropPath)
    compiled: Any = nascompile.compile(model, image())
    for change in (
        lambda m: None,
        lambda m: setattr(m, "drop_path_prob", 0.5),
        lambda m: setattr(m.config, "shift", 1.0),
        lambda m: m.table["factor"].__setitem__(0, 3.0),
        lambda m: setattr(m, "drop_path_prob", 0.0),
    ):
        change(eager)
        change(model)
        assert_equal_steps(eager, compiled, [0, 1])
    assert not compiled.islands


def test_an_attribute_of_every_epoch_is_followed_by_traces() -> None:
    eager, model = build(DropPath), build(DropPath)
    compiled: Any = nascompile.compile(model)
    for epoch in range(20):
        for network in (eager, model):
            network.drop_path_prob = epoch / 20  # type: ignore[assignment]
        for _ in range(10):
            assert_equal_steps(eager, compiled, [1])
    assert not compiled.islands


def test_an_attribute_of_every_call_is_given_up_in_words() -> None:
    eager, model = build(DropPath), build(DropPath)
    compiled: Any = nascompile.compile(model)
    for call in range(24):
        for network in (eager, model):
            network.drop_path_prob = call / 24  # type: ignore[assignment]
        assert_equal_steps(eager, compiled, [1])
    (island,) = compiled.islands
    assert "called in more than 16 ways" in island.reason
    assert island.file == __file__


def test_candidates_may_be_replaced_and_deleted() -> None:
    eager, model = build(programs.SharedPrefixes), build(programs.SharedPrefixes)
    compiled = nascompile.compile(model, image())
    assert_equal_steps(eager, compiled, [0, 1])
    for network in (eager, model):
        torch.manual_seed(1)
        network.op[0] = nn.Sequential(nn.ReLU(inplace=True), conv(3)).double()  # type: ignore[index]
    assert_equal_steps(eager, compiled, [1, 2])
    for network in (eager, model):
        torch.manual_seed(1)
        network.op[2][1] = conv(3).double()  # type: ignore[index]
    assert_equal_steps(eager, compiled, [1, 2])
    for network in (eager, model):
        network.op[0][0].inplace = False  # type: ignore[index]
    assert_equal_steps(eager, compiled, [1, 2])
    for network in (eager, model):
        del network.op[0]  # type: ignore[attr-defined]
        Decided.release(network.op.bound_mutator)  # type: ignore[union-attr]
    assert_equal_steps(eager, compiled, [0, 1])


class Lazy(programs.Program):
    def __init__(self) -> None:
        super().__init__()
        self.op[1] = nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules() -> None:
    eager, model = build(Lazy), build(Lazy)
    compiled = nascompile.compile(model)
    for network in (eager, compiled):
        torch.manual_seed(0)
        decide(network, 0)
        network(image())
    assert_equal_steps(eager, compiled)


# ----- mutators of other kinds


class OwnWay(Decided):
    """Carries a layer choice out in its own way, and listens to scopes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heard: list[str] = []

    def on_forward_layer_choice(self, mutable: LayerChoice, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.heard.append(mutable.name)
        return mutable[0](*args, **kwargs) * 5, [1.0, 0.0, 0.0]


class Listening(Decided):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heard: list[str] = []

    def enter_mutable_scope(self, mutable_scope: MutableScope) -> None:
        self.heard.append(f"enter {mutable_scope.key}")

    def exit_mutable_scope(self, mutable_scope: MutableScope) -> None:
        self.heard.append(f"exit {mutable_scope.key}")


@pytest.mark.parametrize("kind", [OwnWay, Listening])
def test_mutators_with_their_own_way(kind: Any) -> None:
    eager, model = build(programs.Scopes), build(programs.Scopes)
    compiled = nascompile.compile(model, image())
    mutators = [kind(eager), kind(model)]
    assert_equal_steps(eager, compiled)
    assert mutators[0].heard == mutators[1].heard
    assert mutators[0].heard


def test_another_mutator_may_take_over() -> None:
    model = build(programs.Plain)
    compiled = nascompile.compile(model, image())
    first = OwnWay(model)
    first.decide({"op": [True, False, False]})
    expected = model.op[0](image()) * 5  # type: ignore[index]
    assert_same(compiled(image()), expected, exact=True)
    first.release()
    with pytest.raises(ValueError, match="Mutator not set for 'op'"):
        compiled(image())
    Decided(model).decide({"op": [False, False, True]})
    assert_same(compiled(image()), image(), exact=True)


def test_a_bound_mutator_without_a_decision() -> None:
    model = build(programs.Plain)
    compiled = nascompile.compile(model, image())
    Decided(model)
    with pytest.raises(ValueError, match='"op" not found in decision cache'):
        compiled(image())


# ----- never silent


def test_requirements() -> None:
    assert not nascompile.compile(build(programs.Plain), image(), require="fused").islands
    with pytest.raises(TraceError, match="expected None or one of: traced, fused"):
        nascompile.compile(build(programs.Plain), image(), require="everything")
    with pytest.raises(TraceError, match="needs example_inputs"):
        nascompile.compile(build(programs.Plain), require="traced")
    model = build(programs.Plain)
    model.op.reduction = "concat"  # type: ignore[union-attr]
    nascompile.compile(model, image(), require="traced")
    with pytest.raises(TraceError, match='op: mixed_sum: reduction "concat" is not a sum'):
        nascompile.compile(model, image(), require="fused")


def test_in_place_candidates_are_noted() -> None:
    model = build(programs.Plain)
    model.op[0], model.op[1] = nn.Identity(), nn.ReLU(inplace=True)  # type: ignore[index]
    compiled = nascompile.compile(model, image())
    assert "'1' changes its input in place" in compiled.notes["op"]


class WrongType(programs.Program):
    """Asks a question that the tracer cannot refuse."""

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) * (2 if type(x) is Tensor else 3)


def test_a_trace_that_is_not_the_program_is_not_used() -> None:
    eager, model = build(WrongType), build(WrongType)
    compiled = nascompile.compile(model)
    assert_equal_steps(eager, compiled)
    assert "other values than the model" in compiled.islands[0].reason


class Meter:
    def __init__(self) -> None:
        self.values: list[Any] = []


class Metered(programs.Program):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(x)
        self.meter.values.append(y.shape)
        return y


def test_changes_of_plain_objects_are_seen() -> None:
    eager, model = build(Metered), build(Metered)
    compiled = nascompile.compile(model, image())
    assert model.meter.values == []  # type: ignore[union-attr]
    assert_equal_steps(eager, compiled)
    assert model.meter.values == eager.meter.values  # type: ignore[union-attr]
    assert "changes Metered.meter" in compiled.islands[0].reason


def test_calling_with_wrong_arguments_is_the_users_own_error() -> None:
    compiled = nascompile.compile(build(programs.Plain))
    decide(compiled, 0)
    with pytest.raises(TypeError, match="forward"):
        compiled(image(), image())


def test_choices_of_different_shapes_are_named() -> None:
    model = build(programs.Plain)
    model.op[1] = nn.Conv2d(4, 4, 3).double()  # type: ignore[index]
    compiled = nascompile.compile(model)
    decide(model, 0)
    with pytest.raises(
        ValueError, match=r"choice 'op': candidate '1' returns \(2, 4, 3, 3\), '0' returns \(2, 4, 5, 5\)"
    ):
        compiled(image())


def test_input_choice_at_the_root() -> None:
    choice = InputChoice(n_candidates=3, n_chosen=1)
    compiled = nascompile.compile(choice)
    Decided(choice).decide({"InputChoice1": [False, True, False]})
    assert_same(compiled([image(), image() + 1, image()]), image() + 1, exact=True)


def test_inference_mode_autocast_and_no_grad_are_told_apart() -> None:
    eager, model = build(programs.NoGrad), build(programs.NoGrad)
    compiled = nascompile.compile(model)
    with torch.no_grad():
        decide(model, 0)
        compiled.eval()(image())
    assert_equal_steps(eager, compiled)
    with torch.inference_mode():
        assert compiled(image()).is_inference()
