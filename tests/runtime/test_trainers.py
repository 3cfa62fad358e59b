"""All trainers: find a planted best, repeat themselves, move only what was sampled, take any batch."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from nascompile import NascompileError, apply_fixed_architecture
from nascompile.callbacks import Callback
from nascompile.mutables import LayerChoice
from nascompile.random import RandomMutator
from nascompile.runtime.darts import DartsTrainer
from nascompile.runtime.sampling_trainer import SamplingTrainer
from nascompile.runtime.trainer import Trainer
from tests.runtime.toys import CLASSES, FEATURES, KINDS, Net, Planted, Records, accuracy, data, make, sgd


def exported(trainer: Trainer, tmp_path: Path) -> dict[str, Any]:
    file = tmp_path / "architecture.json"
    trainer.export(file)
    return json.loads(file.read_text())


# ---- the planted best, and repetition


@pytest.mark.parametrize("kind", KINDS)
def test_finds_the_planted_best(kind: str, tmp_path: Path) -> None:
    model = Planted()
    further: dict[str, Any] = {"num_epochs": 4, "dataset_train": data(160)}
    if kind == "enas":
        # a controller that is trained before the weights are locks itself in: rewards have to mean something
        further = {"child_steps": 80, "mutator_steps": 15, "mutator_lr": 0.02, "mutator_steps_aggregate": 5}
        further |= {"dataset_train": data(320)}
    trainer = make(kind, model, **further)
    trainer.train()
    assert exported(trainer, tmp_path) == {"op": 2}
    if kind == "enas":
        # the policy itself has learned it, not only the choice of the best sample
        assert max(range(4), key=lambda i: trainer.decisions[-1]["op"][i]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_run(kind: str, tmp_path: Path) -> None:
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(0)
        trainer = make(kind, seed=seed)
        trainer.train()
        runs.append((trainer.history, trainer.decisions, exported(trainer, tmp_path)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_eager_run_alike(kind: str) -> None:
    """The same losses to rounding, and the same BatchNorm statistics and random numbers."""
    trainers = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = make(kind, Net(dropout=0.3), seed=3, compile=compiled)
        trainer.train()
        trainers.append(trainer)
    eager, lean = trainers
    assert eager.compiled is None
    assert lean.compiled is not None
    for one, two in zip(eager.history, lean.history, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(value, lean.model.state_dict()[name], rtol=1e-3, atol=1e-4)


# ---- what moves


@pytest.mark.parametrize("kind", ["enas", "random"])
def test_parameters_of_unsampled_candidates_do_not_move(kind: str) -> None:
    """Not by momentum, not by weight decay: every step, only the sampled candidate's parameters change."""
    model = Planted()

    class Watch(Callback):
        def __init__(self) -> None:
            self.before: list[Tensor] = []
            self.seen: list[str] = []

        def on_batch_begin(self, epoch: int) -> None:
            self.before = [p.detach().clone() for p in model.parameters()]

        def on_batch_end(self, epoch: int) -> None:
            chosen = int(self.trainer.mutator.decision["op"].nonzero())
            moved = {
                name.split(".")[1]
                for (name, p), old in zip(model.named_parameters(), self.before, strict=True)
                if name.startswith("op.") and not torch.equal(p, old)
            }
            # a blind candidate's weight has a gradient of zero, its bias has not
            assert moved == {str(chosen)}
            self.seen.append(str(chosen))

    watch = Watch()
    make(kind, model, callbacks=[watch], num_epochs=3).train(validate=False)
    assert len(set(watch.seen)) > 1


def test_architecture_and_weights_move_in_turns() -> None:
    """The architecture step leaves the weights, the weight step leaves the architecture."""
    for kind in ("darts", "unrolled"):
        trainer = make(kind)
        assert isinstance(trainer, DartsTrainer)
        batch = trainer.split(next(iter(trainer.train_loader)))
        weights = [p.detach().clone() for p in trainer.model.parameters()]
        alphas = [a.detach().clone() for a in trainer.alphas]
        trainer.architecture_step(batch, batch)
        assert all(torch.equal(p, w) for p, w in zip(trainer.model.parameters(), weights, strict=True))
        assert all(p.grad is None for p in trainer.model.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(trainer.alphas, alphas, strict=True))


def test_unrolled_leaves_batch_norm_statistics_to_the_weight_step() -> None:
    trainer = make("unrolled")
    assert isinstance(trainer, DartsTrainer)
    trainer.set_training(True)
    batch = trainer.split(next(iter(trainer.train_loader)))
    before = [b.clone() for b in trainer.model.buffers()]
    trainer.architecture_step(batch, batch)
    assert before
    assert all(torch.equal(b, old) for b, old in zip(trainer.model.buffers(), before, strict=True))


