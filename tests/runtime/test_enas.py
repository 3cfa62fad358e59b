"""ENAS: the controller's log-probabilities recomputed, REINFORCE on a bandit, the method's pitfalls."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nascompile import NascompileError
from nascompile.enas import EnasMutator
from nascompile.mutables import InputChoice, LayerChoice, MutableScope
from nascompile.runtime.enas import EnasTrainer
from tests.runtime.toys import FEATURES, data, make, sgd


class Layer(MutableScope):
    """A layer of the macro space."""

    def __init__(self, key: str, earlier: list[str], lengths: int) -> None:
        super().__init__(key)
        self.op = LayerChoice([nn.Identity() for _ in range(lengths)], key=f"{key}_op")
        self.skips = InputChoice(choose_from=earlier, key=f"{key}_skips") if earlier else None


class Macro(nn.Module):
    """Layers with skips to all earlier ones, choices of different lengths, and inputs without a source."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [Layer("l0", [], 2), Layer("l1", ["l0"], 3), Layer("l2", ["l0", "l1"], 2)]
        )
        self.pick = InputChoice(n_candidates=3, n_chosen=2, key="pick")
        self.one = InputChoice(choose_from=["l1", "l2", "l0_op"], n_chosen=1, key="one")
        self.nothing = InputChoice(n_candidates=2, n_chosen=0, key="nothing")


class Recompute:
    """The controller's arithmetic written a second time, for given masks, in plain matrix products."""

    def __init__(self, mutator: EnasMutator) -> None:
        self.m = mutator
        self.log_p = torch.zeros(())
        self.kl = torch.zeros(())
        size = mutator.g_emb.shape[1]
        self.x, self.h, self.c = mutator.g_emb[0], torch.zeros(size), torch.zeros(size)
        self.anchors: dict[Any, Tensor] = {}

    def step(self) -> None:
        cell: Any = self.m.lstm[0]
        i, f, g, o = (cell.weight_ih @ self.x + cell.weight_hh @ self.h).chunk(4)
        self.c = f.sigmoid() * self.c + i.sigmoid() * g.tanh()
        self.h = o.sigmoid() * self.c.tanh()

    def layer(self, key: str, mask: Tensor) -> None:
        self.step()
        n, index = str(len(mask)), int(mask.nonzero())
        head: Any = self.m.soft[n]
        logits = 1.5 * torch.tanh(head.weight @ self.h)
        self.log_p = self.log_p + logits[index] - logits.logsumexp(0)
        table: Any = self.m.embedding[n]
        self.x = table.weight[index]

    def queries(self, labels: list[Any]) -> Tensor:
        for label in labels:
            if label not in self.anchors:
                self.step()
                self.anchors[label] = self.h
        self.step()
        keys = [self.m.attn_anchor.weight @ self.anchors[x] for x in labels]
        seen = [(k + self.m.attn_query.weight @ self.h).tanh() for k in keys]
        return 1.5 * torch.tanh(torch.stack([self.m.v_attn.weight[0] @ s for s in seen]))

    def skips(self, labels: list[Any], mask: Tensor) -> None:
        q = self.queries(labels)
        p = torch.sigmoid(2 * q)
        chosen = mask.float()
        self.log_p = self.log_p + (chosen * p.log() + (1 - chosen) * (1 - p).log()).sum()
        self.kl = self.kl + (p * (p / 0.4).log() + (1 - p) * ((1 - p) / 0.6).log()).sum()
        anchors = torch.stack([self.anchors[x] for x in labels])
        self.x = (chosen[:, None] * anchors).sum(0) / (1 + chosen.sum())


def test_probabilities_recomputed() -> None:
    """The sum over the orders in which two inputs may come is a probability again."""
    mutator = EnasMutator(Macro(), lstm_size=7)
    assert sorted(mutator.soft) == ["2", "3"]
    for _ in range(5):
        masks = mutator.sample_search()
        other = Recompute(mutator)
        other.layer("l0_op", masks["l0_op"])
        other.anchors["l0"] = other.h
        other.layer("l1_op", masks["l1_op"])
        other.skips(["l0"], masks["l1_skips"])
        other.anchors["l1"] = other.h
        other.layer("l2_op", masks["l2_op"])
        other.skips(["l0", "l1"], masks["l2_skips"])
        other.anchors["l2"] = other.h
        torch.testing.assert_close(mutator.sample_skip_penalty, other.kl)
        picked = masks["pick"].nonzero().flatten().tolist()
        p = other.queries([("pick", 0), ("pick", 1), ("pick", 2)]).softmax(0)
        # the mutator knows in which order it drew them; the test does not
        orders = [(p[a] * p[b] / (1 - p[a])).log() for a, b in (picked, picked[::-1])]
        other.x = torch.stack([other.anchors["pick", i] for i in picked]).mean(0)
        q = other.queries(["l1", "l2", "l0_op"])
        rest = q[int(masks["one"].nonzero())] - q.logsumexp(0)
        wanted = [-(other.log_p + order + rest) for order in orders]
        assert any(torch.allclose(mutator.sample_log_prob, w, rtol=1e-5) for w in wanted)
        assert masks["nothing"].tolist() == [False, False]


