"""Traces a user's forward into an fx graph; what cannot be traced stays an island that runs as the user wrote
it.

The tracer refuses rather than guesses: anything that would make the recorded graph differ from the program (a
branch on data, a changed attribute, random numbers drawn in Python, a gradient mode) turns the module it
happens in into an island.
"""

from __future__ import annotations

import builtins
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nascompile.compiler.ambient import ambient_modes, random_states, same_random_states, set_random_states
from nascompile.compiler.checks import has_hooks
from nascompile.compiler.constructors import Constructor, recorded_constructors
from nascompile.compiler.guards import Guards, NotTraceable, watch_attributes
from nascompile.compiler.islands import FOREIGN, Island, describe, where_defined
from nascompile.compiler.mutables import InputChoice, LayerChoice, Mutable, MutableScope
from nascompile.compiler.names import assigned_globals
from nascompile.compiler.patching import one_at_a_time, replaced, replaced_here
from nascompile.compiler.signature import guessed_inputs
from nascompile.compiler.space import unwrap

_FACTORIES = frozenset(
    {torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.eye, torch.tensor}
    | {torch.rand, torch.randn, torch.randint, torch.randperm}
)
# what may be asked of any tensor without computing
_QUESTIONS = frozenset(
    {"__get__", "dim", "size", "numel", "stride", "is_floating_point", "__len__", "__repr__"}
)
_IN_PLACE_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")


class TensorProxy(fx.Proxy):
    """An fx proxy on which `x += y` and `x[i] = y` change the object, as they do in the program."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(name: str) -> Callable[[TensorProxy, Any], Any]:
    target = getattr(operator, f"i{name}")

    def method(self: TensorProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in _IN_PLACE_OPERATORS:
    setattr(TensorProxy, f"__i{_name}__", _in_place(_name))


class _RecordFactories(TorchFunctionMode):
    """Tensors made from Python numbers belong to the graph: made anew, on the right device, in every call."""

    def __init__(self, tracer: ModelTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        if _computes_now(func, args, kwargs or {}) and not _calls_from_here():
            name = getattr(func, "__name__", str(func))
            raise NotTraceable(
                f"computes {name} of a tensor that is not part of the model while it is traced"
            )
        return func(*args, **(kwargs or {}))


def _computes_now(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call has tensors and no proxy, so that it would run once, now, and not in every call."""
    leaves = tree_leaves((args, kwargs))
    asks = getattr(func, "__name__", "") in _QUESTIONS
    return (
        not asks
        and any(isinstance(x, torch.Tensor) for x in leaves)
        and not any(type(x) is TensorProxy for x in leaves)
    )


def _calls_from_here() -> bool:
    # the frames of this function and of the mode lie above the caller's
    return sys._getframe(2).f_code.co_filename.startswith(FOREIGN[1])


