"""Tests of the compiler: `--update-golden` writes the printed graphs of tests/compiler/golden anew."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nascompile")
    group.addoption("--update-golden", action="store_true", help="write tests/compiler/golden anew")
