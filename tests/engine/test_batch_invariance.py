"""Batch invariance of seeded requests with a real model.

There a last-bit difference in the order of a sum can change a code of the FP8 cache.
"""

import jfp8kv
from jfp8kv import SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time there was", "In the year 1969"]


def test_seeded_output_of_a_real_model_does_not_depend_on_the_batch(smollm2_path) -> None:
    """Without `BATCH_INVARIANT_ROWS` the second output differs from its 13th token on."""
    llm = jfp8kv.LLM(
        smollm2_path, kv_dtype="fp8_e4m3", kv_cache_memory="16MiB", prefix_caching=False
    )
    seeded = [
        SamplingParams(seed=seed, temperature=0.7, max_tokens=16, ignore_eos=True)
        for seed in range(len(PROMPTS))
    ]
    batched = [out.token_ids for out in llm.generate(PROMPTS, seeded)]
    alone = [
        llm.generate(prompt, params)[0].token_ids
        for prompt, params in zip(PROMPTS, seeded, strict=True)
    ]
    assert alone == batched
    decodes = [step for step in llm.compile_report().steps if step.step == "decode"]
    assert {step.requests for step in decodes} == {8}
    llm.generate(PROMPTS[0], max_tokens=1)
    assert llm.compile_report().steps[-1].requests < 8, "unseeded requests are not padded to 8"
