"""How close a result has to be: the only tolerances of the tests.

A result is compared with the same computation in fp64. Its relative root-mean-square error may be at most
twice that of the plain torch reference in the same type, or below a small floor. Shape, type and finiteness
count too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

FACTOR = 2.0
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact values (the plain one if those are zero)."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - exact.detach().double()).square().mean().sqrt().item()
    size = exact.detach().double().square().mean().sqrt().item()
    return difference / size if size > 0 else difference


def assert_closer(
    actual: Tensor,
    reference: Tensor,
    exact: Tensor,
    *,
    name: str = "result",
    working: torch.dtype | None = None,
) -> None:
    """`actual` is as good as `reference`, which has the same type, judged by `exact`, which is in fp64.

    working: the type the computation ran in, where it is not that of the result (fp32 sums of bf16 maps).
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == reference.dtype, f"{name}: type {actual.dtype}, expected {reference.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the exact values are {exact.dtype}, fp64 is needed"
    assert torch.isfinite(exact).all(), f"{name}: the exact values are not finite"
    assert torch.isfinite(actual).all(), (
        f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    )
    floor = FLOORS[working or actual.dtype]
    allowed = max(floor, FACTOR * relative_error(reference, exact))
    error = relative_error(actual, exact)
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g} ({actual.dtype})"


def assert_close(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """`actual` equals `expected` (of the same type, or in fp64) within twice the floor of its type."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert expected.dtype in (actual.dtype, torch.float64), (
        f"{name}: type {actual.dtype}, not {expected.dtype}"
    )
    assert torch.isfinite(actual).all(), (
        f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    )
    error, allowed = relative_error(actual, expected), FACTOR * FLOORS[actual.dtype]
    assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g} ({actual.dtype})"


def assert_identical(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Bit for bit the same, nan included."""
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{name}: type {actual.dtype}, expected {expected.dtype}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} values differ"


def in_fp64(arguments: Any) -> Any:
    """The arguments with every floating tensor as a new fp64 leaf, requiring grad where the old one did."""

    def widen(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return tree_map(widen, arguments)
