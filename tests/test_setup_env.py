"""The decisions of scripts/setup_env.py, without installing anything."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from scripts import setup_env

FACTS = {
    "executable": "/somewhere/python",
    "torch": None,
    "torch_error": None,
    "triton": None,
    "virtual": False,
    "writable": True,
    "managed": False,
}


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("2.11.0a0+git1234", (2, 11)),
        ("3.0", (3, 0)),
        ("nightly", (0, 0)),
        ("2.x", (0, 0)),
    ],
)
def test_parse_release(version: str, release: tuple[int, int]) -> None:
    assert setup_env.parse_release(version) == release


@pytest.mark.parametrize(
    ("facts", "choice"),
    [
        ({}, "own venv"),
        ({"torch": "2.10.1"}, "own venv"),
        ({"torch_error": "ImportError: libcudart"}, "own venv"),
        ({"torch": "2.11.0+cu130"}, "as it is"),
        ({"torch": "2.13.0+cpu", "virtual": True, "writable": False}, "as it is"),
        ({"torch": "2.13.0", "writable": False}, "venv on top"),
        ({"torch": "2.13.0", "managed": True}, "venv on top"),
    ],
)
def test_choice_of_the_environment(facts: dict, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_venv(*, see_system_packages: bool) -> dict:
        return {"executable": "venv on top" if see_system_packages else "own venv"}

    monkeypatch.setattr(setup_env, "probe", lambda python: {**FACTS, "executable": "as it is", **facts})
    monkeypatch.setattr(setup_env, "make_venv", make_venv)
    assert setup_env.choose_environment()["executable"] == choice


def test_probe_tells_the_truth_about_this_interpreter() -> None:
    import torch

    facts = setup_env.probe(sys.executable)
    assert facts.keys() == FACTS.keys()
    assert facts["torch"] == str(torch.__version__)
    assert facts["virtual"] == (sys.prefix != sys.base_prefix)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that would have been run, from the first word after the interpreter on."""
    ran: list[list[str]] = []
    monkeypatch.setattr(setup_env, "run", lambda command, complaint: ran.append(command[1:]))
    monkeypatch.setattr(setup_env, "STATE", tmp_path)
    monkeypatch.delenv("TORCH", raising=False)
    return ran


@pytest.mark.parametrize(
    ("gpu", "cuda", "wanted", "installs"),
    [
        (False, False, "", ["pip install --disable-pip-version-check torch==2.13.0"]),
        (True, True, "", ["pip install --disable-pip-version-check torch"]),
        (False, True, "", ["--quiet uv", "uv pip install --python {} --torch-backend=cpu torch==2.13.0"]),
        (False, True, "torch==2.12.0 --no-deps", ["torch==2.12.0 --no-deps"]),
    ],
)
def test_choice_of_torch(
    gpu: bool,
    cuda: bool,
    wanted: str,
    installs: list[str],
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(setup_env, "brings_cuda", lambda python, requirement: cuda)
    monkeypatch.setenv("TORCH", wanted)
    setup_env.install_torch(sys.executable)
    lines = [" ".join(command) for command in commands]
    assert len(lines) == len(installs)
    for line, end in zip(lines, installs, strict=True):
        assert line.endswith(end.format(sys.executable))


@pytest.mark.parametrize(
    ("packages", "answer"),
    [(["torch", "sympy"], False), (["torch", "nvidia-cublas"], True), (["torch", "cuda-bindings"], True)],
)
def test_asking_pip_what_torch_would_bring(packages: list[str], answer: bool, tmp_path: Path) -> None:
    report = {"install": [{"metadata": {"name": name}} for name in packages]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *--dry-run*) cat {tmp_path}/report.json;; *) exit 1;; esac\n')
    python.chmod(0o755)
    assert setup_env.brings_cuda(str(python), "torch") is answer


def test_later_installs_keep_torch_and_triton(commands: list[list[str]], tmp_path: Path) -> None:
    setup_env.keep_versions({"torch": "2.11.0+cu130", "triton": "3.6.0"})
    setup_env.pip(sys.executable, "rich", what="rich")
    assert (tmp_path / "constraints.txt").read_text() == "torch==2.11.0+cu130\ntriton==3.6.0\n"
    assert commands[0][-3:] == ["--constraint", str(tmp_path / "constraints.txt"), "rich"]


def test_old_python_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    version = namedtuple("version", "major minor micro")(3, 9, 2)
    monkeypatch.setattr(sys, "version_info", version)
    assert setup_env.main(["environment"]) == 1
    words = capsys.readouterr().err
    assert words.count("\n") == 1
    assert "3.9.2" in words
    assert "3.11 or newer" in words


def test_missing_venv_module_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_env, "VENV", tmp_path / "venv")
    monkeypatch.setattr(setup_env, "STATE", tmp_path / "state")
    monkeypatch.setattr(setup_env, "probe", lambda python: FACTS)
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert setup_env.main(["environment"]) == 1
    words = capsys.readouterr().err
    assert words.count("\n") == 1
    assert "ensurepip" in words
    assert "python3-venv" in words


def test_missing_compiler_is_said(
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "python").write_text(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    setup_env.set_up_extension()
    assert "no C++ compiler found" in capsys.readouterr().out
    assert commands[-1][-2:] == ["--editable", "."]


def test_a_build_that_failed_is_said(
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "python").write_text(sys.executable)
    (tmp_path / "nascompile").mkdir()
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    monkeypatch.setattr(setup_env, "find_compiler", lambda: "c++")
    setup_env.set_up_extension()
    assert "did not build" in capsys.readouterr().out
    (tmp_path / "nascompile" / "_C.so").touch()
    setup_env.set_up_extension()
    assert "did not build" not in capsys.readouterr().out
    assert len(commands) == 2


def test_named_compiler_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -march=x86-64-v3")
    assert setup_env.find_compiler() == str(compiler)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert setup_env.find_compiler() is None


def test_requirements_come_from_pyproject() -> None:
    base = setup_env.read_requirements()
    assert any(line.startswith("torch>=") for line in base)
    assert any(line.startswith("setuptools") for line in base)
    assert not any(line.startswith("pytest") for line in base)
    assert any(line.startswith("pytest>=") for line in setup_env.read_requirements(*setup_env.DEV_EXTRAS))


def test_wrong_call_is_a_usage_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup_env.main(["develop"]) == 2
    assert "environment|extension|dev" in capsys.readouterr().err
