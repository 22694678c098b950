"""What is saved comes back as it was, and a folder that is not what it seems is named and left alone."""

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
from jfp8kv.models.names import expected_shapes, nest
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
def test_weights_come_back_bit_for_bit_with_their_config(tiny, tmp_path, dtype):
    config = tiny.config(
        attention_bias=True,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
        torch_dtype="bfloat16",
    )
    tensors = tiny.tensors(config, dtype)
    tensors["model.norm.weight"][:4] = np.array(
        [-0.0, np.nan, -np.inf, 1e-7], dtype
    )  # any bits at all
    params = Params.from_pytree(tensors, config)
    save(params, tmp_path / "a" / "b")
    back = load(tmp_path / "a" / "b")
    assert same(back, params)
    assert jax.tree.structure(back.tree) == jax.tree.structure(params.tree)
    assert (back.tokenizer, back.kv_scales) == (None, None)
    assert {leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(back)} == {True}


def test_each_weight_keeps_its_own_dtype(params, tmp_path):
    params.tree["norm"]["weight"] = params.tree["norm"]["weight"].astype(jnp.bfloat16)
    save(params, tmp_path / "saved")
    back = load(tmp_path / "saved")
    assert same(back, params) and back.tree["norm"]["weight"].dtype == BF16


def test_a_folder_or_a_gguf_file_may_be_saved_anew(tiny, tmp_path):
    config = tiny.config()
    params = load(tiny.folder(tmp_path / "hf", config, tiny.tensors(config)))
    save(params, tmp_path / "saved")
    assert same(load(tmp_path / "saved"), params)


@pytest.mark.parametrize("asked", ["bfloat16", "float16", jnp.float32])
def test_a_dtype_that_is_asked_for_is_rounded_to_once(params, saved, asked):
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(asked)), params.tree)
    assert same(load(saved, dtype=asked), dataclasses.replace(params, tree=expected))


def test_values_beyond_float16_are_refused_by_name(params, tmp_path):
    params.tree["norm"]["weight"] = params.tree["norm"]["weight"].at[3].set(1e5)
    save(params, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"norm\.weight.*65504.*bfloat16"):
        load(tmp_path / "saved", dtype="float16")


