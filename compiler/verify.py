"""Runs a fresh trace beside the program it was made from; a difference means that the trace is not the
program."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nascompile.compiler.decision import Selection, read_mask
from nascompile.compiler.mutables import forced_mutator
from nascompile.compiler.mutator import Mutator
from nascompile.compiler.snapshot import is_changeable, put_back, snapshot
from nascompile.kernels.transforms import is_transformed

# loose on purpose: kernels may round differently, a wrong trace differs in kind
_TOLERANCE = 2e-2
# in bf16 a DARTS supernet of eight cells is itself 2.6 % off
_TOLERANCE_BF16 = 0.16

_AUTOGRAD: Any = torch._C._autograd  # type: ignore[attr-defined]


class EverythingChosen(Mutator):
    """Decides, without being bound, for every layer with equal weights and for as many inputs as each choice
    takes."""

    def __init__(self, weighted: bool) -> None:
        nn.Module.__init__(self)
        self.weighted = weighted

    def selection(self, key: str, length: int) -> tuple[Selection, Any]:
        """All candidates with equal weights, or the first one."""
        mask: Any = [1.0 / length] * length if self.weighted else [True] + [False] * (length - 1)
        return read_mask(mask, length, key), mask


def difference(
    model: nn.Module, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """What distinguishes the compiled model's output from the model's on one call, or None.

    Buffers and random states are as before afterwards. A model that itself cannot run with all candidates is
    compared with the first candidate of every choice, and not at all if that fails as well.
    """
    if not _has_values(args, kwargs):
        return None
    for weighted in (True, False):
        with forced_mutator(EverythingChosen(weighted)), torch.no_grad():
            try:
                with state_kept(model, args, kwargs):
                    expected = model(*args, **kwargs)
            except Exception:  # the user's own model refuses this decision; the next one may suit it
                continue
            try:
                with state_kept(model, args, kwargs):
                    actual = compiled(*args, **kwargs)
            except Exception as error:
                first_line = next(iter(str(error).splitlines()), "")
                return f"the trace fails where the model runs: {type(error).__name__}: {first_line}"
        return _compare(expected, actual)
    return None


def difference_under(
    mutator: Mutator, model: nn.Module, other: nn.Module, args: tuple[Any, ...]
) -> str | None:
    """What distinguishes the outputs of two models on one call when `mutator` decides, or None.

    None too when the first does not run: there is nothing to compare with then.
    """
    if not _has_values(args, {}):
        return None
    with forced_mutator(mutator), torch.no_grad():
        try:
            with state_kept(model, args, {}):
                expected = model(*args)
        except Exception:  # the decision may be one that the user's program does not run with
            return None
        try:
            with state_kept(other, args, {}):
                actual = other(*args)
        except Exception as error:
            return f"the graph fails where the model runs: {type(error).__name__}: {error}"
    return _compare(expected, actual)


def _has_values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    real = all(type(leaf) in (Tensor, nn.Parameter) and not leaf.is_meta for leaf in leaves)
    plain = not is_transformed() and torch._C._get_tracing_state() is None
    return real and plain and not torch.compiler.is_compiling()


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor can be copied: torch crashes where its storage has been taken away (`resize_(0)`)."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return True
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


@contextmanager
def state_kept(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Put the model's buffers and attributes, the arguments and all random states back afterwards."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    plain = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, Tensor)]
    held = {id(tensor): tensor for tensor in (*model.buffers(), *plain)}
    kept = [
        (tensor, tensor.detach().clone(), _version(tensor))
        for tensor in {**held, **{id(leaf): leaf for leaf in tensors}}.values()
        if _has_memory(tensor)
    ]
    devices = sorted({t.device.index or 0 for t, _, _ in kept if t.device.type == "cuda"})
    numpy_state, python_state = numpy.random.get_state(), random.getstate()
    attributes = _attributes(model)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for values, before in attributes:
            put_back(values, before)
        with torch.no_grad():
            for tensor, before, version in kept:
                # an argument that nobody wrote to may be read-only memory; BatchNorm writes to its statistics
                # without a new version
                if id(tensor) in held or version is None or tensor._version != version:
                    tensor.copy_(before)
                if version is not None:
                    # nor does autograd have to know: the tensor is what it was
                    _AUTOGRAD._unsafe_set_version_counter((tensor,), (version,))
        numpy.random.set_state(numpy_state)
        random.setstate(python_state)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _attributes(model: nn.Module) -> list[tuple[Any, Any]]:
    # by id, for an object may be held by several modules
    holders = {id(module.__dict__): module.__dict__ for module in model.modules()}
    held = {
        id(value): value for values in holders.values() for value in values.values() if is_changeable(value)
    }
    return [(value, snapshot(value)) for value in (*holders.values(), *held.values())]


def _tolerance(output: Tensor) -> float:
    """How much of the largest value an output may be off, which may have been cast to a wider type."""
    device = output.device.type
    casts_to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return _TOLERANCE_BF16 if torch.bfloat16 in (output.dtype, casts_to) else _TOLERANCE


def _compare(expected: Any, actual: Any) -> str | None:
    left, left_spec = tree_flatten(expected)
    right, right_spec = tree_flatten(actual)
    if left_spec != right_spec:
        return f"the trace returns {right_spec}, the model {left_spec}"
    for one, other in zip(left, right, strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.shape != other.shape or one.dtype != other.dtype:
                return (
                    f"the trace returns {other.dtype} {tuple(other.shape)}, "
                    f"the model {one.dtype} {tuple(one.shape)}"
                )
            tolerance = _tolerance(one)
            one, other = one.to(torch.float64), other.to(torch.float64)
            scale = one.nan_to_num().abs().max().item() if one.numel() else 0.0
            if not torch.allclose(one, other, rtol=0, atol=tolerance * scale + 1e-6, equal_nan=True):
                return "the trace gives other values than the model on the example inputs"
        elif type(one) is not type(other) or one != other:
            return f"the trace returns {other!r}, the model {one!r}"
    return None
