"""Writes a network to a file that other programs load without nascompile: TorchScript, torch.export or ONNX.

Every file is read back and compared with the module, on the example and on another batch size, before it gets
its name.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.explore import call_arguments, check_initialized, map_tensors, tensors_in
from nascompile.compiler.mutables import Mutable
from nascompile.compiler.space import all_choices, unwrap

SUFFIXES = {".pt": "torchscript", ".ts": "torchscript", ".pt2": "pt2", ".onnx": "onnx"}
"""The format that a file name stands for."""

TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
DEFAULT_TOLERANCE = 1e-4
"""How far a reloaded file may be from the module, relative to the largest output: sums may be reordered."""

OWN_NAMESPACE = "nascompile"
_OWN_OPERATORS = (
    "{}: the network calls operators of nascompile, which the file would need; export a pruned network"
)


class ExportError(NascompileError):
    """A network cannot be written in the format asked for."""


def export(lean: nn.Module, path: str | Path, example_inputs: Any, format: str | None = None) -> Path:
    """Write `lean` (a module without choices) in eval mode, with a dynamic batch size, and return the path.

    `example_inputs` is a tensor or a tuple of arguments, each any nesting of lists, tuples and dicts of
    tensors. The first dimension of the first tensor is the batch, as is that of every tensor with the same
    leading size. `format` is "torchscript", "pt2" or "onnx"; without it the suffix decides (.pt or .ts, .pt2,
    .onnx). The module's modes are as before afterwards, and nothing is left behind when the export fails.

    Raises ExportError for an unknown format, a missing package, a module that still holds choices, inputs
    that the format cannot take, a batch size that is baked into the network, and a file that does not agree
    with the module.
    """
    target = Path(path)
    chosen = _format(target, format)
    if not isinstance(lean, torch.jit.ScriptModule):
        _refuse_choices(lean)
        check_initialized(lean)
    if not target.parent.is_dir():
        raise ExportError(f"folder {str(target.parent)!r} does not exist, expected one for {target.name!r}")
    write, load, suffix = _FORMATS[chosen]
    args = map_tensors(call_arguments(example_inputs), lambda tensor: tensor.detach())
    if not any(tensor.dim() for tensor in tensors_in(args)):
        raise ExportError("example_inputs hold no tensor with a batch dimension")
    with _in_eval_mode(lean), torch.no_grad(), _temporary_beside(target, suffix) as temporary:
        cases = [args, _one_more(args)]
        expected = [_run_module(lean, case) for case in cases]
        write(lean, temporary, args)
        _check(load(temporary), cases, expected, chosen)
        os.replace(temporary, target)
    return target


def _format(target: Path, format: str | None) -> str:
    if format is None:
        format = SUFFIXES.get(target.suffix.lower())
        if format is None:
            known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
            raise ExportError(
                f"{target.name!r} has the suffix {target.suffix!r}; known: {known}; or give a format"
            )
    if format not in _FORMATS:
        raise ExportError(f"format is {format!r}, expected one of: {', '.join(_FORMATS)}")
    return format


def _refuse_choices(lean: nn.Module) -> None:
    left = [choice.key for choice in all_choices(lean)]
    left = left or [module.key for module in unwrap(lean).modules() if isinstance(module, Mutable)]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise ExportError(
            f"the module still holds choices: {', '.join(map(repr, left[:5]))}{more}; "
            "decide them first with nascompile.prune(model, architecture)"
        )


# the formats


def _write_torchscript(lean: nn.Module, file: Path, args: tuple[Any, ...]) -> None:
    with _without_jit_warnings():
        try:
            scripted: Any = torch.jit.script(lean)
            # untyped arguments are taken for tensors: that one is a dict shows only now
            _run(scripted, args)
        except Exception as script_error:  # whatever the script compiler cannot read, tracing may
            scripted = _traced(lean, args, script_error)
        if f"{OWN_NAMESPACE}::" in str(scripted.inlined_graph):
            raise ExportError(_OWN_OPERATORS.format("torchscript"))
        with _saving(file):
            torch.jit.save(scripted, str(file))


def _traced(lean: nn.Module, args: tuple[Any, ...], script_error: Exception) -> Any:
    copies = map_tensors(args, lambda tensor: tensor.clone())
    try:
        with warnings.catch_warnings():
            # the trace keeps numbers as they are; the comparison with another batch finds those that matter
            warnings.simplefilter("ignore", TracerWarning)
            return torch.jit.trace(lean, copies, check_trace=False, strict=False)
    except Exception as error:
        raise ExportError(
            f"torchscript: can neither be scripted ({_line(script_error)}) nor traced ({_line(error)}); "
            "inputs and outputs must be tensors, or lists, tuples and dicts of tensors"
        ) from error


def _load_torchscript(file: Path) -> Callable[..., Any]:
    with _without_jit_warnings():
        return torch.jit.load(str(file))


def _write_pt2(lean: nn.Module, file: Path, args: tuple[Any, ...]) -> None:
    program = _exported(lean, args, "pt2")
    with _saving(file):
        torch.export.save(program, file)


def _load_pt2(file: Path) -> Callable[..., Any]:
    return torch.export.load(file).module()


def _exported(lean: nn.Module, args: tuple[Any, ...], format: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    # a leading size of 1 would be taken for a constant
    example = _one_more(args) if _batch(args) == 1 else args
    size = _batch(example)

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if _is_batched(value, size) else None
        if isinstance(value, dict):
            return {key: dynamic(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return (
                [dynamic(item) for item in value] if isinstance(value, list) else tuple(map(dynamic, value))
            )
        return None

    copies = map_tensors(example, lambda tensor: tensor.clone())
    try:
        program = torch.export.export(lean, copies, dynamic_shapes=tuple(map(dynamic, copies)))
    except Exception as error:
        raise ExportError(f"{format}: torch.export refuses the network: {_line(error)}") from error
    if any(getattr(node.target, "namespace", None) == OWN_NAMESPACE for node in program.graph.nodes):
        raise ExportError(_OWN_OPERATORS.format(format))
    return program


def _write_onnx(lean: nn.Module, file: Path, args: tuple[Any, ...]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _need(package)
    exported = _exported(lean, args, "onnx")
    try:
        with _without_onnx_noise():
            program = torch.onnx.export(exported, dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(f"onnx: torch.onnx refuses the network: {_line(error)}") from error
    assert program is not None
    with _saving(file):
        program.save(str(file), external_data=False)


def _load_onnx(file: Path) -> Callable[..., Any]:
    _need("onnx").checker.check_model(str(file))
    session = _need("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any) -> list[Tensor]:
        tensors = list(tensors_in(args))
        if len(tensors) != len(names):
            raise ExportError(
                f"onnx: the file has {len(names)} inputs, the example has {len(tensors)} tensors"
            )
        feeds = {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.as_tensor(value) for value in session.run(None, feeds)]

    return run


_FORMATS = {
    "torchscript": (_write_torchscript, _load_torchscript, ".pt"),
    "pt2": (_write_pt2, _load_pt2, ".pt2"),
    "onnx": (_write_onnx, _load_onnx, ".onnx"),
}


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"onnx: the package {package!r} is missing; pip install 'nascompile[onnx]'"
        ) from error


@contextlib.contextmanager
def _saving(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise ExportError(f"cannot write to {str(file.parent)!r}: {_line(error)}") from error


@contextlib.contextmanager
def _without_jit_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch.jit works and says that torch.export is its successor; we write both
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        # torch's own layers annotate attributes in a way that its script compiler remarks on
        remark = "The TorchScript type system doesn't support instance-level annotations"
        warnings.filterwarnings("ignore", remark, UserWarning)
        yield


@contextlib.contextmanager
def _without_onnx_noise() -> Iterator[None]:
    # that torchvision is absent is reported once for each of its operators
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch copies a class of its own that warns of itself
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
            )
            yield
    finally:
        logger.setLevel(level)


# reading back


def _run(module: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return module(*map_tensors(args, lambda tensor: tensor.clone()))


def _run_module(lean: nn.Module, args: tuple[Any, ...]) -> Any:
    try:
        return _run(lean, args)
    except Exception as error:
        raise ExportError(
            f"the module does not run with batch size {_batch(args)}: {_line(error)}"
        ) from error


def _check(
    loaded: Callable[..., Any], cases: list[tuple[Any, ...]], expected: list[Any], format: str
) -> None:
    for args, wanted in zip(cases, expected, strict=True):
        batch = _batch(args)
        try:
            got = _run(loaded, args)
        except Exception as error:
            raise ExportError(
                f"{format}: the file does not run with batch size {batch}: {_line(error)}"
            ) from error
        left, right = list(tensors_in(wanted)), list(tensors_in(got))
        if len(left) != len(right):
            raise ExportError(f"{format}: the file returns {len(right)} tensors, the module {len(left)}")
        for position, (want, have) in enumerate(zip(left, right, strict=True)):
            why = _difference(want, have)
            if why:
                raise ExportError(f"{format}: output {position} differs with batch size {batch}: {why}")


def _difference(want: Tensor, have: Tensor) -> str | None:
    have = have.to(want.device)
    if want.shape != have.shape or want.dtype != have.dtype:
        return f"{tuple(have.shape)} {have.dtype}, expected {tuple(want.shape)} {want.dtype}"
    if not want.is_floating_point():
        return None if torch.equal(want, have) else "values are not equal"
    if not want.numel():
        return None
    scale = want.abs().nan_to_num(0.0, 0.0).max().item()
    allowed = TOLERANCE.get(want.dtype, DEFAULT_TOLERANCE) * scale + 1e-6
    if torch.allclose(want, have, rtol=0.0, atol=allowed, equal_nan=True):
        return None
    return f"largest error {(want - have).abs().max().item():.3g}, allowed {allowed:.3g}"


def _batch(args: tuple[Any, ...]) -> int | None:
    first = next((tensor for tensor in tensors_in(args) if tensor.dim()), None)
    return None if first is None else first.shape[0]


def _is_batched(tensor: Tensor, batch: int | None) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == batch


def _one_more(args: tuple[Any, ...]) -> tuple[Any, ...]:
    # the same batch with its first sample repeated; never of size 1, which would broadcast
    batch = _batch(args)

    def extended(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[:1]]) if _is_batched(tensor, batch) else tensor

    return map_tensors(args, extended)


def _line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"


# surroundings


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextlib.contextmanager
def _temporary_beside(target: Path, suffix: str) -> Iterator[Path]:
    # in the same folder, so that renaming is atomic
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{suffix}")
    try:
        temporary.touch()
    except OSError as error:
        raise ExportError(f"cannot write to {str(target.parent)!r}: {error.strerror}") from error
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
