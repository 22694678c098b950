"""Configs: every mistake is named by file, line and key, with what is allowed and what was probably meant."""

import json
from pathlib import Path

import pytest

import jfp8kv
from jfp8kv.batch import check, source
from jfp8kv.batch.config import Config, Engine, Sampling

GOOD = """\
# a comment
model: some/model
kv_dtype: fp8_e4m3
sampling:
  temperature: 0.5
  max_tokens: 16
prompt: |
  Say {{ word }}.
input: rows.jsonl
output: out.jsonl
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a config beside a file of rows, from which it is named; its path."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"word": "hello"}\n')
    Path("scales.jsonl").write_text('{"word": "hello"}\n')

    def written(text: str) -> Path:
        Path("run.yaml").write_text(text)
        return Path("run.yaml")

    return written


def test_a_config_is_its_keys_and_the_defaults(written):
    config = check.load(written(GOOD))
    assert (
        config.model == "some/model"
        and config.kv_dtype == "fp8_e4m3"
        and config.prompt == "Say {{ word }}.\n"
    )
    assert config.input.path == "rows.jsonl" and config.output.unordered is False
    assert config.sampling.given() == {"temperature": 0.5, "max_tokens": 16}
    assert config.engine.page_size == 64 and config.kv_scales == "auto"


def test_a_file_may_be_named_from_the_users_home(written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = check.load(written(GOOD), ["input=~/rows.jsonl", "output.path=~/out.jsonl"])
    assert (config.input.path, config.output.path) == (
        str(tmp_path / "rows.jsonl"),
        str(tmp_path / "out.jsonl"),
    )


def test_set_takes_the_place_of_a_value_and_makes_what_is_not_there(written):
    sets = [
        "sampling.temperature=0.25",
        "engine.max_num_seqs=8",
        "output={path: other.jsonl, unordered: true}",
        "prompt=~",
    ]
    config = check.load(written(GOOD), sets)
    assert config.sampling.temperature == 0.25 and config.engine.max_num_seqs == 8
    assert config.output.path == "other.jsonl" and config.output.unordered and config.prompt is None


@pytest.mark.parametrize(
    ("kv_dtype", "expected"),
    [
        ("[fp8_e4m3, bfloat16]", ["fp8_e4m3", "bfloat16"]),
        (
            "{default: fp8, skip: [0, sliding_window]}",
            {"default": "fp8", "skip": [0, "sliding_window"], "skip_dtype": "bfloat16"},
        ),
    ],
)
def test_the_format_of_the_cache_may_go_by_layer(written, kv_dtype, expected):
    config = check.load(written(GOOD.replace("kv_dtype: fp8_e4m3", f"kv_dtype: {kv_dtype}")))
    found = config.kv_dtype
    assert (found if isinstance(found, list) else found.model_dump()) == expected


MISTAKES = {
    "an unknown key": (
        "temperature: 0.5",
        "temprature: 0.5",
        r"run.yaml:5: sampling.temprature: no such key. Did you mean 'temp",
    ),
    "an unknown section": (
        "prompt: |",
        "promt: |",
        r"run.yaml:7: promt: no such key. Did you mean 'prompt'\? There are task, ",
    ),
    "a wrong type": (
        "temperature: 0.5",
        "temperature: warm",
        r"run.yaml:5: sampling.temperature: 'warm': must be a number",
    ),
    "a half": (
        "max_tokens: 16",
        "max_tokens: 1.5",
        r"run.yaml:6: sampling.max_tokens: 1.5: must be a whole number",
    ),
    "a range": (
        "temperature: 0.5",
        "temperature: -1",
        r"run.yaml:5: sampling.temperature=-1.0: must be a number of at least 0",
    ),
    "a text for a section": (
        "sampling:\n  temperature: 0.5\n  max_tokens: 16",
        "sampling: 3",
        r"run.yaml:4: sampling: 3: must be a m",
    ),
    "a missing key": (
        "model: some/model\n",
        "",
        r"run.yaml: model: is missing; every config needs it",
    ),
    "no such choice": (
        "model: some",
        "task: generat\nmodel: some",
        r"run.yaml:2: task: 'generat' is not allowed.*mean 'generate'",
    ),
    "no such format": ("fp8_e4m3", "fp8_e4m4", r"run.yaml:3: kv_dtype: .*Did you mean 'fp8_e4m3'"),
    "one of the layers": ("fp8_e4m3", "[fp8_e4m3,\n  fp9]", r"run.yaml:4: kv_dtype\[1\]: .*fp9"),
    "a key of a layer": (
        "fp8_e4m3",
        "{defualt: fp8}",
        r"run.yaml:3: kv_dtype.defualt: no such key. Did you mean 'default'",
    ),
    "a template": ("{{ word }}", "{{ word }", r"run.yaml:7: prompt: is no valid template, line 1"),
    "no such file": ("rows.jsonl", "row.jsonl", r"run.yaml:9: input: row.jsonl: no such file"),
    "no such folder": (
        "out.jsonl",
        "there/out.jsonl",
        r"run.yaml:10: output: there/out.jsonl: no file can be written",
    ),
    "no known ending": (
        "out.jsonl",
        "out.doc",
        r"run.yaml:10: output: out.doc: its name says no format",
    ),
    "input as output": ("out.jsonl", "./rows.jsonl", r"run.yaml:10: output: .* is the input, too"),
    "a key given twice": (
        "  max_tokens: 16",
        "  max_tokens: 16\n  temperature: 1",
        r"^run.yaml:7: temperature is given twice",
    ),
    "no YAML": ("kv_dtype: fp8_e4m3", "kv_dtype: [fp8_e4m3", r"run.yaml:4: is no valid YAML"),
    "both prompts": (
        "input:",
        "messages: [{role: user, content: x}]\ninput:",
        r"run.yaml:9: messages: give either",
    ),
    "a role without content": (
        "prompt: |\n  Say {{ word }}.",
        "messages: [{role: user}]",
        r"run.yaml:7: messages\[0\].content: is missing",
    ),
    "a shard": ("input:", "shard: [4, 4]\ninput:", r"run.yaml:9: shard: .*i from 0 to n - 1"),
    "a key of another task": (
        "model: some",
        "task: score\nmodel: some",
        r"run.yaml:5: sampling: belongs to task generate",
    ),
    "the cache of a comparison": (
        "model: some",
        "task: compare\nmodel: some",
        r"run.yaml:4: kv_dtype: belongs to task generate",
    ),
    "no form of a format": (
        "fp8_e4m3",
        "5",
        r"run.yaml:3: kv_dtype: 5: must be a name or a mapping",
    ),
    "no form of scales": (
        "kv_dtype: fp8_e4m3",
        "kv_scales: [a]",
        r"run.yaml:3: kv_scales: \['a'\]: must be a name or a mapping",
    ),
    "a seed": ("input:", "seed: -1\ninput:", r"run.yaml:9: seed: -1: must be at least 0"),
    "no such scales": (
        "kv_dtype: fp8",
        "kv_scales: unity\nkv_dtype: fp8",
        r"run.yaml:3: kv_scales: 'unity': .*mean 'unit'",
    ),
    "memory": (
        "input:",
        "engine:\n  kv_cache_memory: lots\ninput:",
        r"run.yaml:10: engine.kv_cache_memory: .*512MiB",
    ),
    "neither of two types": (
        "input:",
        "engine: {kv_cache_memory: 1.5}\ninput:",
        r"kv_cache_memory: 1.5: must be a whole number.$",
    ),
    "a type of weights": (
        "input:",
        "dtype: float8\ninput:",
        r"run.yaml:9: dtype: 'float8' is not allowed: must be 'bfloat16'",
    ),
    "a percentile": (
        "input:",
        "kv_scales:\n  calibrate: {input: rows.jsonl, percentile: 99}\ninput:",
        r"run.yaml:10: kv_scales.calibrate: percentile=99.0: belongs to observer='percentile'",
    ),
    "scales found on nothing": (
        "kv_dtype: fp8_e4m3\nsampling:\n  temperature: 0.5\n  max_tokens: 16",
        "task: compare\ncomparison: {kv_scales: [head]}",
        r"run.yaml:4: comparison.kv_scales: 'head' scales are found on texts: give them as comparison.calibration",
    ),
    "a cache to compare": (
        "kv_dtype: fp8_e4m3\nsampling:\n  temperature: 0.5\n  max_tokens: 16",
        "task: compare\ncomparison: {kv_dtypes: [fp9]}",
        r"run.yaml:4: comparison: kv_dtype='fp9': must be one of",
    ),
    "a schema with numbers as keys": (
        "  max_tokens: 16",
        "  json_schema: {1: 2}",
        r"run.yaml:6: sampling.json_schema: {1: 2}: must",
    ),
    "a schema": ("  max_tokens: 16", "  json_schema: {a: [1}", r"run.yaml:6: is no valid YAML"),
    "a list in itself": (
        "kv_dtype: fp8_e4m3",
        "kv_dtype: &a [*a]",
        r"^run.yaml: is no valid YAML: maximum recursion depth",
    ),
    "no mapping": (GOOD, "- a\n", r"run.yaml: must be a mapping"),
    "nothing": (GOOD, "", r"run.yaml: must be a mapping"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_where_it_stands(written, kind):
    old, new, message = MISTAKES[kind]
    assert old in GOOD
    with pytest.raises(jfp8kv.ConfigError, match=message):
        check.load(written(GOOD.replace(old, new)))


def test_several_mistakes_are_counted_and_the_first_is_named(written):
    text = GOOD.replace("temperature", "temprature").replace("model:", "modle:")
    with pytest.raises(jfp8kv.ConfigError, match=r"model: is missing.*\(And 2 more mistakes.\)"):
        check.load(written(text))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "sampling.temprature=1",
            "--set sampling.temprature=1: sampling.temprature: no such key. Did you mean 'temperature'",
        ),
        (
            "smapling.temperature=1",
            "--set smapling.temperature=1: smapling: no such key. Did you mean 'sampling'",
        ),
        ("sampling", "--set sampling: must be KEY=VALUE"),
        ("model.name=1", "--set model.name=1: model is no mapping"),
        ("seed=[1", r"--set seed=\[1:1: is no valid YAML"),
        (
            "sampling.top_p=2.5",
            "--set sampling.top_p=2.5: sampling.top_p=2.5: must be a number above 0",
        ),
    ],
)
def test_a_mistake_in_set_is_named_by_it(written, given, message):
    with pytest.raises(jfp8kv.ConfigError, match=message):
        check.load(written(GOOD), [given])


def test_plain_words_and_numbers_are_what_they_look_like(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: no\nb: 1e-4\nc: 010\nd: 12:30\ne: true\nf: 2_000\ng:\nh: 2020-01-01\ni: -.5\nj: [off, ~, .inf]\n"
    )
    assert source.read(path).data == {
        "a": "no", "b": 1e-4, "c": "010", "d": "12:30", "e": True, "f": 2000, "g": None, "h": "2020-01-01", "i": -0.5,
        "j": ["off", None, float("inf")],
    }  # fmt: skip


def test_nothing_in_a_config_makes_an_object(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nmodel: !!python/object/apply:os.system [true]\n")
    with pytest.raises(jfp8kv.ConfigError, match=r"a.yaml:2: is no valid YAML"):
        source.read(path)


def test_the_schema_describes_every_key_and_says_what_is_allowed():
    schema = check.schema()
    json.dumps(schema)
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        name
        for each in sections
        for name, key in each.get("properties", {}).items()
        if "description" not in key
    ]
    assert not undescribed and schema["additionalProperties"] is False
    assert schema["properties"]["task"]["enum"] == ["generate", "score", "calibrate", "compare"]


def test_sampling_and_engine_are_the_librarys_own():
    import inspect
    from dataclasses import fields

    known = {field.name for field in fields(jfp8kv.SamplingParams)}
    assert set(Sampling.model_fields) <= known
    limits = inspect.signature(jfp8kv.LLM).parameters
    assert set(Engine.model_fields) <= set(limits)
    assert all(
        field.default in (None, limits[name].default) for name, field in Engine.model_fields.items()
    )
    assert {"prompt", "messages", "input", "output"} <= set(Config.model_fields)