class ModelTracer(fx.Tracer):
    """Traces one module of a model (by default all of it), with node targets relative to the model.

    With `inline_choices` the bound (or forced) mutator decides at trace time and choices leave no trace;
    otherwise each choice stays one node. Afterwards `islands`, `notes` (why a module is left whole) and
    `guards` (what the trace took for granted) say what was found.
    """

    def __init__(self, model: nn.Module, *, inline_choices: bool = False) -> None:
        super().__init__()
        self.root = model
        self.inline_choices = inline_choices
        self.tensor_attrs = {}
        self.proxy_buffer_attributes = True
        self.islands: dict[str, Island] = {}
        self.notes: dict[str, str] = {}
        self.guards = Guards()
        self.has_scopes = False
        self.paths: dict[nn.Module, str] = {}
        for path, module in model.named_modules():
            self.paths.setdefault(module, path)
            # a compiled model inside is traced as the model that it was made of
            self.paths.setdefault(unwrap(module), path)
        self.submodule_paths = self.paths
        self._tensors = _tensor_paths(model)
        self._ambient, self._thread = ambient_modes(), threading.get_ident()

    def proxy(self, node: fx.Node) -> TensorProxy:
        """Wrap a node (fx interface)."""
        return TensorProxy(node, self)

    def trace_module(
        self, path: str, make_inputs: Callable[[ModelTracer], tuple[tuple[Any, ...], dict[str, Any]]]
    ) -> bool:
        """Trace the module at `path` into `self.graph`; False, with the island on record, when it cannot be
        done."""
        module = unwrap(self.root.get_submodule(path))
        self.graph = fx.Graph()
        reason = why_whole(module)
        if reason is not None:
            self.islands[path] = Island(path, *where_defined(module), reason)
            return False
        try:
            with one_at_a_time(), self._tracing():
                island = self._fill(path, module, make_inputs)
        except TimeoutError as error:
            island = Island(path, *where_defined(module), str(error))
        if island is not None:
            self.islands[path] = island
        return island is None

    def _fill(
        self,
        path: str,
        module: nn.Module,
        make_inputs: Callable[[ModelTracer], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> Island | None:
        """Fill the graph; an island says what stood in the way."""
        try:
            args, kwargs = make_inputs(self)
            output = self._run(module, own_forward(module), args, kwargs)
            self.create_node("output", "output", (self.create_arg(output),), {})
        except Exception as error:
            return describe(error, path, module)
        return None

    def trace_guessed(self, path: str) -> bool:
        """As `trace_module`, when no example is known: every argument without a default is one tensor."""
        forward = own_forward(unwrap(self.root.get_submodule(path)))
        return self.trace_module(path, lambda tracer: guessed_inputs(tracer, forward))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of `m` stay one node (fx interface)."""
        if isinstance(m, LayerChoice | InputChoice):
            return not self.inline_choices
        path = module_qualified_name
        if path in self.islands or path in self.notes:
            return True
        holds_choices = any(isinstance(child, Mutable) for child in m.modules())
        builtin = is_builtin(m)
        reason = "is a torch.nn module" if builtin else why_whole(m)
        if reason is None:
            return False
        if holds_choices:
            self.islands[path] = Island(path, *where_defined(m), reason)
        elif not builtin:
            self.notes[path] = reason
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a leaf, or trace through; a module that fails becomes an island (fx interface)."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        if unwrap(m) is not m:
            self.guards.traced(m)
            return unwrap(m)(*args, **kwargs)
        before = list(self.graph.nodes)[-1] if len(self.graph.nodes) else None
        try:
            return self._run(m, forward, args, kwargs)
        except Exception as error:
            self._roll_back(before)
            self.islands[path] = describe(error, path, m)
            return self.create_proxy("call_module", path, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        """Dotted path in the model (fx interface)."""
        if mod not in self.paths:
            raise NotTraceable(f"calls a {type(mod).__name__} that is not part of the model")
        return self.paths[mod]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Record a node, unless the program has changed a mode or a thread that the graph would not carry
        (fx interface)."""
        if threading.get_ident() != self._thread:
            raise NotTraceable("computes in threads of its own")
        if ambient_modes() != self._ambient:
            raise NotTraceable("changes the gradient, inference or autocast mode in forward")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if _gives_tensor(self.root, node):
            node.meta["is_tensor"] = True
        return node

    def create_arg(self, a: Any) -> Any:
        """An argument as the graph holds it; tensors must belong to the model (fx interface)."""
        if isinstance(a, torch.Tensor):
            path = self._tensors.get(id(a))
            if path is None:
                raise NotTraceable("uses a tensor that is not a parameter, buffer or attribute of the model")
            return self.create_node("get_attr", path, (), {})
        if isinstance(a, Constructor):
            a = a.kind
        if isinstance(a, nn.Module):
            raise NotTraceable(f"passes a module ({type(a).__name__}) to an operation")
        return super().create_arg(a)

    def _run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        assigned = assigned_globals(forward)
        if assigned:
            raise NotTraceable(f"assigns the global {', '.join(sorted(assigned))}")
        state, taken = random_states(), self.guards.mark()
        self.guards.traced(module)
        try:
            output = forward(*args, **kwargs)
            if not same_random_states(state, random_states()):
                raise NotTraceable("draws random numbers in Python")
            self.guards.require_containers_unchanged()
        except Exception:
            # the module will run as written: what it read may change, and what it drew has not been drawn
            set_random_states(state)
            self.guards.forget_since(taken)
            raise
        if isinstance(module, MutableScope):
            self.has_scopes = True
        return output

    def _recorded(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        # torch refuses a proxy as a size before it asks a mode
        return lambda *args, **kwargs: self.create_proxy("call_function", factory, args, kwargs)

    def _roll_back(self, before: fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is before:
                break
            self.graph.erase_node(node)

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        if nn.Module.__call__.__module__ == replaced_here.__module__:
            # torch and nn.Module have been changed already, and the inner trace would record into the outer
            raise NotTraceable("runs a compiled model otherwise than as a module of this one")
        original_getattr = nn.Module.__getattr__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # read as torch does, not as the program
            return self.call_module(module, object.__getattribute__(module, "forward"), args, kwargs)

        def lookup(module: nn.Module, name: str) -> Any:
            value = original_getattr(module, name)
            return self.proxy(self.create_arg(value)) if isinstance(value, torch.Tensor) else value

        def enter(hooks: Any) -> None:
            raise NotTraceable("keeps hooks on saved tensors, as checkpointing does")

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            raise NotTraceable(f"uses the autograd function {cls.__name__}")

        with ExitStack() as patches:
            for owner, name, value in (
                (nn.Module, "__call__", call),
                (MutableScope, "__call__", call),
                (nn.Module, "__getattr__", lookup),
                (torch.autograd.Function, "apply", classmethod(apply)),
                (torch.autograd.graph.saved_tensors_hooks, "__enter__", enter),
                *((torch, factory.__name__, self._recorded(factory)) for factory in _FACTORIES),
            ):
                patches.enter_context(replaced_here(owner, name, value))
            for module, name, function in _TYPE_QUESTIONS:
                # other threads have no stand-ins to ask about
                patches.enter_context(replaced(module, name, _refuses(function)))
            patches.enter_context(
                watch_attributes(self.guards, lambda tensor: self.proxy(self.create_arg(tensor)))
            )
            record = partial(self.create_proxy, "call_function")
            patches.enter_context(recorded_constructors(record))
            patches.enter_context(_RecordFactories(self))
            yield


def _gives_tensor(root: nn.Module, node: fx.Node) -> bool:
    """Whether the result is surely a tensor: of arithmetic with a tensor, or of most torch.nn modules."""
    if (
        node.op == "call_function"
        and getattr(operator, getattr(node.target, "__name__", ""), 0) is node.target
    ):
        return node.target is not operator.getitem and any(
            n.meta.get("is_tensor") for n in node.all_input_nodes
        )
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    tuples = isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)
    # thousands of modules have no such attribute, and each question would become a guard
    gives_indices = "return_indices" in module.__dict__ and module.return_indices
    return is_builtin(module) and not tuples and not gives_indices


def is_builtin(module: nn.Module) -> bool:
    """Whether a module is one operation to the tracer: a forward of torch.nn, also when inherited, or a
    scripted one."""
    definer = next(one for one in type(module).__mro__ if "forward" in one.__dict__)
    builtin = definer.__module__.startswith(("torch.nn", "torch.ao.nn")) and definer is not nn.Sequential
    return builtin or isinstance(module, torch.jit.ScriptModule)


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class."""
    return type(module).forward.__get__(module)


def why_whole(module: nn.Module) -> str | None:
    """Why the inside of a module must not be looked into, or None."""
    if has_hooks(module):
        return "has hooks, which run only when the module itself is called"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if "parametrizations" in module._modules:
        return "has parametrizations"
    if any(is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        return "is lazy: run the model once, so that its parameters exist"
    overridden = next(c for c in type(module).__mro__ if "__call__" in c.__dict__)
    if overridden not in (nn.Module, MutableScope):
        return "overrides __call__"
    return None


_TYPE_QUESTIONS = (
    (builtins, "isinstance", isinstance),
    (builtins, "hasattr", hasattr),
    (torch, "is_tensor", torch.is_tensor),
)


def _refuses(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(value, ...)` for the user's code, which must not take a stand-in for a value of its own."""

    def ask(value: Any, *rest: Any) -> Any:
        if type(value) is not TensorProxy or sys._getframe(1).f_code.co_filename.startswith(FOREIGN):
            return function(value, *rest)
        if not value.node.meta.get("is_tensor", False):
            raise NotTraceable(f"asks for the type of a value ({function.__name__})")
        return function(_SOME_TENSOR, *rest)

    return ask


_SOME_TENSOR = torch.empty(0)


def _tensor_paths(model: nn.Module) -> dict[int, str]:
    paths: dict[int, str] = {}
    for prefix, module in model.named_modules():
        attributes = {**unwrap(module).__dict__, **module._buffers, **module._parameters}
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                paths.setdefault(id(value), f"{prefix}.{name}" if prefix else name)
    return paths
