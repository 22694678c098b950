"""Random numbers that depend on nothing but the request and the position.

A request's key is two words. It comes from a seed and from who asks: `seed -> request number -> sample index`, each
arrow one `fold_in`. Each token then folds in its position in the output, and each entry of the vocabulary has its own
random word at that position, addressed by its id. No state is carried: a token's noise is the same alone or in a
batch, in the first run or after a preemption, over the whole vocabulary or a part of it.

The generator is Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in
the form of `jax.random`: `fold_in` and `random_bits` agree with it bit for bit. It is written out here for two
reasons. It runs on NumPy words too, so that making a request's key takes no device call; and as plain arithmetic it
fuses with what follows, whereas on CPU `jax.random.bits` loops over the rounds through memory (seven times slower).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)  # so that no key schedule is all zero


def threefry(key: tuple[Any, Any], block: tuple[Any, Any]) -> tuple[Any, Any]:
    """One block of Threefry-2x32-20: two uint32 words for a key and a counter, NumPy or JAX arrays that broadcast."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = block[0] + schedule[0], block[1] + schedule[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(bits)) | (y >> np.uint32(32 - bits)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def request_key(
    seed: int | None, *, index: int = 0, engine_seed: int = 0, number: int = 0
) -> UInt32[np.ndarray, "2"]:
    """The key of sample `index` of a request, on the host.

    A request with a `seed` of its own depends on that alone. One without draws from `engine_seed` and its `number` (any
    count from 0 the engine keeps of its requests), on a branch that no request with a seed meets.
    """
    root, branch = (engine_seed, 1 + number) if seed is None else (seed, 0)
    key = (np.uint32([root >> 32]), np.uint32([root & 0xFFFFFFFF]))
    for data in (branch, index):
        key = threefry(key, (np.uint32([0]), np.uint32([data])))
    return np.concatenate(key)


def fold_in(key: UInt32[Array, "2"], data: Int32[Array, ""]) -> UInt32[Array, "2"]:
    """`jax.random.fold_in` on the key's words."""
    return jnp.stack(threefry((key[0], key[1]), (jnp.uint32(0), data.astype(jnp.uint32))))


def random_bits(key: UInt32[Array, "2"], ids: Int32[Array, " tokens"]) -> UInt32[Array, " tokens"]:
    """The random word of each id: entry i of `jax.random.bits(key, (n,))` for any n above i."""
    x, y = threefry((key[0], key[1]), (jnp.zeros_like(ids, jnp.uint32), ids.astype(jnp.uint32)))
    return x ^ y


def exponential(key: UInt32[Array, "2"], ids: Int32[Array, " tokens"]) -> Float32[Array, " tokens"]:
    """Exponential noise of mean 1 for each id, between 6e-8 and 17: never 0 and never infinite.

    -log of the midpoints of 2**23 equal steps of (0, 1), each exact in float32.
    """
    steps = (random_bits(key, ids) >> np.uint32(9)).astype(jnp.int32).astype(jnp.float32)
    return -jnp.log((steps + 0.5) * np.float32(2**-23))
