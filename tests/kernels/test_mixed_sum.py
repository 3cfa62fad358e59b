"""What the mixed sum promises beyond the table of test_kernels.py: types, groups, saved memory, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nascompile.kernels.mixed_sum import LIMIT, eager, mixed_sum, reference
from tests.numerics import assert_close, assert_closer, assert_identical


def tensors(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(count)]


def test_more_tensors_than_one_call_takes_are_summed_in_groups():
    inputs, weights = tensors(2 * LIMIT + 3, 3, 7), torch.randn(2 * LIMIT + 3).requires_grad_()
    exact = reference([tensor.double() for tensor in inputs], weights.double())
    out = mixed_sum(inputs, weights)
    assert_closer(out, reference(inputs, weights), exact)
    out.sum().backward()
    assert weights.grad is not None
    assert_close(weights.grad, torch.stack([tensor.detach().double().sum() for tensor in inputs]))


def test_different_types_are_promoted_like_the_expression():
    inputs = [torch.randn(4, 5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    weights = torch.randn(3)
    out = mixed_sum(inputs, weights)
    assert out.dtype == eager(inputs, weights).dtype == torch.float32
    assert_close(out, reference([tensor.double() for tensor in inputs], weights.double()))


def test_under_autocast_the_type_is_that_of_the_maps():
    weights = torch.randn(2).requires_grad_()
    linear = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = [linear(torch.randn(4, 8)), linear(torch.randn(4, 8))]
        out = mixed_sum(maps, weights)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_get_gradients_of_their_own_type(dtype):
    inputs, weights = tensors(3, 4, 5), torch.randn(3).to(dtype).requires_grad_()
    mixed_sum(inputs, weights).sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == dtype
    # the maps are fp32, and so are their sums
    found = weights.grad.float() if dtype == torch.float64 else weights.grad
    assert_close(found, torch.stack([tensor.detach().double().sum() for tensor in inputs]))


def test_numbers_instead_of_maps():
    inputs = [torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)]
    out = mixed_sum(inputs, torch.tensor([10.0, 100.0]))
    assert out.shape == ()
    assert out.item() == 320.0


def test_weights_with_a_stride():
    weights = torch.randn(3, 4)[:, 1]
    inputs = [tensor.detach() for tensor in tensors(3, 6, 5)]
    assert_close(mixed_sum(inputs, weights), reference(inputs, weights))


def test_only_the_gradients_that_are_needed():
    inputs, weights = tensors(3, 2, 4), torch.randn(3).requires_grad_()
    inputs[1].requires_grad_(False)
    mixed_sum(inputs, weights).sum().backward()
    assert inputs[1].grad is None
    assert inputs[2].grad is not None
    assert_identical(inputs[2].grad, weights[2].detach().expand(2, 4))
    assert weights.grad is not None


class Dropped(torch.autograd.Function):
    """Hands nothing back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        return None


def test_without_a_gradient_of_the_sum_there_are_none():
    inputs, weights = tensors(2, 2, 4), torch.randn(2).requires_grad_()
    (Dropped.apply(mixed_sum(inputs, weights)) + inputs[1]).sum().backward()
    assert weights.grad is None
    assert inputs[0].grad is None
    assert inputs[1].grad is not None
    assert_identical(inputs[1].grad, torch.ones(2, 4))


def test_without_a_decision_gradient_no_candidate_output_is_kept():
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = mixed_sum(tensors(3, 2, 4), torch.randn(3))
    assert kept == [(3,)]
    out.sum().backward()


