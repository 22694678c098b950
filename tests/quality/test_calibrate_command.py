"""`jfp8kv calibrate` in this process, over the tiny reference model that has a tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest

import jfp8kv

pytestmark = pytest.mark.quick_compile

MODEL = Path(__file__).parent.parent / "references" / "llama_bf16"
LINES = ["the end of the day", "a cat sat on the mat", "the end"]


def same(path: Path, scales: jfp8kv.KVScales) -> bool:
    found = jfp8kv.KVScales.load(path)
    return np.array_equal(found.k, scales.k) and np.array_equal(found.v, scales.v)


@pytest.fixture(scope="module")
def params():
    return jfp8kv.load(MODEL)


def test_a_text_file_is_one_prompt_per_line_and_generate_takes_the_scales(run, params, tmp_path):
    data, out = tmp_path / "data.txt", tmp_path / "scales.safetensors"
    data.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(LINES).encode())
    status, shown, message = run("calibrate", MODEL, data, "--out", out)
    assert status == 0, message
    assert same(out, jfp8kv.calibrate(params, LINES))
    assert (
        shown.startswith("amax scales per head for fp8_e4m3, 2 layers\n  K  min ")
        and "\n  V  min " in shown
    )
    assert "of 3 prompts" in message and f"wrote {out}" in message
    generate = (
        "generate",
        MODEL,
        "--prompt",
        "the end",
        "--max-tokens",
        "2",
        "--kv-dtype",
        "fp8",
        "--kv-scales",
        out,
    )
    assert run(*generate)[0] == 0


def test_with_a_window_a_text_file_is_one_prompt(run, params, tmp_path):
    data, out = tmp_path / "data.txt", tmp_path / "scales.safetensors"
    data.write_text("\n".join(LINES))
    options = (
        "--window",
        16,
        "--observer",
        "percentile",
        "--percentile",
        99,
        "--granularity",
        "channel",
        "--kv-dtype",
        "fp8_e5m2",
    )
    status, shown, message = run(
        "calibrate", MODEL, data, "--out", out, "--json", "--quiet", *options
    )
    assert (status, message) == (0, "")
    expected = jfp8kv.calibrate(
        params,
        "\n".join(LINES),
        window=16,
        observer="percentile",
        percentile=99,
        granularity="channel",
        kv_dtype="fp8_e5m2",
    )
    assert same(out, expected)
    summary = json.loads(shown)
    assert summary["k"] == {
        name: float(getattr(np, name)(expected.k)) for name in ("min", "median", "max")
    }
    options = {
        "kv_dtype": "fp8_e5m2",
        "granularity": "channel",
        "observer": "percentile",
        "percentile": 99.0,
    }
    tokens = len(params.tokenizer.encode("\n".join(LINES)))
    seen = {"out": str(out), "prompts": 1, "tokens": tokens, "layers": 2}
    assert {name: summary[name] for name in options | seen} == options | seen


def test_records_give_text_prompt_messages_or_the_named_field(run, params, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "scales.safetensors"
    chat = [{"role": "user", "content": LINES[2]}]
    records = [
        {"text": LINES[0], "other": "the"},
        {"prompt": LINES[1], "other": [5, 6]},
        {"messages": chat, "other": "a"},
    ]
    data.write_text("".join(json.dumps(record) + "\n\n" for record in records))
    assert run("calibrate", MODEL, data, "--out", out)[0] == 0
    assert same(out, jfp8kv.calibrate(params, iter([*LINES[:2], chat])))
    assert run("calibrate", MODEL, data, "--out", out, "--field", "other")[0] == 0
    assert same(out, jfp8kv.calibrate(params, iter(["the", [5, 6], "a"])))


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.txt", None, [], "none.txt: no such file"),
        ("data.txt", "", [], "prompts is empty"),
        ("data.txt", "\n \n", [], "prompts is empty"),
        ("data.txt", "", ["--window", 4], "prompts is empty"),
        ("data.txt", "a " * 400, [], "prompt 0 has"),
        ("data.txt", "a", ["--field", "text"], "--field text: names a field of a row"),
        ("data.txt", "a", ["--granularity", "chanel"], "Did you mean 'channel'"),
        ("data.txt", "a", ["--observer", "max"], "observer='max'"),
        (
            "data.txt",
            "a",
            ["--kv-dtype", "float32"],
            "kv_dtype='float32': scales belong to an FP8 cache",
        ),
        ("data.txt", "a", ["--observer", "percentile", "--percentile", "101"], "percentile=101.0"),
        ("data.txt", "a", ["--percentle", "9"], "Did you mean '--percentile'"),
        ("data.txt", "a", ["--window", "x"], "--window"),
        ("data.txt", b"\xff\xfe", [], "data.txt:1: invalid UTF-8"),
        ("data.jsonl", "{", [], "data.jsonl:1: invalid JSON"),
        (
            "data.jsonl",
            '{"text": "a"}\n{"body": "a"}',
            [],
            "data.jsonl:2: no field 'prompt' or 'messages' or 'text'; the row has 'body'",
        ),
        ("data.jsonl", '{"text": "a"}', ["--field", "body"], "no field 'body'; the row has 'text'"),
        ("data.jsonl", "[1]", [], "JSON of type list: must be an object"),
        ("data.jsonl", '{"text": 5}', [], "prompt 0 is of type int"),
    ],
)
def test_an_error_is_one_line_and_status_two(run, tmp_path, name, content, options, message):
    data, out = tmp_path / name, tmp_path / "scales.safetensors"
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, shown, error = run("calibrate", MODEL, data, "--out", out, *options)
    assert (status, shown) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith("jfp8kv: error: ") and message in line
    assert not out.exists()


def test_an_unwritable_output_is_refused_before_the_model_is_read(run, tmp_path):
    (tmp_path / "data.txt").write_text("a")
    for out in (tmp_path, tmp_path / "none" / "scales"):
        status, _, error = run(
            "calibrate", tmp_path / "no_model", tmp_path / "data.txt", "--out", out
        )
        assert status == 2 and f"--out {out}" in error
    assert "--out" in run("calibrate", MODEL, tmp_path / "data.txt")[2]
