"""The nodes of a graph that lie between images of a region and are none: which of them a region may hold."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx, nn

from nascompile.compiler.region.functions import is_pointwise_function
from nascompile.compiler.region.ir import Unsupported
from nascompile.compiler.region.operations import is_pointwise_module, kind_of
from nascompile.compiler.region.vectors import (
    IMAGE,
    Sizes,
    asks_for_sizes,
    is_expansion,
    resize_of,
    resized,
)

_SIZES = "sizes"
LEADS_NOWHERE = "gives a tensor that is no image and does not become one again inside the region"


class Detours:
    """Sizes that are asked of images, and tensors of other sizes that become images again.

    `inside`: the nodes that a region may hold. `why`: for all others of this kind, why not. `outside`: nodes
    that no region can hold. A tensor that leads to anything but images, such as what a classifier sees, stays
    outside.
    """

    def __init__(self, gm: Any, nodes: Iterable[fx.Node], outside: Collection[fx.Node] = ()) -> None:
        self._gm = gm
        self._forms: dict[fx.Node, Sizes | str] = {}
        self.why: dict[fx.Node, str] = {}
        self.inside: set[fx.Node] = set()
        for node in nodes:
            self._look_at(node)
        self.leave_out(outside)

    def leave_out(self, nodes: Collection[fx.Node]) -> None:
        """Take nodes out, and all that then leads nowhere or comes from nowhere."""
        for node in self.inside.intersection(nodes):
            self.inside.discard(node)
            self.why[node] = LEADS_NOWHERE
        while torn := [node for node in self.inside if not self._is_whole(node)]:
            for node in torn:
                self.inside.discard(node)
                self.why[node] = LEADS_NOWHERE

    def torn(self, parts: Collection[Collection[fx.Node]]) -> list[fx.Node]:
        """The nodes that would take or hand on what is no image across the border of a part."""
        place = {node: number for number, nodes in enumerate(parts) for node in nodes}
        return [
            node
            for node in self.inside
            if self._is_private(node) and any(place.get(user) != place[node] for user in node.users)
        ]

    def _is_private(self, node: fx.Node) -> bool:
        """Whether a node gives what no other part of the graph could take."""
        return is_expansion(node) or not self.is_image(node)

    def is_image(self, node: fx.Node) -> bool:
        """Whether a node gives an image, as far as can be told."""
        form = self._forms.get(node, IMAGE)
        return form != _SIZES and len(form) == 4

    def why_strange(self, node: fx.Node) -> str | None:
        """Why a node cannot be an operation on images, by what it takes; None if it can."""
        strange = next((x for x in node.all_input_nodes if not self.is_image(x)), None)
        return None if strange is None else f"takes {strange.name}, which is no image"

    def _look_at(self, node: fx.Node) -> None:
        try:
            form = self._form(node)
        except Unsupported as reason:
            self.why[node] = str(reason)
            return
        if form is None:
            return
        self._forms[node] = form
        if form == _SIZES or self._resize(node) is not None or not self.is_image(node) or is_expansion(node):
            self.inside.add(node)

    def _form(self, node: fx.Node) -> Sizes | str | None:
        """What a node gives; None where it is an image, or nothing to do with this."""
        given = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if given is None or given.op == "get_attr":
            return None
        form = self._forms.get(given, IMAGE)
        if asks_for_sizes(node) or (form == _SIZES and node.target is operator.getitem):
            return _SIZES
        if form == _SIZES:
            return None
        if is_expansion(node):
            _check_expansion(node)
            return IMAGE
        resize = self._resize(node)
        if resize is not None:
            return resized(form, *resize)  # type: ignore[arg-type]
        return form if not self.is_image(given) and self._is_pointwise(node) else None

    def _resize(self, node: fx.Node) -> Any:
        given = node.args[0] if node.args else None
        of_image = isinstance(given, fx.Node) and self.is_image(given)
        return resize_of(node, self._module(node), of_image=of_image)

    def _module(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        module = self._gm.get_submodule(str(node.target))
        if isinstance(module, nn.Linear | nn.Flatten):
            kind_of(module)
        return module

    def _is_pointwise(self, node: fx.Node) -> bool:
        module = self._module(node)
        return is_pointwise_function(node) if module is None else is_pointwise_module(module)

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether all that a node takes and leads to is there."""
        for x in node.all_input_nodes:
            known = x in self.inside or (self.is_image(x) and x.op != "get_attr" and x not in self.why)
            if not known:
                return False
        if self.is_image(node):
            return True
        is_used = bool(node.users) or self._forms[node] == _SIZES
        return is_used and all(user in self.inside for user in node.users)


def _check_expansion(node: fx.Node) -> None:
    """One that is multiplied with the image it is made as large as: the product does that as well."""
    products = (operator.mul, torch.mul, "mul")
    for user in node.users or (node,):
        operands = [arg for arg in user.args if arg is not node]
        if user.target not in products or operands != [node.args[1]] or user.kwargs:
            raise Unsupported(f"{node.name} is not multiplied with the image it is made as large as")
