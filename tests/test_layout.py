"""The house rules that a machine can hold: direction of imports, names, sizes, packaging, words."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from scripts.link_typings import link_typings
from tests.repository import PACKAGES, ROOT, module_name, python_files, relative, repository_files

OTHER_CODE = ("tests", "benchmarks", "examples", "scripts")

# what each package may import of nascompile, besides itself and the module nascompile._C (kernels only)
MAY_IMPORT = {
    "kernels": set(),
    "compiler": {"kernels"},
    "runtime": {"kernels", "compiler"},
    "spaces": {"mutables", "NascompileError"},
}
SPACES_MAY_IMPORT = {"torch", "nascompile", *sys.stdlib_module_names}

MOST_LINES = 400
# path: why it is one file nevertheless
LONG_FILES: dict[str, str] = {
    "compiler/explain.py": "one report: its data, its two texts and its tables",
    "csrc/cpu/plan_maps.cpp": "the small steps on maps, all of one kind",
    "csrc/cpu/plan_pool.cpp": "two directions of two poolings, each plain and separable",
    "kernels/plan/steps.py": "one table: every step and barrier operation, as in csrc/plan.h",
    "tests/compiler/programs.py": "a collection of programs, each a few lines",
    "tests/compiler/test_passes.py": "the same five tests for every pass",
    "tests/runtime/test_trainers.py": "the same tests for every trainer",
}

# machine paths, package servers, private notes: none of them belongs in a repository that others clone
FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.*-])/(work|root|home|opt)/\w",
            r"download\.py" + r"torch\.org",
            r"py" + r"pi\.org",
            r"python" + r"hosted\.org",
            r"\bnpm" + r"js\.(com|org)",
        ]
    )
)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) for each import anywhere in `tree`, also in functions and under TYPE_CHECKING.

    `from nascompile.compiler import graph` counts as nascompile.compiler.graph: the name may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def wrong_direction(package: str, module: str) -> bool:
    """Whether a file of `package` may not import `module`."""
    parts = module.split(".")
    if package == "spaces" and parts[0] not in SPACES_MAY_IMPORT:
        return True
    if parts[0] != "nascompile" or package == "nascompile":
        return False
    target = parts[1] if len(parts) > 1 else "nascompile"
    if target == "_C":
        return package != "kernels"
    return target != package and target not in MAY_IMPORT[package]


@pytest.mark.parametrize(
    ("package", "module", "wrong"),
    [
        ("kernels", "nascompile.compiler.graph", True),
        ("kernels", "nascompile._C", False),
        ("compiler", "nascompile._C", True),
        ("compiler", "nascompile.kernels.ALL", False),
        ("compiler", "nascompile.compiler.graph", False),
        ("compiler", "nascompile.runtime.darts", True),
        ("compiler", "nascompile", True),
        ("runtime", "nascompile.compiler.trace", False),
        ("runtime", "nascompile.cli", True),
        ("runtime", "nascompile.compile", True),
        ("spaces", "nascompile.mutables.LayerChoice", False),
        ("spaces", "nascompile.compiler.mutables", True),
        ("spaces", "numpy", True),
        ("spaces", "torch.nn", False),
        ("nascompile", "nascompile.runtime.darts", False),
    ],
)
def test_direction_rule_knows_right_from_wrong(package: str, module: str, wrong: bool) -> None:
    assert wrong_direction(package, module) is wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    backward = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files(package)
        for module, line in imported_modules(parse(path))
        if wrong_direction(package, module)
    ]
    assert not backward, "\n".join(backward)


def test_imports_are_absolute() -> None:
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in python_files(*PACKAGES, *OTHER_CODE)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not found, f"relative imports (a type checker then sees two types for one class): {found}"


def test_folders_are_not_imported_by_their_bare_names() -> None:
    bare = {"kernels", "compiler", "runtime", "spaces"}
    found = [
        f"{relative(path)}:{line} imports {module}"
        for path in python_files(*PACKAGES, *OTHER_CODE)
        for module, line in imported_modules(parse(path))
        if module.split(".")[0] in bare
    ]
    assert not found, "\n".join(found)


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
bare = {"kernels", "compiler", "runtime", "spaces"} & set(sys.modules)
assert not bare, f"imported under a bare name: {sorted(bare)}"
"""


def test_every_module_imports_under_its_own_name() -> None:
    names = [module_name(p) for p in python_files(*PACKAGES) if p.stem != "__main__"]
    assert "nascompile.compiler.errors" in names
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_nascompile_does_not_import_torch() -> None:
    program = "import sys, nascompile; dir(nascompile); print(*{'torch', 'numpy', 'rich'} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_every_public_name_exists() -> None:
    import nascompile

    missing = [name for name in nascompile.__all__ if getattr(nascompile, name, None) is None]
    assert not missing


def test_an_unknown_public_name_lists_the_known_ones() -> None:
    import nascompile

    with pytest.raises(AttributeError, match=r"has no attribute 'complie'.*compile"):
        getattr(nascompile, "complie")  # noqa: B009 - a type checker refuses the plain form


def test_long_files_have_a_reason() -> None:
    suffixes = {".py", ".cpp", ".cu", ".h", ".cuh"}
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files()
        if path.suffix in suffixes
    }
    long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert long.keys() - LONG_FILES.keys() == set(), f"over {MOST_LINES} lines: {long}"
    assert LONG_FILES.keys() - long.keys() == set(), "listed as long, but short or gone"


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("see /" + "work/notes.md", True),
        ("https://py" + "pi.org/simple", True),
        ("--index-url https://download.py" + "torch.org/whl/cpu", True),
        ("runs/work/model.py", False),
        ("a/home/b", False),
    ],
)
def test_word_rule_knows_right_from_wrong(text: str, forbidden: bool) -> None:
    assert bool(FORBIDDEN.search(text)) is forbidden


def test_no_machine_paths_and_no_package_servers() -> None:
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures
        found += [f"{relative(path)}: {hit.group()}" for hit in FORBIDDEN.finditer(text)]
    assert not found, "\n".join(found)


def test_typings_show_every_package_to_the_type_checker(tmp_path: Path) -> None:
    for folder in PACKAGES:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f'"""{folder}"""\n')
    (tmp_path / "nascompile" / "_C.pyi").write_text("")
    target = link_typings(tmp_path)
    assert (target / "__init__.py").read_text() == '"""nascompile"""\n'
    assert (target / "_C.pyi").exists()
    for folder in PACKAGES[:-1]:
        assert (target / folder / "__init__.py").read_text() == f'"""{folder}"""\n'


def test_type_checker_includes_every_folder() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = config["tool"]["pyright"]["include"]
    checked = {entry.removeprefix("typings/nascompile/").removeprefix("typings/") for entry in included}
    top = {path.relative_to(ROOT).parts[0] for path in repository_files() if path.suffix == ".py"}
    assert top - {"docs"} <= checked


def test_every_runtime_dependency_is_imported() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {re.split(r"[<>=!~;\[ ]", line)[0] for line in config["project"]["dependencies"]}
    imported = {
        module.split(".")[0]
        for path in python_files(*PACKAGES)
        for module, _ in imported_modules(parse(path))
    }
    assert "torch" in declared
    assert declared <= imported
    needed = imported - set(sys.stdlib_module_names) - {"nascompile", "triton", "cuda"}
    assert needed <= declared, "imported by a package, but not declared"
