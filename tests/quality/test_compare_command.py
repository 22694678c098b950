"""`jfp8kv compare` in this process, over the tiny reference model that has a tokenizer."""

import json
from pathlib import Path

import pytest

import jfp8kv

pytestmark = pytest.mark.quick_compile

MODEL = Path(__file__).parent.parent / "references" / "llama_bf16"
TEXT = "the end of the day\nand a cat sat on the mat, the end. " * 3
USUAL = ("--window", 56, "--needle-lengths", 64, "--needle-depths", "0,1", "--max-model-len", 64)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_the_command_prints_the_report(run, text, tmp_path):
    """As tables with a table by layer and a figure; then as JSON, from records."""
    params, scales = jfp8kv.load(MODEL), ("unit", "head")
    options = {"window": 56, "needle_lengths": [64], "needle_depths": [0, 1], "max_model_len": 64}
    report = jfp8kv.compare(
        params,
        TEXT,
        kv_dtypes=["fp8_e4m3"],
        kv_scales=scales,
        calibration=TEXT[::-1],
        progress=False,
        **options,
    )
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": TEXT[::-1]}))
    given = (
        "--kv-dtypes",
        "fp8",
        "--kv-scales",
        " unit, head",
        "--calibration",
        tmp_path / "other.jsonl",
        *USUAL,
    )
    status, shown, message = run(
        "compare", MODEL, text, *given, "--by-layer", "--plot", tmp_path / "out.svg"
    )
    assert status == 0, message
    assert shown == f"{report}\n\n{report.by_layer()}\n"
    assert message.splitlines()[-1].startswith(f"jfp8kv: 3 caches over {report.tokens} tokens in ")
    assert message.endswith(f"; wrote {tmp_path / 'out.svg'}\n") and (
        tmp_path / "out.svg"
    ).read_text().startswith("<?xml")
    records = tmp_path / "text.jsonl"
    records.write_text(json.dumps({"body": TEXT}) + "\n")
    other = ("--calibration", tmp_path / "other.jsonl", "--field", "body")
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": TEXT[::-1]}))
    status, shown, message = run("compare", MODEL, records, *given, *other, "--json", "--quiet")
    assert (status, message) == (0, "")
    assert json.loads(shown) == report.to_dict()


MISTAKES = {
    "no text": (["--text", "x"], "--text"),
    "an unknown format": (["--kv-dtypes", "bfloat16,fp8_e4m4"], "Did you mean 'fp8_e4m3'?"),
    "no format": (["--kv-dtypes", ","], "kv_dtypes is empty"),
    "unknown scales": (["--kv-scales", "unit,tokenhead"], "Did you mean 'token_head'?"),
    "scales without a file": (["--kv-scales", "/no/scales"], "'/no/scales'"),
    "an empty window": (["--window", 0], "window=0"),
    "a window in words": (["--window", "x"], "--window"),
    "a needle in words": (
        ["--needle-lengths", "long"],
        "--needle-lengths long: must be numbers separated by commas, or none",
    ),
    "a needle too short": (["--needle-lengths", "12"], "must be a whole number of at least 49"),
    "a depth beyond the end": (["--needle-depths", "0,2"], "needle_depths="),
    "no such calibration": (["--calibration", "/no/texts"], "/no/texts: no such file"),
    "a field of a text file": (["--field", "text"], "names a field of a row"),
    "an unknown image format": (["--plot", "out.gif"], "--plot='.gif': must be one of '.png'"),
    "an unwritable figure": (
        ["--plot", "/no/out.png"],
        "--plot /no/out.png: cannot be written",
    ),
    "a misspelt option": (["--kv-dtype", "fp8"], "Did you mean '--kv-dtypes'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_error_is_one_line_and_status_two_before_the_model_is_read(run, text, mistake):
    given, named = MISTAKES[mistake]
    status, shown, message = run("compare", "/no/model", text, *given)
    assert (status, shown) == (2, "")
    (line,) = message.splitlines()
    assert line.startswith("jfp8kv: error: ") and named in line


@pytest.mark.parametrize(
    ("content", "given", "named"),
    [
        (None, [], "text.txt: no such file. TEXT is"),
        ("", [], "texts is empty"),
        (b"\xff\xfe", [], "text.txt: invalid UTF-8"),
        (TEXT, ["--kv-scales", "head"], "give prompts to calibrate on"),
        (TEXT, ["--kv-scales", "checkpoint"], "the checkpoint has none"),
        (TEXT, ["--needle-lengths", "257"], "at most 256, the context"),
        (TEXT, ["--max-model-len", "512"], "max_model_len=512"),
    ],
)
def test_an_error_that_needs_the_model_is_one_line_and_status_two(run, text, content, given, named):
    text.unlink()
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, shown, message = run("compare", MODEL, text, *given)
    assert (status, shown) == (2, "")
    (line,) = message.splitlines()
    assert line.startswith("jfp8kv: error: ") and named in line
