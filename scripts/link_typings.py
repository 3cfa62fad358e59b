"""Show the packages to the type checker under the names they are imported by; standard library only.

The folders compiler/, kernels/, runtime/ and spaces/ are imported as nascompile.compiler and so on through an
entry in `nascompile.__path__`, which no type checker follows. typings/nascompile/ (ignored by git) holds one
symlink for each of them and one for each file of nascompile/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compiler", "kernels", "runtime", "spaces")


def link_typings(root: Path) -> Path:
    """Make `root`/typings/nascompile anew and return it."""
    target = root / "typings" / "nascompile"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    # relative links survive a move of the checkout
    for folder in FOLDERS:
        (target / folder).symlink_to(Path("../..") / folder)
    for file in sorted((root / "nascompile").iterdir()):
        if file.suffix in {".py", ".pyi"}:
            (target / file.name).symlink_to(Path("../../nascompile") / file.name)
    return target


if __name__ == "__main__":
    link_typings(ROOT)