def test_first_order_gradient_is_that_of_the_validation_loss() -> None:
    trainer = make("darts", Net(dropout=0.0))
    assert isinstance(trainer, DartsTrainer)
    batch = trainer.split(next(iter(trainer.valid_loader)))
    trainer.mutator.reset()
    loss = nn.functional.cross_entropy(trainer.model(*batch.args), batch.target)
    wanted = torch.autograd.grad(loss, trainer.alphas)
    trainer.architecture_step(batch, batch)
    for alpha, gradient in zip(trainer.alphas, wanted, strict=True):
        torch.testing.assert_close(alpha.grad, gradient)


def test_darts_halves_are_random_and_disjoint() -> None:
    loaders = make("darts", dataset_train=data(41)).loaders()
    halves = [loader.indices for loader in loaders.values()]
    assert halves[0] is not None
    assert halves[1] is not None
    assert sorted([*halves[0].tolist(), *halves[1].tolist()]) == list(range(41))
    assert halves[0].tolist() != list(range(20))


# ---- what goes in


@pytest.mark.parametrize("kind", KINDS)
def test_dict_batches(kind: str) -> None:
    class Keywords(Net):
        def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
            return super().forward(torch.cat([left, right], 1))

    class WholeDict(Net):
        def forward(self, parts: dict[str, Tensor]) -> Tensor:
            return super().forward(torch.cat([parts["left"], parts["right"]], 1))

    two: Any = Records(("left", "right"), "label")
    one: Any = Records(("anything",), "y")
    for compiled in (False, True):
        for model, records in ((Keywords(), two), (WholeDict(), two), (Net(), one)):
            trainer = make(
                kind, model, num_epochs=1, dataset_train=records, dataset_valid=records, compile=compiled
            )
            trainer.train()
            assert 0 < trainer.history[0]["valid_loss"] < 3


def test_several_inputs_in_a_tuple_and_reconstruction() -> None:
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    inputs, target = data(48).tensors
    pairs = TensorDataset(inputs, inputs, target)
    make("random", Two(), num_epochs=1, dataset_train=pairs, dataset_valid=pairs).train()

    class Bare(Dataset[Tensor]):
        def __len__(self) -> int:
            return 32

        def __getitem__(self, index: int) -> Tensor:
            return inputs[index]

    model = LayerChoice([nn.Linear(FEATURES, FEATURES), nn.Identity()], key="op")
    bare: Any = Bare()
    trainer = make(
        "random",
        nn.Sequential(model),
        loss=nn.functional.mse_loss,
        metrics=None,
        optimizer=sgd(model),
        num_epochs=1,
        dataset_train=bare,
        dataset_valid=bare,
    )
    trainer.train()
    assert trainer.mutator.export() == {"op": 1}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"x": 1.0}, "found none of them"),
        ({"x": 1.0, "y": 1.0, "label": 1.0}, "found label and y"),
        ({"label": 1.0}, "only the target 'label'"),
        ((1.0,), "a batch is a list of 1"),
    ],
)
def test_batches_that_cannot_be_split(record: Any, message: str) -> None:
    trainer = make("random", dataset_train=[record] * 4, compile=False)
    with pytest.raises(NascompileError, match=message):
        trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_may_be_a_function_a_module_or_anything_callable(kind: str) -> None:
    losses = []
    for loss in (
        nn.functional.cross_entropy,
        nn.CrossEntropyLoss(),
        lambda logits, target: nn.functional.cross_entropy(logits, target),
    ):
        torch.manual_seed(0)
        trainer = make(kind, loss=loss, seed=0, num_epochs=1)
        trainer.train()
        losses.append(trainer.history)
    assert losses[0] == losses[1] == losses[2]


def test_auxiliary_logits_add_to_the_training_loss_only() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)])
            self.side = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Any:
            return self.op(x), self.side(x)

    model = Auxiliary()
    trainer = make("random", model, aux_weight=0.5)
    batch = trainer.split(next(iter(trainer.test_loader)))
    trainer.mutator.reset()
    logits, loss = trainer.forward(batch)
    main, side = (nn.functional.cross_entropy(part, batch.target) for part in model(*batch.args))
    torch.testing.assert_close(loss, main + 0.5 * side)
    trainer.train()
    trainer.set_training(False)
    logits, loss = trainer.forward(batch)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, batch.target))
    # the side head was trained
    assert trainer.optimizer.state[model.side.weight]


def test_metrics_may_be_a_number_or_none() -> None:
    trainer = make("random", metrics=lambda logits, target: float(accuracy(logits, target)), num_epochs=1)
    trainer.train()
    assert sorted(trainer.history[0]) == ["epoch", "train_loss", "train_metric", "valid_loss", "valid_metric"]
    assert sorted(make("random", metrics=None).validate()) == ["loss"]


