"""Writes a network to a file that other programs load without nascompile: TorchScript, torch.export or ONNX.

Every file is read back and compared with the module, on the example and on another batch size, before it gets
its name.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nascompile.compiler.errors import NascompileError
from nascompile.compiler.explore import call_arguments, check_initialized, map_tensors, tensors_in
from nascompile.compiler.mutables import Mutable
from nascompile.compiler.space import all_choices, unwrap

SUFFIXES = {".pt": "torchscript", ".ts": "torchscript", ".pt2": "pt2", ".onnx": "onnx"}
"""The format that a file name stands for."""

RELATIVE_TOLERANCE, ABSOLUTE_TOLERANCE = 1e-3, 1e-4
"""How far a reloaded file may be from the module, relative to the largest output; fp32 with operators
reordered."""


class ExportError(NascompileError):
    """A network cannot be written in the format asked for."""


def export(lean: nn.Module, path: str | Path, example_inputs: Any, format: str | None = None) -> Path:
    """Write `lean` (a module without choices) in eval mode, with a dynamic batch size, and return the path.

    `example_inputs` is a tensor or a tuple of arguments; the first dimension of every tensor in it is the
    batch. `format` is "torchscript", "pt2" or "onnx"; without it the suffix decides (.pt or .ts, .pt2,
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
        raise ExportError(
            f"folder {str(target.parent)!r} does not exist; expected an existing one for {target.name!r}"
        )
    write, load = _FORMATS[chosen]
    args = map_tensors(call_arguments(example_inputs), lambda tensor: tensor.detach())
    with _in_eval_mode(lean), torch.no_grad(), _temporary_beside(target) as temporary:
        cases = [args, _other_batch(args)]
        expected = [_run(lean, case) for case in cases]
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
    left = [repr(choice.key) for choice in all_choices(lean)]
    left += [
        repr(module.key) for module in unwrap(lean).modules() if isinstance(module, Mutable) and not left
    ]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise ExportError(
            f"the module still holds choices: {', '.join(left[:5])}{more}; "
            "decide them first with nascompile.prune(model, architecture)"
        )


# the formats


def _write_torchscript(lean: nn.Module, file: Path, args: tuple[Any, ...]) -> None:
    with _without_jit_warnings():
        try:
            scripted = torch.jit.script(lean)
        except Exception as script_error:  # whatever the script compiler cannot read, tracing may
            scripted = _traced(lean, args, script_error)
        torch.jit.save(scripted, str(file))


def _traced(lean: nn.Module, args: tuple[Any, ...], script_error: Exception) -> torch.jit.ScriptModule:
    copies = map_tensors(args, lambda tensor: tensor.clone())
    try:
        with warnings.catch_warnings():
            # a value that the trace would bake in; what is wrong for another batch is found by the comparison
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(lean, copies, check_trace=False, strict=False)
    except Exception as error:
        raise ExportError(
            f"torchscript: can neither be scripted ({_line(script_error)}) nor traced ({_line(error)}); "
            "inputs must be tensors, or lists, tuples and dicts of tensors"
        ) from error
    return traced  # type: ignore[return-value]


def _load_torchscript(file: Path) -> Callable[..., Any]:
    with _without_jit_warnings():
        return torch.jit.load(str(file))


def _write_pt2(lean: nn.Module, file: Path, args: tuple[Any, ...]) -> None:
    torch.export.save(_exported(lean, args, "pt2"), file)


def _load_pt2(file: Path) -> Callable[..., Any]:
    return torch.export.load(file).module()


def _exported(lean: nn.Module, args: tuple[Any, ...], format: str) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)

    def dynamic(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: batch} if value.dim() else None
        if isinstance(value, dict):
            return {key: dynamic(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return (
                [dynamic(item) for item in value] if isinstance(value, list) else tuple(map(dynamic, value))
            )
        return None

    # a leading size of 1 would be taken for a constant
    example = _other_batch(args) if _batch(args) == 1 else args
    copies = map_tensors(example, lambda tensor: tensor.clone())
    try:
        return torch.export.export(lean, copies, dynamic_shapes=tuple(map(dynamic, copies)))
    except Exception as error:
        raise ExportError(f"{format}: torch.export refuses the network: {_line(error)}") from error


def _write_onnx(lean: nn.Module, file: Path, args: tuple[Any, ...]) -> None:
    for package in ("onnx", "onnxscript"):
        _need(package)
    program = torch.onnx.export(_exported(lean, args, "onnx"), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(file), external_data=False)


def _load_onnx(file: Path) -> Callable[..., Any]:
    runtime = _need("onnxruntime")
    _need("onnx").checker.check_model(str(file))
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
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


_FORMATS: dict[
    str, tuple[Callable[[nn.Module, Path, tuple[Any, ...]], None], Callable[[Path], Callable[..., Any]]]
] = {
    "torchscript": (_write_torchscript, _load_torchscript),
    "pt2": (_write_pt2, _load_pt2),
    "onnx": (_write_onnx, _load_onnx),
}


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"onnx: the package {package!r} is missing; pip install 'nascompile[onnx]'"
        ) from error


@contextlib.contextmanager
def _without_jit_warnings() -> Iterator[None]:
    # torch.jit works and says that torch.export is its successor; we write both
    with warnings.catch_warnings():
        pattern = r"`torch\.jit\.\w+` (is deprecated|is not supported)"
        warnings.filterwarnings("ignore", message=pattern, category=DeprecationWarning)
        yield


# reading back


def _run(module: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return module(*map_tensors(args, lambda tensor: tensor.clone()))


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
    allowed = ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * scale
    if torch.allclose(want, have, rtol=0.0, atol=allowed, equal_nan=True):
        return None
    return f"largest error {(want - have).abs().max().item():.3g}, allowed {allowed:.3g}"


def _batch(args: tuple[Any, ...]) -> int | None:
    first = next((tensor for tensor in tensors_in(args) if tensor.dim()), None)
    return None if first is None else first.shape[0]


def _other_batch(args: tuple[Any, ...]) -> tuple[Any, ...]:
    # one sample more; at least two, as a size of 1 broadcasts
    return map_tensors(args, lambda tensor: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor)


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
def _temporary_beside(target: Path) -> Iterator[Path]:
    # in the same folder, so that renaming is atomic; with the suffix that the loaders want to see
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}.", suffix=target.suffix)
    except OSError as error:
        raise ExportError(f"cannot write to {str(target.parent)!r}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
