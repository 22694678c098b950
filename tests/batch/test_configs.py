"""The shipped configs: valid, dry run with a real model, and run with a tiny one."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from jfp8kv.batch import json_schema, load_config
from jfp8kv.batch.yaml_source import read_yaml
from tests.batch.conftest import ROOT, read_rows

CONFIGS = sorted((ROOT / "configs" / "batch").glob("*.yaml"))
TINY = ROOT / "tests" / "references" / "llama_bf16"
LARGE = {  # Llama 3.3 70B
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}

each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def model(tmp_path):
    """Copy the tiny model with changes to its config; without weights if they do not fit it."""

    def model(weights: bool = True, **changes: object) -> Path:
        folder = shutil.copytree(TINY, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        if not weights:
            (folder / "model.safetensors").unlink()
        return folder

    return model


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Inputs in configs are relative to the repository."""
    monkeypatch.chdir(ROOT)


def sets(folder: Path, config: Path, model: Path) -> list[object]:
    """Return overrides for the local model and an output outside the repository."""
    output = folder / Path(load_config(config).output.path).name
    return ["--set", f"model={model}", "--set", f"output.path={output}"]


@each_config
def test_a_config_begins_with_a_comment_and_is_valid(config):
    text = config.read_text()
    assert text.startswith("# ") and load_config(config).input.path.startswith(
        "configs/batch/data/"
    )


@each_config
def test_a_config_is_valid_under_the_json_schema(config):
    jsonschema.Draft202012Validator(json_schema()).validate(read_yaml(config).data)


@each_config
def test_a_dry_run_of_a_config_finds_no_failing_row(run, tmp_path, smollm2_path, config):
    status, out, _ = run("batch", config, "--dry-run", *sets(tmp_path, config, smollm2_path))
    assert status == 0
    assert "135M parameters" in out
    assert " (0 would fail)" in out
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.quick_compile
@pytest.mark.parametrize("name", ["demo", "compare", "calibrate_then_run", "evaluate", "openai"])
def test_a_config_runs(run, tmp_path, model, name):
    config = ROOT / "configs" / "batch" / f"{name}.yaml"
    settings = sets(tmp_path, config, model(max_position_embeddings=1024))
    if name == "evaluate":  # in a model of two layers, these are all
        settings += ["--set", "kv_dtype.skip=[0]"]
    status, out, err = run("batch", config, *settings)
    assert status == 0, err
    output = tmp_path / Path(load_config(config).output.path).name
    if name == "compare":
        assert len(json.loads(output.read_text())["caches"]) == 5 and "perplexity" in out
    else:
        assert len(read_rows(output)) == len(list(load_config(config).input.reader()))


def test_a_dry_run_of_the_large_config_needs_no_weights(run, tmp_path, model):
    config = ROOT / "configs" / "batch" / "large_sharded.yaml"
    settings = sets(tmp_path, config, model(weights=False, **LARGE))
    status, out, err = run("batch", config, "--dry-run", *settings, "--set", "shard=[1,2]")
    assert status == 0, err
    assert "70,554M parameters, 131.42 GiB of weights" in out and "rows     2 (0 would fail)" in out
    assert "30.00 GiB" in out and "8,192" in out
