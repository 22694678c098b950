"""Configs: an error names the file, line and key, what is allowed, and the nearest name."""

import json
from pathlib import Path

import jsonschema
import pytest

import jfp8kv
from jfp8kv.batch import json_schema, load_config
from jfp8kv.batch.config import Config
from jfp8kv.batch.yaml_source import read_yaml
from jfp8kv.engine.options import EngineOptions
from jfp8kv.quality.options import CalibrationOptions, CompareOptions

VALID = """\
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
    """Write a config beside its input; return its path."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"word": "hello"}\n')
    Path("scales.jsonl").write_text('{"word": "hello"}\n')

    def written(text: str) -> Path:
        Path("run.yaml").write_text(text)
        return Path("run.yaml")

    return written


def test_a_config_has_its_keys_and_the_defaults(written):
    config = load_config(written(VALID))
    assert config.model == "some/model"
    assert config.kv_dtype == "fp8_e4m3"
    assert config.prompt == "Say {{ word }}.\n"
    assert config.input.path == "rows.jsonl"
    assert config.output.unordered is False
    assert config.sampling.given() == {"temperature": 0.5, "max_tokens": 16}
    assert config.engine.options().page_size == 64
    assert config.kv_scales == "auto"


def test_a_path_may_be_relative_to_the_home_folder(written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(written(VALID), ["input=~/rows.jsonl", "output.path=~/out.jsonl"])
    assert config.input.path == str(tmp_path / "rows.jsonl")
    assert config.output.path == str(tmp_path / "out.jsonl")


def test_set_replaces_and_adds_values(written):
    overrides = [
        "sampling.temperature=0.25",
        "sampling.max_tokens=~",
        "engine.max_num_seqs=8",
        "output={path: other.jsonl, unordered: true}",
        "prompt=~",
    ]
    config = load_config(written(VALID), overrides)
    assert config.sampling.given() == {"temperature": 0.25}
    assert config.engine.options().max_num_seqs == 8
    assert config.output.path == "other.jsonl" and config.output.unordered
    assert config.prompt is None


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
def test_the_cache_format_may_depend_on_the_layer(written, kv_dtype, expected):
    text = VALID.replace("kv_dtype: fp8_e4m3", f"kv_dtype: {kv_dtype}")
    found = load_config(written(text)).kv_dtype
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
        r"run.yaml:7: promt: no such key. Did you mean 'prompt'\? Keys: task, ",
    ),
    "a wrong type": (
        "temperature: 0.5",
        "temperature: warm",
        r"run.yaml:5: sampling.temperature='warm': must be a number",
    ),
    "a fraction": (
        "max_tokens: 16",
        "max_tokens: 1.5",
        r"run.yaml:6: sampling.max_tokens=1.5: must be a whole number",
    ),
    "a range": (
        "temperature: 0.5",
        "temperature: -1",
        r"run.yaml:5: sampling.temperature=-1: must be a number of at least 0",
    ),
    "a number for a section": (
        "sampling:\n  temperature: 0.5\n  max_tokens: 16",
        "sampling: 3",
        r"run.yaml:4: sampling: 3: must be a m",
    ),
    "a missing key": (
        "model: some/model\n",
        "",
        r"run.yaml: model: is missing; every config needs it",
    ),
    "an unknown choice": (
        "model: some",
        "task: generat\nmodel: some",
        r"run.yaml:2: task: 'generat': must be .*mean 'generate'",
    ),
    "an unknown format": (
        "fp8_e4m3",
        "fp8_e4m4",
        r"run.yaml:3: kv_dtype=.*Did you mean 'fp8_e4m3'",
    ),
    "one of the layers": ("fp8_e4m3", "[fp8_e4m3,\n  fp9]", r"run.yaml:4: kv_dtype\[1\]: .*fp9"),
    "a key of a layer": (
        "fp8_e4m3",
        "{defualt: fp8}",
        r"run.yaml:3: kv_dtype.defualt: no such key. Did you mean 'default'",
    ),
    "a template": ("{{ word }}", "{{ word }", r"run.yaml:7: prompt: invalid template, line 1"),
    "a missing file": ("rows.jsonl", "row.jsonl", r"run.yaml:9: input: row.jsonl: no such file"),
    "a missing folder": (
        "out.jsonl",
        "there/out.jsonl",
        r"run.yaml:10: output: there/out.jsonl: cannot be written",
    ),
    "an unknown suffix": (
        "out.jsonl",
        "out.doc",
        r"run.yaml:10: output: out.doc: unknown suffix",
    ),
    "input as output": ("out.jsonl", "./rows.jsonl", r"run.yaml:10: output: .* is also the input"),
    "a key given twice": (
        "  max_tokens: 16",
        "  max_tokens: 16\n  temperature: 1",
        r"^run.yaml:7: temperature is given twice",
    ),
    "invalid YAML": ("kv_dtype: fp8_e4m3", "kv_dtype: [fp8_e4m3", r"run.yaml:4: invalid YAML"),
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
        r"run.yaml:5: sampling: applies to task generate",
    ),
    "the cache of a comparison": (
        "model: some",
        "task: compare\nmodel: some",
        r"run.yaml:4: kv_dtype: applies to task generate",
    ),
    "a number for a format": (
        "fp8_e4m3",
        "5",
        r"run.yaml:3: kv_dtype: 5: must be a name or a mapping",
    ),
    "a list for scales": (
        "kv_dtype: fp8_e4m3",
        "kv_scales: [a]",
        r"run.yaml:3: kv_scales: \['a'\]: must be a name or a mapping",
    ),
    "a seed": (
        "input:",
        "seed: -1\ninput:",
        r"run.yaml:9: seed=-1: must be a whole number of at least 0",
    ),
    "unknown scales": (
        "kv_dtype: fp8",
        "kv_scales: unity\nkv_dtype: fp8",
        r"run.yaml:3: kv_scales='unity': .*mean 'unit'",
    ),
    "memory": (
        "input:",
        "engine:\n  kv_cache_memory: lots\ninput:",
        r"run.yaml:10: engine.kv_cache_memory=.*512MiB",
    ),
    "a value of neither type": (
        "input:",
        "engine: {kv_cache_memory: true}\ninput:",
        r"engine.kv_cache_memory=True: must be",
    ),
    "a dtype of the weights": (
        "input:",
        "dtype: float8\ninput:",
        r"run.yaml:9: dtype: 'float8': must be 'bfloat16'",
    ),
    "a percentile": (
        "input:",
        "kv_scales:\n  calibrate: {input: rows.jsonl, percentile: 99}\ninput:",
        r"run.yaml:10: kv_scales.calibrate.percentile=99.*needs observer='percentile'",
    ),
    "scales without prompts": (
        "kv_dtype: fp8_e4m3\nsampling:\n  temperature: 0.5\n  max_tokens: 16",
        "task: compare\ncomparison: {kv_scales: [head]}",
        r"run.yaml:4: comparison.kv_scales: .head. scales need prompts: .*comparison.calibration",
    ),
    "a missing file of scales": (
        "kv_dtype: fp8_e4m3",
        "kv_dtype: fp8_e4m3\nkv_scales: there.safetensors",
        r"run.yaml:4: kv_scales: there.safetensors: no such file",
    ),
    "a missing file of scales to compare": (
        "kv_dtype: fp8_e4m3\nsampling:\n  temperature: 0.5\n  max_tokens: 16",
        "task: compare\ncomparison: {kv_scales: [unit, there.safetensors]}",
        r"run.yaml:4: comparison.kv_scales='there.safetensors': must be one of",
    ),
    "a cache to compare": (
        "kv_dtype: fp8_e4m3\nsampling:\n  temperature: 0.5\n  max_tokens: 16",
        "task: compare\ncomparison: {kv_dtypes: [fp9]}",
        r"run.yaml:4: comparison.kv_dtypes: kv_dtype='fp9': must be one of",
    ),
    "a schema with numbers as keys": (
        "  max_tokens: 16",
        "  json_schema: {1: 2}",
        r"run.yaml:6: sampling.json_schema: {1: 2}: ",
    ),
    "a schema": ("  max_tokens: 16", "  json_schema: {a: [1}", r"run.yaml:6: invalid YAML"),
    "a list that contains itself": (
        "kv_dtype: fp8_e4m3",
        "kv_dtype: &a [*a]",
        r"^run.yaml: invalid YAML: a value contains itself",
    ),
    "a list for the config": (VALID, "- a\n", r"run.yaml: must be a mapping"),
    "an empty file": (VALID, "", r"run.yaml: must be a mapping"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_reported_with_its_line(written, kind):
    old, new, message = MISTAKES[kind]
    assert old in VALID
    with pytest.raises(jfp8kv.ConfigError, match=message):
        load_config(written(VALID.replace(old, new)))


def test_of_several_mistakes_the_first_is_reported_with_their_number(written):
    text = VALID.replace("temperature", "temprature").replace("model:", "modle:")
    with pytest.raises(jfp8kv.ConfigError, match=r"model: is missing.*\(And 2 more mistakes.\)"):
        load_config(written(text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "sampling.temprature=1",
            "--set sampling.temprature=1: sampling.temprature: no such key. Did you mean 'temp",
        ),
        (
            "smapling.temperature=1",
            "--set smapling.temperature=1: smapling: no such key. Did you mean 'sampling'",
        ),
        ("sampling", "--set sampling: must be KEY=VALUE"),
        ("model.name=1", "--set model.name=1: model is not a mapping"),
        ("seed=[1", r"--set seed=\[1:1: invalid YAML"),
        (
            "sampling.top_p=2.5",
            "--set sampling.top_p=2.5: sampling.top_p=2.5: must be a number above 0",
        ),
    ],
)
def test_a_mistake_in_an_override_is_reported_with_it(written, override, message):
    with pytest.raises(jfp8kv.ConfigError, match=message):
        load_config(written(VALID), [override])


