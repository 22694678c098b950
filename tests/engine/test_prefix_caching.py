"""Prefix caching in models with windows, or with RoPE that depends on the sequence's length.

Tokens are those of an engine without prefix caching, with ample and with little memory.
"""

import numpy as np
import pytest

import jfp8kv
from tests.engines import limit_free_pages, poisoned
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SIZES = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 4, "max_num_batched_tokens": 16}
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
FAMILIES = ["gemma3_new", "gpt_oss_saved", "phi3_longrope_cross", "rope_dynamic_cross"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_caching_and_preemption_change_no_output(family) -> None:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")

    def new_llm(*, prefix_caching: bool) -> jfp8kv.LLM:
        return poisoned(
            jfp8kv.LLM(
                params,
                kv_dtype="fp8_e4m3",
                kv_cache_memory="2MB",
                prefix_caching=prefix_caching,
                **SIZES,
            )
        )

    rng = np.random.default_rng(0)
    prefix = rng.integers(5, params.config.vocab, 40).tolist()
    prompts = [
        prefix[: int(rng.integers(12, 40))] + rng.integers(5, params.config.vocab, 5).tolist()
        for _ in range(7)
    ]
    without = new_llm(prefix_caching=False)
    want = [out.token_ids for out in without.generate(prompts, **GREEDY)]
    assert without.stats.prefix_hit_tokens == 0
    ample = without.engine.num_pages
    few = without.engine.requirements.total_pages(64) + 6
    for pages in (ample, few):
        llm = new_llm(prefix_caching=True)
        with limit_free_pages(llm, pages):
            for _ in range(2):
                assert [out.token_ids for out in llm.generate(prompts, **GREEDY)] == want
        # With few pages, those of the prefix may have been evicted.
        assert llm.stats.prefix_hit_tokens > 0 or pages == few
