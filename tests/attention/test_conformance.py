"""Every attention backend agrees with a NumPy loop, or raises exactly `NotSupported`.

Both sides read the same stored bytes, so they differ by float32 rounding only. With n keys and
head_dim d, scores have an error of at most about d * 2**-24 of sum(|q||k|). The output has one of
n * 2**-24 of max|v|, plus the effect of the scores: `exp` turns an absolute error e of a score into
a relative error e of its weight. The tolerance is that bound.
"""

import dataclasses
import itertools
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings

from jfp8kv.attention import dispatch
from jfp8kv.attention.interface import AttentionMetadata, AttentionOptions
from jfp8kv.cache.groups import LayerGroups
from jfp8kv.cache.layout import LayerCacheSpec, PoolLayout, slot_widths
from jfp8kv.cache.pool import KVPool, LayerScales, new_pool
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.errors import ConfigError, NotSupported
from jfp8kv.core.formats import E4M3, E5M2, FLOAT32, FORMATS, encode_numpy

LAYERS, PAGES, SIZE = 2, 12, 4
CONFORMANCE = yaml.safe_load(
    (Path(__file__).parents[2] / "configs" / "bench" / "attention.yaml").read_text()
)["conformance"]
SHAPES = CONFORMANCE["shapes"]
PALLAS = (
    "pallas_interpret",
    pytest.mark.quick_compile,
)  # interpreted kernels are large programs for XLA:CPU
BACKENDS = ("reference", "xla", pytest.param(PALLAS[0], marks=PALLAS[1]))
IN_BOTH_LAYOUTS = pytest.mark.parametrize(
    ("name", "keys_transposed"),
    [
        *itertools.product(("reference", "xla"), (True, False)),
        pytest.param(PALLAS[0], False, marks=PALLAS[1]),  # reads keys like values only
    ],
)
EPS = 2.0**-24


def options_of(given: dict) -> dict:
    """Return the attention options of one entry of the config, as arrays by layer."""
    options = dict(given)
    if "window" in options:
        options["window"] = jnp.int32(options["window"])
    if "sinks" in options:
        heads = SHAPES["decode"]["kv_heads"] * SHAPES["decode"]["group"]
        options["sinks"] = jnp.float32(
            np.linspace(*options["sinks"], LAYERS * heads).reshape(LAYERS, heads)
        )
    return options


OPTIONS = {name: options_of(given) for name, given in CONFORMANCE["options"].items()}