def test_samples_follow_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of two inputs drawn without replacement equal the products of probabilities."""

    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick = InputChoice(n_candidates=3, n_chosen=2, key="pick")

    mutator = EnasMutator(Pick(), lstm_size=7)
    logits = torch.tensor([0.0, 1.0, -0.5])
    p = logits.softmax(0)
    monkeypatch.setattr(mutator, "_bound", lambda _: logits.view(3, 1))
    with torch.no_grad():
        draws = 1000
        seen = Counter(tuple(mutator.sample_search()["pick"].tolist()) for _ in range(draws))
    for pair in itertools.combinations(range(3), 2):
        a, b = (float(p[i]) for i in pair)
        wanted = a * b / (1 - a) + a * b / (1 - b)
        assert seen[tuple(i in pair for i in range(3))] / draws == pytest.approx(wanted, abs=0.06)


def test_entropy_is_that_of_the_policy_and_detached() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Identity() for _ in range(4)], key="op")

    mutator = EnasMutator(One())
    with torch.no_grad():
        mutator.soft["4"].weight.zero_()  # pyright: ignore
    mutator.reset()
    assert float(mutator.sample_entropy) == pytest.approx(math.log(4))
    assert not mutator.sample_entropy.requires_grad
    assert mutator.sample_log_prob.requires_grad


def test_temperature_branch_bias_and_reduction() -> None:
    class Reduce(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = LayerChoice([nn.Conv2d(1, 1, 1), nn.Identity()], key="reduce_op")
            self.free = InputChoice(n_candidates=4, key="free")

    def sampled(**options: Any) -> EnasMutator:
        torch.manual_seed(0)
        mutator = EnasMutator(Reduce(), **options)
        mutator.reset()
        return mutator

    plain = sampled(branch_bias=0.0)
    # with hardly any logits left, the bias alone decides: softmax([b, -b])
    biased = sampled(branch_bias=1.0, temperature=1e6)
    p = float(torch.sigmoid(torch.tensor(2.0)))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) + 4 * math.log(2)
    assert float(biased.sample_entropy) == pytest.approx(entropy, rel=1e-4)
    mean = sampled(branch_bias=1.0, temperature=1e6, entropy_reduction="mean")
    assert float(mean.sample_entropy) == pytest.approx(entropy - 3 * math.log(2), rel=1e-4)
    # every skip is sampled with 1/2, and the penalty knows that
    half = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    assert float(biased.sample_skip_penalty.detach()) == pytest.approx(4 * half, rel=1e-3)
    assert float(plain.sample_log_prob.detach()) > 0


def test_refuses_what_makes_no_sense() -> None:
    with pytest.raises(NascompileError, match="skip_target is 1"):
        EnasMutator(Macro(), skip_target=1.0)
    with pytest.raises(NascompileError, match="entropy_reduction is 'max'"):
        EnasMutator(Macro(), entropy_reduction="max")


class Bandit(nn.Module):
    """The arm that is chosen is the output; there is nothing to train but one scale."""

    def __init__(self, arms: tuple[float, ...]) -> None:
        super().__init__()
        self.arm = LayerChoice([Constant(value) for value in arms], key="arm")
        self.subset = InputChoice(n_candidates=3, n_chosen=1, key="subset")
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        zero = torch.zeros(len(x))
        return self.scale * (self.arm(x) + self.subset([zero, zero + 1.0, zero]))


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((len(x),), self.value)


def bandit_trainer(model: nn.Module, **overrides: Any) -> EnasTrainer:
    arguments: dict[str, Any] = {
        "loss": lambda out, target: (out * 0).mean(),
        "metrics": None,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "reward_function": lambda out, target: out.mean(),
        "child_steps": 1,
        "mutator_steps": 50,
        "mutator_steps_aggregate": 5,
        "mutator_lr": 0.02,
        "num_epochs": 1,
        "entropy_weight": 0.0,
    }
    trainer = make("enas", model, **{**arguments, **overrides})
    assert isinstance(trainer, EnasTrainer)
    return trainer


def test_reinforce_finds_the_best_arm() -> None:
    """Both choices without a LayerChoice source: the inputs of an InputChoice are told apart."""
    trainer = bandit_trainer(Bandit((0.0, 0.3, 1.0, 0.5)))
    trainer.train(validate=False)
    trainer.mutator.keep(None)
    samples = [trainer.mutator.export() for _ in range(100)]
    # logits within +-1.5 allow 0.87 and 0.91 at most
    assert Counter(sample["arm"] for sample in samples)[2] > 75
    assert Counter(sample["subset"] for sample in samples)[1] > 75


class OneChoice(nn.Module):
    """A bandit with arms 0, 0.3, 1 and 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.arm = LayerChoice([Constant(value) for value in ARMS], key="arm")
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.arm(x) * self.scale


