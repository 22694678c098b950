"""Names win over files of the same name, for every argument that takes a name or a path."""

from pathlib import Path

import pytest

import jfp8kv
from jfp8kv.core.paths import looks_like_path
from jfp8kv.core.types import KV_DTYPES, KV_SCALES
from jfp8kv.quality.options import CompareOptions, PlanOptions

MODEL = Path(__file__).resolve().parent.parent / "references" / "llama_bf16"


@pytest.mark.parametrize("path", ["./fp8", "a/b", "plan.safetensors", ".hidden/x", Path("fp8")])
def test_a_separator_a_suffix_or_a_pathlike_is_a_path(path) -> None:
    assert looks_like_path(path)


@pytest.mark.parametrize("name", [*KV_DTYPES, *KV_SCALES, "fp8_e4m4", "", None, 1, ["a.b"], {}])
def test_names_and_other_types_are_not_paths(name) -> None:
    assert not looks_like_path(name)


@pytest.fixture
def files_named_like_options(tmp_path, monkeypatch) -> None:
    """Make a directory with a file for every known name the working directory."""
    for name in (*KV_DTYPES, *KV_SCALES, "tensor", "head", "channel"):
        (tmp_path / name).write_bytes(b"not a safetensors file")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("files_named_like_options")
@pytest.mark.parametrize("scales", ["auto", "unit", "token_head"])
def test_files_named_like_an_option_change_nothing_for_generate(scales) -> None:
    params = jfp8kv.load(MODEL)
    cache = {"kv_dtype": "fp8", "kv_scales": scales}
    (output,) = jfp8kv.generate(params, "the end", **cache, max_tokens=2, temperature=0.0)
    assert len(output.token_ids) == 2


@pytest.mark.usefixtures("files_named_like_options")
def test_files_named_like_an_option_change_nothing_for_inspect_and_bench() -> None:
    params = jfp8kv.load(MODEL)
    report = jfp8kv.inspect(params, kv_dtype="fp8", kv_scales="unit")
    assert (
        report.to_dict() == jfp8kv.inspect(params, kv_dtype="fp8_e4m3", kv_scales="unit").to_dict()
    )
    sizes = {"requests": 1, "prompt_tokens": 2, "output_tokens": 2, "rounds": 1}
    speed = jfp8kv.bench(params, kv_dtypes=["fp8"], kv_scales=["unit"], **sizes, progress=False)
    assert len(speed.caches) == 1


@pytest.mark.usefixtures("files_named_like_options")
def test_an_unknown_name_is_refused_although_a_file_has_it(tmp_path) -> None:
    (tmp_path / "mine").write_bytes(b"")
    params = jfp8kv.load(MODEL)
    with pytest.raises(jfp8kv.ConfigError, match="kv_dtype='mine': must be one of"):
        jfp8kv.LLM(params, kv_dtype="mine")
    with pytest.raises(jfp8kv.ConfigError, match="kv_scales='mine': must be one of"):
        jfp8kv.LLM(params, kv_dtype="fp8", kv_scales="mine")


@pytest.mark.usefixtures("files_named_like_options")
def test_files_named_like_an_option_change_nothing_for_lists_of_caches() -> None:
    compared = CompareOptions(kv_dtypes=["fp8", "bfloat16"], kv_scales=["unit", "head"])
    assert [choice.value for choice in compared.dtype_choices] == ["fp8", "bfloat16"]
    assert [choice.value for choice in compared.scales_choices] == ["unit", "head"]
    with pytest.raises(jfp8kv.ConfigError, match="kv_scales='mine': must be one of"):
        Path("mine").write_bytes(b"")
        CompareOptions(kv_scales=["mine"])
    assert PlanOptions(budget="60%", kv_dtypes=["fp8"]).kv_dtypes == ("fp8_e4m3",)


@pytest.mark.usefixtures("files_named_like_options")
def test_files_named_like_an_option_change_nothing_for_commands_and_configs(run) -> None:
    cache = ("--kv-dtype", "fp8", "--kv-scales", "unit")
    status, _, err = run("generate", MODEL, "--prompt", "a", "--max-tokens", 1, *cache)
    assert status == 0 and "KV cache (fp8_e4m3)" in err
    Path("rows.jsonl").write_text('{"prompt": "a"}')
    Path("run.yaml").write_text(
        f"model: {MODEL}\ninput: rows.jsonl\noutput: out.jsonl\n"
        "kv_dtype: fp8\nkv_scales: unit\nsampling: {max_tokens: 1}\n"
    )
    status, _, err = run("batch", "run.yaml", "--quiet")
    assert (status, err) == (0, "")
