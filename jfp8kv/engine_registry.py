"""Warm engines behind `generate`, `logits` and `score`.

These functions run on an `LLM` for each model and cache. The first call creates it, and later calls
reuse it, from any thread. The registry is bounded:

- Engines live as long as their `Params`. Dropping the last reference to it frees pool and weights.
- At most `MAX_ENGINES` are registered. Beyond that the least recently used one is dropped.
- The pool of another engine comes from free memory. While that is less than the registered pools
  take, the least recently used engine is dropped. On an accelerator, where a pool takes most of the
  memory unless `max_num_seqs` full contexts need less, this leaves one engine. For several, create
  each `LLM` with a `kv_cache_memory`.
- `clear_engines()` drops all engines.

A dropped engine frees its memory when the last call on it returns. If weights in `params.tree` have
been replaced, the engines of the model are created again.
"""

import dataclasses
import itertools
import os
import threading
import weakref
from collections.abc import Iterator

import jax
import numpy as np

from jfp8kv.cache.capacity import free_bytes
from jfp8kv.cache.config import resolve_plan
from jfp8kv.cache.plan import KVPlan
from jfp8kv.cache.scales import KVScales
from jfp8kv.core.errors import CapacityError, DeviceMemoryError
from jfp8kv.core.log import logger
from jfp8kv.core.paths import looks_like_path
from jfp8kv.engine.options import EngineOptions, KVDtype, KVScalesLike
from jfp8kv.llm import LLM
from jfp8kv.models.params import Params

MAX_ENGINES = 4  # in a process


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """The settings that need a separate engine. Files are read, so their content is compared."""

    kv_dtype: KVDtype
    kv_scales: KVScalesLike

    @classmethod
    def of(cls, kv_dtype: KVDtype, kv_scales: KVScalesLike) -> "EngineSettings":
        """Return the settings with plans and scales read from their files, if they are paths."""
        if kv_dtype == "fp8":
            kv_dtype = "fp8_e4m3"
        if isinstance(kv_scales, str | os.PathLike) and looks_like_path(kv_scales):
            kv_scales = KVScales.load(kv_scales)
        return cls(resolve_plan(kv_dtype) or kv_dtype, kv_scales)

    def matches(self, other: "EngineSettings") -> bool:
        """Return whether the settings are equal: the same names, or scales with equal values."""
        return _equal(self.kv_dtype, other.kv_dtype) and _equal(self.kv_scales, other.kv_scales)


@dataclasses.dataclass(eq=False)
class _Entry:
    """A registered engine. `last_used` is the time of the last call on the registry's clock."""

    settings: EngineSettings
    prompt_lookup: int
    llm: LLM
    last_used: int


