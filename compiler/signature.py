"""How a forward is called: the shape of a call, and placeholders that rebuild its arguments inside a
trace."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nascompile.compiler.fingerprint import fingerprint
from nascompile.compiler.guards import NotTraceable

_CONSTANTS = (bool, int, str, bytes, type(None), torch.dtype, torch.device)


def call_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Equal for calls that one trace can serve: the nesting, the places of tensors and floats, all other
    values."""
    return _shape(args), _shape(kwargs)


def guessed_shape(forward: Callable[..., Any]) -> Any:
    """The call shape of `guessed_inputs`."""
    required = required_parameters(forward)
    positional = [p for p in required if p.kind is not p.KEYWORD_ONLY]
    return _shape((torch.Tensor,) * len(positional)), _shape(
        {p.name: torch.Tensor for p in required if p.kind is p.KEYWORD_ONLY}
    )


def _shape(value: Any) -> Any:
    if isinstance(value, torch.Tensor) or value is torch.Tensor:
        return "tensor"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list | tuple):
        return type(value), tuple(_shape(item) for item in value)
    if isinstance(value, dict):
        return type(value), tuple((key, _shape(item)) for key, item in value.items())
    return fingerprint(value)


def inputs_like(
    tracer: fx.Tracer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Placeholders in the order of the signature, and arguments for `forward` nested like the example's.

    Tensors and floats are proxies; integers, strings, booleans and None are constants of the trace.
    """
    bound = inspect.signature(forward).bind(*args, **kwargs)
    for parameter in bound.signature.parameters.values():
        proxy = _placeholder(tracer, parameter)
        if parameter.name in bound.arguments:
            bound.arguments[parameter.name] = _rebuild(proxy, bound.arguments[parameter.name])
    return bound.args, bound.kwargs


def guessed_inputs(tracer: fx.Tracer, forward: Callable[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `inputs_like`, when no example is known: every argument without a default is one proxy."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in inspect.signature(forward).parameters.values():
        proxy = _placeholder(tracer, parameter)
        if not _is_required(parameter):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = proxy
        else:
            args.append(proxy)
    return tuple(args), kwargs


def required_parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that a call has to give."""
    return [
        parameter for parameter in inspect.signature(forward).parameters.values() if _is_required(parameter)
    ]


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def _placeholder(tracer: fx.Tracer, parameter: inspect.Parameter) -> fx.Proxy:
    prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default: tuple[Any, ...] = ()
    if parameter.default is not parameter.empty:
        # a default that fx cannot write down is only ever used as the trace's constant
        default = (parameter.default if isinstance(parameter.default, (*_CONSTANTS, float)) else None,)
    elif parameter.kind is parameter.KEYWORD_ONLY and _has_default_before(tracer.graph):
        # the graph knows no keyword-only arguments: Python wants a default after a default
        default = (None,)
    return tracer.create_proxy("placeholder", prefix + parameter.name, default, {})


def _has_default_before(graph: fx.Graph) -> bool:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    starred = any(str(node.target).startswith("*") for node in placeholders)
    return not starred and any(node.args for node in placeholders)


def _rebuild(proxy: Any, example: Any) -> Any:
    if isinstance(example, torch.Tensor | float):
        proxy.node.meta["is_tensor"] = isinstance(example, torch.Tensor)
        return proxy
    fields = getattr(example, "_fields", None) if isinstance(example, tuple) else None
    if fields is not None:
        make: Any = type(example)
        return make(*(_rebuild(_field(proxy, name), getattr(example, name)) for name in fields))
    if isinstance(example, list | tuple):
        return type(example)(_rebuild(_item(proxy, index), item) for index, item in enumerate(example))
    if isinstance(example, dict):
        return type(example)((key, _rebuild(_item(proxy, key), item)) for key, item in example.items())
    if isinstance(example, _CONSTANTS):
        return example
    raise NotTraceable(f"is given a {type(example).__name__} as an argument")


def _field(proxy: Any, name: str) -> Any:
    return proxy.tracer.create_proxy("call_function", getattr, (proxy, name), {})


def _item(proxy: Any, key: Any) -> Any:
    return proxy.tracer.create_proxy("call_function", operator.getitem, (proxy, key), {})
