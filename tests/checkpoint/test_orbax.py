"""`save` and `load` round-trip a model bit for bit, and refuse damaged and foreign folders."""

import asyncio
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import jfp8kv
from jfp8kv.cache.scales import KVScales
from jfp8kv.checkpoint import Tokenizer, load, save
from jfp8kv.checkpoint.load import read_scale_report
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.config import ModelConfig
from jfp8kv.models.names import expected_shapes, unflatten
from jfp8kv.models.params import Params

pytestmark = pytest.mark.quick_compile

BF16 = ml_dtypes.bfloat16


def bits(leaf):
    return np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")


def same(left, right):
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((bits(a) == bits(b)).all()), left.tree, right.tree
    )
    return left.config == right.config and jax.tree.all(equal)


@pytest.fixture
def params(tiny):
    config = tiny.config()
    return Params.from_pytree(tiny.tensors(config), config)


@pytest.fixture
def saved(params, tmp_path):
    save(params, tmp_path / "saved")
    return tmp_path / "saved"


def refused(source, *named):
    with pytest.raises(CheckpointError) as error:
        load(source)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_weights_round_trip_bit_for_bit_with_their_config(tiny, tmp_path, dtype):
    config = tiny.config(
        attention_bias=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        torch_dtype="bfloat16",
    )
    tensors = tiny.tensors(config, dtype)
    tensors["model.norm.weight"][:4] = np.array([-0.0, np.nan, -np.inf, 1e-7], dtype)
    params = Params.from_pytree(tensors, config)
    save(params, tmp_path / "a" / "b")
    back = load(tmp_path / "a" / "b")
    assert same(back, params)
    assert jax.tree.structure(back.tree) == jax.tree.structure(params.tree)
    assert (back.tokenizer, back.kv_scales) == (None, None)
    assert {leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(back)} == {True}


def test_each_weight_keeps_its_dtype(params, tmp_path):
    params.tree["norm"]["weight"] = params.tree["norm"]["weight"].astype(jnp.bfloat16)
    save(params, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert same(back, params) and back.tree["norm"]["weight"].dtype == BF16


def test_a_loaded_folder_or_gguf_file_can_be_saved(tiny, tmp_path):
    config = tiny.config()
    params = load(tiny.folder(tmp_path / "hf", config, tiny.tensors(config)))
    save(params, tmp_path / "saved")
    assert same(load(tmp_path / "saved"), params)


@pytest.mark.parametrize("dtype_given", ["bfloat16", "float16", jnp.float32])
def test_weights_are_rounded_once_to_the_given_dtype(params, saved, dtype_given):
    expected = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype_given)), params.tree
    )
    assert same(load(saved, dtype=dtype_given), dataclasses.replace(params, tree=expected))


def test_values_beyond_float16_are_refused_by_name(params, tmp_path):
    params.tree["norm"]["weight"] = params.tree["norm"]["weight"].at[3].set(1e5)
    save(params, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"norm\.weight.*65504.*bfloat16"):
        load(tmp_path / "saved", dtype="float16")


