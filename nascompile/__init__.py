"""nascompile: the model-graph compiler for neural architecture search with PyTorch.

The public API is the list below; each name is imported on first use: `import nascompile` costs nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# in a checkout the packages lie beside this folder; an installed wheel maps them into it (setup.py)
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "csrc").is_dir() and (_checkout / "setup.py").is_file():
    __path__.append(str(_checkout))

_PUBLIC = {
    "compile": "nascompile.compiler.compiled",
    "CompiledModel": "nascompile.compiler.compiled",
    "prune": "nascompile.compiler.prune",
    "load_supernet": "nascompile.compiler.prune",
    "export": "nascompile.compiler.export",
    "count": "nascompile.compiler.measure",
    "evaluate": "nascompile.runtime.evaluate",
    "explain": "nascompile.compiler.explain",
    "profile": "nascompile.compiler.region.profiling",
    "draw": "nascompile.compiler.draw",
    "search_space": "nascompile.compiler.architecture",
    "load_architecture": "nascompile.compiler.architecture",
    "apply_fixed_architecture": "nascompile.compiler.architecture",
    "NascompileError": "nascompile.compiler.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        known = ", ".join(sorted(_PUBLIC))
        raise AttributeError(f"module 'nascompile' has no attribute {name!r}; it has: {known}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
