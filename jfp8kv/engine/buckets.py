"""The few padded shapes of compiled steps, and the token budget of a scheduler step.

A warm engine runs only these shapes, so it never compiles again.
"""

import dataclasses

import jax

from jfp8kv.core.errors import ConfigError

# Per dispatch: enough to hide the work of the host, few enough to stream and to admit requests.
DECODE_STEPS = 8
# During a prefill decoding requests continue to stream, and prompts get most of the device.
DECODE_STEPS_DURING_PREFILL = 2
DEFAULT_MAX_NUM_SEQS = 64
# With at least this many rows, XLA:CPU sums a row of a matmul in the same order for any number of
# rows (docs/log.md).
BATCH_INVARIANT_ROWS = 8
# Narrower chunks save little: a CPU or GPU reads all weights even for a single token.
MIN_PREFILL_CHUNK = 16
# The maximum size of the float32 logits of prompt tokens in device memory, for all callers.
MAX_LOGITS_BYTES = 256 * 2**20


def default_prefill_chunk() -> int:
    """Return the default width of the widest prefill chunk: enough to use the whole device."""
    return 512 if jax.default_backend() == "cpu" else 2048


def step_token_budget(chunk: int, max_requests: int) -> int:
    """Return the budget for a prefill of `chunk` tokens and a short decode of all requests."""
    return chunk + DECODE_STEPS_DURING_PREFILL * max(2, _power_of_two(max_requests))


def max_tokens_per_dispatch(chunk: int) -> int:
    """Return the maximum number of tokens that one dispatch adds to a sequence."""
    return max(chunk, DECODE_STEPS)


