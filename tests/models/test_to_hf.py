"""`config_to_hf` writes configs that we and transformers read, or refuses by field."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from jfp8kv.core.errors import ConfigError
from jfp8kv.models.config import ExpertsConfig, ModelConfig, RopeConfig
from jfp8kv.models.families import FAMILIES, config_from_hf
from jfp8kv.models.families.to_hf import _WRITERS, config_to_hf

ROOT = Path(__file__).parent.parent / "references"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))
SLIDING, FULL = "sliding_attention", "full_attention"


def config_of(folder: str) -> ModelConfig:
    return config_from_hf(json.loads((ROOT / folder / "config.json").read_text()))


def test_every_family_has_a_writer():
    """A multimodal Gemma 3 is read as its text model, which is a separate architecture."""
    assert set(_WRITERS) == set(FAMILIES) - {"Gemma3ForConditionalGeneration"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_config_round_trips(folder):
    config = config_of(folder.name)
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == dataclasses.replace(config, kv_cache_dtype=None)


# Fields that may differ without a change of meaning: explicit defaults, alternative spellings.
SAME = {
    "dtype",
    "pad_token_id",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "n_inner",
    "max_window_layers",
    "mlp_only_layers",
    "decoder_sparse_step",
    "max_position_embeddings",
    "no_rope_layer_interval",
    "partial_rotary_factor",
    "eos_token_id",
    "original_max_position_embeddings",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "n_ctx",
    "rope_theta",
    "experts_per_token",
    "initial_context_length",
    "quantization_config",
    "_name_or_path",
    "architectures",
    "rope_scaling",
}
ROPE = {
    "type",
    "beta_fast",
    "beta_slow",
    "truncate",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "factor",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_transformers_reads_the_same_config_as_from_the_original(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config_of(folder.name))))
        ours, theirs = (
            transformers.AutoConfig.from_pretrained(path) for path in (tmp_path, folder)
        )
    theirs = getattr(theirs, "text_config", theirs)
    ours, theirs = ours.to_dict(), theirs.to_dict()
    ropes = [each.pop("rope_parameters", None) or {} for each in (ours, theirs)]
    differ = {name for name in set(ours) | set(theirs) if ours.get(name) != theirs.get(name)}
    assert differ <= SAME, {name: (ours.get(name), theirs.get(name)) for name in differ - SAME}
    assert {
        name for name in set(ropes[0]) | set(ropes[1]) if ropes[0].get(name) != ropes[1].get(name)
    } <= ROPE


LLAMA = ModelConfig("LlamaForCausalLM", 40, 32, 3, 4, 2, 8, 64, 128)
OTHER = RopeConfig(theta=500.0)


def qwen2(**changes):
    return dataclasses.replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True, **changes)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(
            LLAMA, ropes=(RopeConfig(kind="linear", factor=2.5),), max_len=317
        ),  # 127 positions, times 2.5
        dataclasses.replace(LLAMA, ropes=(RopeConfig(kind="linear", factor=0.5),)),
        dataclasses.replace(
            LLAMA, ropes=(RopeConfig(kind="dynamic", factor=3.0, original_max_len=50),), max_len=150
        ),
        dataclasses.replace(LLAMA, ropes=(RopeConfig(share=0.5),), eos_ids=(2, 3)),
        qwen2(windows=(8, 0, 8), ropes=(OTHER, RopeConfig()), layer_ropes=(0, 1, 0)),
        dataclasses.replace(
            config_of("smollm3_list"), ropes=(), layer_ropes=()
        ),  # no layer rotates
        dataclasses.replace(config_of("gemma3_new"), windows=()),  # two ropes and no window
        dataclasses.replace(
            config_of("gemma3_new"), layer_ropes=(), ropes=(OTHER,), windows=(8,) * 4
        ),
        dataclasses.replace(config_of("granite_tied"), logit_scale=1 / 16.7),
        dataclasses.replace(config_of("qwen3_moe_mixed"), experts=None),
        dataclasses.replace(
            config_of("gpt2_saved"), sm_scale=1.0, activation="relu", bos_id=None, eos_ids=()
        ),
    ],
    ids=lambda config: config.architecture,
)
def test_settings_without_a_reference_round_trip(config):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_old_and_new_spellings_are_both_written():
    rope = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    written = config_to_hf(dataclasses.replace(LLAMA, ropes=(rope,)))
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert written["rope_theta"] == 5e5 and written["rope_scaling"] == {
        "rope_type": "llama3",
        **scaling,
    }
    assert written["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 5e5, **scaling}
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_phi3_rope_scaling_has_three_entries():
    """Phi-3's first readers require this, with the original length outside of it."""
    written = config_to_hf(config_of("phi3_longrope_long"))
    assert set(written["rope_scaling"]) == {"type", "short_factor", "long_factor"}
    assert (
        written["rope_scaling"]["type"] == "longrope"
        and written["original_max_position_embeddings"] == 32
    )
    assert written["partial_rotary_factor"] == 0.75


EXPERTS = ExpertsConfig(4, 2, 16, (0, 2))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            dataclasses.replace(LLAMA, architecture="RobertaModel"),
            ["'RobertaModel'", "LlamaForCausalLM"],
        ),
        (
            dataclasses.replace(LLAMA, windows=(8, 0, 8)),
            ["LlamaForCausalLM cannot express windows=(8, 0, 8)", "jfp8kv.save"],
        ),
        (dataclasses.replace(LLAMA, qkv_bias=True), ["o_bias=False"]),
        (dataclasses.replace(LLAMA, experts=EXPERTS), ["experts=ExpertsConfig"]),
        (
            dataclasses.replace(LLAMA, layer_ropes=(0, 0, 1), ropes=(OTHER, RopeConfig())),
            ["LlamaForCausalLM", "ropes="],
        ),
        (
            qwen2(layer_ropes=(0, 1, 1), windows=(8, 8, 0), ropes=(OTHER, RopeConfig())),
            ["layer_ropes="],
        ),
        (qwen2(windows=(8, 16, 0)), ["windows=(8, 16, 0)"]),
        (dataclasses.replace(LLAMA, softcap=30.0, sinks=True), ["softcap=30.0", "sinks=True"]),
        (
            dataclasses.replace(config_of("gemma2_caps"), embedding_scale=3.0),
            ["embedding_scale=3.0"],
        ),
    ],
)
def test_settings_that_an_architecture_lacks_are_refused_by_name(config, named):
    with pytest.raises(ConfigError) as error:
        config_to_hf(config)
    assert all(part in str(error.value) for part in named), error.value