def test_averages_weigh_examples_not_batches() -> None:
    trainer = make("random", dataset_valid=data(17, seed=1), batch_size=16)
    trainer.mutator.reset()
    whole = trainer.split(
        next(iter(make("random", dataset_valid=data(17, seed=1), batch_size=17).test_loader))
    )
    measured = trainer.evaluate(trainer.test_loader)
    logits, loss = trainer.forward(whole)
    assert measured["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert measured["acc"] == pytest.approx(float(accuracy(logits, whole.target)), rel=1e-5)


def test_training_averages_weigh_examples_too() -> None:
    counting = make("random", Planted(), metrics=lambda logits, target: len(target), dataset_train=data(17))
    counting.train()
    assert counting.history[0]["train_metric"] == pytest.approx((16 * 16 + 1) / 17)


# ---- how it runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_bf16(kind: str, compiled: bool) -> None:
    seen: set[torch.dtype] = set()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        seen.add(logits.dtype)
        return nn.functional.cross_entropy(logits, target)

    trainer = make(kind, loss=loss, precision="bf16", compile=compiled)
    trainer.train()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in [*trainer.model.parameters(), *trainer.mutator.parameters()])
    assert trainer.history[-1]["train_loss"] < 2


def test_trainers_and_accelerate_do_not_share_state() -> None:
    outside = tuple(dict(state._shared_state) for state in (PartialState, AcceleratorState, GradientState))
    first, second = make("random", precision="bf16"), make("random", precision="no")
    dtypes = []
    for trainer in (first, second, first):
        trainer.mutator.reset()
        batch = trainer.split(next(iter(trainer.test_loader)))
        dtypes.append(trainer.forward(batch)[0].dtype)
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert outside == tuple(
        dict(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)
    )


def test_log_frequency(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nascompile")
    make("random", log_frequency=2, num_epochs=1).train()
    steps = [m for m in caplog.messages if re.search(r"step \d+/6 .*loss", m)]
    assert len(steps) == 3
    caplog.clear()
    make("random", num_epochs=1).train()
    assert not [m for m in caplog.messages if "step" in m]


@pytest.mark.parametrize("kind", KINDS)
def test_history_decisions_and_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = make(kind)
    trainer.train()
    assert list(tmp_path.iterdir()) == []
    assert [entry["epoch"] for entry in trainer.history] == [0, 1]
    assert {"train_loss", "train_acc", "valid_loss", "valid_acc"} <= set(trainer.history[0])
    lengths = {key: len(choice) for key, choice in trainer.mutator.choices_by_key.items()}
    for decision in trainer.decisions:
        assert {key: len(values) for key, values in decision.items()} == lengths
        if kind in ("enas", "random"):
            assert sum(decision["cell.first"]) == pytest.approx(1)
        else:
            assert 0 < sum(decision["cell.first"]) < 1
    text = json.dumps(exported(trainer, tmp_path), indent=2, sort_keys=True) + "\n"
    assert (tmp_path / "architecture.json").read_text() == text
    apply_fixed_architecture(Net(), tmp_path / "architecture.json")


def test_validate_false_measures_nothing() -> None:
    trainer = make("random", num_epochs=1)
    trainer.train(validate=False)
    assert not [name for name in trainer.history[0] if name.startswith("valid")]


def test_random_ranks_by_reward_when_there_is_one(tmp_path: Path) -> None:
    """The reward prefers what the loss does not."""
    model = Planted()
    trainer = make(
        "random", model, samples=8, reward_function=lambda logits, target: -accuracy(logits, target)
    )
    trainer.train()
    assert exported(trainer, tmp_path)["op"] != 2
    assert isinstance(trainer, SamplingTrainer)
    assert trainer.derived is not None
    assert trainer.derived[2] <= 0


# ---- what is refused


def refused(message: str, kind: str = "random", **overrides: Any) -> None:
    with pytest.raises(NascompileError, match=message):
        make(kind, **overrides)


def test_refuses_bad_arguments_and_leaves_the_model_free() -> None:
    refused("batch_size is 0", batch_size=0)
    refused("num_epochs is -1", num_epochs=-1)
    refused("workers is '2'", workers="2")
    refused("log_frequency is 0", log_frequency=0)
    refused("loss is a int", loss=3)
    refused("metrics is a str", metrics="accuracy")
    refused("dataset_train is empty", dataset_train=[])
    refused("dataset_valid is a generator", dataset_valid=(x for x in ()))
    refused("expected at least 2, to split", kind="darts", dataset_train=data(1))
    refused("device 'cuda:9'|device 'nonsense'", device="nonsense")
    refused("precision is 'half'", precision="half")
    refused("needs a CUDA device", precision="fp16")
    refused("does not go with precision", kind="unrolled", precision="fp16")
    refused("samples is 0", samples=0)
    refused("reward_function is a int", kind="enas", reward_function=1)
    refused("child_steps 0", kind="enas", child_steps=0)
    refused("nothing to search", kind="darts", model=nn.Linear(FEATURES, CLASSES))
    model = Net()
    refused("device 'nonsense'", model=model, device="nonsense")
    make("random", model)
    refused("bound to another model", mutator=RandomMutator(Net()))


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE is 2")


def test_model_that_cannot_be_compiled_stays_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while compiling leaves the model for another trainer to take."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise NascompileError("no")

    monkeypatch.setattr("nascompile.compiler.compiled.compile", fail)
    model = Net()
    with pytest.raises(NascompileError, match="no"):
        make("random", model, compile=True)
    assert model.first.bound_mutator is None
