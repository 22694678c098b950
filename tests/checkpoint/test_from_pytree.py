"""`Params` is a pytree; `from_pytree` accepts common trees and names invalid parameters."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jfp8kv.checkpoint.load import load
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.names import expected_shapes, unflatten
from jfp8kv.models.params import Params
from jfp8kv.text.tokenizer import Tokenizer


@pytest.fixture
def config(tiny):
    return tiny.config(attention_bias=True)


@pytest.fixture
def tensors(tiny, config):
    return tiny.tensors(config)


@pytest.fixture
def params(config, tensors):
    return Params.from_pytree(tensors, config)


def same(left: Params, right: Params) -> bool:
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and bool((a == b).all()), left.tree, right.tree
    )
    return left.config == right.config and jax.tree.all(equal)


def test_hugging_face_names_are_stacked_in_layer_order(params, tensors):
    for ours, theirs in (
        ("q", "self_attn.q_proj"),
        ("down", "mlp.down_proj"),
        ("mlp_norm", "post_attention_layernorm"),
    ):
        for layer in range(2):
            expected = tensors[f"model.layers.{layer}.{theirs}.weight"]
            np.testing.assert_array_equal(params.tree["layers"][ours]["weight"][layer], expected)
    np.testing.assert_array_equal(
        params.tree["layers"]["o"]["bias"][1], tensors["model.layers.1.self_attn.o_proj.bias"]
    )
    np.testing.assert_array_equal(params.tree["head"]["weight"], tensors["lm_head.weight"])


def test_the_tree_has_exactly_the_expected_names_and_shapes(params):
    found = {
        ".".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params.tree)[0]
    }
    assert found == expected_shapes(params.config)


def test_the_prefix_model_may_be_missing(params, config, tensors):
    assert same(
        params,
        Params.from_pytree({n.removeprefix("model."): t for n, t in tensors.items()}, config),
    )


def test_nested_wrapped_and_tuple_keyed_trees_are_equal(params, config, tensors):
    assert same(params, Params.from_pytree(unflatten(tensors), config))
    assert same(params, Params.from_pytree({"params": unflatten(tensors)}, config))
    assert same(
        params,
        Params.from_pytree({tuple(name.split(".")): t for name, t in tensors.items()}, config),
    )


def test_a_flax_tree_has_its_kernels_transposed(params, config, tensors):
    flax = {}
    for name, tensor in tensors.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "weight":
            leaf = "embedding" if "embed" in module else "scale" if "norm" in module else "kernel"
        flax[f"{module}.{leaf}"] = tensor.T if leaf == "kernel" else tensor
    assert same(params, Params.from_pytree(unflatten(flax), config))


def test_the_native_tree_is_not_copied(params):
    again = Params.from_pytree(params.tree, params.config)
    assert same(params, again)
    assert again.tree["layers"]["q"]["weight"] is params.tree["layers"]["q"]["weight"]


class Weight(nnx.Module):
    def __init__(self, leaves):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))


class Layers(nnx.Module):
    def __init__(self, tree):
        for name, leaves in tree.items():
            setattr(self, name, Weight(leaves))


class Model(nnx.Module):
    def __init__(self, tree):
        self.embed, self.norm, self.head = (
            Weight(tree["embed"]),
            Weight(tree["norm"]),
            Weight(tree["head"]),
        )
        self.layers = Layers(tree["layers"])
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))  # state that is not a parameter


def test_an_nnx_module_and_its_state_are_accepted(params):
    model = Model(params.tree)
    assert same(params, Params.from_pytree(model, params.config))
    assert same(params, Params.from_pytree(nnx.state(model), params.config))
    assert same(params, Params.from_pytree(nnx.state(model, nnx.Param), params.config))


def test_a_tree_with_tied_embeddings_may_repeat_the_head(tiny, tensors):
    config = tiny.config(attention_bias=True, tie_word_embeddings=True)
    assert "head" not in Params.from_pytree(tensors, config).tree


def test_a_config_may_be_a_model_config_a_dict_or_a_transformers_object(params, config, tensors):
    class Theirs:
        def to_dict(self):
            return config

    assert same(params, Params.from_pytree(tensors, Theirs()))
    assert same(params, Params.from_pytree(tensors, config_from_hf(config)))
    with pytest.raises(ConfigError, match="config of type int"):
        Params.from_pytree(tensors, 3)


def test_an_invalid_tree_is_refused_by_parameter(config, tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(
        CheckpointError, match=r"missing: layers\.1\.mlp\.up_proj\.weight \[64, 32\]"
    ):
        Params.from_pytree({n: t for n, t in tensors.items() if n != name}, config)
    with pytest.raises(
        CheckpointError,
        match=r"layers\.1\.mlp\.up_proj\.weight has shape \[64, 31\], expected \[64, 32\]",
    ):
        Params.from_pytree(tensors | {name: tensors[name][:, :-1]}, config)
    with pytest.raises(
        CheckpointError,
        match=r"not part of this architecture: layers\.0\.self_attn\.q_norm\.weight",
    ):
        Params.from_pytree(
            tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)}, config
        )
    with pytest.raises(CheckpointError, match=r"norm\.weight is of dtype int32"):
        Params.from_pytree(tensors | {"model.norm.weight": np.ones(32, np.int32)}, config)
    with pytest.raises(CheckpointError, match="norm.weight is of type float, not an array"):
        Params.from_pytree(tensors | {"model.norm.weight": 1.0}, config)
    with pytest.raises(CheckpointError, match="contains no arrays"):
        Params.from_pytree({}, config)


def test_a_missing_head_hints_at_tied_embeddings(config, tensors):
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        Params.from_pytree({n: t for n, t in tensors.items() if n != "lm_head.weight"}, config)


def test_leaves_are_the_weights_and_static_fields_survive_transformations(params):
    tokenizer, scales = (
        Tokenizer(object()),
        {"k": np.ones(2)},
    )  # hashed and compared by identity
    params = dataclasses.replace(params, tokenizer=tokenizer, kv_scales=scales)
    assert len(jax.tree.leaves(params)) == len(expected_shapes(params.config))
    mapped = jax.tree.map(lambda x: x * 2, params)
    jitted = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p))(params)
    put = jax.device_put(params, jax.devices()[0])
    for result in (mapped, jitted, put):
        assert isinstance(result, Params)
        assert (
            result.config == params.config
            and result.tokenizer is tokenizer
            and result.kv_scales is scales
        )
    assert same(mapped, jitted) and same(params, put)


def test_the_same_params_do_not_compile_twice(params):
    traces = []

    @jax.jit
    def total(p):
        traces.append(p)
        return jnp.sum(p.tree["norm"]["weight"])

    total(params), total(jax.tree.map(jnp.copy, params))
    assert len(traces) == 1


def test_repr_has_architecture_and_size(params):
    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    count = sum(np.prod(shape) for shape in expected_shapes(params.config).values())
    assert (bf16.size, bf16.nbytes, bf16.dtype) == (count, 2 * count, jnp.bfloat16)
    assert repr(bf16) == (
        f"Params(LlamaForCausalLM, {count / 1e3:.1f} k parameters, {2 * count / 1e3:.1f} kB, "
        "bfloat16, tokenizer=no)"
    )
    assert repr(jax.tree.map(lambda x: None, params)) == "Params(LlamaForCausalLM)"


FAMILIES = sorted(
    path.parent for path in (Path(__file__).parent.parent / "references").glob("*/config.json")
)
ONLY_LOAD_READS = (
    "gpt_oss_mxfp4",
    "gemma3_vision",
)  # quantized weights, and weights of a vision encoder


@pytest.mark.parametrize(
    "folder", [f for f in FAMILIES if f.name not in ONLY_LOAD_READS], ids=lambda f: f.name
)
def test_from_pytree_equals_load_for_every_family(folder):
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    params = Params.from_pytree(tensors, json.loads((folder / "config.json").read_text()))
    loaded = load(folder)
    assert jax.tree.structure(params.tree) == jax.tree.structure(loaded.tree)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(params.tree), jax.tree.leaves(loaded.tree), strict=True)
    )
