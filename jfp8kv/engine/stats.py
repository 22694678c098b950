"""Counters of one engine."""

import dataclasses
import time
from types import TracebackType


@dataclasses.dataclass
class Stats:
    """Counters since the engine was created, and the state of its cache.

    `llm.stats` is a live view: read it, do not write to it.

    Attributes:
      kv_tokens_capacity: tokens of full-length sequences (`max_model_len`) that fit the cache.
      kv_bytes_per_token: bytes of K and V in all layers, dynamic scales included, per token of a
        sequence of `max_model_len` tokens. Layers with a sliding window keep only its tokens.
      kv_bytes_per_token_without_windows: the same if all layers kept all tokens.
      kv_tokens_used: cached tokens of running requests.
      kv_bytes_capacity: size of the pool.
      kv_bytes_used: pages of running requests and sessions, shared pages counted once.
      prefix_hit_tokens: tokens found in the prefix cache instead of computed.
      preemptions: how often a request lost its pages and was recomputed.
      compilations: step programs compiled. A warm engine compiles none.
      prompt_tokens: prompt tokens of all requests.
      generated_tokens: output tokens of all requests.
      draft_tokens: draft tokens that prompt lookup proposed and the model verified.
      accepted_tokens: draft tokens that became output, beside the one that each step generates.
      prefill_steps: prefill dispatches.
      decode_steps: decode steps, each one token per request (more with accepted drafts).
      prefill_s: seconds of device time of prefill, from when the device was free.
      decode_s: seconds of device time of decode.
      grammar_s: seconds the host took to compute token bitmasks, while the device ran.
    """

    kv_tokens_capacity: int = 0
    kv_bytes_per_token: float = 0.0
    kv_bytes_per_token_without_windows: float = 0.0
    kv_tokens_used: int = 0
    kv_bytes_capacity: int = 0
    kv_bytes_used: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    compilations: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    grammar_s: float = 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Return all counters by name."""
        return dataclasses.asdict(self)


class Stopwatch:
    """Seconds spent inside `with watch:`. Time when no caller drives the engine does not count."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._before = self.now()

    def now(self) -> float:
        """Return the seconds so far. Called inside the block."""
        return self._before + time.perf_counter() - self._since
