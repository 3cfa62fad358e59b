"""The NAS-Bench-201 cell under the path it has in NNI 1.x."""

from __future__ import annotations

from nascompile.spaces.nasbench201 import NASBench201Cell

__all__ = ["NASBench201Cell"]
