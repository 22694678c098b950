"""`export` writes a folder that loads bit for bit, also in other libraries, and is atomic."""

import dataclasses
import json
import tracemalloc
import warnings
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jfp8kv
from jfp8kv.checkpoint import Tokenizer, load
from jfp8kv.checkpoint import export as exporting
from jfp8kv.checkpoint import safetensors as writer
from jfp8kv.checkpoint.export import export
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import expected_shapes, unflatten
from jfp8kv.models.params import Params

ROOT = Path(__file__).parent.parent / "references"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))
BF16 = np.dtype(ml_dtypes.bfloat16)
ignore_load_warnings = pytest.mark.filterwarnings(
    "ignore:.*(dequantized to|only text is supported)"
)


def bits(leaf):
    return np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")


def same(left, right):
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((bits(a) == bits(b)).all()), left.tree, right.tree
    )
    return left.config == right.config and jax.tree.all(equal)


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    return found


@pytest.fixture
def params(tiny):
    config = tiny.config()
    return Params.from_pytree(tiny.tensors(config), config)


# Weights and config


@ignore_load_warnings
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_family_round_trips_bit_for_bit_with_its_config(folder, tmp_path):
    params = load(folder)
    export(params, tmp_path)
    back = load(tmp_path)
    assert same(back, params) and jax.tree.structure(back.tree) == jax.tree.structure(params.tree)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


SAVED_BY_TRANSFORMERS = [
    *(
        "llama_gqa",
        "mistral_window",
        "qwen2_bias",
        "qwen2_moe_shared",
        "qwen3_tied",
        "qwen3_moe_mixed",
        "smollm3_list",
    ),
    *(
        "phi3_plain",
        "olmo2_gqa",
        "granite_bias",
        "mixtral_saved",
        "gpt_oss_saved",
        "gemma_mqa",
        "gemma2_caps",
        "gemma3_new",
    ),
    *("gpt2_saved", "gpt2_inverse"),
]


@pytest.mark.parametrize("name", SAVED_BY_TRANSFORMERS)
def test_exported_tensors_equal_those_that_transformers_saved(name, tmp_path):
    """Compare fused, split, transposed and stacked weights, read by the safetensors library."""
    export(load(ROOT / name), tmp_path)
    ours, theirs = tensors_of(tmp_path), tensors_of(ROOT / name)
    assert set(ours) == set(theirs)
    for tensor, expected in theirs.items():
        assert ours[tensor].dtype == expected.dtype and np.array_equal(ours[tensor], expected), (
            tensor
        )


@ignore_load_warnings
def test_mxfp4_experts_are_exported_dequantized(tmp_path):
    export(load(ROOT / "gpt_oss_mxfp4"), tmp_path)
    written = tensors_of(tmp_path)
    assert written["model.layers.0.mlp.experts.gate_up_proj"].shape == (
        3,
        64,
        128,
    )  # [experts, in, gate and up interleaved]
    assert {tensor.dtype for tensor in written.values()} == {BF16}
    assert not [name for name in written if name.endswith(("_blocks", "_scales"))]


def test_a_path_is_loaded_and_exported(tmp_path):
    jfp8kv.export(ROOT / "llama_gqa", tmp_path)
    assert same(load(tmp_path), load(ROOT / "llama_gqa"))


