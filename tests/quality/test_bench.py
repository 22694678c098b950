"""`bench`: the numbers of the report, its output, and errors in one line."""

import json

import pytest
from rich.console import Console

import jfp8kv
from jfp8kv import ConfigError
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

MODEL = REFERENCES[0].parent / "llama_bf16"
SMALL = {"requests": 3, "prompt_tokens": 20, "output_tokens": 6, "rounds": 2}


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(MODEL)


@pytest.fixture(scope="module")
def report(params) -> jfp8kv.BenchmarkReport:
    return jfp8kv.bench(
        params, kv_dtypes=["bfloat16", "fp8_e4m3"], kv_scales=["auto", "token_head"], **SMALL
    )


def test_fp8_caches_run_with_all_scales_and_have_room_for_all_requests(params, report) -> None:
    config, names = params.config, ["bfloat16", "fp8_e4m3", "fp8_e4m3, token_head"]
    assert [cache.kv_dtype for cache in report.caches] == names
    values = 2 * config.layers * config.kv_heads
    assert [c.bytes_per_token for c in report.caches] == [
        2 * values * config.head_dim,
        values * config.head_dim,
        values * 17,
    ]
    for cache in report.caches:
        assert (
            cache.max_requests >= 3 and cache.tokens_capacity >= 3 * 26 and cache.preemptions == 0
        )
        assert cache.first_token_s > 0 and cache.prefill_tokens_s > 0
        assert cache.decode_tokens_s > cache.output_tokens_s > 0, (
            "a round takes longer than its decode steps"
        )


def test_a_small_cache_preempts_requests_and_all_finish(params) -> None:
    memory = (
        3 * 2 * 64 * 256
    )  # half of what bfloat16 needs for three sequences of 120 tokens, in pages of 64
    sizes = SMALL | {"output_tokens": 100, "rounds": 1}
    tight, roomy = jfp8kv.bench(params, kv_cache_memory=memory // 2, **sizes).caches
    assert (tight.max_requests, roomy.max_requests) == (
        1,
        3,
    ) and tight.preemptions > 0 == roomy.preemptions


def test_the_report_prints_as_text_terminal_table_and_html(report) -> None:
    lines = str(report).splitlines()
    assert (
        lines[0]
        == "3 concurrent requests of 20 + 6 tokens, medians of 2 rounds, caches interleaved"
    )
    assert (
        lines[2].split()[:2] == ["KV", "cache"]
        and lines[3].startswith("bfloat16")
        and "x  " in lines[4]
    )
    assert "attention by xla" in lines[-2] and "max requests: requests" in lines[-3]
    console = Console(width=120, record=True)
    console.print(report)
    assert "fp8_e4m3, token_head" in console.export_text() and "<td" in report._repr_html_()
    assert (
        repr(report).startswith("BenchmarkReport(bfloat16 ")
        and json.loads(json.dumps(report.to_dict()))["caches"][1]["max_requests"] >= 3
    )


def test_the_command_prints_the_report(run) -> None:
    sizes = ["--requests", "2", "--prompt-tokens", "1", "--output-tokens", "3", "--rounds", "1"]
    status, out, err = run("bench", MODEL, *sizes, "--kv-dtypes", "fp8_e5m2", "--json", "--quiet")
    found = json.loads(out)
    assert (status, err) == (0, "") and (found["requests"], found["rounds"]) == (2, 1)
    (cache,) = found["caches"]
    assert (
        cache["kv_dtype"] == "fp8_e5m2"
        and cache["prefill_tokens_s"] is None
        and cache["output_tokens_s"] > 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "requests=0: must be a whole number of at least 1"),
        ({"rounds": True}, "rounds=True"),
        ({"kv_dtypes": "fp8"}, "kv_dtypes='fp8': must be a list, such as"),
        ({"kv_dtypes": []}, r"kv_dtypes=\[\]"),
        ({"kv_scales": []}, r"kv_scales=\[\]"),
        ({"kv_dtypes": ["fp9"]}, "'fp9'"),
    ],
)
def test_invalid_options_are_refused_before_the_model_is_loaded(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        jfp8kv.bench("no/such/model", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-tokens", "9999"], "10063"),
        (["--kv-cache-memory", "lots"], "kv_cache_memory='lots'"),
        (["--kv-scales", "tokenhead"], "'tokenhead'"),
        (["--attention", "flash"], "'flash'"),
    ],
)
def test_the_command_reports_an_error_in_one_line(run, options, message) -> None:
    status, out, err = run("bench", MODEL, *options)
    assert (
        (status, out) == (2, "")
        and err.startswith("jfp8kv: error: ")
        and message in err
        and err.count("\n") == 1
    )
