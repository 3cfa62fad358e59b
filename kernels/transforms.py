"""What may be at work around a call that kernels and plans do not know: transformations of functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_transformed() -> bool:
    """Whether functorch (vmap, grad, jvp) transforms what runs."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return functorch.maybe_current_level() is not None


def is_forward_differentiated() -> bool:
    """Whether forward-mode differentiation is at work."""
    return torch.autograd.forward_ad._current_level >= 0


def is_batched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the gradients of a backward pass may be batches of them, whose memory no kernel knows: under
    vmap, and for `autograd.grad(..., is_grads_batched=True)`."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    return is_transformed() or any(
        tensor is not None and functorch.is_legacy_batchedtensor(tensor) for tensor in tensors
    )
