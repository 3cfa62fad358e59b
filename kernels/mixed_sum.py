"""The weighted sum of a choice in one pass: out = sum_k w_k y_k.

Backward, in one pass as well: dy_k = w_k g, and the gradient of the decision, dw_k = <g, y_k>. The two
operators are closed under differentiation, so second-order methods (DARTS, eq. 7) differentiate them again:

    L = sum_k <G_k, w_k g> + sum_k h_k <g, y_k>    gives
    dg = mixed_sum(G, w) + mixed_sum(y, h),    (dy_k, dw_k) = (h_k g, <g, G_k>)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nascompile.kernels import native
from nascompile.kernels.registry import Implementation, Kernel, Sample, choose
from nascompile.kernels.transforms import is_batched, is_forward_differentiated, is_transformed
from nascompile.kernels.triton_support import why_not_triton

LIMIT = 16  # tensors per call of the operator; the kernels keep their pointers in registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# the same lines stand in csrc/ops.cpp, which defines the operators where the extension is built
SCHEMAS = (
    "mixed_sum(Tensor[] inputs, Tensor weights) -> Tensor",
    "mixed_sum_backward(Tensor grad, Tensor[] inputs, Tensor weights, bool[] needs_input, bool needs_weights)"
    " -> (Tensor[], Tensor)",
)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in, and the type of the weights: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----- definition


def eager(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The expression the kernel replaces, as a user would write it: rounds after every operation."""
    total = weights[0] * inputs[0]
    for k in range(1, len(inputs)):
        total = total + weights[k] * inputs[k]
    return total


