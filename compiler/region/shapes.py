"""Whether the tensors of a region's modules have the shapes that the modules say: plans go by what these say,
torch by the tensors."""

from __future__ import annotations

from nascompile.compiler.region.ir import Conv, Graph, Norm, TensorRef, Unsupported, Value

_SIZES = ("num_features", "out_channels", "out_features", "num_parameters")


def check_shapes(graph: Graph) -> None:
    """Raise Unsupported where a weight, a bias or statistics do not fit: the program as written then gives
    torch's own result or error."""
    for value in graph.values:
        if isinstance(value.op, Conv):
            _check_conv(value, value.op)
        elif isinstance(value.op, Norm):
            op = value.op
            least = 1 if op.is_single else op.first + value.shape[0]
            for ref in (op.gamma, op.beta, op.running_mean, op.running_var):
                if ref is not None:
                    shape = tuple(ref.value.shape)
                    _require(ref, len(shape) == 1 and shape[0] >= least and shape[0] == _size(ref, shape[0]))


def _check_conv(value: Value, op: Conv) -> None:
    size = op.weight.value.shape
    inputs = 1 if op.is_depthwise else value.inputs[0].shape[0]
    # those of a linear layer have no kernel
    kernel = list(op.kernel) if hasattr(op.weight.module, "kernel_size") else []
    fits = len(size) >= 2 and list(size[2:]) == kernel and size[1] == inputs
    _require(op.weight, fits and size[0] >= op.first + op.channels and size[0] == _size(op.weight, size[0]))


def _size(ref: TensorRef, otherwise: int) -> int:
    """What a module of torch says; in others these names may mean anything."""
    if not type(ref.module).__module__.startswith("torch.nn"):
        return otherwise
    return next((getattr(ref.module, name) for name in _SIZES if hasattr(ref.module, name)), otherwise)


def _require(ref: TensorRef, fits: bool) -> None:
    if not fits:
        kind = type(ref.module).__name__
        raise Unsupported(f"{ref.name} of a {kind} has the shape {tuple(ref.value.shape)}")
