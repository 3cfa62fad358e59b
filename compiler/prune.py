"""`nascompile.prune`: the network of one architecture, without choices and without anything it does not need.

The user's own forward is traced with the decisions bound, so that Python code follows them (`if x is not
None`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from nascompile.compiler.architecture import Mask, resolve, single_choice
from nascompile.compiler.codegen import graph_module
from nascompile.compiler.decision import read_mask
from nascompile.compiler.errors import NascompileError
from nascompile.compiler.islands import Island, where_defined
from nascompile.compiler.lean import fix_choices, fixed_weights, reduce_fixed, weighed
from nascompile.compiler.lean_module import LeanModule, same_graph
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable, forced_mutator
from nascompile.compiler.mutator import Mutator, readable
from nascompile.compiler.passes.drop_dead import drop_dead
from nascompile.compiler.passes.drop_identity import drop_identity
from nascompile.compiler.passes.drop_zero_terms import LayoutRecorder, drop_zero_terms, makes_zeros
from nascompile.compiler.passes.functionalize_in_place import functionalize_in_place
from nascompile.compiler.signature import inputs_like, required_parameters
from nascompile.compiler.space import choices, unwrap
from nascompile.compiler.trace import ModelTracer, own_forward
from nascompile.compiler.verify import difference_under, state_kept

WHOLE = "model"  # the name of the one node when the model's own forward cannot be traced


def prune(
    model: nn.Module,
    architecture: str | Path | Mapping[str, Any],
    example_inputs: Any = None,
    *,
    weights: str = "inherit",
) -> fx.GraphModule:
    """The network of `architecture` as a new GraphModule; `model` is left as it is and shares nothing with
    it.

    example_inputs: a tensor or a tuple of the arguments of `forward`; needed where arguments are lists, dicts
    or None.
    weights: "inherit" copies the model's, "fresh" initialises anew with each module's
    `reset_parameters`. Parameters are named as in the model after `apply_fixed_architecture`. Where train and
    eval mode take different ways, the graph follows `train()` and `eval()`. What could not be traced stays a
    module of its own, listed in `lean.meta["nascompile"]["islands"]`.

    Raises ArchitectureError when the architecture does not fit, NascompileError for weights that cannot be
    made fresh.
    """
    if weights not in ("inherit", "fresh"):
        raise NascompileError(f'weights is {weights!r}, expected "inherit" or "fresh"')
    model = unwrap(model)
    masks = resolve(model, architecture)
    source = model if weights == "inherit" else _fresh(model)
    lean, tracers = _lean(source, masks, example_inputs)
    if example_inputs is not None:
        problem = _difference(source, lean, masks, _arguments(example_inputs))
        if problem is not None:
            lean, tracers = _lean(source, masks, example_inputs, whole=problem)
    if weights == "fresh":
        _require_reset(source, lean.meta["nascompile"]["names"].values())
    islands = {path: str(island) for tracer in tracers.values() for path, island in tracer.islands.items()}
    lean.meta["nascompile"].update(
        architecture={key: readable(choice, masks[key]) for key, choice in choices(model).items()},
        islands=islands,
        constants=tracers[True].guards.constants(),
    )
    return _set_mode(lean, model.training, _own_modes(lean))


def load_supernet(lean: fx.GraphModule, state: nn.Module | Mapping[str, torch.Tensor]) -> None:
    """Copy the weights of a supernet (the model, or its `state_dict`) into a lean network made from it, in
    place.

    Raises NascompileError naming the first tensor that is missing or has another shape; nothing is copied
    then.
    """
    tensors = unwrap(state).state_dict() if isinstance(state, nn.Module) else state
    names = lean.meta["nascompile"]["names"]
    own = lean.state_dict()
    for name, tensor in own.items():
        source = names[name]
        if source not in tensors:
            raise NascompileError(
                f"the supernet has no tensor {source!r}, which {name!r} of the lean network needs"
            )
        if tensors[source].shape != tensor.shape:
            raise NascompileError(
                f"{source!r} of the supernet has shape {tuple(tensors[source].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
    lean.load_state_dict({name: tensors[names[name]] for name in own})


def _arguments(example_inputs: Any) -> tuple[Any, ...]:
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def _own_modes(lean: nn.Module) -> list[tuple[nn.Module, bool]]:
    # the copies are in the mode of their originals, which may differ from the model's
    return [(m, m.training) for m in lean.modules() if type(m) is not nn.Module and m is not lean]


def _set_mode(lean: fx.GraphModule, training: bool, modes: list[tuple[nn.Module, bool]]) -> fx.GraphModule:
    lean.train(training)
    for module, mode in modes:
        module.training = mode
    return lean


def _difference(
    source: nn.Module, lean: fx.GraphModule, masks: Mapping[str, Mask], args: tuple[Any, ...]
) -> str | None:
    """What distinguishes the lean network from the supernet under the decision, in eval mode, or None."""
    modes, training = _own_modes(lean), lean.training
    try:
        with _mode(source, False):
            return difference_under(_Decided(masks), source, lean.eval(), args)
    finally:
        _set_mode(lean, training, modes)


class _Decided(Mutator):
    """Carries out fixed decisions on proxies, without being bound to the model."""

    def __init__(self, masks: Mapping[str, Mask]) -> None:
        nn.Module.__init__(self)
        self.masks = masks

    def on_forward_layer_choice(self, mutable: LayerChoice, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        mask = self.masks[mutable.key]
        selection = read_mask(mask, len(mutable), mutable.key)
        weights = zip(selection.indices, fixed_weights(selection), strict=True)
        outputs = [weighed(mutable[index](*args, **kwargs), weight) for index, weight in weights]
        return reduce_fixed(outputs, mutable.reduction), mask

    def on_forward_input_choice(self, mutable: InputChoice, tensor_list: list[Any]) -> tuple[Any, Any]:
        mask = self.masks[mutable.key]
        selection = read_mask(mask, len(mutable), mutable.key)
        weights = zip(selection.indices, fixed_weights(selection), strict=True)
        outputs = [weighed(tensor_list[index], weight) for index, weight in weights]
        return reduce_fixed(outputs, mutable.reduction), mask


def _lean(
    source: nn.Module, masks: Mapping[str, Mask], example_inputs: Any, *, whole: str | None = None
) -> tuple[fx.GraphModule, dict[bool, ModelTracer]]:
    """The lean network and the tracers of both modes; with a reason for `whole`, the model is one node."""
    graphs, tracers = {}, {}
    for training in (True, False):
        tracer = tracers[training] = ModelTracer(source, inline_choices=True)
        if whole is None:
            graphs[training] = _trace(tracer, masks, example_inputs, training)
        else:
            tracer.islands[""] = Island("", *where_defined(source), whole)
            graphs[training] = _one_node(tracer, example_inputs)
    return _assemble(source, graphs, masks), tracers


def _trace(tracer: ModelTracer, masks: Mapping[str, Mask], example_inputs: Any, training: bool) -> fx.Graph:
    args = _arguments(example_inputs)
    forward = own_forward(tracer.root)
    with _mode(tracer.root, training), forced_mutator(_Decided(masks)):
        if example_inputs is None:
            traced = tracer.trace_guessed("")
        else:
            traced = tracer.trace_module("", lambda t: inputs_like(t, forward, args, {}))
    if not traced:
        return _one_node(tracer, example_inputs)
    gm = graph_module(tracer.root, tracer.graph, guards=tracer.guards, notes=tracer.notes, tracer=tracer)
    drop_identity(gm)
    if example_inputs is not None and makes_zeros(gm) and _record_layouts(gm, tracer.root, args):
        drop_zero_terms(gm)
    drop_dead(gm)
    functionalize_in_place(gm)
    return gm.graph


def _record_layouts(gm: fx.GraphModule, model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Run the graph on the example and on twice the batch; False where the second does not run.

    Twice, because sizes that are equal for one batch, of a position embedding for example, may differ then.
    """
    doubled = tree_map(lambda x: torch.cat([x, x]) if isinstance(x, torch.Tensor) and x.dim() else x, args)
    signature = inspect.signature(own_forward(model))
    for inputs in (args, doubled):
        bound = signature.bind(*inputs)
        bound.apply_defaults()
        # evaluation mode whatever the graph is for: one example is enough for BatchNorm then
        try:
            with state_kept(model, inputs, {}), _mode(model, False), torch.no_grad():
                LayoutRecorder(gm).run(*bound.arguments.values())
        except Exception:  # a model may be made for one batch size; its zeros stay
            return False
    return True