def reference(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_k weights[k] * inputs[k], summed in fp32 or better, rounded once, laid out like the first input."""
    wide = accumulation_dtype(inputs[0].dtype)
    total = eager([tensor.to(wide) for tensor in inputs], weights.to(wide))
    return torch.empty_like(inputs[0]).copy_(total) if inputs[0].dim() else total.to(inputs[0].dtype)


def reference_backward(
    grad: Tensor, inputs: Sequence[Tensor], weights: Tensor, needs_input: Sequence[bool], needs_weights: bool
) -> tuple[list[Tensor], Tensor]:
    """weights[k] * grad for every k that needs it, and all <grad, inputs[k]> (empty if not needed)."""
    wide = weights.dtype
    products = [(weights[k] * grad.to(wide)).to(grad.dtype) for k, needed in enumerate(needs_input) if needed]
    if not needs_weights:
        return products, weights.new_empty(0)
    return products, torch.stack([(grad.to(wide) * tensor.to(wide)).sum() for tensor in inputs])


PLAIN = Implementation(name="plain", why_not=lambda device: None, forward=eager, backward=reference_backward)
"""Of operations that torch itself differentiates, and knows how to batch."""


# ----- operators


def _fake(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.empty_like(inputs[0])


def _fake_backward(
    grad: Tensor, inputs: Sequence[Tensor], weights: Tensor, needs_input: Sequence[bool], needs_weights: bool
) -> tuple[list[Tensor], Tensor]:
    products = [torch.empty_like(grad) for needed in needs_input if needed]
    return products, weights.new_empty(len(needs_input) if needs_weights else 0)


class _Forward(torch.autograd.Function):
    """An implementation's forward, differentiable."""

    @staticmethod
    def forward(ctx: Any, implementation: Implementation, weights: Tensor, *inputs: Tensor) -> Tensor:
        ctx.implementation = implementation
        ctx.set_materialize_grads(False)
        # without a decision gradient nobody needs the candidates' outputs again
        ctx.save_for_backward(weights, *(inputs if ctx.needs_input_grad[1] else ()))
        return implementation.forward(list(inputs), weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, *inputs = ctx.saved_tensors
        (grad,) = grads
        if grad is None:
            # what nobody asks for stays without a gradient, as in the plain expression
            return (None,) * len(ctx.needs_input_grad)
        _, needs_weights, *needs_input = ctx.needs_input_grad
        run = PLAIN if is_batched(grads) else ctx.implementation
        products, dots = _run_backward(run, grad, inputs, weights, needs_input, needs_weights)
        return None, dots if needs_weights else None, *_spread(products, needs_input)


class _Backward(torch.autograd.Function):
    """An implementation's backward, differentiable by the formula at the top."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.implementation, ctx.needs_input, ctx.needs_weights, grad, weights, *inputs = arguments
        ctx.save_for_backward(grad, weights, *inputs)
        products, dots = ctx.implementation.backward(
            grad, inputs, weights, ctx.needs_input, ctx.needs_weights
        )
        return dots, *products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, weights, *inputs = ctx.saved_tensors
        grad_dots, *grad_products = grads
        *_, needs_grad, needs_weights = ctx.needs_input_grad[:5]
        needs_inputs = ctx.needs_input_grad[5:]
        chosen = [k for k, needed in enumerate(ctx.needs_input) if needed]
        run = PLAIN if is_batched(grads) else ctx.implementation
        d_grad, d_weights, d_inputs = None, None, [None] * len(inputs)
        if needs_grad:
            parts = []
            if chosen:
                parts.append(_run_forward(run, grad_products, torch.stack([weights[k] for k in chosen])))
            if ctx.needs_weights:
                parts.append(_run_forward(run, inputs, grad_dots))
            d_grad = sum(parts[1:], start=parts[0])
        if any(needs_inputs):
            products, _ = _run_backward(run, grad, [], grad_dots, list(needs_inputs), False)
            d_inputs = _spread(products, needs_inputs)
        if needs_weights:
            found = [torch.zeros_like(weights[0])] * len(weights)
            if chosen:
                flags = [False] * len(chosen)
                _, dots = _run_backward(run, grad, grad_products, weights[: len(chosen)], flags, True)
                for position, k in enumerate(chosen):
                    found[k] = dots[position]
            d_weights = torch.stack(found)
        return None, None, None, d_grad, d_weights, *d_inputs


def _run_forward(implementation: Implementation, inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    if implementation is not PLAIN and _is_recorded((weights, *inputs)):
        return _Forward.apply(implementation, weights, *inputs)
    return implementation.forward(inputs, weights)


def _run_backward(
    implementation: Implementation,
    grad: Tensor,
    inputs: Sequence[Tensor],
    weights: Tensor,
    needs_input: Sequence[bool],
    needs_weights: bool,
) -> tuple[list[Tensor], Tensor]:
    if implementation is not PLAIN and _is_recorded((grad, weights, *inputs)):
        dots, *products = _Backward.apply(implementation, needs_input, needs_weights, grad, weights, *inputs)
        return products, dots
    return implementation.backward(grad, inputs, weights, needs_input, needs_weights)


def _is_recorded(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _spread(found: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """One entry for each flag: the next found tensor where it is set, None where it is not."""
    remaining = iter(found)
    return [next(remaining) if flag else None for flag in needed]


# ----- public name


def mixed_sum(inputs: Sequence[Tensor], weights: Tensor, *, implementation: str | None = None) -> Tensor:
    """sum_k weights[k] * inputs[k] in one pass; differentiable, any number of times, in inputs and weights.

    inputs: tensors of one shape and any strides, fp32, bf16, fp16 or fp64; different types are promoted as in
    the plain expression. weights: a vector with one floating-point entry per input, on the same device. The
    result has the inputs' type and the first one's memory format; sums are kept in fp32 (fp64 for fp64).
    implementation: a name from `KERNEL.implementations`, to test or measure it; by default the first that
    this device can use. More than 16 tensors are summed in groups.

    Raises TypeError for other types, ValueError for shapes, lengths and devices that do not fit and for an
    implementation that cannot be used.
    """
    inputs = list(inputs)
    _check(inputs, weights)
    if implementation is None and (is_transformed() or is_forward_differentiated()):
        return eager(inputs, weights)
    if inputs[0].dim() == 0:
        # numbers, not maps: type promotion between numbers is its own matter, and there is nothing to gain
        return eager(inputs, weights)
    dtype = inputs[0].dtype
    if any(tensor.dtype != dtype for tensor in inputs):
        for tensor in inputs:
            dtype = torch.promote_types(dtype, tensor.dtype)
        inputs = [tensor.to(dtype) for tensor in inputs]
    weights = weights.to(accumulation_dtype(dtype))
    if len(inputs) > LIMIT:
        starts = range(0, len(inputs), LIMIT)
        groups = [
            mixed_sum(
                inputs[start : start + LIMIT], weights[start : start + LIMIT], implementation=implementation
            )
            for start in starts
        ]
        return mixed_sum(groups, weights.new_ones(len(groups)), implementation=implementation)
    if implementation is None:
        return _forward(inputs, weights)
    return _run_forward(choose(KERNEL, inputs[0].device, implementation), inputs, weights)


def _check(inputs: list[Tensor], weights: Tensor) -> None:
    if not inputs:
        raise ValueError("mixed_sum: there are no inputs, at least one tensor is needed")
    for k, tensor in enumerate((*inputs, weights)):
        name = f"inputs[{k}]" if k < len(inputs) else "weights"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"mixed_sum: {name} is a {type(tensor).__name__}, a tensor is needed")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(
                f"mixed_sum: {name} is {tensor.dtype} {tensor.layout}, a dense tensor of {known} is needed"
            )
    first = inputs[0]
    for k, tensor in enumerate(inputs):
        if tensor.shape != first.shape:
            raise ValueError(
                f"mixed_sum: inputs[{k}] has shape {tuple(tensor.shape)}, inputs[0] has {tuple(first.shape)}"
            )
        if tensor.device != first.device:
            raise ValueError(f"mixed_sum: inputs[{k}] is on {tensor.device}, inputs[0] is on {first.device}")
    if weights.shape != (len(inputs),):
        raise ValueError(
            f"mixed_sum: weights has shape {tuple(weights.shape)}, one per input is ({len(inputs)},)"
        )
    if weights.device != first.device:
        raise ValueError(f"mixed_sum: weights is on {weights.device}, the inputs are on {first.device}")


# ----- implementations, in order of preference


def _triton_forward(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    from nascompile.kernels.mixed_sum_triton import forward

    return forward(inputs, weights)


def _triton_backward(*arguments: Any) -> tuple[list[Tensor], Tensor]:
    from nascompile.kernels.mixed_sum_triton import backward

    return backward(*arguments)


def samples() -> tuple[Sample, ...]:
    """Ten cases: one tensor to sixteen, empty, odd, several blocks, channels-last, strided, mixed."""

    def case(
        name: str, count: int, *shape: int, view: Callable[[int, Tensor], Tensor] | None = None
    ) -> Sample:
        def make(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(count + sum(shape))
            tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
            weights = torch.randn(count, generator=generator, dtype=torch.float64)
            tensors = [tensor.to(device, dtype) for tensor in tensors]
            if view is not None:
                tensors = [view(k, tensor) for k, tensor in enumerate(tensors)]
            weights = weights.to(device, accumulation_dtype(dtype))
            return [tensor.detach().requires_grad_() for tensor in tensors], weights.requires_grad_()

        return Sample(name=name, make=make)

    def channels_last(k: int, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last)

    def crop(k: int, tensor: Tensor) -> Tensor:
        return tensor[:, :, 1:, ::2]

    def mix(k: int, tensor: Tensor) -> Tensor:
        return (
            channels_last(k, tensor),
            tensor,
            crop(k, tensor.repeat(1, 1, 2, 2))[:, :, : tensor.shape[2]],
        )[k % 3]

    return (
        case("one", 1, 2, 8, 4, 4),
        case("darts edge", 8, 2, 8, 8, 8),
        case("sixteen", 16, 2, 64),
        case("odd", 3, 3, 5, 7),
        case("several blocks", 2, 4099),
        case("empty", 2, 0, 4, 3),
        case("channels last", 4, 2, 5, 6, 7, view=channels_last),
        # rows of 1303 elements, and of 14, that straddle the CPU's blocks of 1024
        case("cropped", 3, 1, 2, 3, 2606, view=crop),
        case("mixed layouts", 5, 2, 3, 16, 14, view=mix),
        case("transposed", 2, 5, 33, view=lambda k, tensor: tensor.t()),
    )


def _operations(inputs: Sequence[Tensor], weights: Tensor) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    grad = torch.ones_like(inputs[0])
    flags = [k % 3 != 1 for k in range(len(inputs))]
    return (_forward, (inputs, weights)), (_backward, (grad, inputs, weights, flags, True))


def _register() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Define the operators, or find them defined by the extension, and add what Python has to give."""
    module, _ = native.load()
    if module is None:
        for schema in SCHEMAS:
            name, parenthesis, rest = schema.partition("(")
            torch.library.define(f"nascompile::{name}", parenthesis + rest)
    forward, backward = (
        torch.ops.nascompile.mixed_sum.default,
        torch.ops.nascompile.mixed_sum_backward.default,
    )
    for operator, plain, fake in (
        (forward, reference, _fake),
        (backward, reference_backward, _fake_backward),
    ):
        torch.library.impl(operator.name(), "CompositeExplicitAutograd")(plain)
        torch.library.register_fake(operator.name())(fake)
    if module is None or not module.cuda_compiled():
        torch.library.impl(forward.name(), "CUDA")(
            lambda *arguments: choose(KERNEL, arguments[1].device).forward(*arguments)
        )
        torch.library.impl(backward.name(), "CUDA")(
            lambda *arguments: choose(KERNEL, arguments[0].device).backward(*arguments)
        )

    # not torch.library.register_autograd: for lists of tensors it costs 100 us a call, this costs 15
    def below_autograd(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)

        return run

    dispatched = Implementation(
        name="dispatched",
        why_not=lambda device: None,
        forward=below_autograd(forward),
        backward=below_autograd(backward),
    )
    torch.library.impl(forward.name(), "Autograd")(partial(_run_forward, dispatched))
    torch.library.impl(backward.name(), "Autograd")(partial(_run_backward, dispatched))
    return forward, backward


_forward, _backward = _register()

KERNEL = Kernel(
    name="mixed_sum",
    formula="out = sum_k w_k y_k;  dy_k = w_k g,  dw_k = <g, y_k>",
    function=mixed_sum,
    reference=reference,
    eager=eager,
    operations=_operations,
    samples=samples,
    implementations=(
        Implementation(name="cuda", why_not=native.why_not_cuda, forward=_forward, backward=_backward),
        Implementation(
            name="triton", why_not=why_not_triton, forward=_triton_forward, backward=_triton_backward
        ),
        Implementation(name="cpu", why_not=native.why_not_cpu, forward=_forward, backward=_backward),
        Implementation(
            name="reference", why_not=lambda device: None, forward=reference, backward=reference_backward
        ),
    ),
)
