"""`inspect` matches published sizes, an engine and `load`, and reads no weights."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import jfp8kv
from jfp8kv import CheckpointError, ConfigError
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.names import expected_shapes, unflatten
from tests.models.test_decoder import REFERENCES

FOLDER = REFERENCES[0].parent / "llama_bf16"
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 256,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}


def described(folder: Path, config: dict, **changes) -> Path:
    """Write a folder with a config and no weights."""
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def with_weights(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, tuple[str, int]] | None = None,
) -> Path:
    """Add a sparse safetensors file, which takes no space on disk.

    Tensors are bfloat16, or have the dtype and bytes per element given by name in `kinds`.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        kind, size = (kinds or {}).get(name, ("BF16", 2))
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def llama_tensors(c: dict) -> dict[str, tuple[int, ...]]:
    hidden, mlp, kv = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // 4
    shapes = {
        f"{name}.weight": (c["vocab_size"], hidden) for name in ("model.embed_tokens", "lm_head")
    }
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {
            f"{at}self_attn.{n}_proj.weight": (out, hidden)
            for n, out in {"q": hidden, "k": kv, "v": kv, "o": hidden}.items()
        }
        shapes |= {f"{at}mlp.{n}_proj.weight": (mlp, hidden) for n in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, mlp)
    return shapes | {"model.norm.weight": (hidden,)}


def by_name(found: jfp8kv.ModelReport) -> dict[tuple[str, str], object]:
    return {(cost.kv_dtype, cost.scales): cost for cost in found.caches}


def test_llama_3_8b_has_its_published_size_without_reading_weights(tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("a weight was read")

    folder = with_weights(described(tmp_path, LLAMA3_8B), llama_tensors(LLAMA3_8B))
    monkeypatch.setattr("jfp8kv.checkpoint.safetensors.read_exactly", read)
    found = jfp8kv.inspect(folder)
    assert found.weights.parameters == 8_030_261_248
    assert found.weights.tensors == {"BF16": 291}
    assert found.weights.bytes_in_memory == 16_060_522_496
    assert found.weights.bytes_on_disk == (folder / "model.safetensors").stat().st_size
    assert (found.model.group, found.weights.dtype) == (4, "bfloat16")
    bf16 = by_name(found)["bfloat16", "static"]
    assert bf16.requested and bf16.bytes_per_token == 2 * 32 * 8 * 128 * 2 == 131_072
    assert [(text.tokens, text.bytes) for text in bf16.sequences] == [
        (1024, 128 << 20),
        (8192, 1 << 30),
    ]
    assert bf16.tokens_per_gib == 8192
    assert by_name(found)["fp8_e4m3", "static"].bytes_per_token == 65_536
    assert by_name(found)["fp8_e4m3", "token_head"].bytes_per_token == 2 * 32 * 8 * (128 + 1)


def test_gemma_3_1b_has_its_published_size_with_windows_counted(tmp_path):
    found = jfp8kv.inspect(described(tmp_path, GEMMA3_1B), kv_dtype="fp8")
    assert (found.weights.parameters, found.weights.bytes_on_disk, found.weights.tensors) == (
        999_885_952,
        None,
        {},
    )
    local, whole = found.attention
    assert (len(local.layers), local.window, local.rope.theta) == (22, 512, 1e4)
    assert (whole.layers, whole.window, whole.rope.theta) == ((5, 11, 17, 23), 0, 1e6)
    assert [cost.kv_dtype for cost in found.caches if cost.requested] == ["fp8_e4m3"]
    # Seven groups of four layers, one with full attention. A window of 512 and a dispatch of 512
    # tokens use at most 17 pages of 64.
    page = 2 * 4 * 64 * 256
    text = by_name(found)["fp8_e4m3", "static"].sequences[1]
    assert (text.tokens, text.bytes, text.bytes_without_windows) == (
        8192,
        page * (6 * 17 + 128),
        2 * 26 * 8192 * 256,
    )
    assert text.ratio == text.bytes / text.bytes_without_windows < 0.29


@pytest.mark.quick_compile
@pytest.mark.parametrize("windows", [(), (48, 48, 0, 48, 48, 0)], ids=["no windows", "windows"])
@pytest.mark.parametrize(
    "cache", [("fp8_e5m2", "auto"), ("fp8_e4m3", "token_head"), ("float32", "auto")], ids=str
)
def test_an_engine_counts_the_same_bytes(windows, cache, monkeypatch):
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    changes = {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 48,
        "layer_types": kinds,
    }
    config = config_from_hf(TINY | (changes if windows else {}))
    assert config.windows == windows
    tree = unflatten(
        {name: jnp.full(shape, 0.1, jnp.float32) for name, shape in expected_shapes(config).items()}
    )
    params = jfp8kv.Params.from_pytree(tree, config)
    kv_dtype, kv_scales = cache
    found = jfp8kv.inspect(
        params, kv_dtype=kv_dtype, kv_scales=kv_scales, max_model_len=2000, page_size=16
    )
    (cost,) = (cost for cost in found.caches if cost.requested)
    sizes = {"max_model_len": 2000, "page_size": 16, "max_num_seqs": 1, "prefix_caching": False}
    llm = jfp8kv.LLM(params, kv_dtype=kv_dtype, kv_scales=kv_scales, **sizes)
    assert cost.bytes_per_token == llm.stats.kv_bytes_per_token
    assert cost.bytes_per_token_without_windows == llm.stats.kv_bytes_per_token_without_windows
    assert (cost.bytes_per_token < cost.bytes_per_token_without_windows) == bool(windows)
    assert (
        cost.sequences[-1].tokens == 2000
        and cost.sequences[-1].bytes == llm.stats.kv_bytes_capacity
    )
    engine, held = llm.engine, []
    dispatch = engine._dispatch
    monkeypatch.setattr(
        engine,
        "_dispatch",
        lambda plan: (
            held.append(engine.scheduler.kv_manager.allocator.used_pages) or dispatch(plan)
        ),
    )
    for text in cost.sequences:
        held.clear()
        llm.generate([[1] * (text.tokens - 4)], max_tokens=4, ignore_eos=True)
        # The report has the most that a sequence may need; its last chunk may be shorter.
        most = max(held) * engine.cache_config.page_bytes
        assert 0.9 * text.bytes < most <= text.bytes if windows else most == text.bytes


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda folder: folder.name)
def test_a_checkpoint_and_its_loaded_params_give_the_same_report(folder):
    source, params = jfp8kv.inspect(folder), jfp8kv.load(folder)
    loaded = jfp8kv.inspect(params)
    assert (source.model, source.caches, source.attention) == (
        loaded.model,
        loaded.caches,
        loaded.attention,
    )
    assert (
        source.weights.parameters == params.size and source.weights.bytes_in_memory == params.nbytes
    )
    assert (source.tokenizer, source.chat_template) == (loaded.tokenizer, loaded.chat_template)
    assert loaded.weights.bytes_on_disk is None and sum(loaded.weights.tensors.values()) == len(
        jax.tree.leaves(params)
    )


