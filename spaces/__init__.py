"""Published search spaces, written with the public API: torch and `nascompile.mutables`."""

from __future__ import annotations

from nascompile.spaces import darts_ops, enas_ops
from nascompile.spaces.darts import DartsCell, DartsNetwork
from nascompile.spaces.enas_macro import ENASMacroGeneralModel, ENASMacroLayer
from nascompile.spaces.enas_micro import ENASMicroLayer, ENASMicroNetwork
from nascompile.spaces.mbconv import MBConvNetwork
from nascompile.spaces.nasbench201 import NASBench201Cell, NASBench201Network
from nascompile.spaces.shuffle import ShuffleNetSpace

__all__ = [
    "DartsCell",
    "DartsNetwork",
    "ENASMacroGeneralModel",
    "ENASMacroLayer",
    "ENASMicroLayer",
    "ENASMicroNetwork",
    "MBConvNetwork",
    "NASBench201Cell",
    "NASBench201Network",
    "ShuffleNetSpace",
    "darts_ops",
    "enas_ops",
]
