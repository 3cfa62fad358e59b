"""The search spaces under the path and the names they have in NNI 1.x."""

from __future__ import annotations

from nascompile.spaces import darts_ops, enas_ops
from nascompile.spaces.darts import DartsCell
from nascompile.spaces.enas_macro import ENASMacroGeneralModel, ENASMacroLayer
from nascompile.spaces.enas_micro import ENASMicroLayer

__all__ = ["DartsCell", "ENASMacroGeneralModel", "ENASMacroLayer", "ENASMicroLayer", "darts_ops", "enas_ops"]
