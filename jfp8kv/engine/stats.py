"""Counters of one engine."""

import dataclasses
import time


@dataclasses.dataclass
class Stats:
    """Counters since the engine was created, and the state of its cache.

    `llm.stats` is a live view: read it, do not write to it.

    Attributes:
      kv_tokens_capacity: how many tokens the cache has room for, in sequences of `max_model_len`.
      kv_bytes_per_token: bytes of K and V in all layers, dynamic scales included, per token of a
        sequence of `max_model_len` tokens. Layers with a sliding window store only its tokens.
      kv_bytes_per_token_without_windows: the same if all layers stored all tokens.
      kv_tokens_used: cached tokens of running requests.
      kv_bytes_capacity: size of the pool.
      kv_bytes_used: pages of running requests and sessions, shared pages counted once.
      prefix_hit_tokens: tokens found in the prefix cache instead of computed.
      preemptions: how often a request was preempted, to be recomputed.
      compilations: step programs compiled. A warm engine compiles none.
      prompt_tokens: prompt tokens of all requests.
      generated_tokens: output tokens of all requests.
      draft_tokens: draft tokens that prompt lookup proposed and the model verified.
      accepted_tokens: draft tokens that became output. Each step generates one more token.
      prefill_steps: prefill dispatches.
      decode_steps: decode steps, each one token per request (more with accepted drafts).
      prefill_s: device time of prefill, in seconds.
      decode_s: device time of decode, in seconds.
      grammar_s: host time of token bitmasks, in seconds. The device runs the model meanwhile.

    Example:
      >>> hit_rate = llm.stats.prefix_hit_tokens / llm.stats.prompt_tokens
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
    """Measures the time spent inside `with stopwatch:`, over all of its uses."""

    def __init__(self) -> None:
        self._elapsed = 0.0  # in earlier uses
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._elapsed = self.now()

    def now(self) -> float:
        """Return the seconds so far. Only valid inside the block."""
        return self._elapsed + time.perf_counter() - self._started
