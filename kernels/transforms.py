"""What may be at work around a call that kernels and plans do not know: transformations of functions."""

from __future__ import annotations

from typing import Any

import torch


def is_transformed() -> bool:
    """Whether functorch (vmap, grad, jvp) transforms what runs."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.maybe_current_level() is not None


def is_forward_differentiated() -> bool:
    """Whether forward-mode differentiation is at work."""
    return torch.autograd.forward_ad._current_level >= 0
