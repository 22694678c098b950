"""Random numbers that depend only on the request and the position of the token.

The key of a request is two words. It is derived from a seed as
`seed -> request number -> sample index`, with one `fold_in` per arrow. Each token folds its
position in the output into the key, and each vocabulary entry has a random word at that position,
addressed by its id. No state is carried: the noise of a token is the same alone and in a batch,
before and after a preemption, and over the whole vocabulary or a part of it.

The generator is Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), as in `jax.random`: `fold_in` and `random_bits` agree with it bit for bit. It is
written out here for two reasons. It also runs on NumPy words, so creating a request's key takes no
device call. And it is plain arithmetic that fuses with the operations after it, whereas
`jax.random.bits` on a CPU writes each round to memory (seven times slower).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)  # keeps the key schedule from being all zero


def threefry(key: tuple[Any, Any], block: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return one block of Threefry-2x32-20: two uint32 words.

    `key` and `block` (the counter) are pairs of NumPy or JAX arrays that broadcast.
    """
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
    """Return the key of sample `index` of a request, computed on the host.

    With a `seed`, the key depends on the seed and the index only. Without one it is derived from
    `engine_seed` and `number`, the count of earlier requests of the engine, on a branch that seeded
    requests never use.
    """
    root, branch = (engine_seed, 1 + number) if seed is None else (seed, 0)
    key = (_word(root >> 32), _word(root & 0xFFFFFFFF))
    for data in (branch, index):
        key = threefry(key, (_word(0), _word(data)))
    return np.concatenate(key)


def _word(value: int) -> UInt32[np.ndarray, "1"]:
    return np.array([value], np.uint32)


def fold_in(key: UInt32[Array, "2"], data: Int32[Array, ""]) -> UInt32[Array, "2"]:
    """Return `jax.random.fold_in(key, data)`, on the key's words."""
    return jnp.stack(threefry((key[0], key[1]), (jnp.uint32(0), data.astype(jnp.uint32))))


def random_bits(key: UInt32[Array, "2"], ids: Int32[Array, " tokens"]) -> UInt32[Array, " tokens"]:
    """Return the random word of each id: entry i of `jax.random.bits(key, (n,))` for any n > i."""
    x, y = threefry((key[0], key[1]), (jnp.zeros_like(ids, jnp.uint32), ids.astype(jnp.uint32)))
    bits: Array = x ^ y
    return bits


def exponential(key: UInt32[Array, "2"], ids: Int32[Array, " tokens"]) -> Float32[Array, " tokens"]:
    """Return exponential noise of mean 1 for each id, between 6e-8 and 17.

    Computed as -log of the midpoints of 2**23 equal steps of (0, 1), each exact in float32. It is
    never 0 and never infinite.
    """
    steps = (random_bits(key, ids) >> np.uint32(9)).astype(jnp.int32).astype(jnp.float32)
    return -jnp.log((steps + 0.5) * np.float32(2**-23))
