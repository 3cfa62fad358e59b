"""Reads a candidate as a chain of layers, each fed by the one before and by nothing else: affine maps and
activations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nascompile.compiler.affine import LAYERS, NORMS, Affine
from nascompile.compiler.checks import has_hooks
from nascompile.compiler.fingerprint import fingerprint
from nascompile.compiler.guards import Guards
from nascompile.compiler.trace import ModelTracer, is_builtin

_INTERNAL = frozenset(nn.Module().__dict__)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus),
)
_ACTIVATION_FUNCTIONS = frozenset(
    (
        *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.sigmoid, F.tanh),
        *(torch.relu, torch.sigmoid, torch.tanh),
    )
)


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise function; equal `key`s compute the same. `apply` leaves its argument as it is."""

    key: Any
    apply: Callable[[Tensor], Tensor]


Layer = Affine | Activation


@dataclass(frozen=True, slots=True)
class Member:
    """A candidate as a chain of layers that starts from `source`: a shared prefix, or the choice's input
    (None). An empty chain is the identity."""

    index: int
    module: nn.Module
    source: fx.Node | None
    layers: tuple[Layer, ...]

    @property
    def affines(self) -> tuple[Affine, ...]:
        """The layers with parameters."""
        return tuple(layer for layer in self.layers if isinstance(layer, Affine))


def links(module: nn.Module, known: dict[Any, Any], key: Any) -> tuple[fx.Node, ...] | None:
    """The nodes of a candidate whose graph is one chain, or None; kept in `known` under its structure."""
    if key not in known:
        known[key] = _links(module)
    return known[key]


def _links(module: nn.Module) -> tuple[fx.Node, ...] | None:
    if is_builtin(module):
        graph = fx.Graph()
        graph.output(graph.call_module("self", (graph.placeholder("x"),)))
    else:
        tracer = ModelTracer(module)
        if not tracer.trace_guessed("") or tracer.islands or tracer.notes:
            return None
        graph = tracer.graph
    nodes = list(graph.nodes)
    for before, node in pairwise(nodes):
        if node.args[:1] != (before,) or node.all_input_nodes != [before] or len(before.users) != 1:
            return None
    return tuple(nodes[1:-1]) if nodes and nodes[0].op == "placeholder" else None


class Reader:
    """Reads the layers of one candidate from the steps of its chain.

    `problem` says why it is of no kind that is ever fused, `obstacle` why it is not although it is of such a
    kind; `waits_for_mode`: it may be in the other of training and evaluation.
    """

    def __init__(self, module: nn.Module, nodes: tuple[fx.Node, ...]) -> None:
        self.module = module
        # None stands for a layer with an obstacle
        self.layers: list[Layer | None] = []
        self.read: list[tuple[nn.Module, str]] = []
        self.modules: list[nn.Module] = []
        self.obstacle: str | None = None
        self.waits_for_mode = False
        reasons = (self._add(node) for node in nodes)
        self.problem = next((reason for reason in reasons if reason is not None), None)
        kinds = [isinstance(layer, Activation) for layer in self.layers]
        if self.problem is None and kinds not in ([], [False], [False, True, False]):
            self.problem = "is neither one layer nor two with an activation between"

    def member(self, index: int, source: fx.Node | None) -> Member | None:
        """The candidate as a member of groups, if it can be one now."""
        if self.problem is not None or self.obstacle is not None or self.waits_for_mode:
            return None
        layers = tuple(layer for layer in self.layers if layer is not None)
        return Member(index, self.module, source, layers)

    def guard(self, guards: Guards) -> None:
        """Make what was taken for granted a condition of the trace."""
        for module, name in self.read:
            guards.saw(module, name, module.__dict__[name])
        for module in self.modules:
            guards.traced(module)

    def _add(self, node: fx.Node) -> str | None:
        if node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS:
            return self._add_function(node)
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return f"{node.target} is no layer"
        module = self.module if node.target == "self" else self.module.get_submodule(str(node.target))
        self.modules.append(module)
        if isinstance(module, tuple(LAYERS)):
            return self._add_affine(module)
        if has_hooks(module) or "forward" in module.__dict__:
            return "has hooks or a replaced forward"
        return self._add_other(module)

    def _add_function(self, node: fx.Node) -> str | None:
        rest, options = node.args[1:], dict(node.kwargs)
        if options.pop("inplace", False) or any(value is True for value in rest):
            return "may change a value in place"
        function: Any = node.target
        key = (function, fingerprint(rest), fingerprint(options))
        self.layers.append(Activation(key, lambda x: function(x, *rest, **options)))
        return None

    def _add_affine(self, module: nn.Module) -> None:
        kind = next(one for one in type(module).__mro__ if one in LAYERS)
        affine: Affine | str
        if hasattr(module, "parametrizations"):
            affine = "has parametrizations"
        elif type(module) is not kind:
            affine = f"is a subclass of {kind.__name__}"
        elif has_hooks(module) or "forward" in module.__dict__:
            affine = "has hooks or a replaced forward"
        else:
            self.read += [(module, name) for name in LAYERS[kind]]
            affine = Affine.of(module)
        if isinstance(affine, str):
            self.obstacle = self.obstacle or affine
        self.layers.append(None if isinstance(affine, str) else affine)

    def _add_other(self, module: nn.Module) -> str | None:
        kind = type(module)
        if kind is nn.Identity:
            return None
        if kind in NORMS:
            return self._add_norm(module)
        if kind is nn.Dropout:
            self.read += [(module, "training"), (module, "p")]
            self.waits_for_mode |= bool(module.training and module.__dict__["p"])
            return None
        if kind not in _ACTIVATIONS:
            return f"{kind.__name__} is no layer"
        config = [name for name in module.__dict__ if name not in _INTERNAL]
        self.read += [(module, name) for name in config]
        twin = copy.copy(module)
        if "inplace" in config:
            twin.__dict__["inplace"] = False
        key = fingerprint({name: twin.__dict__[name] for name in config})
        self.layers.append(Activation((kind, key), kind.forward.__get__(twin)))
        return None

    def _add_norm(self, norm: nn.Module) -> str | None:
        last = self.layers[-1] if self.layers else None
        if last is None:
            return None if self.layers else "begins with a BatchNorm"
        if (
            not isinstance(last, Affine)
            or last.norm is not None
            or not isinstance(last.layer, NORMS[type(norm)])
        ):
            return "has a BatchNorm that follows no convolution"
        self.read += [(norm, name) for name in ("training", "eps", "track_running_stats")]
        if norm.training:
            self.waits_for_mode = True
        elif norm.running_mean is None or norm.running_var is None:
            return "has a BatchNorm that uses the statistics of the batch"
        else:
            self.layers[-1] = replace(last, norm=norm)
        return None
