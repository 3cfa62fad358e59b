"""Whether Triton kernels can run here, in words; Triton itself is imported only where one is used."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# read once, as Triton does: its kernels are interpreted or compiled from the moment they are defined
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST_CAPABILITY = (8, 0)


def why_not_triton(device: torch.device) -> str | None:
    """Why a Triton kernel cannot run on the device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs the kernels on CPU tensors only"
    if device.type != "cuda":
        return f"Triton kernels run on GPUs, not on {device.type} (TRITON_INTERPRET=1 interprets them)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the GPU has compute capability {found}, bfloat16 kernels need 8.0"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """A Triton kernel with the types and constants of one call; a tuple of pointers has a tuple of types."""

    name: str
    function: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a compiled kernel takes: registers and spilled bytes a thread, shared bytes a program."""

    registers: int
    spilled: int
    shared: int


def compile_ahead(case: Compilation, capability: int) -> Resources:
    """Compile a kernel for a compute capability such as 90, without a GPU; not under the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert not INTERPRETED, "TRITON_INTERPRET=1 replaces the compiler"
    names = case.function.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    source = ASTSource(
        fn=case.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        # pointers from torch's allocator are aligned, as the launcher finds out at run time
        attrs=_aligned_pointers(signature),
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.num_warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(
        registers=found["REG"], spilled=found["STACK"] + found["LOCAL"], shared=compiled.metadata.shared
    )


def _aligned_pointers(signature: dict[str, Any]) -> dict[tuple[int, ...], list[list[Any]]]:
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for position, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            attributes.update({(position, part): aligned for part in range(len(kind))})
        elif kind.startswith("*"):
            attributes[(position,)] = aligned
    return attributes


def _cuobjdump() -> Path:
    import triton

    assert triton.__file__ is not None
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