ARMS = (0.0, 0.3, 1.0, 0.5)


def test_reinforce_gradient_is_exact_in_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every arm is sampled once; weighted by its probability, the estimates add up to the exact gradient."""
    trainer = bandit_trainer(OneChoice(), mutator_steps=1, mutator_steps_aggregate=1, mutator_lr=0.0)
    head: Any = trainer.mutator.soft["4"]
    recomputed = Recompute(trainer.mutator)
    recomputed.step()
    p = (1.5 * torch.tanh(head.weight @ recomputed.h)).softmax(0)
    exact = torch.autograd.grad(-(p * torch.tensor(ARMS)).sum(), head.weight, retain_graph=True)[0]
    total = torch.zeros_like(exact)
    for arm in range(4):
        monkeypatch.setattr(torch, "multinomial", lambda probs, n, arm=arm: torch.tensor([[arm]]))
        trainer.baseline = 0.4
        trainer.train_controller()
        total += p[arm].detach() * head.weight.grad
    torch.testing.assert_close(total, exact, rtol=1e-4, atol=1e-6)


def test_baseline_is_the_mean_and_then_a_running_average() -> None:
    trainer = bandit_trainer(Bandit((1.0, 1.0)), baseline_decay=0.6)
    assert trainer._advantage(2.0) == 0.0
    assert trainer._advantage(3.0) == pytest.approx(1.0)
    assert trainer._advantage(4.0) == pytest.approx(4 - 2.5)
    # 2/3 would be the plain mean's share
    assert trainer.baseline == pytest.approx(0.6 * 2.5 + 0.4 * 4)


def test_reward_is_measured_in_evaluation_mode_and_moves_no_statistics() -> None:
    model = nn.Sequential(LayerChoice([nn.Linear(FEATURES, 3), nn.Linear(FEATURES, 3)]), nn.BatchNorm1d(3))
    modes: list[bool] = []

    def reward(logits: Tensor, target: Tensor) -> float:
        modes.append(model.training)
        return 0.0

    trainer = make("enas", model, reward_function=reward, optimizer=sgd(model), num_epochs=1)
    assert isinstance(trainer, EnasTrainer)
    before = model[1].running_mean.clone()  # pyright: ignore
    trainer.train_controller()
    assert modes
    assert not any(modes)
    assert torch.equal(model[1].running_mean, before)  # pyright: ignore


def test_derives_the_best_of_its_samples_on_held_out_data() -> None:
    """With an untrained controller a single sample would be right one time in four."""
    trainer = bandit_trainer(Bandit((0.0, 0.3, 1.0, 0.5)), mutator_steps=0, samples=12)
    trainer.train(validate=False)
    assert trainer.mutator.export() == {"arm": 2, "subset": 1}
    assert trainer.derived is not None
    assert trainer.derived[2] == pytest.approx(2.0)
    assert trainer.mutator.export() == trainer.mutator.export()


def test_deriving_does_not_disturb_the_run() -> None:
    trainer = bandit_trainer(Bandit((0.0, 0.3, 1.0, 0.5)), mutator_steps=1, samples=3)
    trainer.train(validate=False)
    state = torch.get_rng_state()
    trainer.derived = None
    trainer.derive()
    assert torch.equal(torch.get_rng_state(), state)


def test_split_is_ninety_to_ten() -> None:
    trainer = make("enas", dataset_train=data(50))
    loaders = trainer.loaders()
    train, valid = loaders["train"].indices, loaders["valid"].indices
    assert train is not None
    assert valid is not None
    assert (len(train), len(valid)) == (45, 5)
    assert sorted([*train.tolist(), *valid.tolist()]) == list(range(50))
