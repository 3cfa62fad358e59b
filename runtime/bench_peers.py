"""The peers of a benchmark: the same model, the same decision, carried out by eager PyTorch, torch.compile or
us.

The others get the *plain form* of the model: choices that loop over their candidates and know of no mutator,
as a user of plain PyTorch writes them. torch.compile can trace it as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.compiled import compile
from nascompile.compiler.decision import combine
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.mutables import LayerChoice, MutableScope
from nascompile.compiler.mutator import Mutator, readable
from nascompile.compiler.prune import prune
from nascompile.compiler.space import all_choices
from nascompile.runtime.random_mutator import RandomMutator

DECISIONS = ("soft", "sampled", "straight-through")
"""soft: a softmax over all candidates, as in DARTS. sampled: one candidate, as in Single Path One-Shot.
straight-through: one candidate, times a weight of 1 with a gradient, as in GDAS."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to run the model. `mode` is torch.compile's."""

    name: str
    runner: str
    channels_last: bool = False
    mode: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is the one that the others are compared with."""
        return self.runner == "nascompile"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("eager", "eager"),
        Peer("eager-channels-last", "eager", channels_last=True),
        Peer("torch.compile", "compile"),
        Peer("torch.compile-channels-last", "compile", channels_last=True),
        Peer("torch.compile-max-autotune", "compile", mode="max-autotune"),
        Peer("single-path", "single-path"),
        Peer("nascompile", "nascompile"),
        Peer("nascompile-channels-last", "nascompile", channels_last=True),
    )
}


def find_peer(name: str) -> Peer:
    """The peer of a name; raises NascompileError that lists the known ones."""
    if name not in PEERS:
        raise NascompileError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    return PEERS[name]


class Decided(Mutator):
    """Carries out what it is told."""


class Decision:
    """The decision of every step: made anew from `logits`, as a search does.

    Bound to `model`; the same seed gives the same decision in every process.
    """

    def __init__(self, model: nn.Module, kind: str, *, seed: int) -> None:
        if kind not in DECISIONS:
            raise NascompileError(f"unknown decision {kind!r}; known: {', '.join(DECISIONS)}")
        self.kind = kind
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            sampler = RandomMutator(model)
            picked = sampler.sample_search()
            sampler.release()
        self.mutator = Decided(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.logits: dict[str, Tensor] = {}
        self.picked: dict[str, Tensor] = {}
        for key, choice in self.mutator.choices_by_key.items():
            mask = picked[key]
            if isinstance(choice, LayerChoice):
                logits = 0.5 * torch.randn(len(choice), generator=generator)
                if kind != "sampled":
                    self.logits[key] = logits.to(device).requires_grad_()
            elif kind == "soft" or not bool(mask.any()):
                mask = torch.ones_like(mask)
            self.picked[key] = mask
        self.plain: list[Any] = []

    @property
    def architecture(self) -> dict[str, Any]:
        """The sampled path in the form of an architecture file."""
        choices = self.mutator.choices_by_key
        return {key: readable(choices[key], mask) for key, mask in self.picked.items()}

    def masks(self) -> dict[str, Tensor]:
        """A mask for every key; those of weights carry a gradient to `logits`."""
        found = {key: mask.clone() for key, mask in self.picked.items()}
        for key, logits in self.logits.items():
            soft = torch.softmax(logits, 0)
            if self.kind == "soft":
                found[key] = soft
            else:
                hard = self.picked[key].to(soft.device, soft.dtype)
                found[key] = hard - soft.detach() + soft
        return found

    def renew(self) -> None:
        """Decide for the next step."""
        masks = self.masks()
        if not self.plain:
            self.mutator.decide(masks)
        for choice in self.plain:
            choice.plain_weights = masks[choice.key] if choice.key in self.logits else None

    def make_plain(self, model: nn.Module) -> None:
        """Give the model its plain form, in place."""
        for choice in all_choices(model):
            kind = _PlainLayerChoice if isinstance(choice, LayerChoice) else _PlainInputChoice
            soft = self.kind == "soft" and choice.key in self.logits
            indices = range(len(choice)) if soft else self.picked[choice.key].nonzero().flatten().tolist()
            choice.__class__ = _with(kind, type(choice))
            choice.__dict__["plain_indices"] = list(indices)
            choice.__dict__["plain_weights"] = None
            choice.__dict__["plain_mask"] = self.picked[choice.key]
            self.plain.append(choice)
        for scope in [m for m in model.modules() if isinstance(m, MutableScope)]:
            scope.__class__ = _with(_PlainScope, type(scope))

    def double(self) -> None:
        """Turn the logits to fp64, as new leaves."""
        self.logits = {key: logits.detach().double().requires_grad_() for key, logits in self.logits.items()}


def build_call(
    peer: Peer, model: nn.Module, decision: Decision, inputs: tuple[Any, ...]
) -> tuple[Callable[..., Any], nn.Module]:
    """What a peer calls with the inputs, and the module whose parameters it trains."""
    if peer.runner == "nascompile":
        decision.renew()
        return compile(model), model
    if peer.runner == "single-path":
        if decision.kind == "soft":
            raise NascompileError("a single path needs a sampled decision")
        lean: nn.Module = copy.deepcopy(prune(model, decision.architecture, inputs))
        return lean.train(), lean
    decision.make_plain(model)
    if peer.runner == "eager":
        return model, model
    # one shape only: dynamic shapes would cost speed
    return torch.compile(model, dynamic=False, mode=peer.mode), model


def arranged(peer: Peer, value: Any) -> Any:
    """A module or input in the peer's memory layout."""
    if isinstance(value, nn.Module):
        return value.to(memory_format=torch.channels_last) if peer.channels_last else value  # type: ignore
    if isinstance(value, Tensor) and value.dim() == 4 and peer.channels_last:
        return value.contiguous(memory_format=torch.channels_last)
    return value


class _PlainLayerChoice(nn.Module):
    """What the chosen candidates give, weighed and reduced."""

    plain_indices: list[int]
    plain_weights: Tensor | None
    plain_mask: Tensor
    names: list[str]
    reduction: str
    return_mask: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = []
        for index in self.plain_indices:
            candidate = getattr(self, self.names[index])
            output = None if candidate is None else candidate(*args, **kwargs)
            if output is not None and self.plain_weights is not None:
                output = output * self.plain_weights[index]
            outputs.append(output)
        return _answer(self, outputs)


class _PlainInputChoice(nn.Module):
    """The chosen inputs, reduced."""

    plain_indices: list[int]
    as_list: Callable[[Any], list[Any]]

    def forward(self, optional_inputs: Any) -> Any:
        inputs = self.as_list(optional_inputs)
        return _answer(self, [inputs[index] for index in self.plain_indices])


class _PlainScope(nn.Module):
    """A scope that tells nobody."""

    __call__: Callable[..., Any] = nn.Module.__call__


def _answer(choice: Any, outputs: list[Any]) -> Any:
    result: Any = outputs
    if choice.reduction != "none":
        present = [output for output in outputs if output is not None]
        if len(present) > 1:
            result = combine(present, choice.reduction)
        else:
            result = present[0] if present else None
    if not choice.return_mask:
        return result
    return result, choice.plain_mask if choice.plain_weights is None else choice.plain_weights


_classes: dict[tuple[type, type], type] = {}


def _with(plain: type, user: type) -> type:
    # one class for all choices of a type: torch.compile looks at every class once
    if (plain, user) not in _classes:
        _classes[plain, user] = type(f"Plain{user.__name__}", (plain, user), {})
    return _classes[plain, user]
