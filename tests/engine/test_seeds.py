"""A seed fixes a text, whoever decodes beside it: with a real model, where a last bit of a sum can flip a code of the cache."""

import jfp8kv
from jfp8kv import SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time there was", "In the year 1969"]


def test_seeded_texts_of_a_real_model_do_not_depend_on_their_company(smollm2_path) -> None:
    """Without `BATCH_INVARIANT_ROWS` the second parts from itself at its 13th token."""
    llm = jfp8kv.LLM(
        smollm2_path, kv_dtype="fp8_e4m3", kv_cache_memory="16MiB", prefix_caching=False
    )
    seeded = [
        SamplingParams(seed=i, temperature=0.7, max_tokens=16, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    together = [out.token_ids for out in llm.generate(PROMPTS, seeded)]
    assert [
        llm.generate(prompt, one)[0].token_ids for prompt, one in zip(PROMPTS, seeded, strict=True)
    ] == together
    assert {each.requests for each in llm.compile_report().steps if each.step == "decode"} == {8}
    llm.generate(PROMPTS[0], max_tokens=1)
    assert llm.compile_report().steps[-1].requests < 8, (
        "without a seed nobody waits for rows that are not there"
    )