def max_logits_tokens(vocab: int) -> int:
    """Return how many tokens' float32 logits fit in `MAX_LOGITS_BYTES`, at least 1."""
    return max(1, MAX_LOGITS_BYTES // (4 * vocab))


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The padded shapes of one engine.

    Request counts are powers of two. Chunk widths are the widest chunk, 1/2 and 1/4 of it (so
    padding is at most as long as the prompt), then 1/16, 1/64 and so on.

    Attributes:
      max_requests: the maximum number of running requests.
      token_budget: the maximum number of tokens of a scheduler step, padding included. Prefill gets
        what a short decode of `max_requests` leaves, so the chunk width does not depend on how many
        requests decode.
      decode_steps: the maximum number of decode steps per dispatch.
      min_decode_rows: the smallest decode batch, 2 where a matmul with one row is slow
        (models/linear.py).
      drafts: the maximum number of draft tokens per decode step (engine/speculative.py). They do
        not count towards the budget (note 017).
      vocab: the vocabulary size, which limits chunks that return logits.
    """

    max_requests: int
    token_budget: int
    decode_steps: int = DECODE_STEPS
    min_decode_rows: int = 1
    drafts: int = 0
    vocab: int = 1

    @classmethod
    def of(
        cls,
        max_num_seqs: int | None,
        max_num_batched_tokens: int | None,
        *,
        min_decode_rows: int = 1,
        drafts: int = 0,
        vocab: int = 1,
    ) -> "Buckets":
        """Return the buckets for these options.

        Args:
          max_num_seqs: None is `DEFAULT_MAX_NUM_SEQS`, or fewer, so that prefill gets half of a
            given budget.
          max_num_batched_tokens: None gives prefill `default_prefill_chunk` tokens.
          min_decode_rows, drafts, vocab: see `Buckets`.

        Raises `ConfigError` if the budget leaves nothing for prefill.
        """
        default_chunk = default_prefill_chunk()
        if max_num_seqs is None:
            budget = max_num_batched_tokens or step_token_budget(
                default_chunk, DEFAULT_MAX_NUM_SEQS
            )
            half = budget // 2 // DECODE_STEPS_DURING_PREFILL
            max_num_seqs = max(1, min(DEFAULT_MAX_NUM_SEQS, half))
        budget = max_num_batched_tokens or step_token_budget(default_chunk, max_num_seqs)
        min_budget = step_token_budget(1, max_num_seqs)
        if budget < min_budget:
            raise ConfigError(
                f"max_num_batched_tokens={max_num_batched_tokens}: decoding max_num_seqs="
                f"{max_num_seqs} requests takes {min_budget - 1} tokens of a step, which leaves "
                "none for prompts; give at least "
                f"{step_token_budget(MIN_PREFILL_CHUNK, max_num_seqs)}, or a smaller max_num_seqs."
            )
        return cls(
            max_requests=max_num_seqs,
            token_budget=budget,
            min_decode_rows=min_decode_rows,
            drafts=drafts,
            vocab=vocab,
        )

    @property
    def max_prefill_chunk(self) -> int:
        """The widest chunk, and the maximum number of prefill tokens of a scheduler step."""
        return self.token_budget - step_token_budget(0, self.max_requests)

    @property
    def max_tokens_per_dispatch(self) -> int:
        """The maximum number of tokens that one dispatch adds to a sequence."""
        return max(
            max_tokens_per_dispatch(self.max_prefill_chunk), self.max_new_tokens(self.decode_steps)
        )

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prefill chunk widths, narrowest first."""
        widths = [self.max_prefill_chunk]
        divisor = 2
        while self.max_prefill_chunk // divisor >= MIN_PREFILL_CHUNK:
            widths.append(self.max_prefill_chunk // divisor)
            divisor *= 2 if divisor < 4 else 4
        return tuple(reversed(widths))

    def chunk(self, tokens: int) -> int:
        """Return the narrowest chunk width that fits `tokens` tokens, or the widest."""
        return next((width for width in self.chunks if width >= tokens), self.max_prefill_chunk)

    @property
    def max_logits_chunk(self) -> int:
        """The widest chunk whose logits fit in `MAX_LOGITS_BYTES`, or the narrowest."""
        limit = max_logits_tokens(self.vocab)
        return max((width for width in self.chunks if width <= limit), default=self.chunks[0])

    def logits_chunk(self, tokens: int) -> int:
        """Return the chunk width for `tokens` tokens whose logits are returned."""
        return min(self.chunk(tokens), self.max_logits_chunk)

    def session_chunk(self, tokens: int) -> int:
        """Return the chunk width for sessions, which are often extended by a single token."""
        return 1 if tokens == 1 else self.chunk(tokens)

    def prefill_requests(self, width: int) -> int:
        """Return how many requests one prefill runs with chunks of this width."""
        return min(1 << (self.max_prefill_chunk // width).bit_length() - 1, self.max_requests)

    def prefill_rows(self, count: int, width: int) -> int:
        """Return the padded number of requests of a prefill.

        A session's chunk of one token is padded like a decode, because one row may be slow.
        """
        return _power_of_two(count) if width in self.chunks else self.decode_rows(count)

    def decode_rows(self, count: int, *, batch_invariant: bool = False) -> int:
        """Return the padded number of requests of a decode.

        Args:
          count: the number of requests.
          batch_invariant: whether logits must be bit-equal for any number of requests.
        """
        min_rows = self.min_decode_rows
        if batch_invariant:
            invariant_rows = min(BATCH_INVARIANT_ROWS, _power_of_two(self.max_requests))
            min_rows = max(min_rows, invariant_rows)
        return max(min_rows, _power_of_two(count))

    def max_new_tokens(self, steps: int) -> int:
        """Return the maximum number of tokens per request that `steps` decode steps generate."""
        return steps * (1 + self.drafts)

    def steps(self, count: int, *, during_prefill: bool, batch_invariant: bool = False) -> int:
        """Return the maximum number of steps of one decode of `count` requests.

        There are fewer of them `during_prefill`, while prompts wait for the device.
        """
        rows = self.decode_rows(count, batch_invariant=batch_invariant)
        max_steps = DECODE_STEPS_DURING_PREFILL if during_prefill else self.decode_steps
        return min(max_steps, self.token_budget // rows)


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def padded_counts(max_requests: int) -> list[int]:
    """Return one request count for each padded batch of up to `max_requests` requests."""
    counts = range(1, max_requests + 1)
    return sorted({min(_power_of_two(count), max_requests) for count in counts})
