"""A Hugging Face folder loads bit for bit; errors name file and tensor."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import HfHubHTTPError

from jfp8kv.checkpoint import load
from jfp8kv.checkpoint.tensors import aligned_empty
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.params import Params

pytestmark = pytest.mark.quick_compile

BF16 = ml_dtypes.bfloat16


def same(left: Params, right: Params) -> bool:
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), left.tree, right.tree
    )
    return left.config == right.config and jax.tree.all(equal)


@pytest.fixture
def folder(tiny, tmp_path):
    config = tiny.config()
    return tiny.folder(tmp_path / "model", config, tiny.tensors(config))


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_loads_bit_for_bit_in_its_dtype(tiny, tmp_path, dtype, shards):
    config = tiny.config(attention_bias=True, mlp_bias=True, torch_dtype=np.dtype(dtype).name)
    tensors = tiny.tensors(config, dtype)
    params = load(tiny.folder(tmp_path, config, tensors, shards))
    assert params.dtype == dtype and params.config.dtype == np.dtype(dtype).name
    assert same(params, Params.from_pytree(tensors, config))


@pytest.mark.parametrize("stored", [np.float32, BF16, np.float16])
@pytest.mark.parametrize("dtype_given", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_given_dtype(tiny, tmp_path, stored, dtype_given):
    config = tiny.config()
    tensors = tiny.tensors(config, stored)
    params = load(tiny.folder(tmp_path, config, tensors), dtype=dtype_given)
    expected = (
        tensors["model.embed_tokens.weight"].astype(np.float32).astype(jnp.dtype(dtype_given))
    )
    np.testing.assert_array_equal(params.tree["embed"]["weight"], expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype_given}
    assert params.config.dtype == np.dtype(stored).name


@pytest.mark.parametrize("dtype_given", [jnp.bfloat16, np.dtype(BF16), "bfloat16"])
def test_a_dtype_may_be_a_name_or_a_dtype(folder, dtype_given):
    assert load(folder, dtype=dtype_given).dtype == BF16


@pytest.mark.parametrize("dtype_given", ["bf16", "int8", np.int8, object()])
def test_an_unknown_dtype_is_refused_with_the_list(folder, dtype_given):
    with pytest.raises(ConfigError, match="'float32', 'bfloat16', 'float16'"):
        load(folder, dtype=dtype_given)


def test_values_beyond_float16_are_refused_by_name(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config, BF16)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = 1e5
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight.*65504.*bfloat16"
    ):
        load(tiny.folder(tmp_path, config, tensors), dtype="float16")


def test_the_most_common_dtype_is_used_if_norms_are_stored_finer(tiny, tmp_path):
    config = tiny.config()
    tensors = {
        n: t.astype(np.float32) if "norm" in n else t for n, t in tiny.tensors(config, BF16).items()
    }
    assert {
        leaf.dtype.name for leaf in jax.tree.leaves(load(tiny.folder(tmp_path, config, tensors)))
    } == {"bfloat16"}


def test_a_cpu_adopts_aligned_host_memory_without_a_copy():
    host = aligned_empty((3, 5, 7), np.dtype(BF16))
    host[...] = 1
    array = jax.device_put(host, jax.devices("cpu")[0], may_alias=True)
    assert array.unsafe_buffer_pointer() == host.ctypes.data


def test_a_repeated_head_of_tied_embeddings_is_dropped(tiny, tmp_path):
    config = tiny.config(tie_word_embeddings=True)
    tensors = tiny.tensors(config)
    assert "head" not in load(tiny.folder(tmp_path / "a", config, tensors)).tree
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert "head" not in load(tiny.folder(tmp_path / "b", config, tensors)).tree


def test_names_of_a_bare_decoder_lack_the_prefix_model(tiny, tmp_path):
    config = tiny.config(tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): t for name, t in tiny.tensors(config).items()}
    assert load(tiny.folder(tmp_path, config, tensors)).size == sum(
        t.size for t in tensors.values()
    )


def test_eos_ids_of_both_config_files_are_joined(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load(folder).config.eos_ids == (2, 7)


def test_the_tokenizer_is_none_without_tokenizer_files(folder):
    assert load(folder).tokenizer is None


def test_buffers_are_dropped(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    plain = load(tiny.folder(tmp_path / "a", config, tensors))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert same(plain, load(tiny.folder(tmp_path / "b", config, tensors)))


def test_hf_quant_config_of_modelopt_declares_the_cache(folder):
    declared = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(declared))
    with pytest.warns(UserWarning, match="declares an fp8_e4m3 cache but has no scales"):
        assert load(folder).config.kv_cache_dtype == "fp8_e4m3"


def test_a_malformed_hf_quant_config_is_refused(folder):
    (folder / "hf_quant_config.json").write_text('{"quantization": "FP8"}')
    refused(folder, "hf_quant_config.json", "quantization='FP8'")


def test_quantized_weight_tensors_are_refused_by_name(tiny, tmp_path):
    config = tiny.config()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = tiny.tensors(config)
    tensors[name] = tensors[name].astype(np.int8)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is stored as I8"
    ):
        load(tiny.folder(tmp_path, config, tensors))


def refused(source: object, *named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load(source)
    assert all(part in str(error.value) for part in named), error.value


def test_a_missing_tensor_is_refused_with_its_shape(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    refused(
        tiny.folder(tmp_path, config, tensors),
        str(tmp_path),
        "missing: layers.1.self_attn.k_proj.weight [32, 32]",
    )


def test_an_unexpected_tensor_is_refused(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config) | {
        "model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)
    }
    refused(
        tiny.folder(tmp_path, config, tensors), "layers.0.self_attn.q_proj.bias", "Biases", "config"
    )


def test_a_wrong_shape_is_refused_with_file_and_expected_shape(tiny, tmp_path):
    config = tiny.config()
    tensors = tiny.tensors(config)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    refused(
        tiny.folder(tmp_path, config, tensors),
        "model.safetensors",
        "model.norm.weight",
        "[31]",
        "[32]",
    )


@pytest.mark.parametrize("length", [4, 100, -1])
def test_a_truncated_file_is_refused(folder, length):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:length])
    refused(folder, str(path), "truncated")


@pytest.mark.parametrize(
    "content", [b"\x10\0\0\0\0\0\0\0not json at all.", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 64, b""]
)
def test_a_file_that_is_not_safetensors_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        7,
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [3], "data_offsets": ["0", 12]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0.0, 12.0]},
        {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]},
        {"dtype": "F32", "shape": [[3]], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-1, -3], "data_offsets": [0, 12]},
        {"dtype": ["F32"], "shape": [3], "data_offsets": [0, 12]},
    ],
)
def test_a_damaged_header_entry_is_refused(folder, entry):
    header = json.dumps({"model.norm.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\0" * 64
    )
    refused(folder, "model.norm.weight", "damaged")


def test_a_directory_in_place_of_the_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "model.safetensors: cannot be read: Is a directory")


def test_a_missing_shard_is_refused(tiny, tmp_path):
    config = tiny.config()
    tiny.folder(tmp_path, config, tiny.tensors(config), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors", "missing")


def test_a_shard_outside_the_folder_is_refused(tiny, tmp_path):
    config = tiny.config()
    folder = tiny.folder(tmp_path / "model", config, tiny.tensors(config), shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../outside"))
    refused(folder, "../outside.safetensors", "outside the folder")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / "a.gguf").touch()
    refused(folder, "no config.json", "a.gguf")


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "JSON")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pickle"])
def test_pickles_are_refused_with_how_to_convert_them(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, "pickle", "save_pretrained")
    if not name.endswith(".pickle"):
        refused(folder / name, name, "pickle", "save_pretrained")


def test_paths_that_are_not_checkpoints_are_refused_with_a_hint(folder, tmp_path):
    refused(folder / "model.safetensors", "give the folder", str(folder))
    refused(folder / "config.json", "neither a folder nor a .gguf file")
    refused(tmp_path / "absent", "no such file or folder")
    refused(str(tmp_path / "absent.gguf"), "no such file or folder")
    refused("~unknown-user/model", "no such file or folder")
    with pytest.raises(ConfigError, match="hub id"):
        load(" ")


def test_a_bare_name_is_a_folder_or_a_hub_id_and_never_a_file(folder, monkeypatch):
    downloaded = []

    def download(repo, *, weights):
        downloaded.append(repo)
        return folder

    monkeypatch.setattr("jfp8kv.checkpoint.hf_folder.download", download)
    monkeypatch.chdir(folder.parent)
    assert load(folder.name).size > 0 and not downloaded
    (folder.parent / "gpt2").touch()
    assert load("gpt2").size > 0 and downloaded == ["gpt2"]
    refused("./gpt2", "neither a folder nor a .gguf file")
    refused(Path("gpt2"), "neither a folder nor a .gguf file")
    refused(Path("absent"), "no such file or folder")


def test_connection_errors_of_the_hub_say_what_to_try(monkeypatch):
    def unreachable(*_, **__):
        raise HfHubHTTPError.__bases__[0]("connection reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refused("owner/name", "owner/name: not a local folder", "connection reset", "hf auth login")


def test_a_bug_while_downloading_is_not_reported_as_a_missing_model(monkeypatch):
    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("huggingface_hub.snapshot_download", bug)
    with pytest.raises(TypeError, match="a bug"):
        load("owner/name")


def test_a_home_folder_path_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(os.path.join("~", folder.name)).size > 0


HUB = """
import sys
from jfp8kv.checkpoint import load
from jfp8kv.core.errors import CheckpointError
print(load("owner/name"))
try:
    load("owner/absent")
except CheckpointError as error:
    print(error)
"""


def test_a_hub_id_is_read_from_the_cache_and_a_missing_one_is_refused(tiny, tmp_path):
    config = tiny.config()
    repo = tmp_path / "hub" / "models--owner--name"
    tiny.folder(repo / "snapshots" / "0123abcd", config, tiny.tensors(config))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    shown = tiny.run_python(HUB, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert shown[0].startswith("Params(LlamaForCausalLM")
    assert all(
        part in shown[1]
        for part in ("owner/absent", "not a local folder", "HF_HUB_OFFLINE", "hf auth login")
    )
