"""What a decision means: a mask becomes a selection, and selected outputs are reduced. The eager
definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nascompile.compiler.errors import SpaceError

REDUCTIONS = ("sum", "mean", "concat", "none")


@dataclass(frozen=True, slots=True)
class Selection:
    """The candidates that take part (ascending), and their weights: a tensor of all weights, or None for a
    hard choice."""

    indices: tuple[int, ...]
    weights: Tensor | None

    def weight(self, index: int) -> Tensor | None:
        """The weight of one candidate as a 0-d tensor, or None for a hard choice."""
        return None if self.weights is None else self.weights[index]


def read_mask(mask: Any, length: int, key: str) -> Selection:
    """Read a mask of any dtype, given as a tensor, an array or a sequence.

    Booleans and integers select; floating point numbers weigh, and an exact zero leaves the candidate out.
    Raises SpaceError when the length differs from `length`.
    """
    tensor = _of_length(mask, length, key)
    values = tensor.detach().tolist()
    indices = tuple(index for index, value in enumerate(values) if value != 0)
    return Selection(indices, tensor if tensor.is_floating_point() else None)


def read_weights(mask: Any, length: int, key: str) -> Selection:
    """As `read_mask` for floating point numbers, which are not looked at: all candidates take part."""
    return Selection(tuple(range(length)), _of_length(mask, length, key))


def _of_length(mask: Any, length: int, key: str) -> Tensor:
    tensor = mask if isinstance(mask, Tensor) else _as_tensor(mask, key)
    if tensor.dim() != 1 or tensor.numel() != length:
        raise SpaceError(f"choice {key!r}: mask has shape {tuple(tensor.shape)}, expected ({length},)")
    return tensor


def _as_tensor(mask: Any, key: str) -> Tensor:
    try:
        return torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpaceError(f"choice {key!r}: mask {mask!r} is not a sequence of numbers or booleans") from error


def weigh(output: Any, weight: Tensor | None, key: str) -> Any:
    """`weight * output`, or the output itself for a hard choice; a missing output stays missing."""
    if weight is None or output is None:
        return output
    if not isinstance(output, Tensor):
        raise SpaceError(
            f"choice {key!r}: a weighted candidate returned a {type(output).__name__}, expected a tensor"
        )
    return output * weight.to(output.device)


def reduce_outputs(outputs: Sequence[Any], reduction: str, key: str, names: Sequence[str]) -> Any:
    """Combine the outputs of the chosen candidates as NNI 1.x does.

    "none" gives the list; otherwise nothing chosen gives None, one output is returned as it is, and several
    are summed, averaged (over the number chosen), or concatenated along dimension 1. Missing (None) outputs
    of chosen candidates are left out. Raises SpaceError naming two candidates whose shapes do not go
    together.
    """
    if reduction == "none":
        return list(outputs)
    present = [(name, output) for name, output in zip(names, outputs, strict=True) if output is not None]
    if not present:
        return None
    if len(present) == 1:
        return present[0][1]
    check_compatible(present, reduction, key)
    return combine([output for _, output in present], reduction)


def combine(tensors: list[Any], reduction: str) -> Any:
    """Two or more outputs summed, averaged or concatenated, in their order."""
    if reduction == "concat":
        return torch.cat(tensors, dim=1)
    total = sum(tensors[1:], tensors[0])
    return total / len(tensors) if reduction == "mean" else total


def check_compatible(named: Sequence[tuple[str, Any]], reduction: str, key: str) -> None:
    """Raise SpaceError when outputs cannot be combined, naming the choice, two candidates and their
    shapes."""
    first_name, first = named[0]
    for name, output in named:
        if not isinstance(output, Tensor):
            raise SpaceError(
                f"choice {key!r}: candidate {name!r} returns a {type(output).__name__}; "
                f'reduction "{reduction}" of several candidates needs tensors'
            )
        if not _fits(first.shape, output.shape, reduction):
            raise SpaceError(
                f"choice {key!r}: candidate {name!r} returns {tuple(output.shape)}, "
                f'{first_name!r} returns {tuple(first.shape)}; reduction "{reduction}" needs equal shapes'
            )


def _fits(left: torch.Size, right: torch.Size, reduction: str) -> bool:
    if reduction == "concat":
        return len(left) == len(right) and all(
            a == b for d, (a, b) in enumerate(zip(left, right, strict=True)) if d != 1
        )
    if left == right:
        return True
    try:
        torch.broadcast_shapes(left, right)
    except RuntimeError:
        return False
    return True
