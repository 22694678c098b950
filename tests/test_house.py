"""House rules that a machine can check: size, docstrings, nothing left for later, a light front door, strict tests."""

import ast
import importlib.metadata
import inspect
import os
import re
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

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for package in ("jfp8kv", "pallas_kernels") for path in (ROOT / package).rglob("*.py")
)
MAX_LINES = 450
MAY_PRINT = ("jfp8kv/cli", "jfp8kv/__main__.py")

each_source = pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


@each_source
def test_a_file_holds_one_idea(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: look for the second idea and give it its own file"


@each_source
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no module docstring"


@each_source
def test_nothing_is_left_for_later(path):
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))
    raised = [node.exc for node in nodes(path) if isinstance(node, ast.Raise) and node.exc]
    assert not [
        ast.unparse(exc) for exc in raised if ast.unparse(exc).startswith("NotImplementedError")
    ]


@each_source
def test_only_the_command_line_prints(path):
    if path.relative_to(ROOT).as_posix().startswith(MAY_PRINT):
        return
    prints = [
        n.lineno for n in nodes(path) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"
    ]
    assert not prints, f"print() in lines {prints}: return the text, log it or raise it"


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


def test_importing_the_library_takes_no_torch_and_starts_no_backend():
    """Under a platform that does not exist, whatever starts JAX's backend raises: as the second run shows."""
    done = python(
        "import jfp8kv, sys; assert 'torch' not in sys.modules", JAX_PLATFORMS="no_such_platform"
    )
    assert done.returncode == 0, done.stderr
    started = python("import jax; jax.devices()", JAX_PLATFORMS="no_such_platform")
    assert started.returncode == 1 and "no_such_platform" in started.stderr


def test_each_notebook_says_what_its_script_says():
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        notebook, script = (jupytext.read(each).cells for each in (path, path.with_suffix(".py")))
        notebook, script = (
            [(cell.cell_type, cell.source) for cell in cells] for cells in (notebook, script)
        )
        assert notebook == script, (
            f"{path.name} is not in step: `make notebooks` brings them together"
        )


# The three below guard the guards of conftest.py: each would pass unnoticed if it were switched off.


def test_mixed_precision_raises_in_tests():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)


def test_a_warning_raises_in_tests():
    with pytest.raises(UserWarning):
        warnings.warn("said once", UserWarning, stacklevel=1)


def test_wrong_shapes_raise_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        did_you_mean("a", 1)
