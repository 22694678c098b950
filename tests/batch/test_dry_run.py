"""Dry runs: rows and tokens are counted; nothing is loaded and nothing written."""

from pathlib import Path

import pytest

import jfp8kv
from jfp8kv.batch import dry_run, load_config
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


def test_tokens_are_counted_as_in_the_run(tokenizer):
    found = dry_run(load_config(Path("run.yaml"), ["sampling.n=2"]))
    lengths = [len(tokenizer.encode(f"the {row['word']}")) for row in ROWS]
    counts = found.counts
    assert (counts.rows, counts.failed, counts.sequences) == (4, 0, 8)
    assert (counts.prompt_tokens, counts.longest_prompt, counts.completion_tokens) == (
        sum(lengths),
        max(lengths),
        4 * 2 * 12,
    )
    assert found.kv_bytes_per_token == 128 and found.kv_cache_bytes == 65536
    assert sorted(path.name for path in Path().iterdir()) == ["rows.jsonl", "run.yaml"]


def test_concurrent_sequences_are_limited_by_pages_and_max_num_seqs():
    one = dry_run(load_config(Path("run.yaml"), ["engine.max_num_seqs=100"]))
    mean = (one.counts.prompt_tokens + one.counts.completion_tokens) / 4
    assert one.concurrent_sequences == 65536 // (128 * 16 * -(-mean // 16))
    assert dry_run(load_config(Path("run.yaml"))).concurrent_sequences == 4


def test_rows_that_would_fail_are_counted_and_the_first_reported(run):
    write_rows(Path("rows.jsonl"), [*ROWS, {"wrd": 1}, {"word": "x " * 300}])
    status, out, _ = run("batch", "run.yaml", "--dry-run")
    assert status == 1 and "6 (2 would fail)" in out
    assert (
        "rows.jsonl:5: the template uses 'word'" in out
        and "rows.jsonl:6: the prompt has 603 tokens; max_model_len" in out
    )


def test_options_that_the_engine_refuses_are_found_without_it():
    for setting in (
        "sampling={regex: '('}",
        "sampling={logit_bias: {99999: 1.0}}",
        "sampling={stop_token_ids: [99999]}",
    ):
        counts = dry_run(load_config(Path("run.yaml"), [setting])).counts
        assert counts.failed == counts.rows == 4 and len(counts.errors) == 3, setting


def test_a_mistake_that_prevents_a_run_has_exit_status_2(run):
    assert run("batch", "run.yaml", "--dry-run", "--set", "model=nowhere/at/all")[0] == 2
    assert run("batch", "run.yaml", "--dry-run", "--set", "kv_scales=checkpoint")[0] == 2
    assert run("batch", "run.yaml", "--dry-run", "--set", "engine.max_num_batched_tokens=4")[0] == 2
    write_rows(Path("rows.jsonl"), [{"wrd": 1}] * 30)
    status, out, err = run("batch", "run.yaml", "--dry-run")
    assert (status, out) == (2, "") and "None of the first 16 rows is valid" in err


def test_openai_requests_are_counted_with_their_options(tokenizer):
    body = {"prompt": "the end", "max_tokens": 5, "n": 2, "best_of": 3}
    ask = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    write_rows(Path("rows.jsonl"), [ask, ask | {"custom_id": "b", "body": {"prompt": [1, 2, 3]}}])
    found = dry_run(load_config(Path("run.yaml"), ["prompt=~", "sampling={}"])).counts
    assert (found.prompt_tokens, found.completion_tokens) == (
        len(tokenizer.encode("the end")) + 3,
        15 + 16,
    )
