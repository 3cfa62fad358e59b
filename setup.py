"""Folder-to-package mapping and the native extension; the rest of the packaging stands in pyproject.toml.

The extension is built by CMake (CMakeLists.txt) against the torch of the target environment. Where torch, a
compiler or CMake is missing the package installs as pure Python and says so. Environment variables:
NASCOMPILE_BUILD_EXT=1 makes a missing extension an error, =0 leaves it out;
NASCOMPILE_CUDA=1 demands the CUDA kernels, =0 leaves them out (else: for a CUDA torch where nvcc is found).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGES = {
    "nascompile": "nascompile",
    "nascompile.compiler": "compiler",
    "nascompile.compiler.passes": "compiler/passes",
    "nascompile.compiler.region": "compiler/region",
    "nascompile.kernels": "kernels",
    "nascompile.kernels.plan": "kernels/plan",
    "nascompile.runtime": "runtime",
    "nascompile.spaces": "spaces",
}
PROBE = """
import importlib.util, json, sys
found = importlib.util.find_spec("torch")
if found is None:
    sys.exit("torch is not installed")
import torch
print(json.dumps({"folder": torch.__path__[0], "version": torch.__version__, "cuda": torch.version.cuda}))
"""


class CannotBuild(Exception):
    """Why there is no extension, in words."""


def log(message: str) -> None:
    print(f"nascompile: {message}", file=sys.stderr, flush=True)


def target_pythons() -> list[str]:
    """This interpreter, and the one of the environment that an isolated build hides behind it."""
    candidates = [sys.executable]
    for prefix in (
        os.environ.get("VIRTUAL_ENV"),
        os.environ.get("CONDA_PREFIX"),
        sys.prefix,
        sys.base_prefix,
    ):
        if prefix:
            candidates.append(
                str(Path(prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
            )
            candidates.append(str(Path(prefix) / "bin" / "python"))
    return [python for python in dict.fromkeys(candidates) if Path(python).exists()]


def find_torch() -> dict[str, str | None]:
    """Folder, version and CUDA version of the target environment's torch, asked in a process of its own."""
    # an isolated build puts its own folders on the path of every child
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    reasons = []
    for python in target_pythons():
        for variables in (environment, dict(os.environ)):
            answer = subprocess.run(
                [python, "-c", PROBE], capture_output=True, text=True, env=variables, cwd="/", check=False
            )
            if answer.returncode == 0:
                return json.loads(answer.stdout.strip().splitlines()[-1])
        reasons.append(f"{python}: {(answer.stderr.strip().splitlines() or ['no answer'])[-1]}")
    raise CannotBuild("no torch to build against (" + "; ".join(reasons) + ")")


def find_cmake() -> str:
    """CMake from the path, or from its wheel in the running environment."""
    try:
        from cmake import CMAKE_BIN_DIR

        return str(Path(CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        found = shutil.which("cmake")
    if found is None:
        raise CannotBuild("CMake is not installed (pip install cmake)")
    return found


def wants_cuda(torch: dict[str, str | None]) -> bool:
    """Whether to build the CUDA kernels; says why not where one would expect them."""
    asked = os.environ.get("NASCOMPILE_CUDA", "")
    if asked not in ("", "0", "1"):
        raise CannotBuild(f"NASCOMPILE_CUDA={asked!r}: 0, 1 or nothing is expected")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if asked == "1" and nvcc is None:
        raise CannotBuild("NASCOMPILE_CUDA=1, but no nvcc was found")
    if asked:
        return asked == "1"
    if torch["cuda"] is not None and nvcc is None:
        log("torch is built for CUDA, but there is no nvcc: the CUDA kernels are left out, Triton's are used")
    return torch["cuda"] is not None and nvcc is not None


class CMakeExtension(Extension):
    """An extension whose sources only CMakeLists.txt knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class BuildWithCMake(build_ext):
    """Build with CMake; without a way to build, install the package as pure Python."""

    def run(self) -> None:
        asked = os.environ.get("NASCOMPILE_BUILD_EXT", "")
        if asked == "0":
            log("NASCOMPILE_BUILD_EXT=0: installing as pure Python")
            self.extensions = []
            return
        try:
            super().run()
        except CannotBuild as reason:
            if asked == "1":
                raise SystemExit(f"nascompile: the extension cannot be built: {reason}") from reason
            log(f"the extension is not built: {reason}. Installing as pure Python (see `nascompile doctor`)")
            # what was not built must not be copied, and what an earlier build left is out of date
            self.extensions = []
            if self.inplace or getattr(self, "editable_mode", False):
                for stale in (ROOT / "nascompile").glob("_C*.so"):
                    stale.unlink()

    def build_extension(self, ext: Extension) -> None:
        cmake = find_cmake()
        torch = find_torch()
        if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
            raise CannotBuild("there is no C++ compiler")
        cuda = wants_cuda(torch)
        log(f"building nascompile._C for torch {torch['version']} in {torch['folder']}, CUDA: {cuda}")
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        parts = ["cmake", sys.implementation.cache_tag, torch["version"], "cuda" if cuda else "cpu"]
        parts.append("ninja" if shutil.which("ninja") else "make")
        build = ROOT / "build" / "-".join(map(str, parts))
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DNASCOMPILE_TORCH={torch['folder']}",
            f"-DNASCOMPILE_CUDA={'ON' if cuda else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        ninja = shutil.which("ninja")
        if ninja is not None:
            # by full path: the ninja of an earlier, isolated build is gone
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(build), "--parallel", jobs]):
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CannotBuild(f"{' '.join(command[:4])} failed: {error}") from error
        built = next(build.glob("_C*.so"), None)
        assert built is not None, f"CMake succeeded without making {build}/_C*.so"
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, output)


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"nascompile": ["py.typed", "_C.pyi"]},
    ext_modules=[CMakeExtension("nascompile._C")],
    cmdclass={"build_ext": BuildWithCMake},
)
