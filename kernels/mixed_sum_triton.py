"""The mixed sum in Triton: a kernel for forward, one for backward; imported when a GPU tensor first needs it.

Both read dense tensors in the memory order of the result; tensors that lie differently are copied first.
Sums go through one partial value per program and one reduction: no atomics, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nascompile.kernels.triton_support import Compilation

LIMIT = 16  # tensors per call, as in mixed_sum.py
# elements per program; 8 warps read them as 16-byte vectors
BLOCK = 2048
NUM_WARPS = 8


@triton.jit
def _forward_kernel(
    inputs,  # tuple of COUNT pointers to numel elements
    weights_ptr,  # COUNT elements of the accumulation type
    out_ptr,
    numel,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    wide: tl.constexpr = weights_ptr.dtype.element_ty
    total = tl.zeros((BLOCK,), dtype=wide)
    for k in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        weight = tl.load(weights_ptr + k)
        total += weight * tl.load(inputs[k] + offsets, mask=inside, other=0.0).to(wide)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    inputs,  # tuple of COUNT pointers; not read without DOTS
    weights_ptr,
    products,  # tuple of COUNT pointers; those without a bit in PRODUCTS are not written
    partials_ptr,  # (programs, COUNT) elements of the accumulation type
    numel,
    COUNT: tl.constexpr,
    PRODUCTS: tl.constexpr,
    DOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    wide: tl.constexpr = weights_ptr.dtype.element_ty
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(wide)
    for k in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        if (PRODUCTS >> k) & 1:
            product = tl.load(weights_ptr + k) * grad
            tl.store(products[k] + offsets, product.to(grad_ptr.dtype.element_ty), mask=inside)
        if DOTS:
            values = tl.load(inputs[k] + offsets, mask=inside, other=0.0).to(wide)
            tl.store(partials_ptr + program * COUNT + k, tl.sum(grad * values))


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _programs(tensor: Tensor) -> int:
    return (tensor.numel() + BLOCK - 1) // BLOCK


def _lay_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory order of `like`: itself, or a copy."""
    same = all(
        size <= 1 or stride == wanted
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    )
    return tensor if same else torch.empty_like(like).copy_(tensor)


def forward(inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """As `mixed_sum.reference`, for 1 to 16 tensors of one type."""
    out = torch.empty_like(inputs[0])
    if out.numel() == 0:
        return out
    sources = tuple(_lay_out(tensor, out) for tensor in inputs)
    # Any: a decorated kernel is typed without the options of its launch
    launch: Any = _forward_kernel[(_programs(out),)]
    with _on_device(out):
        launch(
            sources,
            weights.contiguous(),
            out,
            out.numel(),
            COUNT=len(sources),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return out


def backward(
    grad: Tensor, inputs: Sequence[Tensor], weights: Tensor, needs_input: Sequence[bool], needs_weights: bool
) -> tuple[list[Tensor], Tensor]:
    """As `mixed_sum.reference_backward`, in one pass over the gradient and the inputs."""
    count = len(needs_input)
    products = [torch.empty_like(grad) if needed else None for needed in needs_input]
    found = [product for product in products if product is not None]
    if grad.numel() == 0:
        return found, weights.new_zeros(count if needs_weights else 0)
    dense = _lay_out(grad, found[0] if found else torch.empty_like(grad))
    sources = tuple(_lay_out(tensor, dense) for tensor in inputs) if needs_weights else (dense,) * count
    programs = _programs(grad)
    partials = weights.new_empty((programs if needs_weights else 1, count))
    launch: Any = _backward_kernel[(programs,)]
    with _on_device(grad):
        launch(
            dense,
            sources,
            weights.contiguous(),
            tuple(dense if product is None else product for product in products),
            partials,
            grad.numel(),
            COUNT=count,
            PRODUCTS=sum(1 << k for k, needed in enumerate(needs_input) if needed),
            DOTS=needs_weights,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return found, partials.sum(0) if needs_weights else weights.new_empty(0)


def compilations() -> list[Compilation]:
    """What to compile ahead of time, to see registers and spills: both kernels, for few and many tensors."""
    cases = []
    for element, wide in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64")):
        for count in (8, LIMIT):
            tensors = (f"*{element}",) * count
            cases.append(
                Compilation(
                    name=f"mixed_sum forward {element} x{count}",
                    function=_forward_kernel,
                    signature={
                        "inputs": tensors,
                        "weights_ptr": f"*{wide}",
                        "out_ptr": f"*{element}",
                        "numel": "i32",
                    },
                    constants={"COUNT": count, "BLOCK": BLOCK},
                    num_warps=NUM_WARPS,
                )
            )
            cases.append(
                Compilation(
                    name=f"mixed_sum backward {element} x{count}",
                    function=_backward_kernel,
                    signature={
                        "grad_ptr": f"*{element}",
                        "inputs": tensors,
                        "weights_ptr": f"*{wide}",
                        "products": tensors,
                        "partials_ptr": f"*{wide}",
                        "numel": "i32",
                    },
                    constants={
                        "COUNT": count,
                        "PRODUCTS": (1 << count) - 1,
                        "DOTS": True,
                        "BLOCK": BLOCK,
                    },
                    num_warps=NUM_WARPS,
                )
            )
    return cases
