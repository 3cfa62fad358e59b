"""The compiled extension `nascompile._C`: loads it once, and knows in words why it is not there.

Its operators register themselves with torch when it is loaded; without it they run their references.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from types import ModuleType

# before the extension: it links against torch's libraries, which must be in the process first
import torch

NAME = "nascompile._C"


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The extension and None, or None and the reason. One that is there and does not load is warned about."""
    try:
        return importlib.import_module(NAME), None
    except ModuleNotFoundError as error:
        if error.name != NAME:
            raise
        return None, "the extension nascompile._C is not built (a C++ compiler at installation builds it)"
    except ImportError as error:
        reason = f"the extension nascompile._C is there but does not load: {error}"
        warnings.warn(f"nascompile: {reason}; the plain torch references are used", stacklevel=2)
        return None, reason


def why_not_cpu(device: torch.device) -> str | None:
    """Why the C++ kernels are not used on the device, or None."""
    if device.type != "cpu":
        return f"the C++ kernels are for the CPU, not for {device.type}"
    return load()[1]


def why_not_cuda(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels are not used on the device, or None."""
    if device.type != "cuda":
        return f"the CUDA kernels are for NVIDIA GPUs, not for {device.type}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the CUDA kernels are for NVIDIA GPUs"
    module, reason = load()
    if module is None:
        return reason
    if not module.cuda_compiled():
        return "the extension nascompile._C was built without CUDA (nvcc at installation builds it)"
    return None
