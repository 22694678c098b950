"""The shipped configs: each is looked at with a real model, and run with a tiny one whose context is long enough for it."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import yaml

from jfp8kv.batch.check import load, schema
from jfp8kv.batch.inputs import Reader
from tests.batch.conftest import ROOT, read_rows

CONFIGS = sorted((ROOT / "configs" / "batch").glob("*.yaml"))
TINY = ROOT / "tests" / "references" / "llama_bf16"
LARGE = {  # Llama 3.3 70B
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip

each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture
def model(tmp_path):
    """A copy of the tiny model with changes to its config, its weights left out unless they fit."""

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
    """Configs name their inputs from there."""
    monkeypatch.chdir(ROOT)


def sets(folder: Path, config: Path, model: Path) -> list[object]:
    """Settings that leave the repository as it is: the model at hand, an output elsewhere."""
    output = folder / Path(load(config).output.path).name
    return ["--set", f"model={model}", "--set", f"output.path={output}"]


@each_config
def test_a_config_says_what_it_is_for_and_is_valid(config):
    text = config.read_text()
    assert text.startswith("# ") and load(config).input.path.startswith("configs/batch/data/")


@each_config
def test_a_config_is_what_the_schema_tells_editors(config):
    jsonschema.Draft202012Validator(schema()).validate(yaml.safe_load(config.read_text()))


@each_config
def test_a_config_is_dry_run(run, tmp_path, smollm2_path, config):
    status, out, _ = run("batch", config, "--dry-run", *sets(tmp_path, config, smollm2_path))
    assert (
        status == 0
        and "135M parameters" in out
        and ", 0 of them would fail" in out
        and "roughly" in out
    )
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.quick_compile
@pytest.mark.parametrize("name", ["demo", "compare", "calibrate_then_run", "evaluate", "openai"])
def test_a_config_is_run(run, tmp_path, model, name):
    config = ROOT / "configs" / "batch" / f"{name}.yaml"
    settings = sets(tmp_path, config, model(max_position_embeddings=1024))
    if name == "evaluate":  # a model of two layers has none between the first and the last
        settings += ["--set", "kv_dtype.skip=[0]"]
    status, out, err = run("batch", config, *settings)
    assert status == 0, err
    output = tmp_path / Path(load(config).output.path).name
    if name == "compare":
        assert len(json.loads(output.read_text())["caches"]) == 5 and "perplexity" in out
    else:
        assert len(read_rows(output)) == len(list(Reader(load(config).input)))


def test_the_large_one_is_looked_at_in_its_own_size(run, tmp_path, model):
    config = ROOT / "configs" / "batch" / "large_sharded.yaml"
    settings = sets(tmp_path, config, model(weights=False, **LARGE))
    status, out, err = run("batch", config, "--dry-run", *settings, "--set", "shard=[1,2]")
    assert status == 0, err
    assert (
        "70,554M parameters, 131.42 GiB of weights" in out
        and "rows     2, 0 of them would fail" in out
    )
    assert "30.00 GiB" in out and "8,192" in out
