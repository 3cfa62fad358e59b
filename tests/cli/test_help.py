"""Help: what it lists, and that it is immediate because nothing heavy is imported for it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.cli.conftest import CommandLine, command

COMMANDS = ("search", "explain", "draw", "space", "count", "prune", "export", "bench", "doctor")


def test_help_lists_every_command(cli: CommandLine) -> None:
    out = cli.good("--help")
    for name in COMMANDS:
        assert f"\n  {name} " in out
    assert cli("").code == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli: CommandLine, name: str) -> None:
    out = cli.good(name, "--help")
    assert f"Usage: nascompile {name}" in out
    if name != "doctor":
        assert "MODEL.py" in out


def test_a_bare_file_is_the_search_command(cli: CommandLine) -> None:
    assert "Usage: nascompile search" in cli.good("net.py", "--help")
    assert "--retrain" in cli.good("net.py", "--help")


def test_no_arguments_show_the_help(cli: CommandLine) -> None:
    assert "Usage: nascompile" in cli().out + cli().err


def test_version(cli: CommandLine) -> None:
    from nascompile import __version__

    assert cli.good("--version") == f"nascompile {__version__}\n"


def test_help_imports_nothing_heavy(process_environment: dict[str, str]) -> None:
    heavy = {"torch", "numpy", "rich", "matplotlib", "networkx", "accelerate"}
    program = (
        f"import sys\nfrom nascompile.cli import run\nrun(['--help'])\nprint({heavy} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env=process_environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.endswith("set()\n"), process.stdout


def test_help_is_immediate(process_environment: dict[str, str]) -> None:
    def seconds() -> float:
        start = time.process_time() + sum(children_times())
        subprocess.run(command("--help"), env=process_environment, capture_output=True, check=True)
        return time.process_time() + sum(children_times()) - start

    # processor time, the best of three: other work on the machine does not count
    assert min(seconds() for _ in range(3)) < 0.3


def children_times() -> tuple[float, float]:
    """User and system seconds of the processes that have ended."""
    import os

    times = os.times()
    return times.children_user, times.children_system