def test_a_gradient_that_is_laid_out_differently():
    inputs, weights = tensors(3, 2, 3, 4, 5), torch.randn(3).requires_grad_()
    grad = torch.randn(5, 3, 4, 2).permute(3, 1, 2, 0)
    found = torch.autograd.grad(mixed_sum(inputs, weights), [*inputs, weights], grad)
    expected = torch.autograd.grad(reference(inputs, weights), [*inputs, weights], grad)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_the_second_order_step_of_darts_equals_the_plain_expression():
    """DARTS, eq. 7: the architecture's gradient through one virtual step of the weights."""
    torch.manual_seed(1)
    x = torch.randn(6, 5, dtype=torch.float64)
    alpha = torch.randn(3, dtype=torch.float64).requires_grad_()
    matrices = [torch.randn(5, 5, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def architecture_gradient(combine):
        def loss(parameters):
            return combine([torch.tanh(x @ p) for p in parameters], alpha.softmax(0)).square().sum()

        grads = torch.autograd.grad(loss(matrices), matrices, create_graph=True)
        virtual = [p - 0.1 * g for p, g in zip(matrices, grads, strict=True)]
        return torch.autograd.grad(loss(virtual), [alpha, *matrices])

    for found, expected in zip(architecture_gradient(mixed_sum), architecture_gradient(eager), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_in_batches(create_graph: bool):
    inputs, weights = tensors(3, 4, 5), torch.randn(3).requires_grad_()
    rows = torch.randn(2, 4, 5)

    def gradients(combine):
        first = torch.autograd.grad(
            combine(inputs, weights),
            [*inputs, weights],
            rows,
            is_grads_batched=True,
            create_graph=create_graph,
        )
        if not create_graph:
            return first
        total = torch.stack([gradient.square().sum() for gradient in first])
        batch = torch.eye(len(first))
        return torch.autograd.grad(total, [*inputs, weights], batch, is_grads_batched=True)

    for found, expected in zip(gradients(mixed_sum), gradients(eager), strict=True):
        assert_close(found, expected)


def test_second_gradients_in_batches():
    """Of gradients that were taken one by one."""
    inputs, weights = tensors(3, 4, 5), torch.randn(3).requires_grad_()

    def gradients(combine):
        first = torch.autograd.grad(
            combine(inputs, weights).sin().sum(), [*inputs, weights], create_graph=True
        )
        total = torch.stack([gradient.square().sum() for gradient in first])
        return torch.autograd.grad(total, [*inputs, weights], torch.eye(len(first)), is_grads_batched=True)

    for found, expected in zip(gradients(mixed_sum), gradients(eager), strict=True):
        assert_close(found, expected)


A, W = torch.ones(2, 3), torch.ones(2)
BAD = {
    "nothing": ([], torch.ones(0), ValueError, "there are no inputs"),
    "shapes": (
        [A, torch.ones(3, 2)],
        W,
        ValueError,
        r"inputs\[1\] has shape \(3, 2\), inputs\[0\] has \(2, 3\)",
    ),
    "count": ([A, A], torch.ones(3), ValueError, r"weights has shape \(3,\), one per input is \(2,\)"),
    "matrix": ([A, A], torch.ones(2, 1), ValueError, r"weights has shape \(2, 1\), one per input is \(2,\)"),
    "integers": (
        [A, A.int()],
        W,
        TypeError,
        r"inputs\[1\] is torch.int32 .* a dense tensor of float32, bfloat16",
    ),
    "complex": ([A, A.to(torch.complex64)], W, TypeError, r"inputs\[1\] is torch.complex64"),
    "sparse": ([A, A.to_sparse()], W, TypeError, r"inputs\[1\] is torch.float32 torch.sparse_coo"),
    "integer weights": ([A, A], W.int(), TypeError, "weights is torch.int32"),
    "no tensor": ([A, 3], W, TypeError, r"inputs\[1\] is a int, a tensor is needed"),
    "list of weights": ([A, A], [1.0, 1.0], TypeError, "weights is a list, a tensor is needed"),
    "device": ([A, A.to("meta")], W, ValueError, r"inputs\[1\] is on meta, inputs\[0\] is on cpu"),
    "device of weights": ([A, A], W.to("meta"), ValueError, "weights is on meta, the inputs are on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    inputs, weights, error, message = BAD[case]
    with pytest.raises(error, match=message):
        mixed_sum(inputs, weights)
