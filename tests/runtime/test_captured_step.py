"""Steps that are recorded and replayed do what they do without, in every circumstance; CUDA graphs are
emulated."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile.runtime.captured_step import GRAPHS, WARM_UP, CapturedStep, addresses, tensors_of
from tests.runtime.emulated_graphs import EmulatedRecorder, EmulatedRecording

BATCH = 6
FIRST = WARM_UP + 1
"""Steps that are never replayed: the first one makes the optimizer's state."""


class Setup:
    """A small model, how it is trained, and the training step as it is and replayed."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any):
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        options = options or {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
        self.optimizer = optimizer(self.model.parameters(), **options)
        self.extra: Callable[[Tensor], Tensor] = lambda loss: loss
        self.recorder = EmulatedRecorder()
        self.captured = self.replayed()

    def replayed(self) -> CapturedStep:
        return CapturedStep(
            self.step,
            self.recorder,
            [self.optimizer],
            lambda *_: addresses(self.state()),
            lambda: [self.state()],
        )

    def state(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers(), *tensors_of(self.optimizer)]

    def groups(self) -> list[list[Tensor]]:
        return [list(self.model.parameters()), list(self.model.buffers()), tensors_of(self.optimizer)]

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = None
        logits = self.model(x)
        loss = self.extra(nn.functional.cross_entropy(logits, y))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        return {"logits": logits, "loss": loss}


def batches(count: int, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = (torch.randn(size, 4, generator=generator) for _ in range(count))
    return [(x, torch.randint(0, 3, (size,), generator=generator)) for x in made]


def compare(
    found: Setup,
    data: list[tuple[Tensor, Tensor]],
    before: Callable[[Setup, int], object] = lambda setup, number: None,
) -> None:
    """Train a copy without replays on the same batches: outputs and state must agree after each step."""
    plain = Setup.__new__(Setup)
    plain.model, plain.optimizer, plain.extra = copy.deepcopy((found.model, found.optimizer, found.extra))
    for number, batch in enumerate(data):
        before(plain, number)
        expected = plain.step(*batch)
        before(found, number)
        outputs = found.captured(*batch)
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(found.state(), plain.state())


def test_replays_do_what_the_step_does() -> None:
    setup = Setup()
    compare(setup, batches(10))
    assert setup.captured.replays == 10 - FIRST
    assert setup.recorder.recordings == 1
    assert setup.captured.reason is None


def test_adam_counts_its_steps_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch knows that only for devices that have graphs
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda: ["cpu"])
    setup = Setup(torch.optim.Adam, lr=1e-2, capturable=True, foreach=False)
    compare(setup, batches(10))
    assert setup.captured.replays == 10 - FIRST


def test_batches_of_another_size_have_a_recording_of_their_own() -> None:
    setup = Setup()
    data = [batch for _ in range(6) for batch in (*batches(2), *batches(1, size=3))]
    compare(setup, data)
    assert setup.recorder.recordings == 2
    assert setup.captured.replays == len(data) - FIRST - WARM_UP


def test_another_learning_rate_is_recorded_anew() -> None:
    setup = Setup()

    def schedule(one: Setup, number: int) -> None:
        one.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number // 8)

    compare(setup, batches(24), schedule)
    assert setup.recorder.recordings == 3
    assert setup.captured.reason is None


def test_a_learning_rate_that_always_changes_is_not_worth_it() -> None:
    setup = Setup()

    def schedule(one: Setup, number: int) -> None:
        one.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)

    compare(setup, batches(10), schedule)
    assert setup.captured.reason is not None
    assert "changes too often" in setup.captured.reason
    assert setup.recorder.recordings <= 3


def test_more_sizes_than_are_kept_are_not_worth_it() -> None:
    setup = Setup()
    data = [batch for _ in range(9) for size in range(2, 4 + GRAPHS) for batch in batches(1, size=size)]
    compare(setup, data)
    assert "changes too often" in str(setup.captured.reason)
    assert setup.recorder.recordings <= GRAPHS + 3


def test_batches_of_other_things_are_not_replayed() -> None:
    setup = Setup()
    step = setup.step
    found: Any = CapturedStep(
        lambda x, y, things: step(x, y), setup.recorder, [setup.optimizer], lambda *_: 0, setup.groups
    )
    thing = object()
    for batch in batches(7):
        found(*batch, thing)
    assert found.replays == 0


def test_a_step_that_reads_values_runs_as_it_is() -> None:
    setup = Setup()
    setup.extra = lambda loss: loss * (2 if loss.item() > 0 else 3)
    compare(setup, batches(8))
    assert setup.captured.replays == 0
    assert setup.captured.reason is not None
    assert "not permitted when stream is capturing" in setup.captured.reason


def test_a_step_that_draws_on_the_host_runs_as_it_is() -> None:
    setup = Setup()
    # the emulated device and the host share a generator
    setup.extra = lambda loss: loss * torch.rand(()).add(1)
    plain = copy.deepcopy((setup.model, setup.optimizer))
    torch.manual_seed(3)
    found = [setup.captured(*batch)["loss"].detach() for batch in batches(8)]
    setup.model, setup.optimizer = plain
    torch.manual_seed(3)
    assert found == [setup.step(*batch)["loss"].detach() for batch in batches(8)]
    assert setup.captured.reason == "a step draws random numbers on the host"


def test_parameters_that_lie_elsewhere_are_recorded_anew() -> None:
    setup = Setup()

    def move(one: Setup, number: int) -> None:
        if number == 6:
            weight = one.model[0].weight
            weight.data = weight.data.clone() * 2

    compare(setup, batches(14), move)
    assert setup.recorder.recordings == 2


def test_parameters_that_are_frozen_stay() -> None:
    setup = Setup()

    def freeze(one: Setup, number: int) -> None:
        one.model[0].requires_grad_(number < 6)

    compare(setup, batches(14), freeze)
    assert setup.recorder.recordings == 2


def test_what_is_returned_is_the_callers_own() -> None:
    setup = Setup()
    data = batches(8)
    losses = [setup.captured(*batch)["loss"].detach() for batch in data]
    assert setup.captured.replays == len(data) - FIRST
    assert len({float(loss) for loss in losses}) == len(data)


@pytest.mark.parametrize("what", ["weights", "no weights", "statistics", "counter", "momentum", "outputs"])
def test_a_recording_that_does_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    setup = Setup()
    replay = EmulatedRecording.replay

    def wrong(self: EmulatedRecording) -> None:
        before = setup.model[0].weight.detach().clone()
        replay(self)
        with torch.no_grad():
            if what == "weights":
                setup.model[0].weight.add_(0.01)
            elif what == "no weights":
                setup.model[0].weight.copy_(before)
            elif what == "statistics":
                setup.model[1].running_mean.mul_(1.5)
            elif what == "counter":
                setup.model[1].num_batches_tracked.add_(1)
            elif what == "momentum":
                tensors_of(setup.optimizer)[0].zero_()
            else:
                self.outputs["loss"].mul_(2)

    monkeypatch.setattr(EmulatedRecording, "replay", wrong)
    compare(setup, batches(8))
    assert setup.captured.reason == "a replayed step gave other parameters or outputs than the step itself"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS may keep numbers"),
        (lambda p: type("Own", (torch.optim.SGD,), {})(p, lr=0.1), "Own may keep numbers"),
    ],
)
def test_optimizers_that_keep_numbers_on_the_host(make: Any, reason: str) -> None:
    setup = Setup(lambda parameters, **_: make(list(parameters)))
    assert setup.captured.reason is not None
    assert reason in setup.captured.reason


def test_hooks_of_an_optimizer_are_called_in_each_step() -> None:
    setup = Setup()
    calls: list[int] = []
    setup.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    setup.captured = setup.replayed()
    for batch in batches(7):
        setup.captured(*batch)
    assert len(calls) == 7
