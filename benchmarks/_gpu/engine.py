"""The whole engine on the device at hand: its logits by kernels against XLA's, and its texts against its own logits.

Prefill, the write, decode and products all take part, in a small Llama of random weights. What one engine sums in another order
than the other moves a value a little, and one that lies between two codes of an FP8 cache moves by a whole step: so logits are
held against each other by their norm. A token that decode made must be the likeliest that prefill finds at its place, or lie as
near to it as logits may differ.
"""

from typing import Any

import numpy as np

import jfp8kv
from benchmarks._gpu.end_to_end import random_params
from benchmarks._gpu.session import Session
from jfp8kv.models.families import config_from_hf

ALIKE = (
    2.0**-6
)  # of the norm of logits: three products of TF32 or bfloat16 a layer, and roundings to FP8 that fall elsewhere
CACHES = {
    "bf16": {"kv_dtype": "bfloat16"},
    "e4m3": {"kv_dtype": "fp8_e4m3", "kv_scales": "unit"},
    "e5m2": {"kv_dtype": "fp8_e5m2", "kv_scales": "unit"},
    "e4m3, token and head scales": {"kv_dtype": "fp8_e4m3", "kv_scales": "token_head"},
}


def run(session: Session, config: dict[str, Any]) -> None:
    """Two rows for each format of the cache; the run fails where one is wrong."""
    asked = config["engine"]
    params = random_params(config_from_hf(asked["model"]))
    sizes = {
        "max_num_seqs": 8,
        "kv_cache_memory": "64MiB",
        "max_model_len": asked["prompt"] + asked["output"],
    }
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(0, params.config.vocab, n).tolist()
        for n in (1, asked["prompt"] // 3, asked["prompt"])
    ]
    for name in session.each(asked["caches"]):
        with session.guarded("engine", cache=name):
            kernels = jfp8kv.LLM(params, attention=asked["attention"], **CACHES[name], **sizes)
            outputs = kernels.generate(
                prompts, max_tokens=asked["output"], temperature=0.0, ignore_eos=True
            )
            texts = [[*out.prompt_token_ids, *out.token_ids] for out in outputs]
            logits = [kernels.logits(text) for text in texts]
            theirs = jfp8kv.LLM(params, attention="xla", **CACHES[name], **sizes).logits(texts[-1])
            apart = np.linalg.norm(logits[-1] - theirs) / np.linalg.norm(theirs)
            session.judge("engine", name, f"logits by kernels and by XLA, {name}", apart / ALIKE)
            worst = max(
                behind(rows, text, len(p))
                for rows, text, p in zip(logits, texts, prompts, strict=True)
            )
            session.judge(
                "engine", name, f"texts and the engine's own logits, {name}", worst / ALIKE
            )


def behind(logits: np.ndarray, text: list[int], prompt: int) -> float:
    """How far the worst generated token is behind the likeliest one at its place, by the largest logit there."""
    rows, made = logits[prompt - 1 : -1], text[prompt:]
    gaps = rows.max(axis=1) - rows[np.arange(len(made)), made]
    return float((gaps / np.abs(rows).max(axis=1)).max())
