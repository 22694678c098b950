"""The engine with interpreted GPU kernels: the same tokens as with XLA, from poisoned pools."""

import jax
import pytest

import jfp8kv
from jfp8kv.cache.pool import poison
from jfp8kv.core.errors import NotSupported
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SIZES = {
    "max_model_len": 64,
    "max_num_seqs": 2,
    "page_size": 8,
    "kv_cache_memory": "400kB",
    "max_num_batched_tokens": 64,
}
PROMPTS = [list(range(3, 30)), [7, 8]]  # prefill and decode: two programs


def tokens(family: str, attention: str, **cache) -> tuple[list[list[int]], str]:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")
    llm = jfp8kv.LLM(params, attention=attention, **SIZES, **cache)
    nan = 0xFF if llm.engine.pages.v_bits.dtype == "uint8" else 0x7FFF
    llm.engine.pages = poison(llm.engine.pages, nan)
    sampling = jfp8kv.SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    return [out.token_ids for out in llm.generate(PROMPTS, sampling)], llm.attention


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llama_gqa", {"kv_dtype": "fp8_e4m3"}),
        # Windows and a cap on attention scores.
        ("gemma2_caps", {"kv_dtype": "fp8_e5m2", "kv_scales": "token_head"}),
        ("gpt_oss_saved", {"kv_dtype": "bfloat16"}),  # sinks
    ],
    ids=lambda x: x if isinstance(x, str) else x["kv_dtype"],
)
def test_output_tokens_are_the_same_with_kernels_and_with_xla(family, cache) -> None:
    by_kernels, why = tokens(family, "pallas_interpret", **cache)
    assert why.startswith("pallas_interpret: requested")
    assert by_kernels == tokens(family, "xla", **cache)[0]


def test_layers_that_kernels_cannot_read_use_xla_and_are_named() -> None:
    mixed = {"kv_dtype": {"default": "fp8_e4m3", "skip": [0]}}
    by_kernels, why = tokens("llama_gqa", "pallas_interpret", **mixed)
    assert "'xla' for layers of bfloat16: pages of uint8 with byte-split bfloat16" in why
    assert by_kernels == tokens("llama_gqa", "xla", **mixed)[0]


def test_requesting_kernels_without_a_gpu_raises_with_what_to_try() -> None:
    assert jax.default_backend() == "cpu"
    with pytest.raises(NotSupported, match="needs an NVIDIA GPU.*use 'xla'"):
        jfp8kv.LLM(REFERENCES[0], attention="pallas")
