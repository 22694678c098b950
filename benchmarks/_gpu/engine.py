"""Check the engine on this device: logits with kernels against XLA, and decode against prefill.

A small Llama with random weights uses all kernels. Summation in another order changes values a
little, and an FP8 code by a whole step, so logits are compared by norm. A token from decode must be
the top token of prefill at its position, or within the tolerance of it.
"""

from typing import Any

import numpy as np

import jfp8kv
from benchmarks._gpu.end_to_end import random_params
from benchmarks._gpu.session import Session
from jfp8kv.models.families import config_from_hf

# Relative difference of logits by norm: three matmuls in TF32 or bfloat16 per layer, and different
# FP8 rounding.
TOLERANCE = 2.0**-6
CACHES = {
    "bf16": {"kv_dtype": "bfloat16"},
    "e4m3": {"kv_dtype": "fp8_e4m3", "kv_scales": "unit"},
    "e5m2": {"kv_dtype": "fp8_e5m2", "kv_scales": "unit"},
    "e4m3, token and head scales": {"kv_dtype": "fp8_e4m3", "kv_scales": "token_head"},
}


def run(session: Session, config: dict[str, Any]) -> None:
    """Add two rows per cache format. Wrong ones fail the run."""
    part = config["engine"]
    params = random_params(config_from_hf(part["model"]))
    max_model_len = part["prompt"] + part["output"]
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, params.config.vocab, length).tolist()
        for length in (1, part["prompt"] // 3, part["prompt"])
    ]
    for name in session.each(part["caches"]):
        with session.guarded("engine", cache=name):

            def open_llm(attention: str, cache: str = name) -> jfp8kv.LLM:
                return jfp8kv.LLM(
                    params,
                    attention=attention,
                    max_num_seqs=8,
                    kv_cache_memory="64MiB",
                    max_model_len=max_model_len,
                    **CACHES[cache],
                )

            llm = open_llm(part["attention"])
            outputs = llm.generate(
                prompts, max_tokens=part["output"], temperature=0.0, ignore_eos=True
            )
            sequences = [[*out.prompt_token_ids, *out.token_ids] for out in outputs]
            logits = [llm.logits(sequence) for sequence in sequences]
            expected = open_llm("xla").logits(sequences[-1])
            error = np.linalg.norm(logits[-1] - expected) / np.linalg.norm(expected)
            what = f"logits with kernels and with XLA, {name}"
            session.judge("engine", name, what, error / TOLERANCE)
            gap = max(
                largest_gap(rows, sequence, len(prompt))
                for rows, sequence, prompt in zip(logits, sequences, prompts, strict=True)
            )
            session.judge("engine", name, f"decode and prefill logits, {name}", gap / TOLERANCE)


def largest_gap(logits: np.ndarray, token_ids: list[int], prompt: int) -> float:
    """Return the largest gap between the logits of a generated token and of the top token.

    Relative to the largest logit at that position. `prompt`: number of prompt tokens.
    """
    rows = logits[prompt - 1 : -1]
    new_tokens = token_ids[prompt:]
    gaps = rows.max(axis=1) - rows[np.arange(len(new_tokens)), new_tokens]
    return float((gaps / np.abs(rows).max(axis=1)).max())
