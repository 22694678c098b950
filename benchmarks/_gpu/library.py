"""Compare every attention backend of jfp8kv with float64 references on this device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._gpu.random_batches import fraction_of_bound
from benchmarks._gpu.session import Session
from jfp8kv.attention.dispatch import AttentionBackend, select_backend
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions
from jfp8kv.cache.layout import PoolLayout
from jfp8kv.cache.pool import LayerScales, new_pool
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.formats import BFLOAT16, E4M3, E5M2
from pallas_kernels import LayerView
from pallas_kernels.error_bound import paged_prefill_reference

FORMATS = {"e4m3": E4M3, "e5m2": E5M2, "bf16": BFLOAT16}
SOFTCAP = 5.0


def check(session: Session, config: dict[str, Any], seed: int) -> None:
    """Write a chunk of a sequence to pages and attend to it, with every element type and scales."""
    elements = config["elements"][: 1 if session.dry_run else None]
    backends = ("reference", "xla", "pallas")
    if session.dry_run:
        backends = ("reference", "pallas_interpret")
    for element in elements:
        for dynamic in (False, True) if FORMATS[element].is_fp8 else (False,):
            for name in backends:
                scales = ", token and head scales" if dynamic else ""
                what = f"jfp8kv {name}, {element}{scales}"
                error = np.inf
                with session.guarded(what):
                    rng = np.random.default_rng(seed)
                    error = _error(select_backend(name), element, dynamic, rng)
                session.judge(f"jfp8kv {name}", element, what, error)


def _error(
    backend: AttentionBackend, element: str, dynamic: bool, rng: np.random.Generator
) -> float:
    """Return the largest error of float32 queries in two layers, as a fraction of the bound."""
    kv_heads, group, head_dim, page_size, tokens, chunk = 2, 2, 16, 8, 37, 9
    layers = 2
    layout = PoolLayout.uniform(
        FORMATS[element], layers, dynamic=dynamic, keys_transposed=backend.keys_transposed
    )
    pages = new_pool(layout, num_pages=8, page_size=page_size, kv_heads=kv_heads, head_dim=head_dim)
    scales = None
    if not dynamic:
        unit = KVScales.unit(layers)
        scales = LayerScales.of(unit, layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    page_table = jnp.asarray(rng.permutation(8)[:5], jnp.int32)
    k = jnp.asarray(rng.normal(size=(tokens, kv_heads, head_dim)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(tokens, kv_heads, head_dim)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(chunk, kv_heads * group, head_dim)), jnp.float32)
    length = jnp.int32(tokens)
    metadata = AttentionMetadata(page_table, jnp.int32(tokens - chunk), length, length)
    windows = (0, 7)
    options = AttentionOptions(
        window=jnp.asarray(windows, jnp.int32), sm_scale=head_dim**-0.5, softcap=SOFTCAP
    )
    write, attend = jax.jit(backend.write), jax.jit(backend.attend)
    largest = 0.0
    for layer, window in enumerate(windows):
        pages = write(
            pages,
            scales,
            k,
            v,
            layer=jnp.int32(layer),
            page_table=page_table,
            start=jnp.int32(0),
            length=length,
        )
        got = attend(q, pages, scales, options, metadata, layer=jnp.int32(layer))
        view = LayerView(
            np.asarray(pages.k),
            np.asarray(pages.v),
            first_row=layer * pages.num_pages,
            k_exponent=np.asarray(pages.k_exponent) if dynamic else None,
            v_exponent=np.asarray(pages.v_exponent) if dynamic else None,
            window=window,
        )
        want, bound = paged_prefill_reference(
            np.asarray(q), view, page_table[None], [tokens], [0], [chunk], softcap=SOFTCAP
        )
        largest = max(largest, fraction_of_bound(got, want, bound))
    return largest
