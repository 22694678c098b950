"""JAX's persistent compilation cache: where compiled programs are stored between processes.

The first `LLM` of a process, or the first call of `calibrate`, `compare` or `plan_kv`, turns it
on in `<cache folder>/compiled` (`JFP8KV_CACHE_DIR`, or else the user's cache folder). This is a
process-wide setting of JAX, so it is left alone if

- it is configured already, by `jax_compilation_cache_dir` or `JAX_COMPILATION_CACHE_DIR`,
- the environment variable `JFP8KV_COMPILATION_CACHE` is `0`, or
- `disable_compilation_cache()` was called.
"""

import os
import threading

import jax

from jfp8kv.core.errors import ConfigError
from jfp8kv.core.platform import cache_folder

SWITCH = "JFP8KV_COMPILATION_CACHE"
MIN_COMPILE_S = 0.2  # programs that compile faster are not stored

_lock = threading.Lock()
_decided = False


def use_compilation_cache() -> None:
    """Turn the cache on, except in the cases that the module docstring lists.

    Only the first call in a process has an effect.
    """
    global _decided
    with _lock:
        if _decided:
            return
        _decided = True
        switch = os.environ.get(SWITCH, "1")
        if switch not in ("0", "1"):
            raise ConfigError(f"{SWITCH}={switch!r}: must be 0 (off) or 1 (on, the default).")
        configured = jax.config.jax_compilation_cache_dir is not None  # type: ignore[attr-defined]
        if switch == "0" or configured or "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)


def disable_compilation_cache() -> None:
    """Leave JAX's persistent compilation cache off in this process.

    Call it before creating the first `LLM`. The environment variable
    `JFP8KV_COMPILATION_CACHE=0` does the same.
    """
    global _decided
    with _lock:
        _decided = True
