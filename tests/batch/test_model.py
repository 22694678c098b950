"""Batch runs of a tiny model through the command line."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jfp8kv
from jfp8kv.batch import load_config
from jfp8kv.batch.engine import LocalEngine
from jfp8kv.batch.requests import RowRequest, row_seed
from jfp8kv.core.errors import StepError
from tests.batch.conftest import ROOT, read_rows, write_rows

pytestmark = pytest.mark.quick_compile
MODEL = ROOT / "tests" / "references" / "llama_bf16"
ENGINE = "{max_num_seqs: 4, max_num_batched_tokens: 64, kv_cache_memory: 1MB}"
CONFIG = f"""
model: {MODEL}
dtype: float32
kv_dtype: float32
engine: {ENGINE}
sampling: {{max_tokens: 12, ignore_eos: true}}
prompt: "the {{{{ word }}}}"
input: rows.jsonl
output: out.jsonl
"""
ROWS = [{"word": word} for word in ("end", "sea", "sky is", "a", "I said no to you", "house") * 2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), ROWS)
    Path("run.yaml").write_text(CONFIG)


@pytest.fixture(scope="module")
def llm() -> jfp8kv.LLM:
    params = jfp8kv.load(MODEL, dtype="float32")
    return jfp8kv.LLM(
        params,
        kv_dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_memory="1MB",
    )


def test_outputs_equal_those_of_generate_for_each_prompt_alone(run, llm):
    status, out, err = run("batch", "run.yaml")
    assert (
        (status, out) == (0, "")
        and err.startswith("jfp8kv: out.jsonl: 12 rows; ")
        and "144 completion tokens" in err
    )
    for number, (row, given) in enumerate(zip(read_rows(Path("out.jsonl")), ROWS, strict=True)):
        (want,) = llm.generate(
            [f"the {given['word']}"], max_tokens=12, ignore_eos=True, seed=row_seed(0, number)
        )
        assert (row["text"], row["prompt_tokens"]) == (want.text, len(want.prompt_token_ids))
        assert row["finish_reason"] == "length" and row["word"] == given["word"]
    manifest = json.loads(Path("out.jsonl.run.json").read_text())
    assert (
        manifest["status"] == "complete"
        and manifest["engine"]["kv_dtype"] == "float32"
        and manifest["versions"]["jax"]
    )
    assert manifest["totals"]["completion_tokens"] == 144 and manifest["seed"] == 0
    status, _, err = run("batch", "run.yaml")
    assert status == 0 and "out.jsonl is already complete: 12 rows." in err


def test_a_mistake_has_exit_status_2_and_failed_rows_1(run):
    status, out, err = run("batch", "run.yaml", "--set", "sampling.temprature=1")
    assert (status, out) == (2, "") and "Did you mean 'temperature'" in err and err.count("\n") == 1
    assert run("batch")[0] == 2 and "no config" in run("batch")[2]
    assert (
        run("batch", "there.yaml")[0] == 2
        and "there.yaml: cannot be read" in run("batch", "there.yaml")[2]
    )
    write_rows(Path("rows.jsonl"), [*ROWS[:2], {"wrd": 1}, {"word": "x " * 300}])
    status, _, err = run("batch", "run.yaml", "--quiet")
    assert (status, err) == (1, "")
    errors = [row["error"] for row in read_rows(Path("out.jsonl"))]
    assert (
        errors[:2] == [None, None]
        and errors[2]["line"] == 3
        and "max_model_len" in errors[3]["message"]
    )


def test_the_schema_is_printed(run):
    status, out, _ = run("batch", "--print-schema")
    assert status == 0 and json.loads(out)["properties"]["kv_scales"]


def test_openai_requests_get_responses(run):
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
    }
    text = {"model": "m", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    rows = [
        ("a", "/v1/chat/completions", chat),
        ("b", "/v1/completions", text),
        ("c", "/v1/completions", text | {"n": 0}),
    ]
    write_rows(
        Path("rows.jsonl"),
        [{"custom_id": i, "method": "POST", "url": url, "body": body} for i, url, body in rows],
    )
    Path("run.yaml").write_text(
        "\n".join(
            line for line in CONFIG.splitlines() if not line.startswith(("prompt", "sampling"))
        )
    )
    assert run("batch", "run.yaml")[0] == 1
    found = read_rows(Path("out.jsonl"))
    assert [line["response"]["status_code"] for line in found] == [200, 200, 400]
    assert len(found[0]["response"]["body"]["choices"][0]["logprobs"]["content"]) == 4
    assert (
        "n=0: must be a whole number of at least 1"
        in found[2]["response"]["body"]["error"]["message"]
    )


def test_completion_scores_equal_those_of_the_model(run, llm):
    write_rows(Path("rows.jsonl"), [{"q": "the end", "a": " of it"}, {"q": "the end", "a": ""}])
    config = CONFIG.replace("sampling: {max_tokens: 12, ignore_eos: true}", "task: score")
    Path("run.yaml").write_text(
        config.replace('"the {{ word }}"', '"{{ q }}"\ncompletion: "{{ a }}"')
    )
    assert run("batch", "run.yaml")[0] == 1
    good, bad = read_rows(Path("out.jsonl"))
    ids, before = llm.tokenizer.encode("the end of it"), llm.tokenizer.encode("the end")
    assert ids[: len(before)] == before
    np.testing.assert_allclose(good["logprobs"], llm.score(ids)[len(before) - 1 :], atol=1e-5)
    assert good["completion_tokens"] == len(ids) - len(before) and good["logprob"] == pytest.approx(
        sum(good["logprobs"])
    )
    assert "nothing to score" in bad["error"]["message"]


def test_outputs_satisfy_the_structured_output_options(run):
    status, _, err = run(
        "batch", "run.yaml", "--set", "sampling={choice: [land, sea, sky], max_tokens: 12}"
    )
    assert status == 0, err
    assert {row["text"] for row in read_rows(Path("out.jsonl"))} <= {"land", "sea", "sky"}
    for sampling in (
        "{choice: [a], regex: a}",
        "{regex: '('}",
        "{max_tokens: 100000}",
        "{logit_bias: {99999: 1.0}}",
    ):
        more = (
            ["engine.kv_cache_memory=16KiB", "engine.page_size=16"]
            if "max_tokens" in sampling
            else []
        )
        sets = [word for each in (f"sampling={sampling}", *more) for word in ("--set", each)]
        status, _, err = run("batch", "run.yaml", *sets, "--restart")
        assert status == 2 and err.count("\n") == 1, err
    body = {"model": "m", "prompt": "hello", "max_tokens": 4}
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}
    bodies = [body | {"response_format": bad}, body]
    asks = [
        {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
        for custom_id, body in zip("ab", bodies, strict=True)
    ]
    write_rows(Path("rows.jsonl"), asks)
    assert (
        run("batch", "run.yaml", "--restart", "--set", "prompt=~", "--set", "sampling={}")[0] == 1
    )
    assert [line["response"]["status_code"] for line in read_rows(Path("out.jsonl"))] == [400, 200]


def test_scales_are_calibrated_on_all_rows(run):
    config = CONFIG.replace(
        "sampling: {max_tokens: 12, ignore_eos: true}", "task: calibrate"
    ).replace("out.jsonl", "out.safetensors")
    Path("run.yaml").write_text(
        config.replace("kv_dtype: float32", "kv_dtype: fp8\ncalibration: {granularity: tensor}")
    )
    status, _, err = run("batch", "run.yaml")
    assert status == 0 and "out.safetensors: 12 rows; " in err
    found, params = jfp8kv.KVScales.load("out.safetensors"), jfp8kv.load(MODEL, dtype="float32")
    want = jfp8kv.calibrate(
        params, [f"the {row['word']}" for row in ROWS], granularity="tensor", max_model_len=None
    )
    np.testing.assert_array_equal(found.k, want.k)
    assert "already complete" in run("batch", "run.yaml")[2]
    write_rows(Path("rows.jsonl"), [*ROWS[:2], {"wrd": "x"}])
    status, _, err = run("batch", "run.yaml", "--restart")
    assert status == 2 and "rows.jsonl:3: the template uses 'word'" in err
    assert run("batch", "run.yaml", "--restart", "--set", "kv_dtype=bfloat16")[0] == 2


def test_caches_are_compared_on_the_rows(run):
    config = CONFIG.replace(
        "sampling: {max_tokens: 12, ignore_eos: true}", "task: compare"
    ).replace("out.jsonl", "out.json")
    config = config.replace(
        f"engine: {ENGINE}",
        "comparison: {kv_dtypes: [fp8_e4m3], kv_scales: [unit], needle_lengths: []}",
    )
    Path("run.yaml").write_text(config.replace("kv_dtype: float32\n", ""))
    status, out, err = run("batch", "run.yaml")
    assert status == 0 and "fp8_e4m3" in out and "perplexity" in out and "out.json: 12 rows" in err
    assert json.loads(Path("out.json").read_text())["tokens"]


def test_scales_calibrated_before_a_run_are_stored_and_reused(run, monkeypatch):
    sets = [
        "--set",
        "kv_dtype=fp8_e4m3",
        "--set",
        "kv_scales={calibrate: {input: rows.jsonl, granularity: head}}",
    ]
    assert run("batch", "run.yaml", *sets)[0] == 0
    found = jfp8kv.KVScales.load("out.jsonl.scales.safetensors")
    assert found.granularity == "head" and len(read_rows(Path("out.jsonl"))) == len(ROWS)
    from jfp8kv.batch import dataset_tasks

    fail = lambda *_, **__: pytest.fail("the scales exist already")  # noqa: E731
    monkeypatch.setattr(dataset_tasks, "_calibrate", fail)
    config = load_config("run.yaml", sets[1::2])
    dataset_tasks.load_calibrated(config, Path("out.jsonl.scales.safetensors"))


class FailingLLM:
    """Runs steps of four prompts. A step with "poison" fails, and so does that prompt alone."""

    def __init__(self, error: Exception):
        self.error = error

    def generate_iter(self, pairs):
        numbered = enumerate(pairs)
        while step := list(itertools.islice(numbered, 4)):
            assert all(sampling == {"seed": 5} for _, (_, sampling) in step)
            failed = any(prompt == "poison" for _, (prompt, _) in step)
            if failed and not isinstance(self.error, jfp8kv.Jfp8kvError):
                raise self.error
            for number, (prompt, _) in step:
                yield number, self.error if failed else prompt.upper()


def local_engine(llm) -> LocalEngine:
    engine = LocalEngine.__new__(LocalEngine)
    engine.llm = llm
    return engine


PROMPTS = ("a", "b", "c", "d", "e", "poison", "f", "g", "h", "i", "j", "k")
REQUESTS = [RowRequest(prompt, {"seed": 5}) for prompt in PROMPTS]


def test_a_failed_step_fails_only_the_row_that_causes_it():
    """The rows of a failed step run again, each alone."""
    error = StepError("on fire")
    found = dict(local_engine(FailingLLM(error)).generate(REQUESTS))
    assert found.pop(5) is error
    assert found == {number: prompt.upper() for number, prompt in enumerate(PROMPTS) if number != 5}


def test_an_unexpected_error_is_not_the_result_of_a_row():
    with pytest.raises(TypeError, match="a bug"):
        list(local_engine(FailingLLM(TypeError("a bug"))).generate(REQUESTS))


def test_a_killed_run_of_a_model_ends_with_the_same_output(run):
    crashes = int(os.environ.get("JFP8KV_MODEL_CRASHES", "1"))
    write_rows(Path("rows.jsonl"), [{"word": f"word {i}"} for i in range(40)])
    run("batch", "run.yaml")
    expected = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    Path("out.jsonl.run.json").unlink()
    partial = Path("out.jsonl.partial")
    killed = 0
    for crash in range(crashes):
        command = [sys.executable, "-m", "jfp8kv", "batch", "run.yaml", "--quiet"]
        with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
            until = partial.stat().st_size if partial.exists() else 0
            while process.poll() is None and not (
                partial.exists() and partial.stat().st_size > until
            ):
                time.sleep(0.005)
            time.sleep(0.02 * (crash % 5))
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
    assert killed
    run("batch", "run.yaml")
    assert Path("out.jsonl").read_bytes() == expected


def test_an_engine_has_the_options_of_the_config(llm):
    config = load_config("run.yaml", ["kv_dtype={default: fp8_e4m3, skip: [0]}", "kv_scales=unit"])
    engine = LocalEngine(config, Path("scales.safetensors"))
    kv_dtype = engine.description["kv_dtype"]
    assert "fp8_e4m3" in kv_dtype and "bfloat16" in kv_dtype
    assert engine.description["max_model_len"] == 256
    assert engine.token_text(llm.tokenizer.encode("a")[-1])
