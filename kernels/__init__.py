"""The kernels: one file per operation, and `ALL`, the one list of them."""

from __future__ import annotations

import torch

from nascompile.kernels import mixed_sum
from nascompile.kernels.registry import Kernel, Row, report

ALL: tuple[Kernel, ...] = (mixed_sum.KERNEL,)


def doctor_report() -> list[Row]:
    """Which implementation of each kernel this machine uses, on the CPU and on the GPU if torch sees one."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    return [row for device in devices for row in report(ALL, device)]
