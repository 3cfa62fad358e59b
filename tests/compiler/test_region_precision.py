"""Regions in low precision, step after step: modes that change, states that are kept, and double backward."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nascompile
from nascompile.compiler.region import region
from nascompile.compiler.verify import difference
from tests import numerics
from tests.comparing import Decided, assert_same, step
from tests.compiler.region_pairs import NET, Net, Pair
from tests.compiler.region_steps import build, decide, images, regions
from tests.compiler.region_types import Under

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with every plan that is made."""
    made: list[Any] = []
    original = region.build

    def build(*args: Any) -> Any:
        made.append(args)
        return original(*args)

    monkeypatch.setattr(region, "build", build)
    return made


def trained(model: nn.Module, mutator: Decided, autocast: torch.dtype | None, dtype: Any) -> dict[str, Any]:
    """A training step with soft weights."""
    masks = decide(mutator, "soft", torch.float32)
    return step(Under(model, autocast), masks, images(NET, dtype), {})


def assert_near(actual: Any, expected: Any, dtype: torch.dtype, share: float = 8.0) -> None:
    """Tensors of one type, as close as a few roundings leave them."""
    assert actual.dtype == expected.dtype
    assert numerics.relative_error(actual, expected) < share * numerics.FLOORS[dtype]


def test_a_mode_has_its_plans_once(builds: list[Any]) -> None:
    pair = Pair(dtype=torch.float32)
    counts = []
    for autocast in (None, torch.bfloat16, torch.float16) * 3:
        seen = pair.each(
            lambda model, masks, a=autocast: step(Under(model, a), masks, images(NET, torch.float32), {})
        )
        assert seen[1]["outputs"].dtype == seen[0]["outputs"].dtype == (autocast or torch.float32)
        counts.append(len(builds))
    assert counts[2:] == counts[2:3] * 7
    pair.assert_planned()


