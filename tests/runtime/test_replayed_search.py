"""A search whose steps are replayed finds what it finds without; CUDA graphs are emulated."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError
from nascompile.runtime.callbacks import Callback
from nascompile.runtime.captured_step import make_capturable
from nascompile.runtime.darts import DartsTrainer
from nascompile.runtime.darts_mutator import DartsMutator
from nascompile.runtime.replaying import ReplayedStep, replayed, why_not_replayed
from nascompile.runtime.trainer import Trainer
from tests.runtime.emulated_graphs import EmulatedRecorder
from tests.runtime.toys import Net, data, make

STEPS = 10


class Scaled(Net):
    """A network whose forward reads a plain attribute."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Written(Net):
    """A network that runs as written: it counts its calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class AtEpochs(Callback):
    """Does something at the begin of every epoch."""

    def __init__(self, do: Callable[[Trainer, int], object]) -> None:
        super().__init__()
        self.do = do

    def on_epoch_begin(self, epoch: int) -> None:
        assert self.trainer is not None
        self.do(self.trainer, epoch)


class AtSteps(Callback):
    """Does something before the weights move."""

    def on_batch_begin(self, epoch: int) -> None:
        assert self.mutator is not None


class Hooked(nn.CrossEntropyLoss):
    """A loss that is not torch's own."""


class Tempered(DartsMutator):
    """A mutator that is not ours."""


@pytest.fixture(autouse=True)
def adam_on_the_emulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda: ["cpu"])


def searched(model: nn.Module, *, replays: bool, **options: Any) -> tuple[Any, Any]:
    """A search, and its steps where they are replayed."""
    torch.manual_seed(0)
    settings = {"num_epochs": 3, "dataset_train": data(2 * 16 * STEPS), "compile": True, "seed": 0}
    trainer: Any = make("darts", model, **{**settings, **options})
    for group in trainer.ctrl_optim.param_groups:
        # the same arithmetic in both
        group.update(capturable=True, foreach=False)
    if replays:
        trainer._search_step = ReplayedStep(trainer, trainer.search_step, EmulatedRecorder())
        trainer.replays = True
    trainer.train()
    return trainer, trainer._search_step


def same(left: Any, right: Any) -> None:
    assert [epoch.keys() for epoch in left.history] == [epoch.keys() for epoch in right.history]
    for one, other in zip(left.history, right.history, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for one, other in zip(left.decisions, right.decisions, strict=True):
        assert one.keys() == other.keys()
        for key, values in one.items():
            assert values == pytest.approx(other[key], rel=1e-4)
    torch.testing.assert_close(left.model.state_dict(), right.model.state_dict())
    torch.testing.assert_close(left.mutator.state_dict(), right.mutator.state_dict())


def net(kind: type[Net] = Net) -> Net:
    torch.manual_seed(1)
    # the emulated device has no random numbers of its own
    return kind(dropout=0.0)


def test_a_replayed_search_is_the_search() -> None:
    plain, _ = searched(net(), replays=False)
    found, step = searched(net(), replays=True)
    same(found, plain)
    assert step.captured.reason is None
    assert step.captured.replays >= 2 * STEPS


def test_attributes_that_change_between_epochs_are_seen() -> None:
    def scale(trainer: Any, epoch: int) -> None:
        trainer.model.scale = 1.0 + epoch

    plain, _ = searched(net(Scaled), replays=False, callbacks=[AtEpochs(scale)])
    found, step = searched(net(Scaled), replays=True, callbacks=[AtEpochs(scale)])
    same(found, plain)
    assert step.captured.replays


def test_a_loss_that_changes_between_epochs_is_seen() -> None:
    def smooth(trainer: Any, epoch: int) -> None:
        trainer.loss.label_smoothing = 0.2 * epoch

    plain, _ = searched(net(), replays=False, loss=nn.CrossEntropyLoss(), callbacks=[AtEpochs(smooth)])
    found, step = searched(net(), replays=True, loss=nn.CrossEntropyLoss(), callbacks=[AtEpochs(smooth)])
    same(found, plain)
    assert step.captured.replays


def test_what_runs_as_written_is_not_replayed() -> None:
    plain, _ = searched(net(Written), replays=False)
    found, step = searched(net(Written), replays=True)
    same(found, plain)
    assert found.model.calls == plain.model.calls
    assert step.captured.replays == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cuda_graph": False}, "cuda_graph=False"),
        ({"compile": False}, "not compiled"),
        ({"loss": lambda logits, target: nn.functional.cross_entropy(logits, target)}, "the loss is code"),
        ({"loss": Hooked()}, "the loss is code"),
        ({"callbacks": [AtSteps()]}, "AtSteps acts"),
    ],
)
def test_reasons_against_replays(options: dict[str, Any], reason: str) -> None:
    trainer = make("darts", net(), **{"compile": True, **options})
    assert reason in str(why_not_replayed(trainer))


