"""The suite over `kernels.ALL`: our kernel, the plain expression, either in channels-last, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.correctness import check, failures
from benchmarks.timing import time_on_cpu
from nascompile.kernels import ALL
from nascompile.kernels.registry import Kernel, choose

CPU = torch.device("cpu")
SECONDS = 1.5  # for all peers of one case together


def cases(kernel: Kernel) -> dict[str, tuple[Any, ...]]:
    """The arguments to time a kernel with, at the sizes of a supernet: kernel.name decides."""
    if kernel.name == "mixed_sum":
        return {
            f"{count} x {'x'.join(map(str, shape))}": maps_and_weights(count, shape)
            for count, shape in (
                (8, (16, 16, 32, 32)),
                (8, (16, 64, 8, 8)),
                (8, (64, 16, 32, 32)),
                (2, (64, 64, 16, 16)),
            )
        }
    raise ValueError(f"benchmarks/kernels.py: no cases for kernel {kernel.name!r}")


def maps_and_weights(count: int, shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Candidate outputs and a softmax over them, all requiring grad."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(count)]
    return maps, torch.randn(count, generator=generator).softmax(0).detach().requires_grad_()


def channels_last(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers with every four-dimensional tensor in channels-last order."""

    def lay_out(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4:
            return value.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        return value

    return tree_map(lay_out, arguments)


def forward_backward(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Callable[[], object]:
    """One step: the output and all gradients, for a gradient in the output's layout."""
    leaves = tree_leaves(arguments)
    grad = torch.randn_like(function(*arguments))
    return lambda: torch.autograd.grad(function(*arguments), leaves, grad)


def rows(*, compiled: bool) -> Iterator[list[dict[str, Any]]]:
    """One row per kernel, case and peer. `ratio` is the fastest other peer's median over this one's."""
    for kernel in ALL:
        names = [found.name for found in kernel.implementations if found.why_not(CPU) is None]
        wrong = failures(kernel, CPU, names)
        ours = choose(kernel, CPU).name
        for case, arguments in cases(kernel).items():
            peers = {
                f"nascompile {ours}": (kernel.function, arguments),
                f"nascompile {ours} channels_last": (kernel.function, channels_last(arguments)),
                "eager": (kernel.eager, arguments),
                "eager channels_last": (kernel.eager, channels_last(arguments)),
            }
            if compiled:
                # each case compiles by itself: recompiling for new shapes would time a slower, dynamic kernel
                torch._dynamo.reset()
                peers["torch.compile"] = (torch.compile(kernel.eager, dynamic=False), arguments)
            try:
                check(kernel, kernel.function, arguments, f"{kernel.name} {case}")
            except AssertionError as problem:
                wrong.append(str(problem).splitlines()[0])
            steps = {name: forward_backward(*peer) for name, peer in peers.items()}
            timings = time_on_cpu(steps, seconds=SECONDS)
            best_other = min(t.median for name, t in timings.items() if not name.startswith("nascompile"))
            yield [
                {
                    "suite": "kernels",
                    "name": kernel.name,
                    "case": case,
                    "peer": name,
                    "median": timing.median,
                    "p20": timing.p20,
                    "p80": timing.p80,
                    "ratio": best_other / timing.median if is_ours and not wrong else None,
                    "wrong": "; ".join(wrong) if is_ours else "",
                }
                for name, timing in timings.items()
                for is_ours in [name.startswith("nascompile")]
            ]
