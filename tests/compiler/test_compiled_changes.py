"""What may change after compiling, mutators with ideas of their own, and that nothing happens silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.errors import TraceError
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from tests.comparing import Decided, assert_same, step
from tests.compiler import programs
from tests.compiler.programs import conv, image
from tests.compiler.stepping import assert_equal_steps, build, decide

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
    assert model.meter.values == []
    assert_equal_steps(eager, compiled)
    assert model.meter.values == eager.meter.values
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
