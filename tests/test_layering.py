"""The import graph, read off the source: imports point down, and no layer reaches past what it may know.

A layer is a folder or a module directly under `jfp8kv`; the package's own `__init__` is the layer `jfp8kv`. Every
import counts, those inside functions and behind `TYPE_CHECKING` too: what a file knows is what it depends on.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jfp8kv", "pallas_kernels")

LIBRARY = {
    "core",
    "text",
    "models",
    "cache",
    "attention",
    "sampling",
    "engine",
    "checkpoint",
    "quality",
    "llm",
    "functional",
}

# Bottom first. Each layer names the layers it may import, beside itself.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "text": {"core"},
    "models": {"core", "text"},
    "cache": {"core", "models"},
    "attention": {"core", "cache"},
    "sampling": {"core"},
    "engine": {"text", "core", "cache", "attention", "models", "sampling"},
    "checkpoint": {"text", "core", "cache", "models"},
    "session": {"text", "core", "sampling", "engine"},
    "llm": {
        "cache",
        "text",
        "core",
        "attention",
        "models",
        "sampling",
        "engine",
        "checkpoint",
        "session",
    },
    "beam_search": {"text", "core", "models", "sampling", "engine", "session", "llm"},
    "quality": {
        "text",
        "core",
        "cache",
        "attention",
        "models",
        "engine",
        "checkpoint",
        "llm",
    },
    "functional": {
        "quality",
        "cache",
        "text",
        "llm",
        "core",
        "attention",
        "models",
        "sampling",
        "engine",
        "checkpoint",
    },
    # The front door names things again, and `python -m jfp8kv` starts the command line.
    "jfp8kv": {
        "quality",
        "core",
        "cache",
        "models",
        "sampling",
        "checkpoint",
        "engine",
        "session",
        "llm",
        "beam_search",
        "functional",
    },
    "batch": LIBRARY,
    "cli": LIBRARY | {"batch", "jfp8kv"},
    "__main__": {"cli"},
}

# The kernels know nothing of the library, and these places alone know the kernels: where attention is chosen, where tokens are
# stored, and where products are chosen, which models are handed as they are handed attention.
MAY_IMPORT_KERNELS = ("jfp8kv/attention/dispatch.py", "jfp8kv/cache/", "jfp8kv/engine/matmul.py")
# Modules without kernels, shared with the XLA code: the FP8 cast, the error, the reference softmax.
SHARED_MODULES = tuple(f"pallas_kernels.{name}" for name in ("elements", "errors", "reference"))
MAY_IMPORT_SHARED = ("jfp8kv/core/", "jfp8kv/attention/")

BANNED = {
    "torch": "the library is pure JAX",
    "tensorflow": "the library is pure JAX",
    "pickle": "nothing runs code from a checkpoint",
}


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything the file imports, relative imports made absolute.

    `from a import b` gives `a.b`, which is right for a module and harmless for a function: layers are found by prefix.
    """
    package = path.relative_to(root).parts[:-1]

    def absolute(level: int, name: str | None) -> str:
        above = package[: len(package) - level + 1] if level else ()
        return ".".join([*above, *([name] if name else [])])

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from (
                    (node.lineno, f"{absolute(level, module)}.{alias.name}") for alias in names
                )
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                yield node.lineno, absolute(len(name) - len(bare), bare)


def layer_of(module: str, root: Path) -> str:
    """The layer a dotted name under `jfp8kv` lies in; a name that is no module is one of the package's own."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__init__":
        return "jfp8kv"
    there = root / "jfp8kv" / parts[1]
    return parts[1] if there.is_dir() or there.with_suffix(".py").is_file() else "jfp8kv"


def violations(root: Path) -> list[str]:
    """Each import under `root` that the rules above do not allow, as `file:line: what is wrong`."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        where = path.relative_to(root).as_posix()
        home = where.split("/")[0]
        layer = layer_of(where.removesuffix(".py").replace("/", "."), root)
        if home == "jfp8kv" and layer not in MAY_IMPORT:
            found.append(
                f"{where}: {layer!r} is no layer of the house; give it its place in MAY_IMPORT"
            )
            continue
        for line, module in imports_of(path, root):
            top = module.split(".")[0]
            wrong = None
            if top in BANNED:
                wrong = f"imports {top}: {BANNED[top]}"
            elif home == "pallas_kernels" and top == "jfp8kv":
                wrong = f"imports {module}: the kernels import nothing of jfp8kv"
            elif (
                home == "jfp8kv"
                and top == "pallas_kernels"
                and not where.startswith(MAY_IMPORT_KERNELS)
                and not (where.startswith(MAY_IMPORT_SHARED) and module.startswith(SHARED_MODULES))
            ):
                wrong = f"imports {module}: only {', '.join(MAY_IMPORT_KERNELS)} may"
            elif home == "jfp8kv" and top == "jfp8kv":
                target = layer_of(module, root)
                if target not in {layer, *MAY_IMPORT[layer]}:
                    wrong = f"{layer} imports {target} ({module}), but may only import {sorted(MAY_IMPORT[layer])}"
            if wrong:
                found.append(f"{where}:{line}: {wrong}")
    return found