class Case:
    """Random requests over one pool whose unwritten slots are poisoned."""

    def __init__(
        self,
        *,
        fmt=E4M3,
        keys_transposed=True,
        kv_heads=2,
        group=3,
        dim=16,
        lengths=(5,),
        tokens=1,
        scales="head",
        seed=0,
        offset=0.0,
        **options,
    ):
        rng = np.random.default_rng(seed)
        self.lengths, self.tokens, self.fmt, self.keys_transposed = (
            np.int32(lengths),
            tokens,
            fmt,
            keys_transposed,
        )
        self.table = np.full((len(lengths), 5), PAGES, np.int32)
        order = iter(rng.permutation(PAGES))
        for i, length in enumerate(lengths):
            used = -(-length // SIZE)
            self.table[i, :used] = list(itertools.islice(order, used))
        dynamic = scales == "token_head"
        shape = {
            "tensor": (LAYERS, 1, 1),
            "head": (LAYERS, kv_heads, 1),
            "channel": (LAYERS, kv_heads, dim),
        }
        self.scales = None
        if not dynamic:
            k_scale, v_scale = rng.uniform(0.01, 0.05, (2, *shape[scales]))
            self.k_offset = offset * rng.normal(size=(LAYERS, kv_heads, dim))
            static = KVScales(k_scale, v_scale, self.k_offset if offset else None)
            self.scales = LayerScales.of(static, layers=LAYERS, kv_heads=kv_heads, head_dim=dim)
        self.layer = int(rng.integers(LAYERS))
        stored = [
            self._stored(rng, which, dynamic, kv_heads, dim) for which in ("k_inverse", "v_inverse")
        ]
        (k, k_exponent), (v, v_exponent) = stored
        layout = PoolLayout.uniform(fmt, LAYERS, dynamic=dynamic, keys_transposed=keys_transposed)
        self.pages = KVPool(self.in_layout(k), v, k_exponent, v_exponent, layout=layout)
        self.whole = self.pages
        self.q = rng.normal(size=(len(lengths), tokens, kv_heads * group, dim)).astype(np.float32)
        self.options = AttentionOptions(sm_scale=dim**-0.5, **options)

    def in_layout(self, keys: jax.Array) -> jax.Array:
        """Convert keys between tokens before channels and the layout of the pool."""
        return keys.swapaxes(2, 3) if self.keys_transposed else keys

    def _stored(self, rng, inverse: str, dynamic: bool, kv_heads: int, dim: int) -> tuple:
        """Return a poisoned pool with the tokens of every request, written by NumPy."""
        bits = np.full(
            (LAYERS * PAGES, kv_heads, SIZE, dim),
            self.fmt.nan_code or np.nan,
            self.fmt.storage_dtype,
        )
        exponents = np.full(bits.shape[:3], 255, np.uint8)
        for i, length in enumerate(self.lengths):
            for position, x in enumerate(
                rng.normal(size=(length, kv_heads, dim)).astype(np.float32)
            ):
                slot = (
                    self.layer * PAGES + self.table[i, position // SIZE],
                    slice(None),
                    position % SIZE,
                )
                if dynamic:
                    exponent = np.ceil(
                        np.log2(np.abs(x).max(-1).astype(np.float64) / self.fmt.largest)
                    )
                    exponents[slot] = exponent + 127
                    factor = np.float32(2.0**-exponent)[:, None]
                else:
                    factor = np.asarray(getattr(self.scales, inverse))[self.layer]
                bits[slot] = encode_numpy(x * factor, self.fmt)
        return jnp.asarray(bits), jnp.asarray(exponents) if dynamic else None

    def byte_split(self) -> "Case":
        """Byte-split the stored elements: the other layer of the pool has another format."""
        other = LayerCacheSpec(FLOAT32 if self.fmt.itemsize < 4 else E5M2)
        specs = [self.pages.layout.specs[0]] * LAYERS
        specs[1 - self.layer] = other
        groups = LayerGroups.of([0] * LAYERS, slot_widths(specs))
        layout = PoolLayout.of(specs, groups, keys_transposed=self.keys_transposed)
        rows = slice(self.layer * PAGES, (self.layer + 1) * PAGES)

        def cut(bits) -> jax.Array:
            pool = np.full((layout.depth * PAGES, *bits.shape[1:]), 0xFF, np.uint8)
            elements = np.ascontiguousarray(np.asarray(bits)[rows])[..., None].view(
                np.uint8
            )  # low byte first
            for part in range(self.fmt.itemsize):
                first = (layout.slots[self.layer] + part) * PAGES
                pool[first : first + PAGES] = elements[..., self.fmt.itemsize - 1 - part]
            return jnp.asarray(pool)

        p = self.pages
        exponents = [None if e is None else e[rows] for e in (p.k_exponent, p.v_exponent)]
        self.whole, self.pages = p, KVPool(cut(p.k_bits), cut(p.v_bits), *exponents, layout=layout)
        return self

    @property
    def starts(self) -> np.ndarray:
        return np.maximum(self.lengths - self.tokens, 0).astype(np.int32)

    def run(self, name: str) -> np.ndarray:
        choice = dispatch.select_backend(name)
        attend, stored = choice.attend, self.pages
        if self.keys_transposed and not choice.keys_transposed:
            layout = dataclasses.replace(stored.layout, keys_transposed=False)
            stored = dataclasses.replace(stored, k_bits=stored.k_bits.swapaxes(2, 3), layout=layout)

        def one(q, table, start, length, pages):
            at = AttentionMetadata(table, start, length, jnp.int32(max(self.lengths)))
            shown = pages.for_spec(pages.layout.specs[self.layer])
            return attend(q, shown, self.scales, self.options, at, layer=jnp.int32(self.layer))

        batched = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None)))
        return np.asarray(batched(self.q, self.table, self.starts, self.lengths, stored))

    def values(self, bits, exponent, scale, request: int, head: int) -> np.ndarray:
        """Return the dequantized tokens of one request and head, float64 `[length, head_dim]`.

        `bits` has tokens before channels.
        """
        out = []
        for position in range(self.lengths[request]):
            row, offset = (
                self.layer * PAGES + self.table[request, position // SIZE],
                position % SIZE,
            )
            stored = np.asarray(bits)[row, head, offset].view(self.fmt.dtype).astype(np.float64)
            factor = (
                np.asarray(scale)[self.layer, head]
                if exponent is None
                else 2.0 ** (float(np.asarray(exponent)[row, head, offset]) - 127)
            )
            out.append(stored * factor)
        return np.array(out).reshape(-1, self.q.shape[-1])

    def expect(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the outputs of a float64 loop, and the bound on the float32 error."""
        out, bound = np.zeros_like(self.q, np.float64), np.zeros(self.q.shape, np.float64)
        pages, o = self.whole, self.options
        group = self.q.shape[2] // pages.k_bits.shape[1]
        for r, t, h in np.ndindex(self.q.shape[:3]):
            position = self.starts[r] + t
            if position >= self.lengths[r]:
                continue
            k = self.values(
                self.in_layout(pages.k_bits),
                pages.k_exponent,
                None if self.scales is None else self.scales.k,
                r,
                h // group,
            )
            v = self.values(
                pages.v_bits,
                pages.v_exponent,
                None if self.scales is None else self.scales.v,
                r,
                h // group,
            )
            window = 0 if o.window is None else int(o.window[self.layer])
            first = max(0, position - window + 1) if window else 0
            k, v, q = (
                k[first : position + 1],
                v[first : position + 1],
                self.q[r, t, h].astype(np.float64),
            )
            offset = 0.0 if self.scales is None else self.k_offset[self.layer, h // group]
            scores = (k + offset) @ q * o.sm_scale
            error = (len(q) + 8) * EPS * ((np.abs(k) + np.abs(offset)) @ np.abs(q)) * o.sm_scale
            if o.softcap is not None:
                scores = o.softcap * np.tanh(scores / o.softcap)
                error = error + 8 * EPS * o.softcap
            sink = [] if o.sinks is None else [float(o.sinks[self.layer, h])]
            weights = np.exp(scores - max([*scores, *sink]))
            weights = weights / (
                weights.sum() + np.exp(np.array(sink) - max([*scores, *sink])).sum()
            )
            out[r, t, h] = weights @ v
            bound[r, t, h] = (2 * error.max() + (2 * len(k) + 16) * EPS) * (
                weights @ np.abs(v)
            ) + 1e-30
        return out, bound

    def check(self, name: str) -> None:
        got, (want, bound) = self.run(name), self.expect()
        assert np.all(np.isfinite(got)), "an unwritten slot reached the output"
        live = self.starts[:, None] + np.arange(self.tokens) < self.lengths[:, None]
        assert np.all(np.abs(got - want)[live] <= bound[live])
        empty = np.broadcast_to((self.lengths == 0)[:, None], live.shape)
        if self.options.sinks is None:
            assert np.all(got[empty] == 0), "a query without keys gives zeros"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scales", ["tensor", "head", "channel", "token_head"])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_fp8_pages_with_every_granularity_of_scales(name, scales, fmt) -> None:
    Case(fmt=fmt, scales=scales, lengths=(0, 1, 3, 4, 5, 13)).check(name)


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_every_format_in_decode_and_prefill(name, fmt, keys_transposed) -> None:
    for tokens in (1, 7):
        case = Case(
            fmt=fmt,
            scales="tensor",
            lengths=(7, 8, 9, 17),
            tokens=tokens,
            keys_transposed=keys_transposed,
        )
        case.check(name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(name, shape) -> None:
    Case(**shape).check(name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_windows_softcaps_and_sinks(name, options) -> None:
    for shape in ("decode", "prefill"):
        Case(**SHAPES[shape], **options).check(name)


@IN_BOTH_LAYOUTS
@pytest.mark.parametrize("scales", ["head", "token_head"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_byte_split_elements_are_read_from_a_mixed_pool(name, fmt, scales, keys_transposed) -> None:
    if fmt.is_fp8 or scales != "token_head":
        Case(
            fmt=fmt, scales=scales, lengths=(7, 8, 9, 0), keys_transposed=keys_transposed
        ).byte_split().check(name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_k_offset_only_affects_softcaps_and_sinks(name, options) -> None:
    for tokens in (1, 6):
        Case(lengths=(1, 6, 14), tokens=tokens, offset=30.0, **options).check(name)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 5 * SIZE), min_size=3, max_size=3).filter(
        lambda x: sum(-(-n // SIZE) for n in x) <= PAGES
    ),
    seed=st.integers(0, 99),
    tokens=st.sampled_from([1, 5]),
)
def test_ragged_batches_over_shuffled_pages(name, lengths, seed, tokens) -> None:
    Case(lengths=tuple(lengths), seed=seed, tokens=tokens, scales="channel").check(name)


@pytest.mark.parametrize("name", BACKENDS)
def test_two_requests_may_share_pages(name) -> None:
    case = Case(fmt=FLOAT32, scales="tensor", lengths=(8, 8))
    case.table[1] = case.table[0]
    case.q[1] = case.q[0]
    got = case.run(name)
    assert np.array_equal(got[0], got[1])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_request_does_not_depend_on_its_neighbours(name) -> None:
    case = Case(lengths=(9, 17, 3), tokens=3)
    together = case.run(name)
    case.lengths, case.table, case.q = case.lengths[:1], case.table[:1], case.q[:1]
    np.testing.assert_allclose(case.run(name)[0], together[0], rtol=0, atol=2e-6)


def test_dispatch_gives_a_reason_and_refuses_what_is_unsupported() -> None:
    assert dispatch.select_backend().name == "xla" and "cpu" in dispatch.select_backend().reason
    assert dispatch.select_backend("reference").reason == "requested"
    with pytest.raises(
        NotSupported, match="needs an NVIDIA GPU, and this machine's device is 'cpu'.* use 'xla'"
    ):
        dispatch.select_backend("pallas")
    with pytest.raises(ConfigError, match="Did you mean 'xla'"):
        dispatch.select_backend("xl")


def test_a_pool_is_never_decoded_whole() -> None:
    """Only a tile is decoded: temporaries are far smaller than the pool."""
    pages = jax.eval_shape(
        lambda: new_pool(
            PoolLayout.uniform(E4M3, 4), num_pages=512, page_size=64, kv_heads=2, head_dim=64
        )
    )
    scales = LayerScales.of(KVScales.unit(4), layers=4, kv_heads=2, head_dim=64)

    def decode(q, pages: KVPool, table, length):
        at = AttentionMetadata(table, length - 1, length, length)
        return dispatch.select_backend().attend(
            q, pages, scales, AttentionOptions(), at, layer=jnp.int32(2)
        )

    shape = jax.ShapeDtypeStruct
    q, table = shape((1, 6, 64), jnp.float32), shape((64,), jnp.int32)
    compiled = jax.jit(decode).lower(q, pages, table, shape((), jnp.int32)).compile()
    pool_bytes = 2 * 4 * 512 * 2 * 64 * 64
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 50
