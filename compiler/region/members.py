"""Which nodes of a graph a region may hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx, nn

from nascompile.compiler.candidates import Candidate, read_once
from nascompile.compiler.fingerprint import attribute
from nascompile.compiler.groups import find_groups
from nascompile.compiler.inplace import is_in_place, is_view
from nascompile.compiler.lower import LoweredChoice, LoweredInputChoice, LoweredLayerChoice
from nascompile.compiler.region.detours import LEADS_NOWHERE, Detours
from nascompile.compiler.region.functions import why_not_function
from nascompile.compiler.region.ir import Unsupported
from nascompile.compiler.region.operations import kind_of, settings_of

MERGED = "its candidates are merged into one layer"
"""Why a choice stays outside that is better off there."""


class Members:
    """Says which nodes a region may hold, and keeps the candidates it read on the way.

    `outside`: nodes that no plan could have. `seen`: those that must run as written because of what changes
    in place, with the reason (`Aliases`).
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        outside: Collection[fx.Node] = (),
        seen: Mapping[fx.Node, str] | None = None,
    ) -> None:
        self.gm = gm
        self._seen = seen or {}
        self.known: dict[Any, Candidate | str] = gm.meta.setdefault("candidates", {})
        self.candidates: dict[LoweredChoice, list[tuple[nn.Module, Candidate]]] = {}
        self.supported: dict[fx.Node, bool] = {}
        self._reasons: dict[int, str | None] = {}
        self._detours = Detours(gm, gm.graph.nodes, outside)
        for node in gm.graph.nodes:
            reason = "no plan can have it" if node in outside else self._why_not(node)
            self.supported[node] = reason is None
            if reason and isinstance(node.target, LoweredChoice):
                gm.meta.setdefault("outside", {})[node.target.path] = reason
            if reason and node.op == "call_module":
                self._count_on_settings(gm.get_submodule(str(node.target)))

    def leave_out_torn(self, parts: Sequence[Sequence[fx.Node]]) -> bool:
        """Whether parts would hand something on that is no image, which is then left out of all parts."""
        torn = self._detours.torn(parts)
        self._detours.leave_out(torn)
        for node in self._detours.why:
            self.supported[node] = False
        return bool(torn)

    def _count_on_settings(self, module: nn.Module) -> None:
        """Look again when the settings change for which a module stays outside."""
        for name in settings_of(module):
            self.gm.meta["guards"].saw(module, name, attribute(module, name))

    def _why_not(self, node: fx.Node) -> str | None:
        if node in self._seen:
            return self._seen[node]
        if isinstance(node.target, LoweredChoice):
            strange = self._detours.why_strange(node)
            if strange is not None:
                return strange
        if isinstance(node.target, LoweredLayerChoice):
            return self._why_not_layer_choice(node)
        if isinstance(node.target, LoweredInputChoice):
            return self._why_not_input_choice(node)
        if node.op in ("placeholder", "output", "get_attr"):
            return "is an input, output or attribute"
        return _why_not(self.gm, node, self._detours)

    def _why_not_layer_choice(self, node: fx.Node) -> str | None:
        target: Any = node.target
        choice = target.choice
        if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], fx.Node):
            return "takes more than one image"
        reason = _why_not_choice(choice)
        if reason is not None:
            return reason
        found = []
        for name, module in zip(choice.names, choice, strict=True):
            if module is None:
                return f"candidate {name!r} is None"
            candidate = read_once(module, self.known)
            if isinstance(candidate, str):
                return f"candidate {name!r} {candidate}"
            reason = self._why_not_candidate(module, candidate)
            if reason is not None:
                return f"candidate {name!r}: {reason}"
            found.append((module, candidate))
        if self._is_merged(choice, [candidate for _, candidate in found]):
            return MERGED
        self.candidates[target] = found
        return None

    def _is_merged(self, choice: Any, candidates: Sequence[Candidate]) -> bool:
        """Whether convolutions of the choice become a single one, which is better than any plan."""
        pairs = zip(candidates, choice, strict=True)
        if sum(_is_affine(candidate, module) for candidate, module in pairs) < 2:
            return False
        prefixes = [None] * len(choice)
        groups, _ = find_groups(choice, prefixes, self.gm.meta["guards"], self.known)
        return any(group.pattern.name == "merge" for group in groups)

    def _why_not_candidate(self, module: nn.Module, candidate: Candidate) -> str | None:
        # candidates of equal structure are one object
        if id(candidate) not in self._reasons:
            inside: Any = _Inside(module)
            steps = [step for step in candidate.graph.nodes if step.op not in ("placeholder", "output")]
            self._reasons[id(candidate)] = why_not_operations(inside, steps)
        reason = self._reasons[id(candidate)]
        for step in candidate.graph.nodes if reason else ():
            if step.op == "call_module":
                self._count_on_settings(_Inside(module).get_submodule(str(step.target)))
        return reason

    def _why_not_input_choice(self, node: fx.Node) -> str | None:
        reason = _why_not_choice(node.target.choice)  # type: ignore[union-attr]
        if reason is not None:
            return reason
        parts = node.args[0] if len(node.args) == 1 else None
        if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
            return "takes something else than a list of images"
        return None


