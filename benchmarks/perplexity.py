"""Perplexity of SmolLM2 under float32, bf16 and FP8 caches, on a text.

    python -m benchmarks.perplexity --text FILE

The text is cut into windows of `--window` tokens, each scored on its own through the paged cache. Without `--text` the
documentation of this repository serves, which says something of the difference between caches and nothing of the model.
"""

import numpy as np

import jfp8kv
from benchmarks._common import console, header, parser, smollm2, table, text_of

CACHES = (
    ("float32", "auto"),
    ("bfloat16", "auto"),
    ("fp8_e4m3", "unit"),
    ("fp8_e4m3", "token_head"),
    ("fp8_e5m2", "unit"),
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--text", help="a text file")
    arguments.add_argument("--window", type=int, default=1024, help="tokens scored together")
    arguments.add_argument("--windows", type=int, default=20, help="how many windows, from the beginning of the text")
    given = arguments.parse_args()
    header()
    params = jfp8kv.load(given.model or smollm2(), dtype="float32")
    ids = params.tokenizer.encode(text_of(given.text))
    windows = [ids[i : i + given.window] for i in range(0, len(ids), given.window)][: given.windows]
    windows = [w for w in windows if len(w) > 1]
    console.print(f"{sum(map(len, windows))} tokens in {len(windows)} windows of {given.window}")
    rows, base = [], None
    for kv_dtype, kv_scales in CACHES:
        llm = jfp8kv.LLM(params, kv_cache_dtype=kv_dtype, kv_scales=kv_scales, kv_cache_memory="256MiB", max_num_seqs=1)
        scores = np.concatenate([llm.score(w) for w in windows]).astype(np.float64)
        value = float(np.exp(-scores.mean()))
        base = base or value
        bytes_ = llm.stats.kv_bytes_per_token
        rows.append([f"{kv_dtype}, {kv_scales} scales", f"{value:.3f}", f"{100 * (value / base - 1):+.2f}%", f"{bytes_:.0f}"])
        console.print(*rows[-1])
    table("Perplexity by cache", ["cache", "perplexity", "against float32", "KV bytes/token"], rows)


if __name__ == "__main__":
    main()
