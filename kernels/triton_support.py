"""Whether Triton kernels can run here, in words; Triton itself is imported only where one is used."""

from __future__ import annotations

import importlib.util
import os

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
