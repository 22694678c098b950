"""jfp8kv: inference in pure JAX with a paged key/value cache in 8-bit floating point.

    params = jfp8kv.load("path/or/hub-id")
    outs = jfp8kv.generate(params, ["Once upon a time"], kv_dtype="fp8_e4m3", max_tokens=64)
    print(outs[0].text)

`__init__.pyi` declares the public names. Each is imported when it is first used (PEP 562), because
JAX takes seconds to import and `jfp8kv --help` does not need it.
"""

import ast
import importlib
from pathlib import Path

__version__ = "0.1.0.dev0"


def _declared() -> dict[str, str]:
    """Return the module of each public name, as `__init__.pyi` imports it."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = (node for node in stub.body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names}


_MODULES = _declared()
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
