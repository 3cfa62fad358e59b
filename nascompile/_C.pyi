"""The compiled extension: kernels for the CPU and, where it was built with nvcc, for NVIDIA GPUs."""

def instruction_sets() -> list[str]:
    """The instruction sets the CPU kernels are built for: "DEFAULT", "AVX2", "AVX512"."""

def selected_instruction_set() -> str:
    """The one this processor uses."""

def cuda_compiled() -> bool:
    """Whether the CUDA kernels are in this build."""
