"""Rules that ruff and import-linter cannot check, and the settings of conftest.py."""

import ast
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import tomllib
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import jupytext
import pytest

import jfp8kv
from jfp8kv.core.errors import did_you_mean

PACKAGES = ("jfp8kv", "pallas_kernels")
IGNORED = shutil.ignore_patterns("__pycache__", "*.json")
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 450


def test_every_public_name_can_be_imported_and_has_a_docstring():
    for name in jfp8kv.__all__:
        thing = getattr(jfp8kv, name)
        assert isinstance(thing, str) or inspect.getdoc(thing), f"jfp8kv.{name} has no docstring"


def received_types(function: object) -> Iterator[type]:
    """Yield the classes of this library in the return annotation of a function or property."""
    if isinstance(function, property):
        function = function.fget
    queue = [typing.get_type_hints(function).get("return")]
    while queue:
        hint = queue.pop()
        queue += typing.get_args(hint)
        if isinstance(hint, type) and hint.__module__.startswith("jfp8kv."):
            yield hint


def test_every_class_that_a_public_function_returns_is_public():
    functions = [getattr(jfp8kv, name) for name in jfp8kv.__all__]
    functions = [thing for thing in functions if inspect.isfunction(thing)]
    for cls in (jfp8kv.LLM, jfp8kv.Session):
        members = [value for name, value in vars(cls).items() if not name.startswith("_")]
        functions += [m for m in members if inspect.isfunction(m) or isinstance(m, property)]
    for function in functions:
        for found in received_types(function):
            assert found.__name__ in jfp8kv.__all__, f"{function} returns {found}"


def test_the_version_is_the_one_in_pyproject():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    assert jfp8kv.__version__ == version
    assert importlib.metadata.version("jfp8kv") == version, (
        "install again: the installed package is of another version"
    )


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_import_neither_loads_torch_nor_starts_a_backend():
    # A platform that does not exist: starting JAX's backend raises, as the second run shows.
    unknown = {"JAX_PLATFORMS": "no_such_platform"}
    done = python("import jfp8kv, sys; assert 'torch' not in sys.modules", **unknown)
    assert done.returncode == 0, done.stderr
    started = python("import jax; jax.devices()", **unknown)
    assert started.returncode == 1
    assert "no_such_platform" in started.stderr


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_notebooks_match_their_scripts():
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        assert cells(path) == cells(path.with_suffix(".py")), (
            f"{path.name} differs from its script: run `make notebooks`"
        )


def linted(folder: Path, files: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run import-linter with the project's contracts on a copy of the package plus `files`."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=IGNORED)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in files.items():
        path = folder / name
        old = path.read_text(encoding="utf-8") if path.exists() else '"""New."""\n'
        path.write_text(f"{old}\n{text}\n", encoding="utf-8")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = [sys.executable, "-c", command, "--no-logo", "--no-cache"]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True)


FORBIDDEN_IMPORTS = {
    "upward": ("jfp8kv/cache/pool.py", "import jfp8kv.engine.loop"),
    "in a function": ("jfp8kv/core/log.py", "def f():\n    import jfp8kv.cache.pool"),
    "relative": ("jfp8kv/models/layers.py", "from ..attention import xla"),
    "for types": (
        "jfp8kv/core/log.py",
        "import typing\nif typing.TYPE_CHECKING:\n    import jfp8kv.cache.pool",
    ),
    "cache in a model": ("jfp8kv/models/layers.py", "import jfp8kv.cache.pool"),
    "kernel in a model": ("jfp8kv/models/layers.py", "import pallas_kernels"),
    "library in a kernel": ("pallas_kernels/backend.py", "import jfp8kv.core.formats"),
    "circle": ("jfp8kv/engine/request.py", "import jfp8kv.engine.scheduler"),
    "undeclared module": ("jfp8kv/utilities.py", ""),
}


@pytest.mark.parametrize("kind", FORBIDDEN_IMPORTS)
def test_import_linter_reports_a_forbidden_import(tmp_path, kind):
    where, text = FORBIDDEN_IMPORTS[kind]
    done = linted(tmp_path, {where: text})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout or "utilities" in done.stdout, done.stdout + done.stderr


def test_the_imports_of_the_package_keep_all_contracts(tmp_path):
    done = linted(tmp_path, {})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("code", ["import torch.nn", "import pickle", "from torch import Tensor"])
def test_ruff_refuses_torch_and_pickle(code):
    arguments = ["check", "--stdin-filename", "jfp8kv/checkpoint/new.py", "-"]
    command = [sys.executable, "-m", "ruff", *arguments]
    source = f'"""New."""\n\n{code}\n'
    done = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TID251" in done.stdout


def root_imports(path: Path) -> Iterator[int]:
    """Yield the lines on which a file imports from the package root, which names everything."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names) if any(alias.name == "jfp8kv" for alias in names):
                yield node.lineno
            case ast.ImportFrom(module="jfp8kv", level=0, names=names):
                children = ROOT / "jfp8kv"
                for alias in names:
                    if (
                        not (children / alias.name).exists()
                        and not (children / f"{alias.name}.py").exists()
                    ):
                        yield node.lineno


def test_no_module_below_the_command_line_imports_from_the_package_root():
    below = [path for path in SOURCES if path.parent.name != "cli"]
    found = [f"{path}:{line}" for path in below for line in root_imports(path)]
    assert not found


def test_no_source_file_is_too_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    too_long = {str(path): lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not too_long, "look for the second idea and give it a file"


def test_nothing_raises_not_implemented():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert not ast.unparse(node.exc).startswith("NotImplementedError"), path


# The tests below check settings of conftest.py: without them, switching one off would go unnoticed.


def test_mixed_precision_raises_in_tests():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_a_warning_raises_in_tests():
    with pytest.raises(UserWarning):
        warnings.warn("a warning", UserWarning, stacklevel=1)


def test_wrong_argument_types_raise_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        did_you_mean("a", 1)
