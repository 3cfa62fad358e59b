"""The suite of choices whose weighted sum is one layer, or two: plain convolutions, linear layers, MLPs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import nascompile
from benchmarks.timing import time_on_cpu
from nascompile.compiler import pipeline
from nascompile.mutables import LayerChoice
from nascompile.mutator import Mutator
from tests.numerics import assert_closer, relative_error

SECONDS = 6.0  # for all peers of one case together
WIDTH, TOKENS = 256, 128
DECISION = 2  # its place among the outputs of a step
# a sum over the kernel's gradient instead of over the maps: it inherits what that was rounded by (9e-6 for
# C=32, where the plain expression has 7e-7)
DECISION_ERROR = 3e-5


class OneChoice(nn.Module):
    """The choice and nothing else."""

    def __init__(self, candidates: list[nn.Module]) -> None:
        super().__init__()
        self.op = LayerChoice(candidates, key="op")

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class WeightedSum(nn.Module):
    """The same as a user of plain PyTorch writes it."""

    def __init__(self, candidates: list[nn.Module], weights: Tensor) -> None:
        super().__init__()
        self.candidates = nn.ModuleList(candidates)
        self.mixture = weights

    def forward(self, x: Tensor) -> Tensor:
        total = self.candidates[0](x) * self.mixture[0]
        for k in range(1, len(self.candidates)):
            total = total + self.candidates[k](x) * self.mixture[k]
        return total


class Decided(Mutator):
    """Decides what it is told."""


def convolutions(channels: int) -> list[nn.Module]:
    """3x3, 5x5 and 7x7."""
    return [nn.Conv2d(channels, channels, k, padding=k // 2) for k in (3, 5, 7)]


def linears(count: int) -> list[nn.Module]:
    """Linear layers of one width."""
    return [nn.Linear(WIDTH, WIDTH) for _ in range(count)]


def mlps(*widths: int) -> list[nn.Module]:
    """Two linear layers with a GELU between."""
    return [nn.Sequential(nn.Linear(WIDTH, w), nn.GELU(), nn.Linear(w, WIDTH)) for w in widths]


def bottlenecks(channels: int, *widths: int) -> list[nn.Module]:
    """1x1 down, ReLU, 1x1 up."""
    return [nn.Sequential(nn.Conv2d(channels, w, 1), nn.ReLU(), nn.Conv2d(w, channels, 1)) for w in widths]


def cases() -> Iterator[tuple[str, str, Callable[[], list[nn.Module]], tuple[int, ...]]]:
    """Name, case, the candidates, the shape of the input."""
    for channels in (32, 64):
        shape = (32, channels, 32, 32)
        case = f"C={channels}, 32x32"
        yield "3x3 5x5 7x7", case, partial(convolutions, channels), shape
        yield "3 conv, identity", case, lambda c=channels: [*convolutions(c), nn.Identity()], shape
    for batch in (8, 32):
        shape = (batch, TOKENS, WIDTH)
        for count in (3, 4):
            make = partial(linears, count)
            yield f"{count} linear", f"batch {batch}", make, shape
        for widths in ((16, 16, 16, 16), (64, 64, 64), (128, 128, 128), (256, 256, 256, 256)):
            yield f"{len(widths)} MLP, {widths[0]}", f"batch {batch}", partial(mlps, *widths), shape
    yield "3 bottlenecks", "C=128, 16x16", lambda: bottlenecks(128, 32, 32, 32), (32, 128, 16, 16)


def step(model: nn.Module, x: Tensor, weights: Tensor) -> Callable[[], list[Tensor]]:
    """The output, and the gradients of input, decision and parameters."""
    leaves = [x, weights, *model.parameters()]
    # in the layout of the input, which is that of the output
    grad = torch.empty_like(x).copy_(torch.arange(x.numel(), dtype=torch.float64).cos().reshape(x.shape))

    def run() -> list[Tensor]:
        out = model(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return run


def difference(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> str:
    """Where the step is less exact than tests/numerics.py allows, or an empty string."""
    error = relative_error(found[DECISION], exact[DECISION])
    if not error < DECISION_ERROR:
        return f"decision gradient: relative error {error:.3g}, allowed {DECISION_ERROR:.3g}"
    for position, tensors in enumerate(zip(found, plain, exact, strict=True)):
        if position == DECISION:
            continue
        try:
            assert_closer(*tensors, name=f"gradient {position}" if position else "output")
        except AssertionError as problem:
            return str(problem).splitlines()[0]
    return ""


def rows(*, compiled: bool) -> Iterator[list[dict[str, Any]]]:
    """One row per case and peer; `ratio` is the fastest other peer's median over ours."""
    for name, case, make, shape in cases():
        torch.manual_seed(0)
        candidates = make()
        weights = torch.randn(len(candidates)).softmax(0).detach().requires_grad_()
        x = torch.randn(shape, requires_grad=True)
        plain = WeightedSum(candidates, weights)
        # regions are another suite's matter
        skip = [one for one in pipeline.names() if one == "fuse_regions"]
        model = nascompile.compile(OneChoice(candidates), x, skip=skip)
        Decided(model).decide({"op": weights})
        peers = {"nascompile": step(model, x, weights), "eager": step(plain, x, weights)}
        if len(shape) == 4:
            last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            peers["nascompile channels_last"] = step(model, last, weights)
            peers["eager channels_last"] = step(plain, last, weights)
        if compiled:
            torch._dynamo.reset()
            peers["torch.compile"] = step(torch.compile(plain, dynamic=False), x, weights)  # type: ignore[arg-type]
        exact_weights = weights.detach().double().requires_grad_()
        exact = WeightedSum([copy.deepcopy(one).double() for one in candidates], exact_weights)
        expected = step(exact, x.detach().double().requires_grad_(), exact_weights)()
        eager = peers["eager"]()
        wrong = {peer: difference(run(), eager, expected) for peer, run in peers.items()}
        timings = time_on_cpu(dict(peers), seconds=SECONDS)
        best = min(timing.median for peer, timing in timings.items() if not peer.startswith("nascompile"))
        yield [
            {
                "suite": "linear choices",
                "name": name,
                "case": case,
                "peer": peer,
                "median": timing.median,
                "p20": timing.p20,
                "p80": timing.p80,
                "ratio": best / timing.median if ours and not wrong[peer] else None,
                "wrong": wrong[peer] if ours else "",
            }
            for peer, timing in timings.items()
            for ours in [peer.startswith("nascompile")]
        ]
