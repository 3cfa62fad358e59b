"""The settings of a search job: defaults, what is allowed, and what may change on resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from nascompile.compiler.errors import NascompileError

METHODS = ("darts", "darts-unrolled", "enas", "random")
PRECISIONS = ("no", "bf16", "fp16")
FORMATS = ("torchscript", "pt2", "onnx")
DEVICES = ("auto", "cpu", "cuda")

# a run with another of these would not be the same run
_FIXED = ("method", "seed", "batch_size", "precision", "compile", "inherit")


class SettingsError(NascompileError):
    """A setting has an impossible value; the message names it, the value and what is expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to search and what to make of the result. Raises SettingsError for impossible values.

    `epochs` and `retrain` are numbers of passes over the data (`retrain=0`: keep the weights of the search),
    `inherit` starts retraining from the supernet's weights, `workers` is the number of data loading
    processes.
    """

    method: str = "darts"
    epochs: int = 50
    device: str = "auto"
    seed: int = 0
    batch_size: int = 64
    precision: str = "no"
    formats: tuple[str, ...] = ("torchscript", "pt2")
    retrain: int = 0
    inherit: bool = False
    compile: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("precision", self.precision, PRECISIONS)
        for name in self.formats:
            _one_of("format", name, FORMATS)
        if self.device not in DEVICES and not self.device.startswith("cuda:"):
            raise SettingsError(
                f"device is {self.device!r}, expected one of: {', '.join(DEVICES)}, cuda:0, cuda:1, ..."
            )
        _at_least("epochs", self.epochs, 1)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("retrain", self.retrain, 0)
        _at_least("workers", self.workers, 0)
        _at_least("seed", self.seed, 0)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from what was given; None means the default."""
        return cls(**{name: value for name, value in given.items() if value is not None})

    def resumed_with(self, given: Mapping[str, Any]) -> Settings:
        """These settings of an earlier start, changed by what is given now where that is allowed."""
        changes = {name: value for name, value in given.items() if value is not None}
        for name in _FIXED:
            if name in changes and changes[name] != getattr(self, name):
                raise SettingsError(
                    f"--resume continues a run with {_option(name, getattr(self, name))}; "
                    f"{_option(name, changes[name])} would be another run: give it its own --out"
                )
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return {**asdict(self), "formats": list(self.formats)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Settings:
        """Settings written by `to_json`; raises SettingsError for names or types that do not belong."""
        known = {field.name: type(field.default) for field in fields(cls)}
        for name, value in content.items():
            expected = list if name == "formats" else known.get(name)
            if expected is None or type(value) is not expected:
                raise SettingsError(f"stored settings are damaged: {name!r} is {value!r}")
        return cls(**{**content, "formats": tuple(content.get("formats", cls.of({}).formats))})


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        positive = {"compile": "compilation", "inherit": "--inherit"}[name]
        return positive if value else f"no {positive}"
    return f"--{flag} {value}"


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingsError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise SettingsError(f"{name} is {value}, expected at least {least}")
