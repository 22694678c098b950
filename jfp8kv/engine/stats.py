"""What an engine counts."""

import dataclasses
import time
from types import TracebackType


@dataclasses.dataclass
class Stats:
    """Counters since the engine was made, and the state of its cache. `llm.stats` is a live view: read, do not write.

    `kv_bytes_per_token` covers K and V of all layers, dynamic scales included, as a text of `max_model_len` tokens takes them:
    layers with a sliding window keep its tokens alone, and `kv_bytes_per_token_without_windows` is what all layers would take
    if they kept everything. `kv_tokens_capacity` is for such texts too. `kv_tokens_used` are those of running requests;
    `kv_bytes_used` is what they and sessions hold of `kv_bytes_capacity`, shared pages once. `prefix_hit_tokens` are tokens
    that were found in the cache and not run again; `preemptions` counts how often a request gave its pages up to be run anew.
    `compilations` counts step programs built (a warm engine builds none).
    `generated_tokens` are those that requests got. `prefill_s` and `decode_s` are seconds from when the device was free until
    it was done, for the `prefill_steps` dispatches and the `decode_steps` tokens in a row of each kind. Of the `draft_tokens`
    that prompt lookup guessed and that were run, `accepted_tokens` became output, beside the one that each step makes anyway.
    `grammar_s` is what the host took to find out which tokens grammars allow, while the device ran the model.
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
        """All counters by name."""
        return dataclasses.asdict(self)


class Stopwatch:
    """Seconds spent inside `with watch:`; what passes while nobody drives the engine does not count."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, 0.0

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
        """Seconds so far; asked inside."""
        return self._before + time.perf_counter() - self._since
