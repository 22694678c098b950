"""jfp8kv's own attention, every implementation that dispatch knows, against float64 on the device at hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.batches import share_of_bound
from benchmarks._gpu.session import Session
from jfp8kv.attention.dispatch import AttentionBackend, select_backend
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import LayerScales, new_pool
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import BFLOAT16, E4M3, E5M2
from pallas_kernels.paged_prefill.reference import paged_prefill_reference

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "bf16": BFLOAT16}
SOFTCAP = 5.0


def check(session: Session, config: dict[str, Any], seed: int) -> None:
    """A chunk of a text that is written to pages and attended to, in every element type; dynamic scales for FP8."""
    for element in config["elements"][: 1 if session.dry_run else None]:
        for dynamic in (False, True)[: 1 + FORMATS[element].is_fp8]:
            for name in (
                ("reference", "pallas_interpret")
                if session.dry_run
                else ("reference", "xla", "pallas")
            ):
                what = f"jfp8kv {name}, {element}{', token and head scales' if dynamic else ''}"
                error = np.inf
                with session.guarded(what):
                    error = _error(
                        select_backend(name), element, dynamic, np.random.default_rng(seed)
                    )
                session.judge(f"jfp8kv {name}", element, what, error)


def _error(
    choice: AttentionBackend, element: str, dynamic: bool, rng: np.random.Generator
) -> float:
    """The worst error of two layers' queries in float32, as a share of what is allowed."""
    heads, group, channels, page_size, tokens, chunk = 2, 2, 16, 8, 37, 9
    fmt, layers = FORMATS[element], 2
    sizes = {"kv_heads": heads, "head_dim": channels}
    layout = PoolLayout.uniform(
        fmt, layers, dynamic=dynamic, keys_transposed=choice.keys_transposed
    )
    pages = new_pool(layout, num_pages=8, page_size=page_size, **sizes)
    scales = None if dynamic else LayerScales.of(KVScales.unit(layers), layers=layers, **sizes)
    table = jnp.asarray(rng.permutation(8)[:5], jnp.int32)
    k, v = (jnp.asarray(rng.normal(size=(tokens, heads, channels)), jnp.float32) for _ in "kv")
    q = jnp.asarray(rng.normal(size=(chunk, heads * group, channels)), jnp.float32)
    at = AttentionMetadata(table, jnp.int32(tokens - chunk), jnp.int32(tokens), jnp.int32(tokens))
    windows = (0, 7)
    options = AttentionOptions(
        window=jnp.asarray(windows, jnp.int32), sm_scale=channels**-0.5, softcap=SOFTCAP
    )
    worst = 0.0
    for layer, window in enumerate(windows):
        place = {"layer": jnp.int32(layer), "page_table": table}
        pages = jax.jit(choice.write)(
            pages, scales, k, v, start=jnp.int32(0), length=jnp.int32(tokens), **place
        )
        got = jax.jit(choice.attend)(q, pages, scales, options, at, layer=place["layer"])
        exponents = (
            {"k_exponent": np.asarray(pages.k_exponent), "v_exponent": np.asarray(pages.v_exponent)}
            if dynamic
            else {}
        )
        want, bound = paged_prefill_reference(
            np.asarray(q), np.asarray(pages.k), np.asarray(pages.v), table[None], [tokens], [0], [chunk],
            first_row=layer * pages.num_pages, window=window, softcap=SOFTCAP, **exponents,
        )  # fmt: skip
        worst = max(worst, share_of_bound(got, want, bound))
    return worst