def test_plain_scalars_follow_yaml_1_2(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: no\nb: 1e-4\nc: 010\nd: 12:30\ne: true\nf: 2_000\ng:\nh: 2020-01-01\ni: -.5\n"
        "j: [off, ~, .inf]\n"
    )
    assert read_yaml(path).data == {
        "a": "no",
        "b": 1e-4,
        "c": 10,
        "d": "12:30",
        "e": True,
        "f": 2000,
        "g": None,
        "h": "2020-01-01",
        "i": -0.5,
        "j": ["off", None, float("inf")],
    }


def test_yaml_cannot_create_objects(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nmodel: !!python/object/apply:os.system [true]\n")
    with pytest.raises(jfp8kv.ConfigError, match=r"a.yaml:2: invalid YAML"):
        read_yaml(path)


def test_the_schema_describes_every_key():
    schema = json_schema()
    json.dumps(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    sections = [schema, *schema["$defs"].values()]
    undescribed = [
        name
        for section in sections
        for name, key in section.get("properties", {}).items()
        if "description" not in key
    ]
    assert not undescribed
    assert schema["additionalProperties"] is False
    assert schema["properties"]["task"]["enum"] == ["generate", "score", "calibrate", "compare"]


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("EngineSection", EngineOptions),
        ("SamplingSection", jfp8kv.SamplingParams),
        ("CalibrationSection", CalibrationOptions),
        ("ComparisonSection", CompareOptions),
    ],
)
def test_sections_have_the_defaults_and_help_of_the_option_classes(section, options):
    properties = json_schema()["$defs"][section]["properties"]
    specs = {spec.name: spec for spec in options.specs()}
    derived = properties.keys() & specs.keys()
    assert len(derived) >= 5
    for name in derived:
        default = specs[name].default
        assert properties[name]["description"] == specs[name].help
        assert properties[name]["default"] == (list(default) if type(default) is tuple else default)
    assert properties.keys() - derived <= {"calibration"}


def test_the_schema_has_the_ranges_of_the_option_classes():
    sections = json_schema()["$defs"]
    top_p = sections["SamplingSection"]["properties"]["top_p"]
    assert top_p["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"}
    seed = json_schema()["properties"]["seed"]
    assert (seed["minimum"], seed["maximum"]) == (0, 2**64 - 1)
    max_num_seqs = sections["EngineSection"]["properties"]["max_num_seqs"]
    assert max_num_seqs["anyOf"][0] == {"minimum": 1, "type": "integer"}


def test_config_keys_outside_the_sections_have_the_defaults_of_the_engine():
    defaults = {spec.name: spec.default for spec in EngineOptions.specs()}
    for name in ("dtype", "strict", "kv_dtype", "kv_scales", "seed"):
        assert Config.model_fields[name].default == defaults[name]