def test_mutators_of_the_user_have_a_word() -> None:
    model = net()
    mutator = Tempered(model)
    trainer = make("darts", model, mutator=mutator, compile=True)
    assert "Tempered is code of your own" in str(why_not_replayed(trainer))
    trainer.cuda_graph = True
    assert why_not_replayed(trainer) is None


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, nn.CrossEntropyLoss()])
def test_torchs_losses_are_known(loss: Any) -> None:
    assert why_not_replayed(make("darts", net(), loss=loss, compile=True)) is None
    if isinstance(loss, nn.Module):
        loss.register_forward_hook(lambda *_: None)
        assert why_not_replayed(make("darts", net(), loss=loss, compile=True)) is not None


def test_another_loss_between_epochs_is_seen() -> None:
    def other(trainer: Any, epoch: int) -> None:
        trainer.loss = [nn.CrossEntropyLoss(), nn.MultiMarginLoss(), nn.CrossEntropyLoss(reduction="sum")][
            epoch
        ]

    plain, _ = searched(net(), replays=False, callbacks=[AtEpochs(other)])
    found, step = searched(net(), replays=True, callbacks=[AtEpochs(other)])
    same(found, plain)
    assert step.captured.replays


def test_a_loss_of_the_user_that_comes_later_is_not_replayed() -> None:
    factor = [1.0]

    def own(logits: Tensor, target: Tensor) -> Tensor:
        factor[0] += 1.0
        return factor[0] * nn.functional.cross_entropy(logits, target)

    def other(trainer: Any, epoch: int) -> None:
        factor[0] = 1.0
        if epoch == 1:
            trainer.loss = own

    plain, _ = searched(net(), replays=False, callbacks=[AtEpochs(other)])
    found, step = searched(net(), replays=True, callbacks=[AtEpochs(other)])
    same(found, plain)
    assert 0 < step.captured.replays <= STEPS


def test_a_choice_that_is_none_is_refused() -> None:
    with pytest.raises(NascompileError, match="cuda_graph is 'yes', expected None, True or False"):
        make("darts", net(), compile=True, cuda_graph="yes")


def test_a_cpu_has_no_graphs() -> None:
    trainer = make("darts", net(), compile=True)
    assert isinstance(trainer, DartsTrainer)
    assert replayed(trainer, trainer.search_step) == trainer.search_step
    assert not trainer.replays


def test_checkpoints_of_a_gpu_are_resumed_on_a_cpu(tmp_path: Any) -> None:
    """Adam counts its steps on the device there, and on the host here."""
    first: Any = make("darts", net(), compile=True, folder=tmp_path, num_epochs=1)
    first.train()
    for group in first.ctrl_optim.param_groups:
        group["capturable"] = True
    first.checkpoint()
    second: Any = make("darts", net(), compile=True, folder=tmp_path, num_epochs=2)
    second.resume()
    assert [group["capturable"] for group in second.ctrl_optim.param_groups] == [False]
    second.train()
    assert len(second.history) == 2


def test_only_optimizers_that_can_are_told_to() -> None:
    model = nn.Linear(2, 2)
    for kind in (torch.optim.SGD, torch.optim.Adam):
        optimizer = kind(model.parameters(), lr=0.1)
        make_capturable(optimizer, torch.device("cuda"))
        assert [group.get("capturable") for group in optimizer.param_groups] == [
            True if kind is torch.optim.Adam else None
        ]


def test_state_that_is_loaded_is_taken_up() -> None:
    """Optimizers make new tensors of it, at other addresses."""

    def back(trainer: Any, epoch: int) -> None:
        if epoch == 1:
            trainer.kept = [copy.deepcopy(o.state_dict()) for o in trainer.optimizers().values()]
        if epoch == 2:
            for optimizer, state in zip(trainer.optimizers().values(), trainer.kept, strict=True):
                optimizer.load_state_dict(state)

    plain, _ = searched(net(), replays=False, callbacks=[AtEpochs(back)])
    found, step = searched(net(), replays=True, callbacks=[AtEpochs(back)])
    same(found, plain)
    assert step.captured.replays