def test_sharded_and_numpy_weights_are_saved_equal(params, tmp_path):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    placed = jax.device_put(
        params.tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    for number, tree in enumerate((placed, jax.tree.map(np.asarray, params.tree))):
        save(dataclasses.replace(params, tree=tree), tmp_path / str(number))
        assert same(load(tmp_path / str(number)), params)


def test_kv_scales_round_trip(params, tmp_path):
    random = np.random.default_rng(0)
    scales = KVScales(random.uniform(0.1, 2, (2, 2, 1)), random.uniform(0.1, 2, (2, 2, 16)))
    save(dataclasses.replace(params, kv_scales=scales), tmp_path / "saved")
    back = load(tmp_path / "saved").kv_scales
    assert (
        (back.k == scales.k).all() and (back.v == scales.v).all() and back.granularity == "channel"
    )
    layers = read_scale_report(tmp_path / "saved").layers
    assert [(layer.used[0].source, layer.granularity) for layer in layers] == [
        ("kv_scales.safetensors", "channel")
    ] * 2


def test_invalid_saved_scales_and_those_of_other_models_are_refused(params, tmp_path):
    save(dataclasses.replace(params, kv_scales=KVScales.unit(2)), tmp_path / "saved")
    file, v = tmp_path / "saved" / "kv_scales.safetensors", np.ones((2, 1, 1), np.float32)
    safetensors.numpy.save_file({"k": np.float32([1, 0]).reshape(2, 1, 1), "v": v}, file)
    refused(tmp_path / "saved", str(file), "k scale of layer 1 is 0")
    KVScales(np.ones((2, 3, 1)), v).save(file)
    refused(tmp_path / "saved", str(file), "kv_heads=2")


CHAT = [{"role": "user", "content": "hello 123"}]


def test_the_tokenizer_round_trips_with_template_and_special_tokens(tiny, params, tmp_path):
    folder = tiny.tokenizer(
        tiny.folder(tmp_path / "hf", tiny.config(), tiny.tensors(tiny.config()))
    )
    params = load(folder)
    save(params, tmp_path / "saved")
    left, right = params.tokenizer, load(tmp_path / "saved").tokenizer
    assert left.encode("<|im_start|>héllo 日本") == right.encode("<|im_start|>héllo 日本")
    assert left.chat(CHAT) == right.chat(CHAT)
    assert (left.special_tokens, left.eos_ids, left.vocab) == (
        right.special_tokens,
        right.eos_ids,
        right.vocab,
    )


def test_a_tokenizer_that_cannot_be_written_is_refused_before_any_write(params, tmp_path):
    class Bytes:
        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode()

    wrapped = dataclasses.replace(params, tokenizer=Tokenizer(Bytes()))
    for given in (wrapped, Params.from_pytree(params.tree, params.config, tokenizer=Bytes())):
        with pytest.raises(ConfigError, match=r"type Bytes.*tokenizer=None"):
            save(given, tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"kv_scales of type str"):
        save(dataclasses.replace(params, kv_scales="unit"), tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"params of type dict"):
        save(params.tree, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_orbax_can_restore_the_weights(params, saved):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(
            saved / "weights", jax.tree.map(ocp.utils.to_shape_dtype_struct, params.tree)
        )
    assert same(dataclasses.replace(params, tree=tree), params)


def test_save_and_load_work_in_a_running_event_loop(params, tmp_path):
    """Notebooks run cells in an event loop."""

    async def cell():
        save(params, tmp_path / "saved")
        return load(tmp_path / "saved")

    assert same(asyncio.run(cell()), params)


def test_save_is_exported_and_expands_home(params, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jfp8kv.save(params, "~/saved")
    assert same(jfp8kv.load(str(tmp_path / "saved")), params)


def test_a_saved_model_is_only_replaced_with_overwrite(params, saved, tmp_path):
    other = dataclasses.replace(params, tree=jax.tree.map(lambda leaf: leaf + 1, params.tree))
    with pytest.raises(CheckpointError, match="already contains a saved model.*overwrite=True"):
        save(other, saved)
    assert same(load(saved), params)
    (saved / "stale").touch()
    save(other, saved, overwrite=True)
    assert same(load(saved), other) and not (saved / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_other_folders_are_never_overwritten(params, tmp_path):
    (tmp_path / "empty").mkdir()
    save(params, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="exists and was not written by jfp8kv.save"):
            save(params, path, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_folder_unchanged(params, saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="saved: cannot be written: No space left on device"):
        save(params, saved, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"] and same(load(saved), params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params.tree)
    with pytest.raises(CheckpointError, match="the weights cannot be written"):
        save(dataclasses.replace(params, tree=shapes), saved, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"] and same(load(saved), params)


def test_a_folder_of_two_models_or_none_is_refused(tiny, saved, tmp_path):
    (saved / "config.json").write_text(json.dumps(tiny.config()))
    refused(saved, "contains both jfp8kv.json", "config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json", "no jfp8kv.json")


def test_other_orbax_checkpoints_are_refused(params, saved, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", params.tree)
    refused(tmp_path / "theirs", "without jfp8kv.json", "from_pytree")
    refused(saved / "weights", "give the folder above")


def change(saved, **entries):
    about = json.loads((saved / "jfp8kv.json").read_text())
    (saved / "jfp8kv.json").write_text(json.dumps(about | entries))


def test_a_newer_version_of_the_format_is_refused(saved):
    change(saved, version=2)
    refused(saved, "version 2", "reads up to 1", "upgrade")


@pytest.mark.parametrize(
    "entry",
    [
        {"version": "1"},
        {"version": None},
        {"version": 0},
        {"format": "other"},
        {"config": None},
        {"config": {"type": "RopeConfig", "theta": 1.0}},
        {"config": {"type": "ModelConfig", "vocab": 40}},
        {"config": {"type": "Path"}},
        {"tokenizer": {"eos_ids": []}},
        {"tokenizer": 3},
    ],
)
def test_a_damaged_description_is_refused(saved, entry):
    change(saved, **entry)
    refused(saved, "jfp8kv.json: damaged")


def test_an_unknown_config_field_is_refused_and_a_missing_one_is_default(params, saved):
    config = json.loads((saved / "jfp8kv.json").read_text())["config"]
    change(saved, config={name: value for name, value in config.items() if name != "sm_scale"})
    assert same(load(saved), params)
    change(saved, config=config | {"antigravity": True})
    refused(saved, "jfp8kv.json", "antigravity")


def test_missing_files_are_refused_by_name(params, saved, tmp_path):
    change(saved, kv_scales=True)
    refused(saved, "kv_scales.safetensors", "no such file")
    change(saved, kv_scales=False)
    shutil.rmtree(saved / "weights")
    refused(saved, "weights", "not a readable Orbax checkpoint")


def test_a_damaged_list_of_arrays_is_refused(saved):
    (saved / "weights" / "_METADATA").write_text("{")
    refused(saved, "weights/_METADATA: cannot be read as JSON")
    (saved / "weights" / "_METADATA").write_text("[]")
    refused(saved, "weights/_METADATA: must contain a JSON object")
    (saved / "weights" / "_METADATA").write_text("{}")
    refused(saved, "weights: not a readable Orbax checkpoint", "tree_metadata")
    (saved / "weights" / "_METADATA").unlink()
    refused(
        saved,
        "weights: not a readable Orbax checkpoint",
        "list of its arrays is missing or damaged",
    )


def test_weights_of_another_model_are_refused(saved):
    config = json.loads((saved / "jfp8kv.json").read_text())["config"]
    change(saved, config=config | {"mlp_hidden": 128})
    refused(saved, "weights: layers.gate.weight has shape [2, 64, 32], expected [2, 128, 32]")
    change(saved, config=config | {"qkv_bias": True})
    refused(saved, "missing: layers.q.bias")
    change(saved, config=config | {"tied_embeddings": True})
    refused(saved, "not part of this architecture: head.weight")


@pytest.mark.parametrize(
    "function", ["from_json", "expected_shapes", "_stored_tensors", "read_backend", "check_shape"]
)
@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_bug_while_loading_is_not_reported_as_a_damaged_file(
    tiny, params, tmp_path, monkeypatch, function, error
):
    def bug(*_, **__):
        raise error("a bug")

    folder = tiny.tokenizer(
        tiny.folder(tmp_path / "hf", tiny.config(), tiny.tensors(tiny.config()))
    )
    params = dataclasses.replace(load(folder), kv_scales=KVScales.unit(2))
    save(params, tmp_path / "saved")
    monkeypatch.setattr(f"jfp8kv.checkpoint.orbax.{function}", bug)
    with pytest.raises(error, match="a bug"):
        load(tmp_path / "saved")


def test_a_bug_while_saving_is_not_reported_as_a_write_error(params, tmp_path, monkeypatch):
    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", bug)
    with pytest.raises(TypeError, match="a bug"):
        save(params, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# When a read fails, Orbax closes its event loop, and other reads raise unraisable exceptions.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_truncated_or_missing_file_is_refused(params, saved, tmp_path):
    files = [
        path.relative_to(saved)
        for path in (saved / "weights").rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    refusals = 0
    for file in files:
        for cut in (
            lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
            Path.unlink,
        ):
            copy = shutil.copytree(saved, tmp_path / "copy")
            cut(copy / file)
            try:
                assert same(load(copy), params), file  # the file is not needed
            except CheckpointError as error:
                assert str(copy) in str(error)
                refusals += 1
            shutil.rmtree(copy)
    assert refusals >= 6


PEAK = """
import re, sys
import jax, jax.numpy as jnp, orbax.checkpoint
from jfp8kv.checkpoint import load

def kib(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read())[1])

jnp.zeros(1).block_until_ready()
before = kib("VmRSS")
params = load(sys.argv[1])
print((kib("VmHWM") - before) * 1024 / params.nbytes, params.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_has_less_than_two_copies_of_the_weights_in_memory(tiny, tmp_path):
    config = ModelConfig("LlamaForCausalLM", 8000, 1024, 8, 16, 16, 64, 4096, 128)
    tree = unflatten(
        {name: jnp.ones(shape, jnp.bfloat16) for name, shape in expected_shapes(config).items()}
    )
    save(Params(tree, config), tmp_path / "saved")
    ratio, nbytes = map(float, tiny.run_python(PEAK, tmp_path / "saved").split())
    assert nbytes > 300e6
    assert (
        0.9 < ratio < 1.5
    )  # Orbax needs about 100 MB more; two copies of all weights would be 2.3