def _one_node(tracer: ModelTracer, example_inputs: Any) -> fx.Graph:
    tracer.graph = graph = fx.Graph()
    forward = own_forward(tracer.root)
    if example_inputs is None:
        names = [parameter.name for parameter in required_parameters(forward)]
    else:
        names = list(inspect.signature(forward).parameters)[: len(_arguments(example_inputs))]
    graph.output(graph.call_module(WHOLE, tuple(graph.placeholder(name) for name in names)))
    return graph


def _assemble(source: nn.Module, graphs: dict[bool, fx.Graph], masks: Mapping[str, Mask]) -> fx.GraphModule:
    """Copies of what the graphs use, under the names of the fixed model, as one GraphModule."""
    memo: dict[int, Any] = {}
    parts: dict[str, Any] = {}
    names: dict[str, str] = {}
    volatile: set[str] = set()
    for graph in graphs.values():
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            path = str(node.target)
            lean_name = (
                path if path == WHOLE and not hasattr(source, WHOLE) else _lean_name(source, path, masks)
            )
            if lean_name not in parts:
                part = source if path == WHOLE and not hasattr(source, WHOLE) else _get(source, path)
                names.update(_names_of(part, path if part is not source else "", lean_name, masks))
                if isinstance(part, torch.Tensor) and _is_volatile(source, path):
                    volatile.add(lean_name)
                parts[lean_name] = _copy(part, masks, memo)
            node.target = lean_name
    train, evaluation = graphs[True], graphs[False]
    lean = fx.GraphModule(parts, train) if same_graph(train, evaluation) else LeanModule(parts, graphs)
    for name in volatile:
        owner, _, attribute = name.rpartition(".")
        lean.get_submodule(owner)._non_persistent_buffers_set.add(attribute)
    names = {name: names[name] for name in lean.state_dict()}
    lean.meta["nascompile"] = {"names": names}
    _assert_lean(lean)
    return lean