def _is_affine(candidate: Candidate, module: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Identity)
    inside = _Inside(module)
    steps = [step for step in candidate.graph.nodes if step.op not in ("placeholder", "output")]
    return bool(steps) and all(
        step.op == "call_module" and isinstance(inside.get_submodule(str(step.target)), kinds)
        for step in steps
    )


def _why_not_choice(choice: Any) -> str | None:
    if choice.return_mask:
        return "returns its mask"
    return None if choice.reduction in ("sum", "mean") else f'reduction "{choice.reduction}" is not a sum'


class _Inside:
    """The modules inside a candidate, by the names that its graph has for them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get_submodule(self, path: str) -> nn.Module:
        return self._module if path == "self" else self._module.get_submodule(path)


def why_not_operations(gm: Any, nodes: Sequence[fx.Node]) -> str | None:
    """Why modules, functions and methods, in their order, cannot all be part of a region, or None."""
    detours = Detours(gm, nodes)
    found = {node: reason for node in nodes if (reason := _why_not(gm, node, detours))}
    # what leads nowhere does so because of something that comes after it
    causes = (reason for node, reason in found.items() if detours.why.get(node) != LEADS_NOWHERE)
    return next(causes, None) or next(iter(found.values()), None)


def _why_not(gm: Any, node: fx.Node, detours: Detours) -> str | None:
    if is_in_place(gm, node) and not _changes_its_own(gm, node):
        return f"{node.name} changes a value in place that others see"
    if node in detours.inside:
        return None
    if node in detours.why:
        is_module = node.op == "call_module"
        name = type(gm.get_submodule(str(node.target))).__name__ if is_module else node.name
        return f"{name}: {detours.why[node]}"
    reason, strange = _why_not_on_images(gm, node), detours.why_strange(node)
    return reason if reason is not None or strange is None else f"{node.name} {strange}"


def _why_not_on_images(gm: Any, node: fx.Node) -> str | None:
    if node.op == "call_module":
        arg = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if not isinstance(arg, fx.Node) or arg.op == "get_attr":
            return f"{node.name} does not take one image"
        try:
            kind_of(gm.get_submodule(str(node.target)))
        except Unsupported as reason:
            return str(reason)
        return None
    return why_not_function(node)


def _changes_its_own(gm: Any, node: fx.Node) -> bool:
    """Whether an operation in place changes a value that nobody else sees."""
    changed = node.args[0] if node.args else None
    if not isinstance(changed, fx.Node) or changed.op == "placeholder" or len(changed.users) != 1:
        return False
    return not is_view(gm, changed) or _changes_its_own(gm, changed)
