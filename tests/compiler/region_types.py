"""Steps of a model of `region_models` or of a network in a low precision: eagerly, compiled, and exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nascompile
from tests import numerics
from tests.comparing import Decided, step, tensors
from tests.compiler.region_steps import Rounds, decide, detached


@dataclass(frozen=True)
class Setting:
    """`weights`: the type of the model. inputs: of its images. autocast: what it casts to. norms: the type of
    BatchNorms, where it is not that of the model."""

    name: str
    weights: torch.dtype
    inputs: torch.dtype
    autocast: torch.dtype | None = None
    norms: torch.dtype | None = None

    @property
    def low(self) -> torch.dtype:
        """The least precise type of all."""
        return self.weights if self.autocast is None else self.autocast

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model in these types, in place."""
        model.to(self.weights)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and self.norms is not None:
                module.to(self.norms)
        return model


single, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
AUTOCAST_BF16 = Setting("autocast to bf16", single, single, bf16)
AUTOCAST_FP16 = Setting("autocast to fp16", single, single, fp16)
BF16, FP16 = Setting("bf16", bf16, bf16), Setting("fp16", fp16, fp16)
SETTINGS = (
    AUTOCAST_BF16,
    AUTOCAST_FP16,
    BF16,
    FP16,
    Setting("bf16 with norms in fp32", bf16, bf16, norms=single),
    Setting("bf16 under autocast to bf16", bf16, bf16, bf16),
    Setting("images in bf16 under autocast to bf16", single, bf16, bf16),
)


class Under(nn.Module):
    """A model that runs under autocast, or without."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, *images: Tensor) -> Any:
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return self.model(*images)


def steps(
    model: nn.Module,
    images: Sequence[Sequence[Tensor]],
    rounds: Sequence[tuple[str, bool]],
    setting: Setting,
    *,
    compile_it: bool,
) -> tuple[Rounds, nn.Module]:
    """What could be seen of a step for each of the rounds, and the model that ran."""
    runs = nascompile.compile(model) if compile_it else model
    mutator, under = Decided(model), Under(runs, setting.autocast)
    found = []
    for inputs, (kind, mode) in zip(images, rounds, strict=True):
        model.train(mode)
        masks = decide(mutator, kind, torch.float32)
        seen = step(under, masks, inputs, {})
        seen.pop("changed inputs")
        seen["strides"] = [out.stride() for out in tensors(seen["outputs"])]
        found.append(
            detached({k: v for k, v in seen.items() if k != "strides"}) | {"strides": seen["strides"]}
        )
    return found, runs


def compared(
    make: Callable[[], nn.Module],
    images: Sequence[Sequence[Tensor]],
    rounds: Sequence[tuple[str, bool]],
    setting: Setting,
) -> tuple[Rounds, Rounds, Rounds, Any]:
    """Compiled, eagerly, and exactly: in fp64, from the same rounded weights and images."""
    cast = [[x.detach().to(setting.inputs).requires_grad_() for x in row] for row in images]
    actual, runs = steps(setting.prepared(make()), cast, rounds, setting, compile_it=True)
    expected, _ = steps(setting.prepared(make()), cast, rounds, setting, compile_it=False)
    wide = [[x.detach().double().requires_grad_() for x in row] for row in cast]
    off = Setting("fp64", torch.float64, torch.float64)
    exact, _ = steps(off.prepared(setting.prepared(make())), wide, rounds, off, compile_it=False)
    return actual, expected, exact, runs


GROUPS = ("outputs", "inputs", "weights", "decisions", "buffers")


def assert_as_eager(actual: Rounds, expected: Rounds, exact: Rounds, low: torch.dtype) -> None:
    """Types, strides and None as in eager mode; each group of tensors, as one vector, at most twice as far
    off as eager mode is in its worst group: a decision's few numbers may be right by luck."""
    for number, (one, reference, right) in enumerate(zip(actual, expected, exact, strict=True)):
        assert one["strides"] == reference["strides"], number
        pairs = [(_vector(_named(reference[group])), _vector(_named(right[group]))) for group in GROUPS]
        allowed = max(numerics.FLOORS[low], *(numerics.relative_error(*pair) for pair in pairs))
        for group in GROUPS:
            mine, theirs = _named(one[group]), _named(reference[group])
            name = f"round {number}: {group}"
            assert _types(mine) == _types(theirs), name
            goal = _vector(_named(right[group]))
            error = numerics.relative_error(_vector(mine), goal)
            assert error <= numerics.FACTOR * allowed, f"{name}: {error:.3g}, eagerly {allowed:.3g} at worst"


def _named(value: Any) -> dict[str, Tensor | None]:
    if isinstance(value, dict):
        return {f"{k}.{name}": leaf for k, item in value.items() for name, leaf in _named(item).items()}
    if isinstance(value, list | tuple):
        return _named(dict(enumerate(value)))
    return {"": value}


def _types(named: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: None if leaf is None else (leaf.dtype, leaf.shape) for name, leaf in named.items()}


def _vector(named: dict[str, Tensor | None]) -> Tensor:
    leaves = [leaf.double().reshape(-1) for leaf in named.values() if leaf is not None]
    return torch.cat(leaves) if leaves else torch.zeros(0, dtype=torch.float64)
