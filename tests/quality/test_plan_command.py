"""`jfp8kv plan` in this process: a plan that `jfp8kv generate` takes, and mistakes in one line."""

import json
from pathlib import Path

import pytest

import jfp8kv
from jfp8kv.cli import main

pytestmark = pytest.mark.quick_compile

MODEL = Path(__file__).parent.parent / "references" / "llama_bf16"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(
        "the end of the day, a cat sat on the mat and that was the end " * 2, encoding="utf-8"
    )
    return path


def test_a_plan_is_written_within_the_budget_and_serves_generate(text, tmp_path, capsys) -> None:
    out = tmp_path / "plan"
    options = ["--out", str(out), "--budget", "75%", "--window", "32", "--max-model-len", "64"]
    assert main(["plan", str(MODEL), str(text), *options, "--json"]) == 0
    shown = capsys.readouterr()
    told, plan = json.loads(shown.out), jfp8kv.KVPlan.load(out)
    assert (
        told == plan.to_dict() | {"out": str(out)}
        and f"wrote {out}, for --kv-dtype {out}" in shown.err
    )
    config = jfp8kv.load(MODEL).config
    assert plan.bytes_per_token <= 0.75 * 2 * 2 * config.layers * config.kv_heads * config.head_dim
    assert (
        main(
            [
                "generate",
                str(MODEL),
                "--prompt",
                "the end",
                "--max-tokens",
                "2",
                "--kv-dtype",
                str(out),
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either budget"),
        (["--budget", "60%", "--max-loss", "0.1"], "either budget"),
        (["--budget", "60%", "--kv-dtypes", "fp8_e4m3,fp9"], "'fp9'"),
        (["--budget", "sixty"], "budget='sixty'"),
        (
            ["--budget", "60%", "--out", "no/such/folder/plan"],
            "--out no/such/folder/plan: cannot be written",
        ),
        (["--budget", "60%", "--filed", "x"], "Did you mean '--field'"),
    ],
)
def test_an_error_is_one_line_and_status_two(options, message, text, tmp_path, capsys) -> None:
    out = [] if "--out" in options else ["--out", str(tmp_path / "plan")]
    assert main(["plan", str(MODEL), str(text), *out, *options]) == 2
    told = capsys.readouterr()
    assert (
        not told.out
        and told.err.startswith("jfp8kv: error: ")
        and message in told.err
        and told.err.count("\n") == 1
    )
