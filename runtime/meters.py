"""Running averages of what a training loop measures, and a counter, with the names of NNI 1.x."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

_numbers = itertools.count(1)


def global_mutable_counting() -> int:
    """The next number of a program-wide count from 1. (Keys are per model and do not use it.)"""
    return next(_numbers)


class AverageMeter:
    """The last value and the weighted average of a series.

    Values may be 0-d tensors on any device: they are added up there, so nothing waits for the device until an
    average is read. `fmt` is a format such as ":.4f".
    """

    def __init__(self, name: str, fmt: str = ":f") -> None:
        self.name = name
        self.fmt = fmt
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._value: Any = 0.0
        self._sum: Any = 0.0
        self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        """Add `val` with weight `n`."""
        if isinstance(val, torch.Tensor):
            # in double precision, so that long epochs do not lose digits
            val = val.detach().double() if val.device.type != "mps" else val.detach().cpu().double()
        self._value = val
        self._sum = self._sum + val * n
        self.count += n

    @property
    def val(self) -> float:
        """The last value."""
        return float(self._value)

    @property
    def sum(self) -> float:
        """The weighted sum."""
        return float(self._sum)

    @property
    def avg(self) -> float:
        """The weighted average, 0 before the first update."""
        return self.sum / self.count if self.count else 0.0

    def __str__(self) -> str:
        return ("{name} {val" + self.fmt + "} ({avg" + self.fmt + "})").format(
            name=self.name, val=self.val, avg=self.avg
        )

    def summary(self) -> str:
        """The name and the average."""
        return ("{name}: {avg" + self.fmt + "}").format(name=self.name, avg=self.avg)


class AverageMeterGroup:
    """An AverageMeter for every name it has been given, in the order they came."""

    def __init__(self) -> None:
        self.meters: dict[str, AverageMeter] = {}

    def update(self, data: Mapping[str, Any], n: int = 1) -> None:
        """Add one value for every name, with weight `n`."""
        for name, value in data.items():
            if name not in self.meters:
                self.meters[name] = AverageMeter(name, ":.4f")
            self.meters[name].update(value, n)

    def averages(self) -> dict[str, float]:
        """The average for every name."""
        return {name: meter.avg for name, meter in self.meters.items()}

    def __getitem__(self, name: str) -> AverageMeter:
        return self.meters[name]

    def __getattr__(self, name: str) -> AverageMeter:
        meters = self.__dict__.get("meters", {})
        if name not in meters:
            raise AttributeError(f"no meter is called {name!r}; there are: {', '.join(meters) or 'none'}")
        return meters[name]

    def __str__(self) -> str:
        return "  ".join(str(meter) for meter in self.meters.values())

    def summary(self) -> str:
        """The averages in one line."""
        return "  ".join(meter.summary() for meter in self.meters.values())
