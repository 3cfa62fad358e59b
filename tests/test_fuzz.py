"""What the comparison of random spaces calls a failure."""

from __future__ import annotations

from typing import Any

import pytest

import nascompile
from nascompile.kernels.plan.state import Sums
from tests import fuzz
from tests.fuzz_spaces import Edge, Space

ILL_CONDITIONED = Space(
    channels=24,
    size=(7, 5),
    edges=(
        Edge(0, ("cumulative", "silu")),
        Edge(1, ("avg_bn", "conv_bn_relu", "max", "times_zero"), reads=1),
        Edge(2, ("bn", "avg")),
        Edge(0, ("skip", "mb3"), how="residual", choose=(0, 2, 1)),
    ),
    batches=(3, 3),
    modes=(True, False),
    decisions=("many", "soft"),
    end="added",
    seed=14002125,
)
"""In its second step the orders of sums differ by 7e-12 in fp64."""
PLAIN = Space(8, (4, 4), (Edge(0, ("relu_conv_bn", "skip")),), (2,), (True,), ("soft",))


def test_what_rounding_does_to_plain_torch_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz.attempt(ILL_CONDITIONED, fuzz.Seen()) is None
    monkeypatch.setattr(fuzz, "DRAWS", 0)
    failure = fuzz.attempt(ILL_CONDITIONED, fuzz.Seen())
    assert failure is not None
    assert failure.kind == "imprecise"
    assert "float64" in failure.text


@pytest.mark.parametrize(("error", "kind"), [(1e-10, "imprecise"), (1e-4, "wrong")])
def test_lost_digits_in_fp64_are_a_failure(error: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Sums.variance
    monkeypatch.setattr(Sums, "variance", lambda *args: original(*args) * (1 + error))
    failure = fuzz.attempt(PLAIN, fuzz.Seen())
    assert failure is not None
    assert failure.kind == kind
    assert "float64" in failure.text


def test_a_gradient_that_is_not_there_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fuzz.train

    def train(space: Space, model: Any, *args: Any) -> list[dict[str, Any]]:
        found = original(space, model, *args)
        if isinstance(model, nascompile.CompiledModel):
            found[0]["weights"]["ops.0.0.conv.weight"] = None
        return found

    monkeypatch.setattr(fuzz, "train", train)
    failure = fuzz.attempt(PLAIN, fuzz.Seen())
    assert failure is not None
    assert failure.kind == "wrong"
    assert "fp64, step 0, weights" in failure.text