def test_a_gguf_file_is_described_by_its_header(smollm2_path, monkeypatch):
    monkeypatch.setattr(
        "jfp8kv.checkpoint.gguf.read_exactly", lambda *_: pytest.fail("a weight was read")
    )
    found = jfp8kv.inspect(smollm2_path)
    assert (found.kind, found.weights.parameters) == ("GGUF file", 134_515_008)
    assert found.weights.tensors == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert found.tokenizer and found.chat_template
    assert by_name(found)["fp8_e4m3", "static"].bytes_per_token == 11_520


def test_a_saved_model_is_described_without_reading_weights(tmp_path, monkeypatch):
    loaded = jfp8kv.load(FOLDER)
    params = jfp8kv.Params(
        loaded.tree, loaded.config, loaded.tokenizer, jfp8kv.KVScales.unit(loaded.config.layers)
    )
    jfp8kv.save(params, tmp_path / "saved")
    monkeypatch.setattr(
        "jfp8kv.checkpoint.orbax.load_parameter", lambda *_: pytest.fail("a weight was read")
    )
    found, memory = jfp8kv.inspect(tmp_path / "saved"), jfp8kv.inspect(params)
    assert (found.model, found.caches) == (memory.model, memory.caches)
    assert (
        [(row.k, row.v) for row in found.scales.layers]
        == [(row.k, row.v) for row in memory.scales.layers]
        != []
    )
    assert (
        (found.tokenizer, found.chat_template)
        == (memory.tokenizer, memory.chat_template)
        == (True, True)
    )
    assert found.kind == "folder of jfp8kv.save" and found.weights.bytes_on_disk > 0
    assert (
        found.weights.tensors == memory.weights.tensors
        and found.weights.bytes_in_memory == params.nbytes
    )


def test_float8_weights_are_reported_in_their_stored_format(tmp_path):
    config = LLAMA3_8B | {"num_hidden_layers": 1, "quantization_config": {"quant_method": "fp8"}}
    shapes = llama_tensors(config)
    quantized = [name for name in shapes if "_proj" in name]
    scales = {f"{name}_scale": () for name in quantized}
    folder = with_weights(
        described(tmp_path, config), shapes | scales, {name: ("F8_E4M3", 1) for name in quantized}
    )
    found = jfp8kv.inspect(folder)
    assert found.weights.tensors == {"F8_E4M3": 7, "BF16": 5} and found.weights.dtype == "bfloat16"
    assert "7 F8_E4M3, 5 BF16 (fp8: FP8, a scale per tensor)" in str(found)


