"""The errors a user can cause: one base class, so that the command line can turn each into one clear line."""

from __future__ import annotations


class NascompileError(ValueError):
    """Something the user gave cannot be used; the message names the thing, the value and what was
    expected."""


class SpaceError(NascompileError):
    """The search space itself is inconsistent (keys, counts, shapes)."""


class ArchitectureError(NascompileError):
    """An architecture does not fit the search space."""


class TraceError(NascompileError):
    """A part of the model cannot be traced where tracing was required."""