def test_weights_on_several_places_and_in_numpy_are_saved_alike(params, tmp_path):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    placed = jax.device_put(
        params.tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    for number, tree in enumerate((placed, jax.tree.map(np.asarray, params.tree))):
        save(dataclasses.replace(params, tree=tree), tmp_path / str(number))
        assert same(load(tmp_path / str(number)), params)


def test_scales_of_the_cache_come_back(params, tmp_path):
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


def test_saved_scales_that_are_bad_or_of_another_model_are_named(params, tmp_path):
    save(dataclasses.replace(params, kv_scales=KVScales.unit(2)), tmp_path / "saved")
    file, v = tmp_path / "saved" / "kv_scales.safetensors", np.ones((2, 1, 1), np.float32)
    safetensors.numpy.save_file({"k": np.float32([1, 0]).reshape(2, 1, 1), "v": v}, file)
    refused(tmp_path / "saved", str(file), "k scale of layer 1 is 0")
    KVScales(np.ones((2, 3, 1)), v).save(file)
    refused(tmp_path / "saved", str(file), "kv_heads=2")


CHAT = [{"role": "user", "content": "hello 123"}]


def test_the_tokenizer_comes_back_with_its_template_and_special_tokens(tiny, params, tmp_path):
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


def test_a_tokenizer_without_a_written_form_is_refused_before_anything_is_written(params, tmp_path):
    class Bytes:
        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode()

    for tokenizer in (Bytes(), Tokenizer(Bytes())):
        with pytest.raises(ConfigError, match=r"type Bytes.*tokenizer=None"):
            save(dataclasses.replace(params, tokenizer=tokenizer), tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"kv_scales of type str"):
        save(dataclasses.replace(params, kv_scales="unit"), tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"params of type dict"):
        save(params.tree, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_orbax_alone_reads_the_weights(params, saved):
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(
            saved / "weights", jax.tree.map(ocp.utils.to_shape_dtype_struct, params.tree)
        )
    assert same(dataclasses.replace(params, tree=tree), params)


def test_saving_and_loading_work_inside_a_running_event_loop(params, tmp_path):
    """As in a notebook."""

    async def cell():
        save(params, tmp_path / "saved")
        return load(tmp_path / "saved")

    assert same(asyncio.run(cell()), params)


def test_save_is_at_the_front_door(params, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jfp8kv.save(params, "~/saved")
    assert same(jfp8kv.load(str(tmp_path / "saved")), params)


def test_nothing_is_overwritten_unless_asked(params, saved, tmp_path):
    other = dataclasses.replace(params, tree=jax.tree.map(lambda leaf: leaf + 1, params.tree))
    with pytest.raises(CheckpointError, match="already contains a saved model.*overwrite=True"):
        save(other, saved)
    assert same(load(saved), params)
    (saved / "stale").touch()
    save(other, saved, overwrite=True)
    assert same(load(saved), other) and not (saved / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_of_something_else_is_never_overwritten(params, tmp_path):
    (tmp_path / "empty").mkdir()
    save(params, tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").touch()
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="exists and was not written by jfp8kv.save"):
            save(params, path, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_save_that_fails_leaves_nothing_and_keeps_what_was_there(
    params, saved, tmp_path, monkeypatch
):
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


def test_a_folder_that_is_two_models_or_none_is_told(tiny, saved, tmp_path):
    (saved / "config.json").write_text(json.dumps(tiny.config()))
    refused(saved, "contains both jfp8kv.json", "config.json")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json", "no jfp8kv.json")


def test_an_orbax_checkpoint_of_something_else_is_told(params, saved, tmp_path):
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
def test_a_damaged_description_is_named(saved, entry):
    change(saved, **entry)
    refused(saved, "jfp8kv.json: damaged")


def test_a_config_field_that_is_not_known_is_named_and_one_that_is_missing_has_its_default(
    params, saved
):
    config = json.loads((saved / "jfp8kv.json").read_text())["config"]
    change(saved, config={name: value for name, value in config.items() if name != "sm_scale"})
    assert same(load(saved), params)
    change(saved, config=config | {"antigravity": True})
    refused(saved, "jfp8kv.json", "antigravity")


def test_missing_parts_are_named(params, saved, tmp_path):
    change(saved, kv_scales=True)
    refused(saved, "kv_scales.safetensors", "no such file")
    change(saved, kv_scales=False)
    shutil.rmtree(saved / "weights")
    refused(saved, "weights", "not a readable Orbax checkpoint")


def test_weights_whose_list_is_damaged_are_named(saved):
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


def test_weights_of_another_model_are_named(saved):
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


def test_a_bug_while_saving_is_not_reported_as_a_folder_that_cannot_be_written(
    params, tmp_path, monkeypatch
):
    def bug(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", bug)
    with pytest.raises(TypeError, match="a bug"):
        save(params, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# When one read fails, Orbax closes its event loop over the others, which then complain to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_whatever_file_is_truncated_or_gone_an_error_says_so(params, saved, tmp_path):
    files = [
        path.relative_to(saved)
        for path in (saved / "weights").rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    loud = 0
    for file in files:
        for cut in (
            lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
            Path.unlink,
        ):
            copy = shutil.copytree(saved, tmp_path / "copy")
            cut(copy / file)
            try:
                assert same(load(copy), params), file  # a file that was not needed
            except CheckpointError as error:
                assert str(copy) in str(error)
                loud += 1
            shutil.rmtree(copy)
    assert loud >= 6


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
def test_loading_never_holds_the_weights_twice(tiny, tmp_path):
    config = ModelConfig("LlamaForCausalLM", 8000, 1024, 8, 16, 16, 64, 4096, 128)
    tree = nest(
        {name: jnp.ones(shape, jnp.bfloat16) for name, shape in expected_shapes(config).items()}
    )
    save(Params(tree, config), tmp_path / "saved")
    ratio, nbytes = map(float, tiny.run_python(PEAK, tmp_path / "saved").split())
    assert nbytes > 300e6
    assert (
        0.9 < ratio < 1.5
    )  # Orbax itself takes about 100 MB more; both copies of everything would be 2.3
