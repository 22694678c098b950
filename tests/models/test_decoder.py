"""The decoder: FP8 rounding against PyTorch, scales against the oracle, and no cache.

`test_families` has every family.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jfp8kv
from jfp8kv.checkpoint.hf_folder import read_config
from jfp8kv.models.config import ExpertsConfig, ModelConfig, RopeConfig
from jfp8kv.models.decoder import Decoder, bind
from jfp8kv.models.families import config_from_hf
from jfp8kv.models.names import expected_shapes
from tests.references import oracle

pytestmark = pytest.mark.quick_compile

REFERENCES = sorted((Path(__file__).parent.parent / "references").glob("llama_*"))
FAMILIES = sorted(path.parent for path in REFERENCES[0].parent.glob("*/config.json"))
CASES = pytest.mark.parametrize("folder", REFERENCES, ids=lambda f: f.name)
ENGINE = {
    "kv_cache_memory": "1MB",
    "max_model_len": 96,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,
    "page_size": 16,
}


def rms(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(np.asarray(want, np.float64) ** 2)))


def engine(folder: Path, kv_dtype: str, **options) -> jfp8kv.LLM:
    return jfp8kv.LLM(jfp8kv.load(folder, dtype="float32"), kv_dtype=kv_dtype, **ENGINE | options)


@pytest.mark.parametrize(
    ("folder", "fmt"),
    [
        *((folder, "e4m3") for folder in REFERENCES),
        *((folder, "e5m2") for folder in REFERENCES[:2]),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_an_fp8_cache_rounds_keys_and_values_like_pytorch(folder, fmt) -> None:
    reference = np.load(folder / "reference.npz")
    llm = engine(folder, f"fp8_{fmt}")
    assert rms(llm.logits(reference["tokens"])[-4:], reference[f"last_logits_{fmt}"]) <= 1e-5
    out = llm.generate(
        reference["tokens"].tolist(), max_tokens=24, temperature=0.0, ignore_eos=True
    )
    assert out[0].token_ids == reference[f"greedy_{fmt}"].tolist()


def static_scales(config: ModelConfig, granularity: str) -> jfp8kv.KVScales:
    heads, dim = {
        "tensor": (1, 1),
        "head": (config.kv_heads, 1),
        "channel": (config.kv_heads, config.head_dim),
    }[granularity]
    rng = np.random.default_rng(3)
    return jfp8kv.KVScales(*rng.uniform(0.002, 0.05, (2, config.layers, heads, dim)))


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel", "token_head"])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_every_granularity_of_scales_agrees_with_the_oracle(granularity, fmt) -> None:
    """The library multiplies by the inverse of a scale, so values may round differently: 5e-3."""
    folder = REFERENCES[0].parent / "llama_gqa"
    tokens = np.load(folder / "reference.npz")["tokens"]
    if granularity == "token_head":
        llm = engine(folder, f"fp8_{fmt}", kv_scales=granularity)
        store = oracle.fp8_store(fmt, dynamic=True)
    else:
        scales = static_scales(jfp8kv.load(folder).config, granularity)
        llm = engine(folder, f"fp8_{fmt}", kv_scales=scales)
        store = oracle.fp8_store(fmt, scales.k, scales.v)
    assert rms(llm.logits(tokens), oracle.forward(folder, tokens, store)) <= 5e-3


def plain_attention(config: ModelConfig):
    """Return `attend` without a cache: over the keys and values of the call."""

    def attend(layer, q, k, v, carry):
        tokens, group = q.shape[0], config.group
        k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q, k, precision="highest") * config.attention_scale
        scores = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), scores, -jnp.inf)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v, precision="highest"), carry + 1

    return attend


@CASES
def test_the_model_runs_without_a_cache_and_passes_the_carry_through(folder) -> None:
    reference, params = np.load(folder / "reference.npz"), jfp8kv.load(folder, dtype="float32")
    decoder = bind(params.config, params.tree, params.dtype)
    tokens = jnp.asarray(reference["tokens"])
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, calls = decoder(
        tokens, positions, attend=plain_attention(params.config), carry=jnp.int32(0)
    )
    assert rms(np.asarray(decoder.logits(hidden)), reference["logits"]) <= 1e-5
    assert calls == params.config.layers


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)
def test_the_decoder_has_the_expected_parameters(folder) -> None:
    config = config_from_hf(read_config(folder))
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config)), nnx.Param)
    found = {".".join(map(str, path)): value.shape for path, value in nnx.to_flat_state(state)}
    assert found == {name: tuple(shape) for name, shape in expected_shapes(config).items()}


def test_an_nnx_module_generates_the_same_tokens_as_its_parameters() -> None:
    config = jfp8kv.load(REFERENCES[0].parent / "llama_gqa").config
    module = Decoder(config, dtype=np.dtype("float32"), rngs=nnx.Rngs(7))
    params = jfp8kv.Params.from_pytree(module, config)
    out = jfp8kv.LLM(params, **ENGINE).generate(
        [[5, 6, 7]], max_tokens=4, temperature=0.0, ignore_eos=True
    )
    tokens = jnp.int32([5, 6, 7, *out[0].token_ids[:3]])
    hidden, _ = module(
        tokens, jnp.arange(6, dtype=jnp.int32), attend=plain_attention(config), carry=jnp.int32(0)
    )
    assert np.asarray(module.logits(hidden)).argmax(-1)[2:].tolist() == out[0].token_ids


def mixed(layers: int) -> dict:
    """Return options in which the layers of one model differ in everything they can."""
    return {
        "ropes": (RopeConfig(), RopeConfig(1e6, "linear", 4.0)),
        "layer_ropes": tuple((0, 1, -1, 0)[i % 4] for i in range(layers)),
        "windows": tuple((8, 0)[i % 2] for i in range(layers)),
        "experts": ExpertsConfig(4, 2, 16, tuple(range(0, layers, 2))),
        "sinks": True,
        "qk_norm": "head",
        "post_norm": True,
    }


@pytest.mark.parametrize("differ", [lambda layers: {}, mixed], ids=["uniform", "mixed"])
def test_the_traced_program_does_not_grow_with_depth(differ) -> None:
    def equations(layers: int) -> int:
        config = ModelConfig(
            "LlamaForCausalLM", 64, 32, layers, 2, 1, 16, 48, 128, **differ(layers)
        )
        decoder = nnx.eval_shape(lambda: Decoder(config))
        graph, state = nnx.split(decoder)

        def run(state, tokens):
            attend = plain_attention(config)
            return nnx.merge(graph, state)(tokens, tokens, attend=attend, carry=jnp.int32(0))

        return str(jax.make_jaxpr(run)(state, jax.ShapeDtypeStruct((4,), jnp.int32))).count(" = ")

    assert equations(4) == equations(32)