def _assert_lean(lean: fx.GraphModule) -> None:
    left = [name for name, module in lean.named_modules() if isinstance(module, Mutable)]
    assert not left, f"choices are left in the lean network: {left}"


def _copy(part: Any, masks: Mapping[str, Mask], memo: dict[int, Any]) -> Any:
    clone = copy.deepcopy(part, memo)
    if isinstance(clone, nn.Module):
        clone = fix_choices(clone, masks)
    return clone


def _get(root: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(root.get_submodule(owner), name)


def _is_volatile(root: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    module = root.get_submodule(owner)
    return name not in module._parameters and (
        name not in module._buffers or name in module._non_persistent_buffers_set
    )


def _lean_name(root: nn.Module, path: str, masks: Mapping[str, Mask]) -> str:
    """The path after every choice with one hard-chosen layer has given its place to that layer."""
    kept: list[str] = []
    module: Any = root
    for depth, name in enumerate(path.split(".")):
        # a choice that is the whole model has no place in a parent to give away
        gives_way = depth > 0 and isinstance(module, LayerChoice) and module.key in masks
        if not (gives_way and single_choice(module, masks[module.key]) == name):
            kept.append(name)
        module = getattr(module, name)
    return ".".join(kept)


def _names_of(part: Any, path: str, lean_name: str, masks: Mapping[str, Mask]) -> dict[str, str]:
    if isinstance(part, torch.Tensor):
        return {lean_name: path}
    found = {}
    for name in part.state_dict():
        inner = _lean_name(part, name, masks) if not isinstance(part, LayerChoice) else name
        found[f"{lean_name}.{inner}"] = f"{path}.{name}" if path else name
    return found


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    frozen = _frozen(model)
    try:
        for module, _ in modes:
            module.training = training and module not in frozen
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _frozen(model: nn.Module) -> set[nn.Module]:
    """Modules that the user holds in eval mode while the model trains."""
    return {module for module in model.modules() if not module.training} if model.training else set()


def _fresh(model: nn.Module) -> nn.Module:
    clone = copy.deepcopy(model)
    for module in clone.modules():
        reset = _reset(module)
        if reset is not None:
            reset()
    return clone


def _require_reset(model: nn.Module, used: Iterable[str]) -> None:
    """Raise NascompileError for the first used parameter of a module that cannot be initialised anew."""
    for path in used:
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if name in module._parameters and _reset(module) is None:
            raise NascompileError(
                f'weights="fresh": {path!r} belongs to a module without reset_parameters; define it, '
                'or use weights="inherit"'
            )


def _reset(module: nn.Module) -> Any:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
