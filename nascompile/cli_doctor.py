"""`nascompile doctor`: versions, devices, and which implementation of each operation this machine uses."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_PACKAGES = (
    "torch",
    "triton",
    "accelerate",
    "networkx",
    "safetensors",
    "numpy",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Versions, devices, and what each operation runs on here."""
    findings = examine()
    if json:
        from json import dumps

        print(dumps(findings, indent=2))
        return
    _show(findings)


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as JSON types."""
    import platform
    import warnings

    from nascompile import __version__
    from nascompile.compiler.region.region import plan_rows
    from nascompile.kernels import doctor_report

    with warnings.catch_warnings():
        # what these warn about is a row of the report
        warnings.simplefilter("ignore")
        rows = [*doctor_report(), *plan_rows()]
    return {
        "versions": {
            "nascompile": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "build": {"extension": _extension(), "C++ compiler": _compiler()},
        "devices": _devices(),
        "operations": [
            {
                "operation": row.operation,
                "device": row.device,
                "implementation": row.implementation,
                "used": row.used,
                "reason": row.reason,
            }
            for row in rows
        ],
    }


def _show(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for section in ("versions", "build", "devices"):
        table = Table(
            title=section,
            title_justify="left",
            title_style="bold",
            show_header=False,
            box=None,
            padding=(0, 2),
        )
        for name, value in findings[section].items():
            table.add_row(f"  {name}", escape(value) if value is not None else "[dim]not installed[/dim]")
        console.print(table)
    table = Table(title="operations", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for heading in ("  operation", "device", "implementation", "", "why not"):
        table.add_column(heading, header_style="dim", overflow="fold")
    previous = None
    for row in findings["operations"]:
        subject = (row["operation"], row["device"])
        shown = (f"  {subject[0]}", subject[1]) if subject != previous else ("", "")
        previous = subject
        mark, style = ("used", "green") if row["used"] else ("–", "dim")
        why = "" if row["used"] else escape(row["reason"])
        table.add_row(*shown, f"[{style}]{row['implementation']}[/]", f"[{style}]{mark}[/]", why)
    console.print(table)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extension() -> str:
    from nascompile.kernels import native

    module, reason = native.load()
    return str(reason) if module is None else f"nascompile._C, {module.__file__}"


def _compiler() -> str:
    import os
    import shutil
    import subprocess

    command = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if command is None:
        return "none found (pure Python works; the C++ kernels cannot be built)"
    found = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=False)
    return (
        found.stdout.splitlines()[0] if found.returncode == 0 and found.stdout else f"{command} does not run"
    )


def _devices() -> dict[str, str]:
    import platform

    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    devices = {
        "cpu": f"{_processor() or platform.machine()}, {capability}, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        devices[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {size:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
        devices["cuda"] = f"none ({reason})"
    return devices


def _processor() -> str | None:
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        # only Linux has it
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
