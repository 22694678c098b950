"""Texts that begin alike share pages in models whose layers differ, or whose ropes depend on a text's length: the tokens are
those of an engine that shares nothing, with more memory and with less."""

import numpy as np
import pytest

import jfp8kv
from tests.engines import only, poisoned
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

SIZES = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 4, "max_num_batched_tokens": 16}
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


@pytest.mark.parametrize(
    "family", ["gemma3_new", "gpt_oss_saved", "phi3_longrope_cross", "rope_dynamic_cross"]
)
def test_sharing_and_preemption_change_no_text(family) -> None:
    params = jfp8kv.load(REFERENCES[0].parent / family, dtype="float32")

    def engine(*, sharing: bool) -> jfp8kv.LLM:
        cache = {"kv_dtype": "fp8_e4m3", "kv_cache_memory": "2MB", "prefix_caching": sharing}
        return poisoned(jfp8kv.LLM(params, **cache, **SIZES))

    rng = np.random.default_rng(0)
    beginning = rng.integers(5, params.config.vocab, 40).tolist()
    prompts = [
        beginning[: int(rng.integers(12, 40))] + rng.integers(5, params.config.vocab, 5).tolist()
        for _ in range(7)
    ]
    apart = engine(sharing=False)
    want = [out.token_ids for out in apart.generate(prompts, **GREEDY)]
    assert apart.stats.prefix_hit_tokens == 0
    plenty = apart._engine.scheduler.kv_manager.allocator.num_pages
    few = apart._engine.requirements.total_pages(64) + 6
    for pages in (plenty, few):
        llm = engine(sharing=True)
        with only(llm, pages):
            for _ in range(2):
                assert [out.token_ids for out in llm.generate(prompts, **GREEDY)] == want
        assert llm.stats.prefix_hit_tokens > 0 or pages == few  # few may have been forgotten
