"""The compiled extension: kernels for the CPU and, where it was built with nvcc, for NVIDIA GPUs."""

from typing import Any

def instruction_sets() -> list[str]:
    """The instruction sets the CPU kernels are built for: "DEFAULT", "AVX2", "AVX512"."""

def selected_instruction_set() -> str:
    """The one in use: the best this processor has."""

def select_instruction_set(name: str) -> None:
    """Use another one, to test it; ValueError where it is not built in or this processor does not have it."""

def lane() -> int:
    """What the plan kernels in use want channels padded to: 16 for AVX512, else 8."""

def cuda_compiled() -> bool:
    """Whether the CUDA kernels are in this build."""

class Watch:
    """Whether dictionaries or classes, and the classes and dictionaries that objects have, are what they were
    when this was made."""

    def __init__(self, dicts: list[dict[Any, Any] | type], objects: list[Any]) -> None: ...
    def holds(self) -> bool:
        """False where something has changed, and where Python does not say (from 3.13 on)."""
