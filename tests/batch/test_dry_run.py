"""Dry runs: every row looked at, tokens counted, what the cache holds; nothing is loaded and nothing written."""

from pathlib import Path

import pytest

import jfp8kv
from jfp8kv.batch.check import load
from jfp8kv.batch.dry_run import _words, dry_run
from tests.batch.conftest import ROOT, write_rows

MODEL = ROOT / "tests" / "references" / "llama_bf16"
CONFIG = f"""
model: {MODEL}
kv_dtype: fp8_e4m3
engine: {{max_num_seqs: 4, kv_cache_memory: 64KiB, page_size: 16}}
sampling: {{max_tokens: 12}}
prompt: "the {{{{ word }}}}"
input: rows.jsonl
output: out.jsonl
"""
ROWS = [{"word": word} for word in ("end", "sea", "sky is blue", "a")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), ROWS)
    Path("run.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def tokenizer():
    return jfp8kv.load(MODEL).tokenizer


def test_tokens_are_those_that_the_run_would_have(tokenizer):
    found = dry_run(load(Path("run.yaml"), ["sampling.n=2"]))
    lengths = [len(tokenizer.encode(f"the {row['word']}")) for row in ROWS]
    counts = found.counts
    assert (counts.rows, counts.failed, counts.texts) == (4, 0, 8)
    assert (counts.prompt_tokens, counts.longest_prompt, counts.completion_tokens) == (
        sum(lengths),
        max(lengths),
        4 * 2 * 12,
    )
    assert found.kv_bytes_per_token == 128 and found.kv_cache_bytes == 65536 and found.seconds > 0
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl", "run.yaml"]


def test_the_texts_that_the_cache_holds_are_counted_in_pages():
    one = dry_run(load(Path("run.yaml"), ["engine.max_num_seqs=100"]))
    mean = (one.counts.prompt_tokens + one.counts.completion_tokens) / 4
    assert one.texts_at_once == 65536 // (128 * 16 * -(-mean // 16))
    assert dry_run(load(Path("run.yaml"))).texts_at_once == 4


def test_rows_that_would_fail_are_counted_and_the_first_named(run):
    write_rows(Path("rows.jsonl"), [*ROWS, {"wrd": 1}, {"word": "x " * 300}])
    status, out, _ = run("batch", "run.yaml", "--dry-run")
    assert status == 1 and "6, 2 of them would fail" in out
    assert (
        "rows.jsonl:5: the template wants 'word'" in out
        and "rows.jsonl:6: the prompt has 603 tokens, and max_model" in out
    )


def test_what_no_text_can_be_held_to_is_found_without_an_engine():
    for setting in (
        "sampling={regex: '('}",
        "sampling={logit_bias: {99999: 1.0}}",
        "sampling={stop_token_ids: [99999]}",
    ):
        counts = dry_run(load(Path("run.yaml"), [setting])).counts
        assert counts.failed == counts.rows == 4 and len(counts.errors) == 3, setting


def test_what_would_keep_a_run_from_starting_is_two(run):
    assert run("batch", "run.yaml", "--dry-run", "--set", "model=nowhere/at/all")[0] == 2
    assert run("batch", "run.yaml", "--dry-run", "--set", "kv_scales=checkpoint")[0] == 2
    assert run("batch", "run.yaml", "--dry-run", "--set", "engine.max_num_batched_tokens=4")[0] == 2
    write_rows(Path("rows.jsonl"), [{"wrd": 1}] * 30)
    status, out, err = run("batch", "run.yaml", "--dry-run")
    assert (status, out) == (2, "") and "None of the first 16 rows will do" in err


def test_requests_of_openai_are_counted_by_what_each_asks(tokenizer):
    body = {"prompt": "the end", "max_tokens": 5, "n": 2, "best_of": 3}
    ask = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    write_rows(Path("rows.jsonl"), [ask, ask | {"body": {"prompt": [1, 2, 3]}}])
    found = dry_run(load(Path("run.yaml"), ["prompt=~", "sampling={}"])).counts
    assert (found.prompt_tokens, found.completion_tokens) == (
        len(tokenizer.encode("the end")) + 3,
        15 + 16,
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 seconds"), (100, "100 seconds"), (600, "10 minutes"), (1e5, "28 hours")],
)
def test_times_are_rough(seconds, words):
    assert _words(seconds) == words
