"""The mean decision of an epoch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class DecisionMean:
    """Adds decisions up where their masks lie, so that a step does not wait for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[tuple[tuple[str, int], ...], Tensor] = {}
        self._count = 0

    def add(self, decision: Mapping[str, Any]) -> None:
        """Count one decision: a mask for every key."""
        by_device: defaultdict[torch.device, dict[str, Tensor]] = defaultdict(dict)
        for key, mask in decision.items():
            tensor = torch.as_tensor(mask).detach()
            by_device[tensor.device][key] = tensor.flatten()
        for masks in by_device.values():
            # all at once: a supernet has a hundred small masks
            layout = tuple((key, mask.numel()) for key, mask in masks.items())
            values = torch.cat([mask.double() for mask in masks.values()])
            known = self._sums.get(layout)
            self._sums[layout] = values if known is None else known + values.to(known.device)
        self._count += 1

    def by_key(self) -> dict[str, list[float]]:
        """The mean of every key's mask over all decisions."""
        totals: dict[str, Tensor] = {}
        for layout, values in self._sums.items():
            pieces = values.cpu().split([length for _, length in layout])
            for (key, _), piece in zip(layout, pieces, strict=True):
                totals[key] = totals[key] + piece if key in totals else piece
        return {key: (total / self._count).tolist() for key, total in totals.items()}
