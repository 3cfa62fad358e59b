"""NNI's import path for fixed architectures."""

from nascompile.compiler.architecture import FixedArchitecture, apply_fixed_architecture

__all__ = ["FixedArchitecture", "apply_fixed_architecture"]
