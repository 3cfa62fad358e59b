"""An affine layer as one weight and one bias: a convolution or linear layer, with the BatchNorm in evaluation
behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# by type: the attributes that decide what the layer computes, besides its parameters
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
}
NORMS = {nn.BatchNorm1d: nn.Conv1d, nn.BatchNorm2d: nn.Conv2d}
_FUNCTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}


@dataclass(frozen=True, slots=True)
class Affine:
    """`layer` is a Linear, Conv1d or Conv2d, whose settings are read when the trace is made; `padding` is in
    numbers, and empty for a Linear."""

    layer: Any
    shape: torch.Size
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    norm: Any = None

    @staticmethod
    def of(layer: Any) -> Affine | str:
        """Read a layer of one of the types in LAYERS; a string says why it cannot be fused."""
        weight = layer._parameters.get("weight")
        reason = _why_not_plain(weight) or _why_not_plain(layer._parameters.get("bias"), optional=True)
        if reason is not None:
            return reason
        if isinstance(layer, nn.Linear):
            return Affine(layer, weight.shape)
        if layer.padding_mode != "zeros":
            return f'padding mode "{layer.padding_mode}" is not that of zeros'
        padding = _in_numbers(layer.padding, weight.shape[2:], layer.dilation)
        if padding is None:
            return "pads one side more than the other"
        return Affine(layer, weight.shape, layer.stride, padding, layer.dilation, layer.groups)

    @property
    def dims(self) -> int:
        """The number of spatial dimensions; 0 of a linear layer."""
        return len(self.shape) - 2

    @property
    def geometry(self) -> Any:
        """Equal for layers that differ in channels and parameters only."""
        settings = self.shape[2:], self.stride, self.padding, self.dilation, self.groups
        return type(self.layer), *settings

    def why_not_now(self, x: Tensor) -> str | None:
        """What has changed since the trace was made, or does not suit `x`."""
        for module in (self.layer,) if self.norm is None else (self.layer, self.norm):
            if (type(module) not in LAYERS and type(module) not in NORMS) or "forward" in module.__dict__:
                return "a layer was changed"
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                reason = _why_not_plain(tensor, optional=name != "weight" or module is self.norm)
                if reason is not None and name != "num_batches_tracked":
                    return reason
                if tensor is not None and tensor.device != x.device:
                    return "parameters are on several devices"
        weight = self.layer._parameters["weight"]
        if weight.shape != self.shape:
            return "a weight has another shape"
        if self.norm is not None and (self.norm.running_mean is None or self.norm.running_var is None):
            return "BatchNorm uses the statistics of the batch"
        if self.dims and x.dim() != self.dims + 2:
            return "the input has no batch dimension"
        return None

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the whole; in fp32 or better where a BatchNorm is folded in."""
        weight, bias = self.layer.weight, self.layer.bias
        if self.norm is None:
            return weight, bias
        norm, wide = self.norm, torch.promote_types(weight.dtype, torch.float32)
        scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = shift.to(wide) * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        return weight.to(wide) * scale.view(-1, *[1] * (weight.dim() - 1)), shift

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's operation with other parameters."""
        return apply(type(self.layer), x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def apply(
    kind: type[nn.Module],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """A convolution, or a linear map, by its type."""
    if kind is nn.Linear:
        return F.linear(x, weight, bias)
    return _FUNCTIONS[kind](x, weight, bias, stride, padding, dilation, groups)


def _why_not_plain(tensor: Any, *, optional: bool = False) -> str | None:
    if tensor is None:
        return None if optional else "has no weight"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return f"has a parameter of type {type(tensor).__name__}"
    if tensor.dtype not in DTYPES:
        return f"has parameters of type {tensor.dtype}"
    return None


def _in_numbers(padding: Any, kernel: Any, dilation: tuple[int, ...]) -> tuple[int, ...] | None:
    if padding == "valid":
        return (0,) * len(dilation)
    if padding != "same":
        return padding
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
