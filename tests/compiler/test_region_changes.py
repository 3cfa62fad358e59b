"""What users change after a region was made: attributes, hooks, modules, tensors, formats, types."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import nascompile
from nascompile.compiler.region import region
from nascompile.compiler.region.executors import NATIVE
from tests.comparing import Decided, assert_same, step
from tests.compiler.region_models import Unit
from tests.compiler.region_pairs import NET, Pair
from tests.compiler.region_steps import build, decide, fp64_plans, images, regions
from tests.numerics import assert_closer


@pytest.fixture(autouse=True)
def plans_in_fp64() -> Iterator[None]:
    with fp64_plans():
        yield


def _momentum(model: Any) -> None:
    model.op[0].bn.momentum = 0.5


def _epsilon(model: Any) -> None:
    model.stem[1].eps = 0.3


def _dilation(model: Any) -> None:
    model.end[1].stride = (2, 1)


def _padding(model: Any) -> None:
    model.op[1].op[1].padding, model.op[1].op[1].dilation = (2, 2), (2, 2)


def _norm_in_evaluation(model: Any) -> None:
    model.op[0].bn.eval()


def _evaluation(model: Any) -> None:
    model.eval()


def _untracked(model: Any) -> None:
    model.op[0].bn.track_running_stats = False


def _bound(model: Any) -> None:
    model.op[2].body[2].max_val = 1.0


def _no_bias(model: Any) -> None:
    model.end[1].bias = None


def _parameter(model: Any) -> None:
    model.op[0].conv.weight = nn.Parameter(model.op[0].conv.weight.detach() * 2)


def _data(model: Any) -> None:
    model.op[0].conv.weight.data = model.op[0].conv.weight.data * 3
    model.stem[1].running_mean.data = torch.ones_like(model.stem[1].running_mean)


def _buffer(model: Any) -> None:
    model.op[0].bn.running_var = model.op[0].bn.running_var * 2


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.op[0].conv.weight.mul_(2)


def _leaf(model: Any) -> None:
    torch.manual_seed(3)
    model.op[1].op[6] = nn.Conv2d(8, 8, 1, bias=False).double()


def _candidate(model: Any) -> None:
    torch.manual_seed(3)
    model.op[1] = Unit("cba", 8, 5).double()


def _other_kind(model: Any) -> None:
    model.end[0] = nn.GELU()


def _wider_kernel(model: Any) -> None:
    torch.manual_seed(3)
    model.end[1].weight = nn.Parameter(torch.randn(4, 8, 1, 1, dtype=torch.float64))
    model.end[1].bias = nn.Parameter(torch.randn(4, dtype=torch.float64))
    model.end[1].out_channels = 4


def _statistics_reset(model: Any) -> None:
    model.stem[1].reset_running_stats()


def _forward_replaced(model: Any) -> None:
    model.op[0].act.forward = torch.tanh


CHANGES = (
    *(
        _momentum,
        _epsilon,
        _dilation,
        _padding,
        _norm_in_evaluation,
        _evaluation,
        _untracked,
        _bound,
        _no_bias,
    ),
    *(
        _parameter,
        _data,
        _buffer,
        _in_place,
        _leaf,
        _candidate,
        _other_kind,
        _wider_kernel,
        _statistics_reset,
    ),
    _forward_replaced,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change: Callable[[Any], None]) -> None:
    pair = Pair()
    pair.assert_same_steps()
    assert pair.plans
    pair.change(change)
    pair.assert_same_steps()


def _no_statistics(model: Any) -> None:
    model.op[0].bn.running_mean = model.op[0].bn.running_var = None


def _no_counter(model: Any) -> None:
    model.op[0].bn.num_batches_tracked = None


def _average_without_counter(model: Any) -> None:
    model.op[0].bn.momentum = model.op[0].bn.num_batches_tracked = None


def _nothing_tracked(model: Any) -> None:
    _no_statistics(model)
    _no_counter(model)
    model.op[0].bn.track_running_stats = False


NORMS = (_no_statistics, _no_counter, _average_without_counter, _untracked, _nothing_tracked)


@pytest.mark.parametrize("change", NORMS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_norms_without_all_buffers(change: Callable[[Any], None], training: bool, early: bool) -> None:
    pair = Pair(change if early else None)
    pair.change(lambda model: model.train(training))
    pair.assert_same_steps()
    if not early:
        pair.change(change)
        pair.assert_same_steps()
    assert pair.plans or "counts batches and has no running statistics" in pair.notes


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_with_one_statistic_fails_as_in_eager_mode(name: str, training: bool) -> None:
    def act(model: Any, masks: Any) -> tuple[Any, str]:
        setattr(model.op[0].bn, name, None)
        with pytest.raises((ValueError, RuntimeError)) as error:
            model(*images(NET, torch.float64))
        return error.type, str(error.value)

    pair = Pair(lambda model: model.train(training))
    pair.assert_same_steps()
    expected, actual = pair.each(act)
    assert actual == expected


HOOKED = ("op", "op.0", "op.0.conv", "op.1.op.2", "stem.1", "end.0", "end", "")


@pytest.mark.parametrize("path", HOOKED)
@pytest.mark.parametrize(
    "hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_added_later_are_called(path: str, hook: str) -> None:
    pair = Pair()
    pair.assert_same_steps()
    seen: dict[str, int] = {"eager": 0, "compiled": 0}

    def add(model: nn.Module, who: str) -> None:
        def count(*_: Any) -> None:
            seen[who] += 1

        getattr(model.get_submodule(path), hook)(count)

    add(pair.eager, "eager")
    # a hook of the model itself is one of the compiled model's
    add(pair.compiled if not path else pair.model, "compiled")
    # a fresh trace is first run beside the model, which calls hooks as well
    pair.assert_same_steps()
    seen.update(eager=0, compiled=0)
    pair.assert_same_steps(kinds=("soft", "one"))
    assert seen["eager"] == seen["compiled"] > 0


def test_copies_have_regions_of_their_own() -> None:
    pair = Pair()
    pair.assert_same_steps()
    for twin in (copy.deepcopy(pair.compiled), pickle.loads(pickle.dumps(pair.compiled))):
        mutator: Any = next(m.bound_mutator for m in twin.modules() if getattr(m, "bound_mutator", None))
        eager = copy.deepcopy(pair.eager)
        masks = decide(mutator, "soft", torch.float64)
        actual = step(twin, masks, images(NET, torch.float64), {})
        other: Any = next(m.bound_mutator for m in eager.modules() if getattr(m, "bound_mutator", None))
        expected = step(eager, decide(other, "soft", torch.float64), images(NET, torch.float64), {})
        assert_same(actual, expected)
        assert regions(twin)[0].plans
    pair.assert_same_steps()


@pytest.mark.parametrize("model_too", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_last(model_too: bool, dtype: torch.dtype) -> None:
    pair = Pair(dtype=dtype)
    exact: Any = build(NET)
    if model_too:
        pair.change(lambda model: model.to(memory_format=torch.channels_last))
    (x,) = images(NET, dtype)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected, actual = pair.each(lambda model, masks: step(model, masks, (x,), {}))
    assert actual["outputs"].stride() == expected["outputs"].stride()
    pair.assert_planned()
    if dtype == torch.float64:
        assert_same(actual, expected)
        return
    right = step(exact, decide(Decided(exact), "soft", torch.float64), (x.detach().double(),), {})
    assert_closer(actual["outputs"], expected["outputs"], right["outputs"])
    gradients = [
        torch.cat([g.flatten() for g in one["weights"].values()]) for one in (actual, expected, right)
    ]
    assert_closer(*gradients)


def test_a_model_in_double_runs_op_by_op_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "EXECUTORS", (NATIVE,))
    pair = Pair(dtype=torch.float64)
    pair.assert_same_steps()
    assert not pair.plans
    sentence = "no plan for images in torch.float64 on cpu: plans are for fp32, bf16 and fp16"
    assert sentence in pair.notes
    notes = nascompile.explain(pair.compiled, images(NET, torch.float64)).notes
    assert sentence in " ".join(notes.values())


def test_a_state_that_is_loaded_is_used() -> None:
    pair = Pair()
    pair.assert_same_steps()
    other = build(NET)
    torch.manual_seed(5)
    for parameter in other.parameters():
        parameter.detach().normal_()
    pair.eager.load_state_dict(other.state_dict())
    pair.compiled.load_state_dict(other.state_dict())
    pair.assert_same_steps()
    pair.model.load_state_dict({k: v * 2 for k, v in other.state_dict().items()}, assign=True)
    pair.eager.load_state_dict({k: v * 2 for k, v in other.state_dict().items()}, assign=True)
    pair.change(lambda model: model.requires_grad_(True))
    pair.assert_same_steps()