def test_the_exported_dtype_is_that_of_the_weights_in_memory(tmp_path):
    export(load(ROOT / "llama_bf16", dtype="float32"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert {tensor.dtype for tensor in tensors_of(tmp_path).values()} == {np.dtype(np.float32)}


def test_each_weight_keeps_its_dtype_and_fused_weights_get_the_widest(tmp_path):
    params = load(ROOT / "phi3_plain")
    for name in ("q", "attention_norm"):
        weight = params.tree["layers"][name]["weight"]
        params.tree["layers"][name]["weight"] = weight.astype(jnp.float32) * jnp.float32(1 + 2**-20)
    export(params, tmp_path)
    written = tensors_of(tmp_path)
    wide = {name for name, tensor in written.items() if tensor.dtype == np.float32}
    assert wide == {
        f"model.layers.{n}.{name}.weight"
        for n in (0, 1)
        for name in ("input_layernorm", "self_attn.qkv_proj")
    }
    fused = written["model.layers.1.self_attn.qkv_proj.weight"]
    assert np.array_equal(fused[:32], params.tree["layers"]["q"]["weight"][1])
    assert np.array_equal(
        fused[32:64], np.asarray(params.tree["layers"]["k"]["weight"][1]).astype(np.float32)
    )


def test_gguf_numpy_and_sharded_weights_export_equal_tensors(tiny, params, tmp_path):
    config = tiny.config(vocab_size=266)
    tensors = tiny.tensors(config)
    with pytest.warns(UserWarning, match="its tokenizer"):
        opened = load(tiny.gguf(tmp_path / "model.gguf", config, tensors))
    export(opened, tmp_path / "gguf")
    written = tensors_of(tmp_path / "gguf")
    assert set(written) == set(tensors) and all(
        np.array_equal(written[name], tensors[name]) for name in tensors
    )
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    placed = jax.device_put(
        params.tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    for number, tree in enumerate((placed, jax.tree.map(np.asarray, params.tree))):
        export(dataclasses.replace(params, tree=tree), tmp_path / str(number))
        assert same(load(tmp_path / str(number)), params)


def test_large_weights_are_sharded_with_an_index(params, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 20_000)
    scales = jfp8kv.KVScales(np.full((2, 2, 1), 0.5), np.full((2, 2, 1), 0.25))
    export(params, tmp_path, kv_scales=scales)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    sizes = []
    for file in files:
        shard = safetensors.numpy.load_file(file)
        assert {name for name, home in index["weight_map"].items() if home == file.name} == set(
            shard
        )
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
    assert len(files) > 3 and max(sizes) <= 20_000 and index["metadata"]["total_size"] == sum(sizes)
    back = load(tmp_path)
    assert same(dataclasses.replace(back, config=params.config), params) and np.array_equal(
        back.kv_scales.k, scales.k
    )


def test_written_files_are_aligned_and_readable_by_the_safetensors_library(tmp_path):
    """Offsets are multiples of the element size, and the metadata has the format."""
    values = {
        "a": np.ones(3, BF16),
        "é": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.ones((0, 2), np.float16),
    }
    given = [
        writer.LazyTensor(name, each.shape, each.dtype, lambda each=each: each)
        for name, each in values.items()
    ]
    path = tmp_path / "x.safetensors"
    writer.write_safetensors(path, given, {"format": "pt"})
    read = safetensors.numpy.load_file(path)
    assert all(
        read[name].dtype == each.dtype and np.array_equal(read[name], each)
        for name, each in values.items()
    )
    opened = writer.open_safetensors(path)
    assert all(opened[name].offset % each.dtype.itemsize == 0 for name, each in values.items())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_export_has_one_tensor_in_memory_at_a_time(tmp_path):
    config = ModelConfig("Phi3ForCausalLM", 2000, 256, 6, 8, 4, 32, 512, 128)
    tree = unflatten(
        {name: np.ones(shape, np.float32) for name, shape in expected_shapes(config).items()}
    )
    params, largest = Params(tree, config), 2 * 512 * 256 * 4  # gate and up fused
    tracemalloc.start()
    export(params, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert params.nbytes > 10 * largest and peak < 2 * largest


# Tokenizer


def with_tokenizer(tiny, folder, **config):
    config = tiny.config(vocab_size=266, **config)
    return load(
        tiny.tokenizer(tiny.folder(folder, config, tiny.tensors(config)), pad_token="<|endoftext|>")
    )


CHAT = [{"role": "user", "content": "hello 123"}]
TEXT = "<|im_start|>héllo 日本\n hello  123"


def test_the_tokenizer_round_trips_and_transformers_reads_it(tiny, tmp_path):
    params = with_tokenizer(tiny, tmp_path / "hf", eos_token_id=[2, 0])
    export(params, tmp_path / "out")
    left, right = params.tokenizer, load(tmp_path / "out").tokenizer
    assert left.encode(TEXT) == right.encode(TEXT) and left.chat(CHAT) == right.chat(CHAT)
    assert (left.special_tokens, left.eos_ids, left.vocab) == (
        right.special_tokens,
        right.eos_ids,
        right.vocab,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.encode(TEXT) == left.encode(TEXT) and theirs.decode(left.encode(TEXT)) == TEXT
    assert theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    ) == left.render(CHAT)
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|endoftext|>",
    )
    assert generation.eos_token_id == config.eos_token_id == [2, 0] and config.pad_token_id == 0


def test_a_gguf_tokenizer_is_exported_as_tokenizer_json(tiny, tmp_path):
    tokens, merges = tiny.vocab()

    def more(file):
        file.add_tokenizer_model("gpt2")
        file.add_tokenizer_pre("gpt-2")
        file.add_token_list(tokens)
        file.add_token_types(
            [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
        )
        file.add_token_merges(merges)
        file.add_chat_template(tiny.chatml)

    config = tiny.config(vocab_size=266)
    params = load(tiny.gguf(tmp_path / "model.gguf", config, tiny.tensors(config), more=more))
    export(params, tmp_path / "out")
    back = load(tmp_path / "out")
    assert same(back, params)
    assert back.tokenizer.encode(TEXT) == params.tokenizer.encode(TEXT)
    assert back.tokenizer.chat(CHAT) == params.tokenizer.chat(CHAT)


def test_eos_of_the_tokenizer_is_exported_if_the_config_has_none(tiny, params, tmp_path):
    tokenizer = Tokenizer(with_tokenizer(tiny, tmp_path / "hf").tokenizer.backend, eos_ids=(2,))
    config = dataclasses.replace(params.config, eos_ids=())
    export(dataclasses.replace(params, config=config, tokenizer=tokenizer), tmp_path / "out")
    assert load(tmp_path / "out").eos_ids == (2,)


# Errors


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(params, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(
            CheckpointError, match=f"{path.name}: exists and is not an empty folder"
        ):
            export(params, path)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_parent_folders_are_created_and_home_is_expanded(params, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jfp8kv.export(params, "~/a/b")
    assert same(jfp8kv.load(str(tmp_path / "a" / "b")), params)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_failed_export_leaves_no_files(params, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(exporting, "write_safetensors", full)
    with pytest.raises(CheckpointError, match="out: cannot be written: No space left on device"):
        export(params, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_inexpressible_models_are_refused_before_any_write(params, tmp_path):
    class Bytes:
        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode()

    def changed(name, change):
        tree = jax.tree.map(lambda leaf: leaf, params.tree)
        tree["layers"][name]["weight"] = change(tree["layers"][name]["weight"])
        return dataclasses.replace(params, tree=tree)

    config = dataclasses.replace(params.config, windows=(8, 0))
    cases = [
        (params.tree, "type dict: must be a Params, a path or a hub id"),
        (
            dataclasses.replace(params, tokenizer=Tokenizer(Bytes())),
            "tokenizer of type Bytes: cannot be written",
        ),
        (
            dataclasses.replace(params, config=config),
            r"LlamaForCausalLM cannot express windows=\(8, 0\)",
        ),
        (
            changed("q", lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)),
            r"layers\.q\.weight is a ShapeDtypeStruct",
        ),
        (
            changed("k", lambda x: x.astype(jnp.float8_e5m2)),
            r"layers\.k\.weight is of dtype float8_e5m2",
        ),
        (
            changed("v", lambda x: x[:, :3]),
            r"layers\.v\.weight has shape \[2, 3, 32\], expected \[2, 32, 32\]",
        ),
        (
            dataclasses.replace(params, tree={**params.tree, "extra": {"weight": np.ones(1)}}),
            r"extra\.weight",
        ),
    ]
    for given, named in cases:
        with pytest.raises((ConfigError, CheckpointError), match=named):
            export(given, tmp_path / "out")
    with pytest.raises(
        ConfigError,
        match="layout='compressed_tensors': must be one of 'compressed-tensors'.*Did you mean",
    ):
        export(params, tmp_path / "out", layout="compressed_tensors")
    assert not list(tmp_path.iterdir())
