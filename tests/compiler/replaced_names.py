"""Globals that the programs of test_replaced_code.py read through a module."""

from __future__ import annotations

FACTOR = 2.0


class Constants:
    shift = 1.0
