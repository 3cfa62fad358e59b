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

class Prepared:
    """A program under its flags, ready to run on the CPU. Memory is given by its address; what is run has to
    stay where it is. RuntimeError for what this build cannot run."""

    def __init__(self, program: int, words: int, flags: int, count: int) -> None: ...
    @property
    def expected(self) -> list[tuple[int, int, int, list[int], list[int]]]:
        """Of every tensor that is used its number, its kind (0: contiguous fp32, 1: contiguous int64, 2: fp32
        images of at least so many channels), how many elements it has at least, its sizes and strides."""

    @property
    def operations(self) -> int:
        """Operations of the program, whether their flags hold or not."""

    @property
    def work(self) -> int:
        """Floats of work memory."""

    def run(self, slab: int, floats: int, work: int, tensors: list[int], seconds: int) -> None:
        """Carry it out; the slab has so many floats. seconds: 0, or where (chunks, operations) of fp64 are
        added to."""
