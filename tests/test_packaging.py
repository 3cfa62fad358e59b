"""The packages that pip makes of the repository, without a C++ compiler: archive, wheel, refusal.

With a compiler the set-up itself is the test: `make` installs the checkout and its extension before any test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.repository import PACKAGES, module_name, python_files, relative, repository_files

BUILD_ARCHIVE = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
FIND_ALL = """
import importlib.util, sys
# an editable install of the checkout would find what the wheel lacks
sys.meta_path = [one for one in sys.meta_path if "__editable__" not in getattr(one, "__module__", "")]
import nascompile
assert nascompile.__file__.startswith(sys.argv[1]), nascompile.__file__
assert importlib.util.find_spec("nascompile._C") is None
missing = [name for name in sys.argv[2:] if importlib.util.find_spec(name) is None]
assert not missing, missing
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built from a copy of the repository and unpacked."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("archive")
    for file in repository_files():
        copy = checkout / relative(file)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    run([sys.executable, "-c", BUILD_ARCHIVE, str(folder)], checkout)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run a command that must succeed; its output, stderr included."""
    result = attempt(command, folder, **variables)
    assert result.returncode == 0, result.stdout
    return result.stdout


def attempt(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def wheel_command(source: Path, target: Path) -> list[str]:
    options = ["--no-deps", "--no-build-isolation", "--verbose", "--wheel-dir", str(target)]
    return [sys.executable, "-m", "pip", "wheel", *options, str(source)]


def test_archive_holds_the_repository(source: Path) -> None:
    hidden = [".gitignore", ".ci/run"]  # of use to a checkout only
    missing = [name for name in map(relative, repository_files()) if not (source / name).exists()]
    assert sorted(missing) == sorted(hidden)


def test_wheel_without_compiler_is_pure_python_and_says_so(source: Path, tmp_path: Path) -> None:
    output = run(
        wheel_command(source, tmp_path), tmp_path, PATH=str(tmp_path), CXX="", NASCOMPILE_BUILD_EXT=""
    )
    assert "Installing as pure Python" in output
    wheel = next(tmp_path.glob("*.whl"))
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "nascompile/py.typed" in names
    assert not [name for name in names if name.split("/")[0] not in {"nascompile", wheel_metadata(wheel)}]
    modules = [module_name(path) for path in python_files(*PACKAGES)]
    run([sys.executable, "-c", FIND_ALL, str(installed), *modules], tmp_path, PYTHONPATH=str(installed))


def wheel_metadata(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def test_missing_compiler_is_an_error_where_the_extension_is_demanded(source: Path, tmp_path: Path) -> None:
    variables = {"PATH": str(tmp_path), "CXX": "", "NASCOMPILE_BUILD_EXT": "1"}
    result = attempt(wheel_command(source, tmp_path), tmp_path, **variables)
    assert result.returncode != 0
    assert "the extension cannot be built: there is no C++ compiler" in result.stdout
