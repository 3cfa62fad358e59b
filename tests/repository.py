"""What belongs to this repository: its files, and the modules they are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "compiler", "runtime", "spaces", "nascompile")

LEFT_BY_BUILDS = re.compile(r"(^|/)(build|dist|typings|runs|__pycache__|\.[^/]*|[^/]*\.egg-info)/")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def repository_files() -> list[Path]:
    """Every file that git tracks or would track; in an unpacked archive, all but what a build leaves."""
    if not (ROOT / ".git").exists():
        return [p for p in ROOT.rglob("*") if p.is_file() and not LEFT_BY_BUILDS.search(relative(p))]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    """The Python files under the named top-level folders, sorted."""
    return sorted(p for p in repository_files() if p.suffix == ".py" and relative(p).split("/")[0] in folders)


def module_name(path: Path) -> str:
    """The name a file of PACKAGES is imported by: compiler/trace.py is nascompile.compiler.trace."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    named = parts if parts[0] == "nascompile" else ("nascompile", *parts)
    return ".".join(named[:-1] if named[-1] == "__init__" else named)