def test_every_import_of_the_library_points_down():
    assert not violations(ROOT), "\n".join(violations(ROOT))


def test_the_graph_itself_points_down():
    below: set[str] = set()
    for layer, allowed in MAY_IMPORT.items():
        assert allowed <= below, (
            f"{layer} may import {sorted(allowed - below)}, which is not below it"
        )
        below.add(layer)


PLANTED = {
    "a layer above": (
        "jfp8kv/cache/pool.py",
        "from jfp8kv.engine.loop import run",
        "cache imports engine",
    ),
    "a layer beside": (
        "jfp8kv/models/decoder.py",
        "import jfp8kv.cache.pool",
        "models imports cache",
    ),
    "a layer as a name": (
        "jfp8kv/sampling/params.py",
        "from jfp8kv import engine",
        "sampling imports engine",
    ),
    "a relative import": (
        "jfp8kv/models/layers.py",
        "from ..attention import xla",
        "models imports attention",
    ),
    "a relative parent": (
        "jfp8kv/models/layers.py",
        "from .. import engine",
        "models imports engine",
    ),
    "inside a function": (
        "jfp8kv/core/fp8.py",
        "def f():\n    import jfp8kv.cache",
        "core imports cache",
    ),
    "for types alone": (
        "jfp8kv/core/fp8.py",
        "if TYPE_CHECKING:\n    from jfp8kv.cache import pages",
        "core imports cache",
    ),
    "by name": (
        "jfp8kv/core/fp8.py",
        "importlib.import_module('jfp8kv.engine')",
        "core imports engine",
    ),
    "by relative name": (
        "jfp8kv/core/fp8.py",
        "import_module('..engine', __package__)",
        "core imports engine",
    ),
    "the front door": ("jfp8kv/engine/loop.py", "from jfp8kv import LLM", "engine imports jfp8kv"),
    "in an __init__": (
        "jfp8kv/cache/__init__.py",
        "from ..engine import loop",
        "cache imports engine",
    ),
    "a kernel in a model": (
        "jfp8kv/models/layers.py",
        "import pallas_kernels",
        "only jfp8kv/attention/dispatch.py",
    ),
    "a kernel in xla": (
        "jfp8kv/attention/xla.py",
        "from pallas_kernels import kv_write",
        "only jfp8kv/attention/dispatch.py",
    ),
    "the library in a kernel": (
        "pallas_kernels/kv_write.py",
        "from jfp8kv.core import fp8",
        "nothing of jfp8kv",
    ),
    "torch": ("jfp8kv/checkpoint/bin.py", "import torch.nn", "pure JAX"),
    "torch in a kernel": ("pallas_kernels/paged_decode.py", "from torch import Tensor", "pure JAX"),
    "pickle": ("jfp8kv/checkpoint/bin.py", "def f():\n    from pickle import load", "runs code"),
    "a new layer": ("jfp8kv/utils.py", "", "is no layer of the house"),
}

ALLOWED = {
    "jfp8kv/__init__.py": "from jfp8kv.functional import LLM\nfrom .core import errors",
    "jfp8kv/__main__.py": "from jfp8kv.cli import main",
    "jfp8kv/functional.py": "from jfp8kv.engine import loop\nimport jfp8kv.checkpoint",
    "jfp8kv/cli.py": "from .functional import LLM\nfrom jfp8kv.core.errors import Jfp8kvError",
    "jfp8kv/core/__init__.py": "",
    "jfp8kv/core/formats.py": "from pallas_kernels import elements",
    "jfp8kv/attention/reference.py": "from pallas_kernels.reference import scores",
    "jfp8kv/cache/write.py": "from pallas_kernels import kv_write",
    "jfp8kv/engine/matmul.py": "from pallas_kernels import layer_matmul",
    "jfp8kv/attention/dispatch.py": "import pallas_kernels.paged_decode\nfrom . import xla\nimport jax, numpy",
    "jfp8kv/engine/loop.py": "from jfp8kv.engine import step\nfrom ..cache.pages import KVPool",
    "jfp8kv/checkpoint/gguf.py": "import gguf  # a file may share its name with the library it reads through",
    "pallas_kernels/__init__.py": "from pallas_kernels import kv_write",
}


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_house_that_keeps_the_rules_passes(tmp_path):
    assert violations(build(tmp_path, ALLOWED)) == []


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_import_is_caught(tmp_path, kind):
    where, text, expected = PLANTED[kind]
    (found,) = violations(build(tmp_path, ALLOWED | {where: text}))
    assert found.startswith(where)
    assert expected in found