def test_scales_are_named_and_auto_is_the_declared_format(tmp_path):
    scheme = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    names = [
        f"model.layers.{layer}.self_attn.{which}_scale" for layer in range(2) for which in "kv"
    ]
    config = LLAMA3_8B | {"num_hidden_layers": 2, "quantization_config": scheme}
    folder = with_weights(
        described(tmp_path, config), llama_tensors(config) | dict.fromkeys(names, (1,))
    )
    found = jfp8kv.inspect(folder)
    assert sorted(found.scales.tensors) == names
    assert [(cost.kv_dtype, cost.scales) for cost in found.caches if cost.requested] == [
        ("fp8_e4m3", "static")
    ]
    assert (
        found.weights.tensors == {"BF16": 21} and found.weights.quantization == "compressed-tensors"
    )
    assert (
        f"4 tensors: {names[0]} to {names[-1]}; the config declares an fp8_e4m3 cache; "
        "ISSUES: 4, see below" in str(found)
    )


def test_scales_in_memory_are_reported_by_granularity():
    loaded = jfp8kv.load(FOLDER)
    params = jfp8kv.Params(
        loaded.tree, loaded.config, kv_scales=jfp8kv.KVScales.unit(loaded.config.layers)
    )
    assert jfp8kv.inspect(params).scales.granularity == "tensor"


FAMILIES = {
    "experts": (
        {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
        },
        ["experts       2 of 4 in every layer, of size 16"],
    ),
    "layers without RoPE": (
        {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 1, 0, 1, 1, 0]},
        ["4  full       default", "2  full       none", "0-1, 3-4", "2, 5"],
    ),
    "a llama3 rope": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
        ["llama3, theta 10,000, x8"],
    ),
    "post norms": (
        {"architectures": ["Olmo2ForCausalLM"]},
        ["RMS after attention and MLP; queries and keys over all heads"],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_a_family_are_reported(tmp_path, family):
    changes, message = FAMILIES[family]
    shown = str(jfp8kv.inspect(described(tmp_path, TINY, **changes)))
    assert all(text in shown for text in message), shown


def test_learned_positions_are_reported(tmp_path):
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 16,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": 64,
        "vocab_size": 64,
    }
    shown = str(jfp8kv.inspect(described(tmp_path, gpt2)))
    assert (
        "64 tokens, learned position embeddings" in shown
        and "layer norm before attention and MLP" in shown
    )


def test_the_report_prints_as_text_terminal_table_html_and_json(tmp_path):
    found = jfp8kv.inspect(described(tmp_path, GEMMA3_1B))
    assert "\x1b" not in str(found) and not any(
        line != line.rstrip() for line in str(found).splitlines()
    )
    with (console := Console(width=100, force_terminal=True)).capture() as shown:
        console.print(found)
    assert "without windows:" in shown.get() and "28%" in shown.get()
    assert (
        repr(found) == f"ModelReport({str(tmp_path)!r}, Gemma3ForCausalLM, 999,885,952 parameters)"
    )
    assert "<table>" in found._repr_html_()
    kept = json.loads(json.dumps(found.to_dict()))
    assert (kept["model"]["group"], kept["caches"][0]["sequences"][1]["tokens"]) == (4, 8192)


def test_only_the_small_files_of_a_hub_model_are_downloaded(tmp_path, monkeypatch):
    options = {}

    def snapshot_download(repo, **patterns):
        options[repo] = patterns["allow_patterns"]
        return str(described(tmp_path, LLAMA3_8B))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = jfp8kv.inspect("owner/llama")
    assert (found.source, found.weights.parameters) == ("owner/llama", 8_030_261_248)
    assert "*.json" in options["owner/llama"] and "*.safetensors" not in options["owner/llama"]


def test_vision_tensors_are_counted_and_ignored(tmp_path):
    text = {
        key: value
        for key, value in GEMMA3_1B.items()
        if key not in ("architectures", "torch_dtype")
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {},
    }
    shapes = {
        "language_model.model.embed_tokens.weight": (262144, 1152),
        "vision_tower.patch.weight": (3, 3),
    }
    found = jfp8kv.inspect(with_weights(described(tmp_path, config), shapes))
    assert (found.weights.vision_tensors, found.weights.tensors) == (1, {"BF16": 1})


MISTAKES = {
    "no model": ("/no/model", {}, CheckpointError, "/no/model"),
    "not a source": (3, {}, ConfigError, "source=3"),
    "an unknown format": (FOLDER, {"kv_dtype": "fp8_e4m4"}, ConfigError, "Did you mean 'fp8_e4m3'"),
    "scales that the checkpoint does not have": (
        FOLDER,
        {"kv_dtype": "fp8", "kv_scales": "checkpoint"},
        ConfigError,
        "has none",
    ),
    "a context beyond the model's": (
        FOLDER,
        {"max_model_len": 512},
        ConfigError,
        "max_model_len=512",
    ),
    "an invalid page size": (FOLDER, {"page_size": 0}, ConfigError, "page_size=0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_invalid_arguments_are_refused(mistake):
    source, settings, error, named = MISTAKES[mistake]
    with pytest.raises(error, match=named):
        jfp8kv.inspect(source, **settings)
