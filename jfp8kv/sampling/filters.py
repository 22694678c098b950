"""Top-k, top-p and min-p without sorting: each keeps the tokens above a cut, and the cut is found by bisection.

Sorting a vocabulary of 49152 takes about 18 ms a request on a CPU; one pass that sums what lies above a guess takes
some 30 microseconds. The bits of a float, read as an integer, are in the order of the floats, so halving an interval of
those integers ends at the exact cut after at most 32 passes, and earlier once no second token is left inside.

The order is temperature, top-k, top-p, min-p (that of Hugging Face's processors): top-p takes its share of what top-k
left, and min-p compares with the likeliest token, which no filter removes. **Ties are kept together**: tokens as
likely as the last one kept are kept too, so that which tokens survive never depends on the order of their ids.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jfp8kv.core.pytree import pytree
from jfp8kv.sampling.settings import SamplerSettings

LARGEST_VOCAB = 2**24  # counts up to here are exact in float32

Keys = Int32[Array, " tokens"]
Key = Int32[Array, ""]


@pytree
class Outside:
    """What is known of the tokens a search does not look at: none of their logits exceeds `ceiling`.

    `mass` is their total weight: the sum of exp((logit - peak) / temperature), where `peak` is the largest logit.
    """

    ceiling: Float32[Array, ""]
    mass: Float32[Array, ""]


def ordered(x: Float32[Array, "*dims"]) -> Int32[Array, "*dims"]:
    """Integers in the order of the floats, infinities included; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def weights(
    logits: Float32[Array, "*dims"], temperature: Float32[Array, ""], peak: Float32[Array, ""]
) -> Float32[Array, "*dims"]:
    """Probabilities over their maximum: exp((logit - peak) / temperature). 0 for a logit of -inf, never NaN."""
    return jnp.exp(
        (logits - jnp.where(peak > -jnp.inf, peak, 0)) / jnp.where(temperature > 0, temperature, 1)
    )


def keep(
    logits: Float32[Array, " tokens"],
    settings: SamplerSettings,
    peak: Float32[Array, ""],
    outside: Outside | None = None,
) -> tuple[Float32[Array, " tokens"], Bool[Array, ""]]:
    """The weights of the tokens that survive the filters, 0 for the others; and whether that is certain.

    It is certain when no token outside could have survived or changed a cut, always so when nothing is outside.
    """
    count = logits.shape[0]
    outside = outside or Outside(ceiling=jnp.float32(-jnp.inf), mass=jnp.float32(0))
    w = weights(logits, settings.temperature, peak)
    keys = ordered(logits)
    ranked = settings.top_k > 0
    kth = cut(
        keys,
        _one_each,
        settings.top_k.astype(jnp.float32),
        active=ranked & (settings.top_k < count),
        bounds=(ordered(jnp.float32(-jnp.inf)), ordered(peak)),
        total=jnp.float32(count),
    )
    w = jnp.where(keys >= kth, w, 0)

    shared = settings.top_p < 1
    total = jnp.sum(w) + jnp.where(ranked, 0, outside.mass)
    # Dropping every token below this would lose less than 1 - top_p: the cut is no lower.
    floor = (1 - settings.top_p) * total / LARGEST_VOCAB
    nucleus = cut(
        ordered(w),
        _as_float,
        settings.top_p * total,
        active=shared,
        bounds=(ordered(floor), ordered(jnp.float32(1))),
        total=total,
    )
    least = jnp.maximum(jnp.where(shared, _as_float(nucleus), 0), settings.min_p)

    beaten = kth > ordered(outside.ceiling)
    certain = (beaten | ~ranked) & (
        beaten | (least > weights(outside.ceiling, settings.temperature, peak))
    )
    return jnp.where(w >= least, w, 0), certain | (outside.ceiling == -jnp.inf)


def _one_each(keys: Int32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    return jnp.ones(keys.shape, jnp.float32)


def _as_float(keys: Int32[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """The float whose `ordered` key this is, for keys that are not negative."""
    return jax.lax.bitcast_convert_type(keys, jnp.float32)


def cut(
    keys: Keys,
    measure: Callable[[Int32[Array, "*dims"]], Float32[Array, "*dims"]],
    target: Float32[Array, ""],
    *,
    active: Bool[Array, ""],
    bounds: tuple[Key, Key],
    total: Float32[Array, ""],
) -> Key:
    """A key t such that `keys >= t` is the smallest set {keys >= x} whose `measure` adds up to `target`.

    `measure` is elementwise and never falls as the key rises. `bounds` are keys the cut is known to lie between, both
    included; `total` is at least what all keys from the lower one measure. Where `active` is false no pass is made and
    every key is kept. Sums of float32 are rounded, yet a larger set never has a smaller sum (rounding is monotone, the
    order of addition fixed), so halving always closes in on one cut.
    """
    low = jnp.where(active, bounds[0], jnp.iinfo(jnp.int32).min)
    high = jnp.where(active, bounds[1] + 1, low)

    def searching(state: tuple[Array, Array]) -> Bool[Array, ""]:
        edges, above = state
        several = above[0] - above[1] >= 1.5 * measure(
            edges[0]
        )  # more than one token from edge to edge
        return (edges[0] + 1 < edges[1]) & several

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        edges, above = state
        middle = (edges[0] & edges[1]) + ((edges[0] ^ edges[1]) >> 1)  # the mean, without overflow
        here = jnp.sum(jnp.where(keys >= middle, measure(keys), 0))
        moved = jnp.stack([here >= target, here <= target])
        return jnp.where(moved, middle, edges), jnp.where(moved, here, above)

    edges, _ = jax.lax.while_loop(
        searching, halve, (jnp.stack([low, high]), total * jnp.array([1.0, 0.0]))
    )
    return edges[0]