def test_a_model_that_changes_its_type_keeps_its_plan(builds: list[Any]) -> None:
    """The plan is in fp32 whatever the model is in, if the call is traced only once."""
    pair = Pair(dtype=torch.float32)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        pair.change(lambda model, d=dtype: model.to(d))
        expected, actual = pair.each(lambda model, masks, d=dtype: step(model, masks, images(NET, d), {}))
        assert actual["outputs"].dtype == expected["outputs"].dtype == dtype
        assert_near(actual["outputs"], expected["outputs"], dtype if dtype in LOW else torch.bfloat16)
        outputs.append(actual["outputs"])
        if dtype == torch.float32 and len(outputs) == 1:
            first = len(builds)
    assert len(builds) == first
    pair.assert_planned()


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """On, whether or not there is a GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_autocast_on_a_gpu_does_not_concern_the_cpu() -> None:
    pair = Pair(dtype=torch.float32)
    plain = trained(pair.compiled, pair.mutators[1], None, torch.float32)
    again = Pair(dtype=torch.float32)
    with cuda_autocast():
        under = trained(again.compiled, again.mutators[1], None, torch.float32)
    again.assert_planned()
    assert_same(under, plain, exact=True)


def test_one_region_in_several_modes() -> None:
    """As where a part of the model is called under autocast and another time without."""
    pair = Pair(dtype=torch.float32)
    trained(pair.compiled, pair.mutators[1], None, torch.float32)
    (found,) = regions(pair.compiled)
    plans = len(found.plans)
    (x,) = images(NET, torch.float32)
    for autocast in (None, torch.bfloat16, torch.float16, None):
        assert Under(found, autocast)(x).dtype == (autocast or torch.float32)  # type: ignore[arg-type]
    assert len(found.plans) == plans
    pair.assert_planned()


def test_weights_that_change_their_type_under_the_same_images() -> None:
    pair = Pair(dtype=torch.bfloat16)
    for norms in (torch.bfloat16, torch.float32):
        pair.change(
            lambda model, to=norms: [m.to(to) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        )
        expected, actual = pair.each(lambda model, masks: step(model, masks, images(NET, torch.bfloat16), {}))
        assert actual["outputs"].dtype == expected["outputs"].dtype == torch.bfloat16
        assert {g.dtype for g in actual["weights"].values()} == {torch.bfloat16, norms}
        pair.assert_planned()
    pair.change(lambda model: model.float())

    def refusal(model: nn.Module, masks: Any) -> str:
        with pytest.raises(RuntimeError) as problem:
            model(*images(NET, torch.bfloat16))
        return str(problem.value)

    expected, actual = pair.each(refusal)
    assert actual == expected


def test_autocast_switched_off_inside() -> None:
    pair = Pair(dtype=torch.float32)

    def act(model: nn.Module, masks: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            return model(*images(NET, torch.float32))

    expected, actual = pair.each(act)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    pair.assert_planned()


def test_backward_under_autocast_and_outside_agree() -> None:
    found = []
    for inside in (True, False):
        pair = Pair(dtype=torch.float32)
        decide(pair.mutators[1], "soft", torch.float32)
        (x,) = images(NET, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = pair.compiled(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        pair.assert_planned()
        found.append([x.grad, *(parameter.grad for parameter in pair.model.parameters())])
    assert_same(found[0], found[1], exact=True)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_second_backward(autocast: bool) -> None:
    """With the memory of the first gone the plan runs again, and leaves the statistics alone."""
    dtype = torch.float32 if autocast else torch.bfloat16
    pair = Pair(dtype=dtype)
    decide(pair.mutators[1], "soft", torch.float32)
    (x,) = images(NET, dtype)
    loss = Under(pair.compiled, torch.bfloat16 if autocast else None)(x).float().square().sum()
    before = [buffer.clone() for buffer in pair.model.buffers()]
    wanted = [x, *pair.model.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert [gradient.dtype for gradient in first] == [dtype] * len(wanted)
    pair.assert_planned()
    assert_same(second, first, exact=True)
    assert_same(list(pair.model.buffers()), before, exact=True)


@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_of_gradients(autocast: bool) -> None:
    """They come from the region op by op, in the types of forward, in whatever mode backward runs."""
    dtype = torch.float32 if autocast else torch.bfloat16

    def act(model: nn.Module, masks: Any) -> list[Tensor]:
        (x,) = images(NET, dtype)
        loss = Under(model, torch.bfloat16 if autocast else None)(x).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        mask = next(iter(masks.values()))
        return [gradient, *torch.autograd.grad(gradient.float().square().sum(), [x, mask])]

    pair = Pair(dtype=dtype)
    trained(pair.compiled, pair.mutators[1], torch.bfloat16 if autocast else None, dtype)
    found: Any = regions(pair.compiled)[0]
    fallback, seen = found.fallback, []

    def op_by_op(*tensors: Tensor) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), *(tensor.dtype for tensor in tensors)))
        return fallback(*tensors)

    found.fallback = op_by_op
    expected, actual = pair.each(act)
    assert seen == [(autocast, dtype)]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert numerics.relative_error(one, other) < 0.1


@pytest.mark.parametrize("dtype", LOW)
def test_a_checkpoint_goes_round(dtype: torch.dtype) -> None:
    """Weights and statistics of a model in low precision, to a file and back, eagerly and compiled."""
    pair = Pair(dtype=dtype)
    for _ in range(3):
        trained(pair.compiled, pair.mutators[1], None, dtype)
    file = io.BytesIO()
    torch.save(pair.compiled.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert {tensor.dtype for tensor in state.values()} == {dtype, torch.int64}
    other = Pair(dtype=dtype)
    other.compiled.load_state_dict(state)
    other.eager.load_state_dict(state)
    outputs = []
    for model, mutator in ((pair.compiled, pair.mutators[1]), (other.compiled, other.mutators[1])):
        model.eval()
        decide(mutator, "soft", torch.float32)
        outputs.append(model(*images(NET, dtype)))
    assert_same(outputs[1], outputs[0], exact=True)
    assert state["op.0.bn.num_batches_tracked"] == 3
    assert not torch.equal(state["op.0.bn.running_mean"], torch.zeros_like(state["op.0.bn.running_mean"]))


def test_a_trace_may_differ_by_the_rounding_of_its_type() -> None:
    """Else a deep network in bf16 counts as wrongly traced: eight cells of DARTS are 2.6 % off."""
    model = nn.Identity()
    x = torch.linspace(-1, 1, 16)

    def off(x: Tensor) -> Tensor:
        return x * 1.05

    assert "other values" in str(difference(model, off, (x,), {}))
    assert "other values" in str(difference(model, off, (x.half(),), {}))
    assert difference(model, off, (x.bfloat16(),), {}) is None
    assert "other values" in str(difference(model, lambda x: x * 1.5, (x.bfloat16(),), {}))
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model, off, (x,), {}) is None


def test_statistics_of_what_is_not_chosen_stay() -> None:
    pair = Pair(dtype=torch.bfloat16)
    decide(pair.mutators[1], "one", torch.float32)
    buffers = dict(pair.model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    step(pair.compiled, {}, images(NET, torch.bfloat16), {})
    pair.assert_planned()
    changed = {name for name, buffer in buffers.items() if not torch.equal(buffer, before[name])}
    assert any(name.startswith("op.0.") for name in changed)
    assert not any(name.startswith(("op.1.", "op.2.")) for name in changed)


class Tied(nn.Module):
    """Two norms that update the same running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        other: Any = self.net.op[0]
        stem: Any = self.net.stem
        for name in ("running_mean", "running_var"):
            other.bn.register_buffer(name, getattr(stem[1], name))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_statistics_that_two_norms_share() -> None:
    """Each update counts, though the plan works on a copy in fp32."""
    found = []
    for dtype, compile_it in ((torch.bfloat16, True), (torch.float32, False)):
        torch.manual_seed(0)
        model: Any = Tied()
        model.net.stem.to(dtype)
        model.net.op.to(dtype)
        model.net.end.to(dtype)
        for name in ("running_mean", "running_var"):
            model.net.op[0].bn._buffers[name] = model.net.stem[1]._buffers[name]
        Decided(model).decide({"LayerChoice1": torch.tensor([True, False, False])})
        compiled = nascompile.compile(model) if compile_it else model
        compiled(torch.randn(3, 8, 7, 5, generator=torch.Generator().manual_seed(1)).to(dtype))
        if isinstance(compiled, nascompile.CompiledModel):
            assert regions(compiled)[0].plans
        found.append(model.net.stem[1].running_var.float())
    assert numerics.relative_error(*found) < 2 * numerics.FLOORS[torch.bfloat16]


@pytest.mark.parametrize("dtype", LOW)
def test_weights_and_images_channels_last(dtype: torch.dtype) -> None:
    pair = Pair(lambda model: model.to(memory_format=torch.channels_last), dtype)
    (x,) = images(NET, dtype)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected, actual = pair.each(lambda model, masks: step(model, masks, (x,), {}))
    assert actual["outputs"].stride() == expected["outputs"].stride()
    pair.assert_planned()
    exact = build(NET, dtype).double()
    right = step(exact, decide(Decided(exact), "soft", torch.float64), (x.detach().double(),), {})
    numerics.assert_closer(actual["outputs"], expected["outputs"], right["outputs"])


def test_copies_follow_the_weights() -> None:
    """What is changed in place between two steps is seen by the second."""
    pair = Pair(dtype=torch.bfloat16)
    for _ in range(2):
        expected, actual = pair.each(lambda model, masks: step(model, masks, images(NET, torch.bfloat16), {}))
        assert_near(actual["outputs"], expected["outputs"], torch.bfloat16)
        pair.change(lambda model: [parameter.data.mul_(-1.5) for parameter in model.parameters()])
    pair.assert_planned()