class EngineRegistry:
    """Engines by `Params` and settings. Thread-safe: two first calls create one engine."""

    def __init__(self, max_engines: int = MAX_ENGINES) -> None:
        self._max_engines = max_engines
        self._clock = itertools.count()
        self._lock = threading.Lock()  # of the entries
        self._create_lock = threading.Lock()  # one at a time, since each measures free memory
        # By the id of a `Params`. Its finalizer removes the item in one operation, without a lock,
        # because a finalizer may run in a thread that has the lock.
        self._entries: dict[int, list[_Entry]] = {}

    def __len__(self) -> int:
        return sum(1 for _ in self._all())

    def get(
        self,
        params: Params,
        *,
        kv_dtype: KVDtype = "auto",
        kv_scales: KVScalesLike = "auto",
        prompt_lookup: int | None = None,
    ) -> LLM:
        """Return the engine for these settings, created if necessary.

        Args:
          params: the model. The engine gets a copy of the object, which shares the weights.
          kv_dtype, kv_scales: as in `EngineOptions`.
          prompt_lookup: as in `EngineOptions`; None accepts an engine with any value.

        Raises the errors of `LLM`.
        """
        EngineOptions(  # invalid options are refused before an engine is dropped for them
            kv_dtype=kv_dtype, kv_scales=kv_scales, prompt_lookup=prompt_lookup or 0
        )
        settings = EngineSettings.of(kv_dtype, kv_scales)
        llm = self._find(params, settings, prompt_lookup)
        if llm is not None:
            return llm
        with self._create_lock:
            llm = self._find(params, settings, prompt_lookup)
            return llm or self._create(params, settings, prompt_lookup or 0)

    def clear(self) -> None:
        """Drop all engines."""
        with self._lock:
            dropped = dict(self._entries)
            self._entries.clear()
        dropped.clear()  # outside of the lock: it frees the engines

    def _find(
        self, params: Params, settings: EngineSettings, prompt_lookup: int | None
    ) -> LLM | None:
        with self._lock:
            for entry in self._entries.get(id(params), ()):
                same_lookup = prompt_lookup is None or prompt_lookup == entry.prompt_lookup
                if same_lookup and settings.matches(entry.settings):
                    if not _same_weights(params, entry.llm.params):
                        break
                    entry.last_used = next(self._clock)
                    return entry.llm
        return None

    def _create(self, params: Params, settings: EngineSettings, prompt_lookup: int) -> LLM:
        self._drop_outdated(params)
        self._make_room()
        try:
            llm = _new_llm(params, settings, prompt_lookup)
        except (CapacityError, DeviceMemoryError):
            if not len(self):
                raise
            self.clear()
            llm = _new_llm(params, settings, prompt_lookup)
        entry = _Entry(settings, prompt_lookup, llm, next(self._clock))
        with self._lock:
            if id(params) not in self._entries:
                weakref.finalize(params, self._entries.pop, id(params), None).atexit = False
            self._entries.setdefault(id(params), []).append(entry)
        return llm

    def _drop_outdated(self, params: Params) -> None:
        """Drop the engines of `params` that have other weights than it has now."""
        with self._lock:
            entries = self._entries.get(id(params), [])
            current = [entry for entry in entries if _same_weights(params, entry.llm.params)]
            entries[:] = current

    def _make_room(self) -> None:
        """Drop least recently used engines while there are too many or memory is short."""
        device = jax.local_devices()[0]
        while len(self):
            free = free_bytes(device)
            pools = sum(entry.llm.stats.kv_bytes_capacity for _, entry in self._all())
            if len(self) < self._max_engines and free >= pools:
                return
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        with self._lock:
            oldest = min(self._all(), key=lambda item: item[1].last_used, default=None)
            if oldest is not None:
                entries, entry = oldest
                entries.remove(entry)
                logger.info("dropped the engine with kv_dtype=%s", entry.llm.kv_dtype)

    def _all(self) -> Iterator[tuple[list[_Entry], _Entry]]:
        """Yield each entry, after the list that it is in."""
        for entries in list(self._entries.values()):
            for entry in list(entries):
                yield entries, entry


def _new_llm(params: Params, settings: EngineSettings, prompt_lookup: int) -> LLM:
    # A reference to `params` itself would keep it alive, and its finalizer would never run.
    copy = jax.tree.map(lambda leaf: leaf, params)
    return LLM(
        copy,
        kv_dtype=settings.kv_dtype,
        kv_scales=settings.kv_scales,
        prompt_lookup=prompt_lookup,
    )


def _same_weights(a: Params, b: Params) -> bool:
    """Return whether both have the same arrays, compared by identity."""
    leaves = jax.tree.leaves(a)
    others = jax.tree.leaves(b)
    return len(leaves) == len(others) and all(x is y for x, y in zip(leaves, others, strict=True))


def _equal(a: object, b: object) -> bool:
    if isinstance(a, KVScales) and isinstance(b, KVScales):
        same_arrays = a.arrays.keys() == b.arrays.keys() and all(
            np.array_equal(value, b.arrays[name]) for name, value in a.arrays.items()
        )
        return a.kv_dtype == b.kv_dtype and same_arrays
    if isinstance(a, KVPlan) and isinstance(b, KVPlan):
        return a.layers == b.layers and _equal(a.scales, b.scales)
    return type(a) is type(b) and a == b


_registry = EngineRegistry()


def engine_for(
    params: Params,
    *,
    kv_dtype: KVDtype = "auto",
    kv_scales: KVScalesLike = "auto",
    prompt_lookup: int | None = None,
) -> LLM:
    """Return the warm engine of the process for a model and these settings."""
    return _registry.get(
        params, kv_dtype=kv_dtype, kv_scales=kv_scales, prompt_lookup=prompt_lookup
    )


def clear_engines() -> None:
    """Drop the warm engines behind `generate`, `logits` and `score`, and free their memory.

    The next call creates an engine again. Engines of an `LLM` are not affected.
    """
    _registry.clear()
