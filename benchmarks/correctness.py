"""The gate of every benchmark: a wrong kernel gets no ratio. The tolerances are those of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nascompile.kernels.registry import Kernel
from tests.numerics import assert_closer, in_fp64

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def output_and_gradients(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The output and the gradient of every tensor that requires one."""
    out = function(*arguments)
    ramp = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
    grad = torch.sin(ramp).reshape(out.shape).to(out.dtype)
    wanted = [
        tensor for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor) and tensor.requires_grad
    ]
    return [out, *torch.autograd.grad(out, wanted, grad)]


def check(kernel: Kernel, function: Callable[..., Tensor], arguments: tuple[Any, ...], name: str) -> None:
    """Raise AssertionError where a value is less exact than tests/numerics.py allows."""
    found = output_and_gradients(function, arguments)
    plain = output_and_gradients(kernel.reference, arguments)
    exact = output_and_gradients(kernel.reference, in_fp64(arguments))
    for position, (one, other, best) in enumerate(zip(found, plain, exact, strict=True)):
        assert_closer(
            one, other, best, name=f"{name}, {'output' if position == 0 else f'gradient {position}'}"
        )


def failures(kernel: Kernel, device: torch.device, implementations: list[str]) -> list[str]:
    """What is wrong with the implementations, over all samples and types; empty where nothing is."""
    wrong = []
    for implementation in implementations:
        for sample in kernel.samples():
            for dtype in DTYPES:
                name = f"{kernel.name}/{implementation} {sample.name} {str(dtype).removeprefix('torch.')}"
                try:
                    check(
                        kernel,
                        lambda *a, chosen=implementation: kernel.function(*a, implementation=chosen),
                        sample.make(dtype, device),
                        name,
                    )
                except AssertionError as problem:
                    wrong.append(str(problem).splitlines()[0])
    return wrong
